"""What a replay reads of traced texts, by an engine's models: q once over each text, p and q' as they would decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.gates import Gate
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.places import confident_lookup
from viasd_calib.errors import PlanningError
from viasd_calib.planning.places import drafted_places, proposals_of, slim_places
from viasd_calib.planning.traced import ReplayTable, ReplayText
from viasd_calib.progress import tracked
from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.low_bit import widened_weights
from viasd_calib.spec import PolicyDrafter
from viasd_calib.traces.texts import TraceText

SLIM_PASSES = 4
"""Passes of q' over each text: of the ages of a place that none of them gives, the nearest one stands in."""


def drafters_of(engine: Engine) -> dict[PolicyDrafter | None, Drafter]:
    """What policies of an engine may draft with: its own drafter, and lookup where that is another one."""
    if engine.spec.draft.kind == "prompt_lookup":
        return {None: engine.drafter}
    lookup = confident_lookup(engine.spec.draft)
    return {None: engine.drafter, "lookup": PromptLookup(lookup.max_ngram, lookup.min_ngram)}


@torch.inference_mode()
def replay_tables(
    engine: Engine, texts: Sequence[tuple[TraceText, int]], depths: int, ages: int, passes: int = SLIM_PASSES
) -> dict[PolicyDrafter | None, ReplayTable]:
    """Tables of the same texts, one for each of :func:`drafters_of`.

    Args:
        texts: greedy ones of the engine's verifier, each with the most tokens that it might have had; one at least.
        depths: most tokens that a policy drafts.
        ages: most tokens that may wait for q, and one.

    Raises:
        PlanningError: the spec has no calibrated gates.
    """
    gates, model = engine.spec.gates, engine.routed
    if gates.slim is None or gates.draft is None:
        raise PlanningError("a plan needs a draft gate and a calibrated slim gate, as viasd fit makes them")
    draft_gate, slim_gate = Gate(gates.draft), Gate(gates.slim)
    drafters = drafters_of(engine)
    found: dict[PolicyDrafter | None, list[ReplayText]] = {name: [] for name in drafters}
    with widened_weights(model.slim_networks):
        for text, limit in tracked(texts, "reading traces", len(texts), "texts"):
            states, cache = read_text(model, text.ids[None, :-1].to(model.device), engine.drafter.taps)
            proposals = {
                name: proposals_of(drafter, text, states.tapped[0], depths) for name, drafter in drafters.items()
            }
            by_depth = [one.by_depth for one in proposals.values()]
            said = slim_places(model, slim_gate, text, cache, by_depth, ages, min(passes, ages))
            for (name, one), slim in zip(proposals.items(), said, strict=True):
                gate = draft_gate if name is None else None  # it knows the draft model alone
                found[name].append(ReplayText(limit, drafted_places(one, gate, text), slim))
    return {name: ReplayTable.of(own) for name, own in found.items()}


def some_texts(texts: Sequence[tuple[TraceText, int]], most_tokens: int) -> list[tuple[TraceText, int]]:
    """Whole texts of up to so many generated tokens, one at least, drawn by the hash of their prompts."""
    chosen: list[tuple[TraceText, int]] = []
    tokens = 0
    for text, limit in sorted(texts, key=lambda pair: (pair[0].prompt_sha256, pair[0].turn)):
        if len(text.generated) == 0 or (chosen and tokens + len(text.generated) > most_tokens):
            continue
        chosen.append((text, limit))
        tokens += len(text.generated)
    return chosen
