"""Where drafting should stop: the threshold that a replay of traced blocks finds fastest, at measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.calibration.candidates import TierScores
from viasd_calib.decoding.acceptance import drafted_until_stop, leading_true

GRID = tuple(step / 20 for step in range(20))
"""Bounds that are tried; at 0 drafting never stops early."""
FEWEST_BLOCKS = 50
"""Fewer blocks say too little: the threshold then stays where it was."""


@dataclass(frozen=True)
class PassCosts:
    """What rounds spend, in seconds.

    Attributes:
        draft_step: one step of the drafter.
        full: a pass of q with output head over 1, 2, ... tokens.
        slim: a pass of q' over as many.
    """

    draft_step: float
    full: Sequence[float]
    slim: Sequence[float]


@dataclass(frozen=True)
class Blocks:
    """Drafted blocks of equal length, found in traces.

    Attributes:
        scores: the draft gate's, [blocks, length].
        agrees: whether each token was q's choice, given that all before it were, [blocks, length], bool.
    """

    scores: Tensor
    agrees: Tensor


def whole_blocks(scores: TierScores, length: int) -> Blocks:
    """Places that were drafted as one block of ``length`` tokens, as the first ones of a longer block too.

    A capture cuts texts, prompts included, into blocks of random length: those that are long enough and lie
    after the prompt are taken for all.

    Example:
        >>> yes = torch.ones(5)
        >>> depth = torch.tensor([0, 1, 0, 1, 2])
        >>> whole_blocks(TierScores(depth, yes, yes > 0, yes, yes, yes > 0), 3).scores.shape
        torch.Size([1, 3])
    """
    ends = torch.nonzero(scores.depth == length - 1)  # [blocks, 1]
    places = ends - torch.arange(length - 1, -1, -1)  # [blocks, length]
    # The first block of a text may have begun inside its prompt; what comes before it is another text.
    whole = (places[:, 0] >= 0) & (scores.depth[places.clamp(min=0)] == torch.arange(length)).all(-1)
    places = places[whole]
    return Blocks(scores.draft[places], scores.draft_agrees[places])


def seconds_per_token(blocks: Blocks, stop_below: float, draft_step: float, passes: Sequence[float]) -> float:
    """*Simulated* seconds a token, were every round one of these blocks and one pass over it.

    A round drafts k tokens, one step each, and makes a pass over them and the token before. It gives the leading
    drafted tokens that are q's choice and one more, so that over all blocks

        seconds a token = sum(k * draft_step + passes[k]) / sum(kept + 1).

    Drafting stops after the token up to which the probability that all are kept, the product of the scores, falls
    below ``stop_below``. With full passes this is speculative decoding. With slim passes it is three-tier decoding in
    which q' chooses what q would, and the draft gate accepts nothing. The catch-up passes of q are left out: they go
    with the tokens and hardly with how these are drafted.

    Args:
        draft_step: seconds of one step of the drafter.
        passes: seconds of the pass that ends a round, over 1, 2, ... tokens.

    Example:
        >>> blocks = Blocks(torch.tensor([[0.9, 0.1, 0.1]]), torch.tensor([[True, False, False]]))
        >>> passes = [4.0, 4.0, 4.0, 4.0]
        >>> seconds_per_token(blocks, 0.0, 1.0, passes), seconds_per_token(blocks, 0.5, 1.0, passes)
        (3.5, 3.0)
    """
    drafted = drafted_until_stop(blocks.scores, stop_below)  # [blocks]
    accepted = torch.minimum(leading_true(blocks.agrees), drafted)  # [blocks]
    seconds = drafted * draft_step + torch.tensor(passes, dtype=torch.float32)[drafted]  # [blocks]
    return float(seconds.sum() / (accepted + 1).sum())


def best_stop(scores: TierScores, length: int, draft_step: float, passes: Sequence[float], default: float) -> float:
    """The threshold of ``GRID`` with the fewest *simulated* seconds a token; ``default`` for too few blocks.

    What is simulated is said of :func:`seconds_per_token`. Of equally fast thresholds the lowest is taken.

    Args:
        scores: of texts the gate was not fitted on.
        length: most tokens drafted a round.
        draft_step: seconds of one step of the drafter.
        passes: seconds of the pass that ends a round, over 1 to ``length`` + 1 tokens: ``slim`` of
            :class:`PassCosts` for decoding with the slim tier, ``full`` for decoding without it.
    """
    blocks = whole_blocks(scores, min(length, int(scores.depth.max()) + 1))
    if len(blocks.scores) < FEWEST_BLOCKS:
        return default
    return min(GRID, key=lambda threshold: seconds_per_token(blocks, threshold, draft_step, passes))
