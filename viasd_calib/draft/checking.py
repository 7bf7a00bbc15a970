"""Whether the tensors of a spec's shallow drafter fit its entry in the spec, as far as it shows without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from viasd_calib.spec import CombinedDraft, RoutingSpec, ShallowDraft

MEND = "export the spec again, or train the drafter for this verifier"
"""How to mend a drafter that does not fit."""


def drafter_misfits(spec: RoutingSpec, folder: Path) -> list[str]:
    """What does not fit: one line at most, none where the spec has no shallow drafter.

    Only the header of the file is read. It shows how many layers of the verifier the drafter reads, not which.

    Args:
        folder: of the spec; the file is there (:func:`~viasd_calib.spec.spec_problems`).
    """
    match spec.draft:
        case (ShallowDraft() as draft) | CombinedDraft(model=ShallowDraft() as draft):
            path = folder / draft.tensors.path
        case _:
            return []
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        return [f"{path} cannot be read as a drafter's tensors ({error}); {MEND}"]
    wrong = next(_misfits(draft, spec.verifier.hidden_size, found), None)
    return [] if wrong is None else [f"{path}: {wrong}; {MEND}"]


def _misfits(draft: ShallowDraft, hidden: int, found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in found.items():
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            layers.setdefault(layer, {})[part] = shape
    if layers.keys() != {str(layer) for layer in range(draft.num_layers)}:
        held = ", ".join(sorted(layers)) or "of no number"
        yield f"holds layers {held}, the spec names num_layers {draft.num_layers}"
    for layer, parts in sorted(layers.items()):
        if parts != layers.get("0"):
            yield f"layer {layer} has other tensors than layer 0"
    wanted = {
        "head.weight": ((draft.head_vocab, hidden), f"head_vocab {draft.head_vocab}"),
        "vocabulary": ((draft.head_vocab,), f"head_vocab {draft.head_vocab}"),
        "from_taps.weight": ((hidden, len(draft.taps) * hidden), f"{len(draft.taps)} taps"),
        **dict.fromkeys(("from_token.weight", "from_own.weight"), ((hidden, hidden), f"hidden_size {hidden}")),
        **dict.fromkeys(("from_token.bias", "norm.weight"), ((hidden,), f"hidden_size {hidden}")),
    }
    for name, (shape, named) in wanted.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != shape:
            yield f"{name} is of shape {list(found[name])}, the spec names {named}"
