"""From a drafter's name to its entry in a spec, and from the entry to the drafter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import get_args

from transformers import PreTrainedTokenizerBase

from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.places import LOOKUP, named_model
from viasd_calib.draft.places import relocated as relocated
from viasd_calib.draft.quantised import quantise_linears
from viasd_calib.draft.shallow import ShallowDrafter, load_shallow
from viasd_calib.errors import DraftWarning, ModelError
from viasd_calib.files import write_json
from viasd_calib.models import DTYPE_NAMES, beside, first_difference, load_draft_model, weights_sha256
from viasd_calib.shipped import shipped
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    ModelDraft,
    PromptLookupDraft,
    ShallowDraft,
    ShallowShape,
    WeightFormat,
    tensor_file,
)

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
SHALLOW_FILE = "draft.json"
SHALLOW_TENSORS = "drafter.safetensors"


def build_drafter(
    spec: DraftSpec, folder: Path, verifier: RoutedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Drafter:
    """Make the drafter of a spec that lies in ``folder``.

    Args:
        tokenizer: the verifier's; a draft model's is compared with it, token by token. Where one of the two is missing
            the draft model must have as many output rows as the verifier, and a warning says so.

    Raises:
        ModelError: the draft model is missing, damaged or of another tokenizer, or cannot be quantised as asked.
    """
    if isinstance(spec, PromptLookupDraft):
        return PromptLookup(spec.max_ngram, spec.min_ngram)
    if isinstance(spec, CombinedDraft):
        model = _build_model(spec.model, folder, verifier, tokenizer)
        return CombinedDrafter(model, verifier.config.vocab_size, spec.lookup.max_ngram, spec.lookup.min_ngram)
    return _build_model(spec, folder, verifier, tokenizer)


def _build_model(
    spec: ModelDraft, folder: Path, verifier: RoutedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    drafter = _load_model(spec, folder, verifier, tokenizer)
    if spec.quantize is not None:
        quantise_linears(drafter.networks, spec.quantize)
    return drafter


def _load_model(
    spec: ModelDraft, folder: Path, verifier: RoutedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    if isinstance(spec, ShallowDraft):
        return ShallowDrafter(load_shallow(verifier, spec, folder / spec.tensors.path))
    model, own = load_draft_model(
        beside(spec.name_or_path, folder),
        dtype=DTYPE_NAMES[verifier.dtype],
        device=str(verifier.device),
        revision=spec.revision,
    )
    _check_tokens(spec.name_or_path, own, tokenizer, model.config.vocab_size, verifier.config.vocab_size)
    return CausalDrafter(verifier.alike(model), verifier.config.vocab_size)


def _check_tokens(
    name: str,
    own: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    verifier_rows: int,
) -> None:
    """Refuse a draft model of another tokenizer: what it proposes would be other tokens.

    Args:
        own: the draft model's tokenizer.
        tokenizer: the verifier's.
        rows: the draft model's output rows.
    """
    if own is not None and tokenizer is not None:
        difference = first_difference(own, tokenizer)
        if difference is not None:
            number, there, here = difference
            raise ModelError(
                f"the draft model {name} has another tokenizer than the verifier: id {number} is {there} there and "
                f"{here} here; choose a draft model with the verifier's tokenizer"
            )
        return
    lacking = f"the draft model {name} has no tokenizer" if own is None else "the verifier comes without a tokenizer"
    mend = (
        "copy the verifier's tokenizer files into its folder if it is the same"
        if own is None
        else f"give the verifier's, so that it is compared with that of the draft model {name}"
    )
    if rows != verifier_rows:
        raise ModelError(
            f"{lacking}, and {name} has {rows} output rows beside the verifier's {verifier_rows}, so that nothing says "
            f"that their tokens are the same; {mend}"
        )
    warnings.warn(
        f"{lacking}: as both have {rows} output rows, their tokens are taken to be the same; {mend}",
        DraftWarning,
        stacklevel=2,
    )


def draft_weights(spec: DraftSpec, folder: Path) -> str | None:
    """Hash of the weights of the model that a spec in ``folder`` drafts with; None where it names none by its place.

    Raises:
        ModelError: the model is not there.
    """
    model = named_model(spec)
    return None if model is None else weights_sha256(beside(model.name_or_path, folder), model.revision)


def name_draft(name: str) -> tuple[DraftSpec, Path]:
    """What a user means by a drafter's name, and the folder its tensors are relative to.

    ``prompt_lookup``, a folder with a shallow drafter, or else a causal language model; ``int8:`` or ``int4:`` before
    one of the latter two gives it integer weights; ``prompt_lookup+`` before one of them, or before both, takes lookup
    where it is confident, and the model elsewhere.

    Raises:
        ModelError: the folder's description of a shallow drafter is damaged, or a prefix stands before no model.
    """
    if name == LOOKUP:
        return PromptLookupDraft(), Path()
    if name.startswith(f"{LOOKUP}+"):
        model, folder = _name_model(_after(f"{LOOKUP}+", name))
        return CombinedDraft(model=model), folder
    return _name_model(name)


def _after(prefix: str, name: str) -> str:
    """The draft model's name after ``prefix``."""
    after = name.removeprefix(prefix)
    if after in ("", LOOKUP) or after.startswith(f"{LOOKUP}+"):
        raise ModelError(f"{name}: name one draft model after {prefix}, a shallow drafter's folder or a model")
    return after


def _name_model(name: str) -> tuple[ModelDraft, Path]:
    for weight_format in WEIGHT_FORMATS:
        if name.startswith(f"{weight_format}:"):
            model, folder = _name_plain(_after(f"{weight_format}:", name))
            return model.model_copy(update={"quantize": weight_format}), folder
    return _name_plain(name)


def _name_plain(name: str) -> tuple[ModelDraft, Path]:
    folder = Path(shipped(name))
    if (folder / SHALLOW_FILE).is_file():
        try:
            spec = ShallowDraft.model_validate_json((folder / SHALLOW_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{folder / SHALLOW_FILE} is damaged; copy the drafter's folder again") from error
        return spec, folder
    return CausalLMDraft(name_or_path=name), Path()


def describe_shallow(folder: Path, shape: ShallowShape) -> ShallowDraft:
    """Write the description of the shallow drafter whose tensors lie in ``folder``."""
    tensors = tensor_file(folder / SHALLOW_TENSORS, folder)
    spec = ShallowDraft(num_layers=shape.num_layers, head_vocab=shape.head_vocab, taps=shape.taps, tensors=tensors)
    write_json(folder / SHALLOW_FILE, spec)
    return spec
