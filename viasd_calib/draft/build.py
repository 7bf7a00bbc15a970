"""From a drafter's name to its entry in a spec, and from the entry to the drafter."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.shallow import ShallowDrafter, load_shallow
from viasd_calib.errors import ModelError
from viasd_calib.files import write_text
from viasd_calib.models import DTYPE_NAMES, load_verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    PromptLookupDraft,
    ShallowDraft,
    ShallowShape,
    tensor_file,
)

LOOKUP = "prompt_lookup"
SHALLOW_FILE = "draft.json"
SHALLOW_TENSORS = "drafter.safetensors"


def build_drafter(spec: DraftSpec, folder: Path, verifier: RoutedModel) -> Drafter:
    """Make the drafter of a spec that lies in ``folder``.

    Raises:
        ModelError: the draft model is missing, damaged or of another vocabulary.
    """
    if isinstance(spec, PromptLookupDraft):
        return PromptLookup(spec.max_ngram, spec.min_ngram)
    if isinstance(spec, CombinedDraft):
        model = build_drafter(spec.model, folder, verifier)
        return CombinedDrafter(model, verifier.config.vocab_size, spec.lookup.max_ngram, spec.lookup.min_ngram)
    if isinstance(spec, ShallowDraft):
        return ShallowDrafter(load_shallow(verifier, spec, folder / spec.tensors.path))
    loaded = load_verifier(
        spec.name_or_path,
        dtype=DTYPE_NAMES[verifier.dtype],
        device=str(verifier.device),
        revision=spec.revision,
    )
    return CausalDrafter(verifier.alike(loaded.model), verifier.config.vocab_size)


def name_draft(name: str) -> tuple[DraftSpec, Path]:
    """What a user means by a drafter's name, and the folder its tensors are relative to.

    ``prompt_lookup``, a folder with a shallow drafter, or else a causal language model; ``prompt_lookup+`` before
    one of the latter two takes lookup where it is confident, and the model elsewhere.

    Raises:
        ModelError: the folder's description of a shallow drafter is damaged, or lookup is combined with no model.
    """
    if name == LOOKUP:
        return PromptLookupDraft(), Path()
    if name.startswith(f"{LOOKUP}+"):
        behind = name.removeprefix(f"{LOOKUP}+")
        model, folder = name_draft(behind)
        if not behind or isinstance(model, PromptLookupDraft | CombinedDraft):
            raise ModelError(f"{name}: name one draft model behind {LOOKUP}+, a shallow drafter's folder or a model")
        return CombinedDraft(model=model), folder
    folder = Path(name)
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
    write_text(folder / SHALLOW_FILE, spec.model_dump_json(indent=2) + "\n")
    return spec
