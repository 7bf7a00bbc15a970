from __future__ import annotations

import pytest
import torch

from tests.tiny import DRAFTERS, make_model, tiny_config
from tests.unit.profiling.test_recording import engine_of
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.errors import PlanningError
from viasd_calib.models import Verifier
from viasd_calib.profiling import context_scaling
from viasd_calib.profiling.context_scaling import (
    ROUND_METHODS,
    ROUND_TOKENS,
    attention_alone,
    attention_stacks,
    measure_rounds,
)
from viasd_calib.profiling.recording import RecordedRound, Span
from viasd_calib.slim.families import LayerType
from viasd_calib.slim.forward import RoutedModel

CONTEXTS = (8, 40)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_method_is_measured_at_every_context(tiny_verifier: Verifier, kind: str) -> None:
    found = measure_rounds(engine_of(tiny_verifier, kind), CONTEXTS, 2)
    assert [(one.method, one.context) for one in found] == [(name, at) for name in ROUND_METHODS for at in CONTEXTS]
    assert all(one.tokens == ROUND_TOKENS and one.rounds > 0 for one in found)
    parts = {one.method: list(one.seconds) for one in found}
    assert parts["autoregressive"] == ["full", "head", "rest"]
    assert parts["speculative"] == ["draft", "full", "head", "rest"]
    assert all(min(one.seconds.values()) > 0 < one.attention for one in found)


def test_a_text_stops_where_the_context_ends(tiny_verifier: Verifier) -> None:
    found = measure_rounds(engine_of(tiny_verifier), (252,), 2)
    assert [one.tokens for one in found] == [4, 4, 4]


def test_a_context_without_room_behind_it_is_refused(tiny_verifier: Verifier) -> None:
    with pytest.raises(PlanningError, match="context 256 leaves no room for a token after it; give shorter"):
        measure_rounds(engine_of(tiny_verifier), (8, 256), 2)
    engine = engine_of(tiny_verifier)
    small = CausalDrafter(
        RoutedModel(make_model(tiny_config(max_position_embeddings=20))), engine.routed.config.vocab_size
    )
    with pytest.raises(PlanningError, match="context 20 leaves no room"):
        measure_rounds(type(engine)(engine.spec, engine.verifier, engine.routed, small), (20,), 2)


class Told:
    """A text whose rounds are told, not recorded."""

    def __init__(self, rounds: list[RecordedRound], tokens: int) -> None:
        self.rounds, self.tokens = rounds, tokens


def told(seconds: float, rounds: int, tokens: int) -> Told:
    """Rounds with one pass of q that takes ``seconds`` and a tenth of that for the rest."""
    return Told([RecordedRound((Span("full", "full", 0.0, seconds, 1),), 1.1 * seconds)] * rounds, tokens)


def test_chance_agreement_at_one_context_is_no_growth(tiny_verifier: Verifier) -> None:
    """Two tokens a pass here, one there: a token is charged 1.5 passes for two everywhere."""
    texts = {8: told(0.03, 2, 4), 40: told(0.03, 4, 4)}
    near, far = context_scaling._round_times(engine_of(tiny_verifier), "autoregressive", texts, 2)  # type: ignore[arg-type]
    assert near.total == pytest.approx(far.total) == pytest.approx(6 / 8 * 0.033)
    assert near.rest_share == pytest.approx(1 / 11)


def test_slower_passes_at_one_context_are(tiny_verifier: Verifier) -> None:
    texts = {8: told(0.03, 4, 4), 40: told(0.06, 4, 4)}
    near, far = context_scaling._round_times(engine_of(tiny_verifier), "autoregressive", texts, 2)  # type: ignore[arg-type]
    assert far.total == pytest.approx(2 * near.total)


def test_attention_stacks_are_those_of_the_passes(tiny_verifier: Verifier) -> None:
    stacks = attention_stacks(engine_of(tiny_verifier, "shallow"))
    assert {tier: len(stack.layers) for tier, stack in stacks.items()} == {"full": 4, "slim": 3, "draft": 2}
    assert "draft" not in attention_stacks(engine_of(tiny_verifier, "lookup"))


@pytest.mark.parametrize(
    ("family", "read"),
    [("llama", {"full_attention": 12}), ("gemma3_text", {"full_attention": 12, "sliding_attention": 5})],
)
def test_attention_alone_reads_what_a_pass_reads(
    family: str, read: dict[LayerType, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call a layer, each over the context and the new tokens, or over a window and the new tokens."""
    routed = RoutedModel(make_model(tiny_config(family)))
    seen: list[int] = []

    def noted(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **_: object) -> None:
        assert query.shape[2] == 3
        assert keys.shape == values.shape
        seen.append(keys.shape[2])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    stack = context_scaling.AttentionStack(routed.config, tuple(routed.layer_types))
    attention_alone(stack, 3, 9, routed.final_norm_module.weight)()  # type: ignore[arg-type]
    assert seen == [read[kind] for kind in routed.layer_types]
