"""Hypothesis strategies for the parts of a decoder."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.tiny import LAYERS, TINY_FAMILIES, VOCAB, random_gate
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.spec import Gates, LogisticGate, Route

BOUNDS = st.floats(0.0625, 0.9375)
NEVER = 1.01
"""A bound above 1, which no score meets."""


def families() -> st.SearchStrategy[str]:
    """Names of tiny models."""
    return st.sampled_from(list(TINY_FAMILIES))


def routes(layers: int = LAYERS) -> st.SearchStrategy[Route]:
    """Any set of attention and MLP sublayers to leave out, from none to all."""
    skips = st.sets(st.integers(0, layers - 1)).map(sorted)
    return st.builds(Route, attention_skip=skips, mlp_skip=skips)


def logistic_gates(names: tuple[str, ...]) -> st.SearchStrategy[LogisticGate]:
    """Random gates, careful or trusting."""
    seeds, biases = st.integers(0, 9), st.floats(-2, 4)
    return st.builds(lambda seed, bias: random_gate(names, seed, bias), seeds, biases)


@st.composite
def gate_sets(draw: st.DrawFn) -> Gates:
    """Gates of either convention, with every tier on or off."""
    shared = {
        "draft": draw(logistic_gates(DRAFT_FEATURES)),
        "draft_stop_below": draw(st.just(0.0) | BOUNDS),
        "draft_accept_at": draw(st.just(NEVER) | BOUNDS),
    }
    if draw(st.booleans()):
        slim = draw(logistic_gates(SLIM_FEATURES))
        bound = st.just(NEVER) | BOUNDS
        return Gates(slim=slim, accept_at=draw(bound), regenerate_at=draw(bound), **shared)
    escalate_below = draw(BOUNDS)
    accept_at = draw(st.floats(escalate_below, NEVER, exclude_min=True))
    return Gates(convention="ratio", accept_at=accept_at, escalate_below=escalate_below, **shared)


def token_lists(least: int, most: int, vocab: int = VOCAB) -> st.SearchStrategy[list[int]]:
    """Token ids."""
    return st.lists(st.integers(0, vocab - 1), min_size=least, max_size=most)
