"""What rounds take beside the passes that were timed: gates, policy and host, and the prompt's own passes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.profiling.recording import PASSES, RecordedRound

FULL_CALLS = (("full", "full"), ("head", "logits"))
"""Tier and name of the calls that are a pass of q with output head."""


@dataclass(frozen=True)
class HostTime:
    """What passes do not account for, in seconds.

    Attributes:
        round: of each round.
        draft_step: of each draft step, after which a gate is asked.
        slim_pass: of each pass of q', whose choice a gate is asked about.
        prompt: of q's pass over the prompt, for each token of the answer.
        draft_prompt: of the draft model's reading of the prompt, for each token of an answer that it drafts.
    """

    round: float
    draft_step: float
    slim_pass: float
    prompt: float
    draft_prompt: float

    def added_to(self, costs: ReplayCosts) -> ReplayCosts:
        """Costs of passes, with this beside them."""
        return replace(
            costs,
            draft_step=costs.draft_step + self.draft_step,
            slim=[seconds + self.slim_pass for seconds in costs.slim],
            round=self.round,
            prompt=self.prompt,
            draft_prompt=self.draft_prompt,
        )


def host_time(
    costs: ReplayCosts, texts: Sequence[Sequence[RecordedRound]], prompt_seconds: Sequence[float], tokens: float
) -> HostTime:
    """What recorded rounds took beyond their passes as these are priced.

    It is shared out among rounds, draft steps and slim passes by least squares over the medians of rounds of the same
    make, none below 0. The first round of a text, in which the draft model reads the prompt, is left out there; what
    it takes beyond all of these prices goes to the prompt.

    All of it is of the machine as it was when passes were timed: where q's passes take longer while rounds are
    recorded, since other work goes on or other weights were used in between, everything is taken to do so, by the
    median of these passes.

    Args:
        costs: of passes alone, at about the context of the texts.
        texts: the rounds of each text, in order; of several kinds of policies.
        prompt_seconds: of q's passes over each of the prompts, all turns together.
        tokens: of an answer to such a prompt, all turns together.

    Example:
        >>> from viasd_calib.profiling.recording import Span
        >>> text = [RecordedRound((Span("full", "full", 0.0, 1.0, 1),), 1.5)] * 3  # a pass, and half as much beside it
        >>> found = host_time(ReplayCosts(128, 0.1, [1.0], [0.5]), [text], [6.0], tokens=12)
        >>> round(found.round, 6), found.prompt
        (0.5, 0.5)
    """
    slower = _slower(texts, costs)
    beyond: dict[tuple[int, int], list[float]] = defaultdict(list)
    for rounds in texts:
        for one in rounds[1:]:
            beyond[_makes(one)].append(one.seconds / slower - _priced(one, costs))
    own = step = slim = 0.0
    if beyond:
        weights = np.sqrt([len(seconds) for seconds in beyond.values()])
        columns = np.array([[1, *made] for made in beyond]) * weights[:, None]
        medians = np.array([statistics.median(seconds) for seconds in beyond.values()]) * weights
        own, step, slim = (float(one) for one in nnls(columns, medians)[0])
    first: list[float] = []
    for rounds in texts:
        steps, passes = _makes(rounds[0]) if rounds else (0, 0)
        if steps:
            first.append(rounds[0].seconds / slower - _priced(rounds[0], costs) - own - steps * step - passes * slim)
    return HostTime(
        own,
        step,
        slim,
        prompt=statistics.mean(prompt_seconds) / slower / tokens,
        draft_prompt=max(statistics.median(first), 0.0) / tokens if first else 0.0,
    )


def _slower(texts: Sequence[Sequence[RecordedRound]], costs: ReplayCosts) -> float:
    """How many times as long as priced q's passes took, by the median; 1 where there is none."""
    ratios: list[float] = []
    for one in (one for rounds in texts for one in rounds):
        priced = sum(costs.pass_seconds("full", span.width) for span in one.spans if span.tier == "full")
        if priced > 0:
            ratios.append(sum(span.seconds for span in one.spans if (span.tier, span.call) in FULL_CALLS) / priced)
    return statistics.median(ratios) if ratios else 1.0


def _makes(one: RecordedRound) -> tuple[int, int]:
    """Draft steps and slim passes of a round."""
    tiers = [span.tier for span in one.spans if span.call in PASSES]
    return tiers.count("draft"), tiers.count("slim")


def _priced(one: RecordedRound, costs: ReplayCosts) -> float:
    """Seconds of a round's passes by what they cost."""
    steps, _ = _makes(one)
    widths = [(span.tier, span.width) for span in one.spans if span.call in PASSES and span.tier != "draft"]
    return steps * costs.draft_step + sum(costs.pass_seconds(tier, width) for tier, width in widths)
