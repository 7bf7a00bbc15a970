"""Loading verifiers and draft models: a hub id, a local folder, a GGUF file, or the embedded default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from viasd_calib.choices import SMOLLM2
from viasd_calib.devices import check_device
from viasd_calib.errors import ModelError, PromptError
from viasd_calib.models.adapters import find_adapter, load_adapted
from viasd_calib.models.chat import check_template, encode_conversation, template_of
from viasd_calib.models.loading import load_complete, local_file
from viasd_calib.models.names import check_model, resolve_model
from viasd_calib.models.offloaded import layer_weights, load_without_layers
from viasd_calib.models.weights import weights_sha256
from viasd_calib.option_types import check_option
from viasd_calib.prompts import Prompt
from viasd_calib.spec import DType, VerifierRef, config_sha256, tokenizer_sha256
from viasd_calib.token_ids import check_token_ids

DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Verifier:
    """A frozen causal language model, its tokenizer and its identity."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref: VerifierRef

    def __repr__(self) -> str:
        """In one line; the fields say the rest."""
        ref = self.ref
        return f"Verifier({ref.name_or_path!r}, {ref.architecture}, {ref.dtype} on {self.model.device})"

    def encode_chat(
        self, turns: list[dict[str, str]], template_arguments: Mapping[str, JsonValue] | None = None
    ) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

        Args:
            turns: messages with ``role`` and ``content``.
            template_arguments: what the chat template is told beside them, as ``enable_thinking``.

        Raises:
            PromptError: the chat template refuses them.
        """
        return encode_conversation(self.tokenizer, turns, template_arguments)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.model.config.eos_token_id if eos is None else eos
        if eos is None:
            return frozenset()
        return frozenset(eos if isinstance(eos, list) else [eos])


class LoadVerifier(Protocol):
    """What :func:`load_verifier` does, or something that remembers what it did."""

    def __call__(
        self, name_or_path: str, *, dtype: DType = "float32", device: str = "cpu", layers: bool = True
    ) -> Verifier:
        """The verifier of that name."""
        ...


def load_verifier(
    name_or_path: str = SMOLLM2,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    layers: bool = True,
) -> Verifier:
    """Load a verifier from a hub id, a folder, a ``.gguf`` file or ``"smollm2-135m"``.

    A GGUF file is widened to full tensors once and kept under its hash, so that the next start is quick. The folder
    of an adapter (PEFT) stands for its base model with the adapter merged into the weights.
    Attention runs in transformers' default implementation: ``sdpa``, or ``eager`` where a model caps its
    attention scores, which ``sdpa`` cannot (Gemma 2).

    Args:
        layers: whether the weights of its decoder layers are read; without them it runs only in an engine that was
            given an :class:`~viasd_calib.slim.offload.settings.Offload`.

    Raises:
        ModelError: nothing of that name, a damaged file, or a model of more than text.
        StorageError: the converted model cannot be written.
    """
    check_option("dtype", dtype, DType, ModelError)
    check_device(device)
    folder, identity = resolve_model(name_or_path)
    revision = identity or revision
    hub_revision = None if identity else revision
    with _named(name_or_path):
        arguments: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code}
        model, words_at = (
            _load(folder, hub_revision, **arguments) if layers else _load_apart(folder, hub_revision, **arguments)
        )
        tokenizer = AutoTokenizer.from_pretrained(words_at, revision=hub_revision, trust_remote_code=trust_remote_code)
        weights = weights_sha256(name_or_path, hub_revision)
    apart = layer_weights(model)
    if apart is not None:
        apart.sha256 = weights
    _check_kind(model, name_or_path)
    check_template(tokenizer, name_or_path)
    _freeze(model, device)
    return Verifier(model, tokenizer, fingerprint(model, tokenizer, name_or_path, revision, weights))


def load_draft_model(
    name_or_path: str, *, dtype: DType = "float32", device: str = "cpu", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model that is to draft, with its tokenizer if it has one; else as :func:`load_verifier`.

    Raises:
        ModelError: nothing of that name, a damaged file, or a model of more than text.
        StorageError: the converted model cannot be written.
    """
    check_option("dtype", dtype, DType, ModelError)
    check_device(device)
    folder, identity = resolve_model(name_or_path)
    hub_revision = None if identity else revision
    tokenizer: PreTrainedTokenizerBase | None = None
    with _named(name_or_path):
        model, words_at = _load(folder, hub_revision, dtype=DTYPES[dtype])
        if not Path(words_at).is_dir():
            tokenizer = AutoTokenizer.from_pretrained(words_at, revision=hub_revision)
        else:
            tokenizer = tokenizer_of(words_at)
    _check_kind(model, name_or_path)
    _freeze(model, device)
    return model, tokenizer


def tokenizer_of(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer among a model's files, as far as they lie on this machine; None where there is none."""
    if not any(local_file(name_or_path, name) is not None for name in TOKENIZER_FILES):
        return None
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    return found


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these at least lies where a tokenizer does."""


@contextmanager
def _named(name_or_path: str) -> Iterator[None]:
    """Whatever a library says of a model it cannot read, said in one line with the model's name."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot load the model {name_or_path!r}: {reason}; give a hub id, a folder or a .gguf file"
        ) from error


def _check_kind(model: PreTrainedModel, name_or_path: str) -> None:
    if not hasattr(model.config, "num_hidden_layers"):  # its parts have a configuration each
        raise ModelError(
            f"the model {name_or_path!r} is of type {model.config.model_type!r}, which reads more than text; "
            "give a text-only one of its family"
        )


def _freeze(model: PreTrainedModel, device: str) -> None:
    weights = layer_weights(model)
    if weights is not None:
        weights.move(torch.device(device))
    torch.nn.Module.to(model, torch.device(device))  # transformers' own wrapper is untyped
    model.eval().requires_grad_(False)


def _load(folder: str, revision: str | None, **arguments: Any) -> tuple[PreTrainedModel, str]:
    """A model, or an adapter with its base model, and where its tokenizer is.

    Raises:
        ModelError: one of them is nowhere.
    """
    folder = str(check_model(folder, revision) or folder)
    adapter = find_adapter(folder, revision)
    if adapter is None:
        model = load_complete(folder, revision=revision, **arguments)
        adapter = find_adapter(folder, revision)  # the hub's files have come only now
        if adapter is None:
            return model, folder
    base, identity = resolve_model(adapter.base)
    base_revision = None if identity else adapter.base_revision
    base = str(check_model(base, base_revision) or base)
    model = load_adapted(adapter, base, revision=base_revision, **arguments)
    own_tokenizer = local_file(folder, "tokenizer_config.json", revision) is not None
    return model, folder if own_tokenizer else base


def _load_apart(folder: str, revision: str | None, **arguments: Any) -> tuple[PreTrainedModel, str]:
    """A model without the weights of its layers, and where its tokenizer is.

    Raises:
        ModelError: it is nowhere, or an adapter.
    """
    folder = str(check_model(folder, revision) or folder)
    if find_adapter(folder, revision) is not None:
        raise ModelError(
            f"{folder} is an adapter, whose base model cannot be read layer by layer; merge it into the model and save "
            "that, or leave out --offload"
        )
    return load_without_layers(folder, revision, **arguments), folder


def fingerprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name_or_path: str,
    revision: str | None,
    weights: str | None = None,
) -> VerifierRef:
    """Identity of a loaded model, as a spec records it; arguments and errors as for :func:`identify`."""
    words = tokenizer_sha256(tokenizer.get_vocab(), template_of(tokenizer))
    return identify(model, words, name_or_path, revision, weights)


def identify(
    model: PreTrainedModel, tokenizer_hash: str, name_or_path: str, revision: str | None, weights: str | None = None
) -> VerifierRef:
    """The same, for a tokenizer whose hash is known.

    Args:
        weights: hash of its weights, as :func:`~viasd_calib.models.weights_sha256` gives it; None where unknown.

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
        weights_sha256=weights,
        dtype=DTYPE_NAMES[model.dtype],
    )


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
        room: tokens that must still fit after the prompt.

    Raises:
        PromptError: the prompt is empty, the verifier's chat template refuses it or the verifier lacks its tokens, or
            it and its answer do not fit the verifier's context.
    """
    try:
        ids = verifier.encode_chat(prompt.conversation(answers), prompt.chat_template_kwargs)
    except PromptError as error:
        raise PromptError(f"prompt {prompt.id!r}: {error}") from error
    context = context_length(verifier.model.config)
    if not ids:
        raise PromptError(f"prompt {prompt.id!r} has no tokens; give it some text")
    check_token_ids(ids, verifier.model.config.vocab_size, f"prompt {prompt.id!r}")
    if len(ids) + room > context:
        raise PromptError(
            f"prompt {prompt.id!r} has {len(ids)} tokens; with {room} new ones it exceeds the verifier's "
            f"context of {context}: shorten it or ask for fewer tokens"
        )
    return ids
