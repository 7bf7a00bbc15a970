"""The slim tier is left out where it makes exact decoding slower."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from tests.tiny import constant_gate, make_drafter, tiny_prompts
from viasd_calib.calibration import policy_timing
from viasd_calib.calibration.policy_timing import without_slim
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.models import Verifier
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.spec import Audit, Decoding, Gates, Route

GATES = Gates(
    draft=constant_gate("draft_margin", 0.0),
    slim=constant_gate("slim_margin", 0.0),
    draft_accept_at=0.9,
    accept_at=0.4,
    regenerate_at=0.4,
)
"""Every score is 0.5: q' decides all, the draft gate nothing."""


class Clock(RoutedModel):
    """A verifier whose passes, and nothing else, take time."""

    full_seconds = 1.0
    slim_seconds = 1.0
    now = 0.0

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def full(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        self.now += self.full_seconds
        return super().full(ids, window, taps)

    def slim(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        self.now += self.slim_seconds
        return super().slim(ids, window, taps)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize(("slim_seconds", "pays"), [(1.0, False), (0.01, True)])
def test_the_clock_decides(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch, slim_seconds: float, pays: bool, certified: bool
) -> None:
    """A q' that is q itself is always right: its passes pay where they are cheap, and not where they cost as much."""
    routed = Clock(tiny_verifier.model, Route())
    routed.slim_seconds = slim_seconds
    monkeypatch.setattr(policy_timing, "time", routed)
    drafter = make_drafter("near", routed)

    def decoder_for(gates: Gates, audit: Audit) -> Decoder:
        return Decoder(routed, drafter, ThreeTier.from_spec(gates, Decoding(audit=audit, draft_length=2)))

    measured = policy_timing.time_policies(
        decoder_for, GATES, tiny_verifier, tiny_prompts(policy_timing.FEWEST_PROMPTS), 24, certified=certified
    )
    assert measured.pays is pays
    assert (measured.seconds_per_token_certified is not None) == certified
    assert measured.n_prompts == policy_timing.FEWEST_PROMPTS
    assert sorted(measured.by_bound) == sorted([0.4, *policy_timing.STRICT_THRESHOLDS])  # the gates' own is tried too
    assert measured.by_bound[0.7] == pytest.approx(measured.by_bound[0.85])  # no score of 0.5 meets them
    if pays:
        assert measured.threshold <= 0.5
        assert measured.seconds_per_token < measured.by_bound[0.7]
        if certified:  # nothing diverges from a q' that is q, and cheap slim passes settle all
            assert measured.seconds_per_token_certified < measured.seconds_per_token_without  # type: ignore[operator]


def test_of_too_few_prompts_nothing_pays() -> None:
    few, enough = (
        policy_timing.PolicyTiming(
            by_bound={0.5: 0.01}, seconds_per_token_without=0.02, seconds_per_token_certified=0.001, n_prompts=count
        )
        for count in (policy_timing.FEWEST_PROMPTS - 1, policy_timing.FEWEST_PROMPTS)
    )
    assert (few.pays, few.lossy_pays) == (False, False)
    assert (enough.pays, enough.lossy_pays) == (True, True)


def test_the_draft_model_alone_is_trusted_less_than_the_slim_verifier() -> None:
    for threshold, drafted in ((0.6, policy_timing.STRICT_DRAFT_THRESHOLD), (0.95, 0.95)):
        gates = policy_timing.with_threshold(GATES, threshold)
        assert (gates.draft_accept_at, gates.accept_at, gates.regenerate_at) == (drafted, threshold, threshold)
    assert gates.slim == GATES.slim


def test_without_slim_no_slim_pass_is_made(tiny_verifier: Verifier) -> None:
    """The text stays; draft gate and stopping stay; q' is not run."""
    routed = RoutedModel(tiny_verifier.model, Route(attention_skip=[1]))
    texts = []
    for gates in (GATES, without_slim(GATES)):
        decoder = Decoder(routed, make_drafter("near", routed), ThreeTier.from_spec(gates, Decoding(audit="strict")))
        (turn,) = converse(decoder, tiny_verifier, tiny_prompts(1)[0], 16)
        texts.append(turn.generation.tokens)
        assert (turn.generation.counts.slim_passes > 0) == gates.slim_tier
    assert texts[0] == texts[1]
    assert (without_slim(GATES).draft_accept_at, without_slim(GATES).slim) == (0.9, GATES.slim)
