"""What a replay's passes cost: *simulated* seconds a token of policies, at the costs of a machine and a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.errors import PlanningError
from viasd_calib.planning.replay import ReplayCounts
from viasd_calib.profiling.profile import LatencyProfile, TierName


@dataclass(frozen=True)
class ReplayCosts:
    """What rounds spend at one context, in seconds of one text.

    Of a batch each text has its share of the passes that all take together. That is what they take where the texts go
    in lockstep: each round all of them draft as many tokens and take the same passes, of the same width. Rounds of the
    host and prompts are a text's own.

    Attributes:
        context: cached tokens before the passes.
        draft_step: one step of the draft model.
        full: a pass of q with output head over 1, 2, ... tokens.
        slim: a pass of q' over as many.
        round: of the host, for each round: policy and bookkeeping.
        prompt: of q's pass over the prompt, for each token of its answer.
        draft_prompt: of the draft model's reading of the prompt, for each token of an answer that it drafts.
        batch: texts that are decoded together.
    """

    context: int
    draft_step: float
    full: Sequence[float]
    slim: Sequence[float]
    round: float = 0.0
    prompt: float = 0.0
    draft_prompt: float = 0.0
    batch: int = 1

    @classmethod
    def of_profile(
        cls, profile: LatencyProfile, context: int, widest: int, batch: int = 1, draft_step: float | None = None
    ) -> ReplayCosts:
        """Costs that a latency profile has measured, linear between its points.

        Args:
            widest: the widest pass that will be asked for.
            batch: texts that are decoded together.
            draft_step: of all of them together; a profile has those of single texts alone.

        Raises:
            PlanningError: it was not measured at this context or batch, or not as wide.
        """
        widths = range(1, widest + 1)
        return cls(
            context,
            (profile.seconds("draft", 1, context) if draft_step is None else draft_step) / batch,
            [profile.seconds("full", width, context, batch) / batch for width in widths],
            [profile.seconds("slim", width, context, batch) / batch for width in widths],
            batch=batch,
        )

    def pass_seconds(self, tier: TierName, width: float) -> float:
        """Of a pass of q or q' of the nearest whole width."""
        seconds = self.full if tier == "full" else self.slim
        return seconds[min(max(round(width), 1), len(seconds)) - 1]


def simulated_seconds(counts: ReplayCounts, costs: ReplayCosts) -> Tensor:
    """*Simulated* seconds a token of each policy, [policies], float64.

        seconds = (sum of passes of q by width * full[width] + the same of q' + draft steps * draft_step
                   + rounds * round) / tokens + prompt + draft_prompt where there are draft steps

    Raises:
        PlanningError: a pass is wider than what was measured.
    """
    passes = _of_passes(counts.full, costs.full, "full") + _of_passes(counts.slim, costs.slim, "slim")
    rest = counts.draft_steps * costs.draft_step + counts.rounds * costs.round
    drafted = (counts.draft_steps > 0) * costs.draft_prompt
    return (passes + rest) / counts.tokens + costs.prompt + drafted


def _of_passes(by_width: Tensor, seconds: Sequence[float], tier: str) -> Tensor:
    """Seconds of all passes of one tier, [policies]."""
    widest = _widest(by_width)
    if widest > len(seconds):
        raise PlanningError(
            f"a {tier} pass is {widest} tokens wide, and {len(seconds)} is the widest that was measured; "
            "profile wider passes, or plan with a smaller draft length and fewer pending tokens"
        )
    used = torch.tensor([0.0, *seconds], dtype=torch.float64)[: widest + 1]
    return by_width[:, : widest + 1].double() @ used


def _widest(by_width: Tensor) -> int:
    """The widest pass that any policy makes; 0 where there is none."""
    used = by_width.sum(0).nonzero()
    return int(used.max()) if len(used) else 0
