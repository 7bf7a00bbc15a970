"""From a drafter's name to its entry in a spec, and from the entry to the drafter."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from viasd_calib.draft.base import DraftContext, Drafter, builder_of
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.places import LOOKUP, confident_lookup, named_model
from viasd_calib.draft.quantised import quantise_linears
from viasd_calib.errors import ModelError
from viasd_calib.files import write_json
from viasd_calib.models import beside, weights_sha256
from viasd_calib.shipped import shipped
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import round_linears
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    Decoding,
    DraftSpec,
    ModelDraft,
    ModelDraftSettings,
    ShallowDraft,
    ShallowShape,
    WeightFormat,
    tensor_file,
)

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
_WITHOUT_SETTINGS: dict[str, type[Any]] = {
    entry.model_fields["kind"].default: entry
    for entry in get_args(get_args(DraftSpec)[0])
    if not any(field.is_required() for field in entry.model_fields.values())
}
"""Entries of a spec that need no more than their kind, by that."""

_WINDOW = re.compile(r"window([0-9]+):")

SHALLOW_FILE = "draft.json"
SHALLOW_TENSORS = "drafter.safetensors"


def build_drafter(
    spec: DraftSpec, folder: Path, verifier: RoutedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Drafter:
    """Make the drafter of a spec that lies in ``folder``.

    Args:
        tokenizer: the verifier's; a draft model's is compared with it, token by token. Where one of the two is missing
            the draft model must have as many output rows as the verifier, with a warning.

    Raises:
        ModelError: the draft model is missing, damaged or of another tokenizer, or cannot be quantised as asked.
    """
    for module in iter_modules([str(Path(__file__).parent)]):  # each registers what it builds
        import_module(f"{__package__}.{module.name}")
    drafter = builder_of(spec)(spec, DraftContext(folder, verifier, tokenizer))
    if isinstance(spec, ModelDraftSettings) and spec.quantize is not None:
        if verifier.integer_kernels:
            round_linears(drafter.networks, 8 if spec.quantize == "int8" else 4)
        else:
            quantise_linears(drafter.networks, spec.quantize)
    return drafter


def policy_drafter(draft: DraftSpec, decoding: Decoding, drafter: Drafter) -> Drafter | None:
    """What three-tier decoding drafts with; None where a verifier writes token by token.

    Args:
        draft: of the spec.
        drafter: the one that it describes.
    """
    match decoding.drafter:
        case None:
            return drafter
        case "slim" | "none":
            return None
        case "lookup":
            lookup = confident_lookup(draft)
            return PromptLookup(lookup.max_ngram, lookup.min_ngram)


def draft_weights(spec: DraftSpec, folder: Path) -> str | None:
    """Hash of the weights of the model that a spec in ``folder`` drafts with; None where it names none by its place.

    Raises:
        ModelError: the model is not there.
    """
    model = named_model(spec)
    return None if model is None else weights_sha256(beside(model.name_or_path, folder), model.revision)


def with_weights(spec: DraftSpec, folder: Path) -> DraftSpec:
    """A drafter with the hash of the model's weights that a spec in ``folder`` names by its place, if it names one.

    Raises:
        ModelError: the model is not there.
    """
    named = {"weights_sha256": draft_weights(spec, folder)}
    match spec:
        case CausalLMDraft():
            return spec.model_copy(update=named)
        case CombinedDraft(model=CausalLMDraft() as model):
            return spec.model_copy(update={"model": model.model_copy(update=named)})
    return spec


def name_draft(name: str) -> tuple[DraftSpec, Path]:
    """What a user means by a drafter's name, and the folder its tensors are relative to.

    The kind of a drafter that needs nothing else, as ``prompt_lookup``; a folder with a shallow drafter, or else a
    causal language model. ``int8:`` or ``int4:`` before one of the latter two gives it integer weights, then
    ``window128:`` lets it read the last 128 tokens of a prompt alone; ``prompt_lookup+`` before one of them, or before
    all of this, takes lookup where it is confident, and the model elsewhere.

    Raises:
        ModelError: the folder's description of a shallow drafter is damaged, a window of nothing, or no model follows
            a prefix.

    Example:
        >>> draft, _ = name_draft("int4:window128:a")
        >>> draft.quantize, draft.prompt_window, draft.name_or_path
        ('int4', 128, 'a')
    """
    if name in _WITHOUT_SETTINGS:
        return _WITHOUT_SETTINGS[name](), Path()
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
            model, folder = _name_windowed(_after(f"{weight_format}:", name))
            return model.model_copy(update={"quantize": weight_format}), folder
    return _name_windowed(name)


def _name_windowed(name: str) -> tuple[ModelDraft, Path]:
    found = _WINDOW.match(name)
    if found is None:
        return _name_plain(name)
    model, folder = _name_plain(_after(found[0], name))
    if (size := int(found[1])) == 0:
        raise ModelError(f"{name}: a draft model reads one token of a prompt at least; name a window from 1 on")
    return model.model_copy(update={"prompt_window": size}), folder


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
