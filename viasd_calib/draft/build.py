"""The drafter a routing spec names."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.shallow import ShallowDrafter, ShallowShape, load_shallow
from viasd_calib.models import DTYPE_NAMES, load_verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import DraftSpec, PromptLookupDraft, ShallowDraft


def build_drafter(spec: DraftSpec, folder: Path, verifier: RoutedModel) -> Drafter:
    """Make the drafter of a spec that lies in ``folder``.

    Raises:
        ModelError: the draft model is missing, damaged or of another vocabulary.
    """
    if isinstance(spec, PromptLookupDraft):
        return PromptLookup(spec.max_ngram, spec.min_ngram)
    if isinstance(spec, ShallowDraft):
        shape = ShallowShape(spec.num_layers, spec.head_vocab)
        return ShallowDrafter(load_shallow(verifier, shape, folder / spec.tensors.path))
    loaded = load_verifier(
        spec.name_or_path, dtype=DTYPE_NAMES[verifier.dtype], device=str(verifier.device), revision=spec.revision
    )
    return CausalDrafter(RoutedModel(loaded.model), verifier.config.vocab_size)
