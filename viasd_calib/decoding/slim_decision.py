"""What the slim tier makes of a block, greedily or by drawing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import SlimMasks, accept_by_slim, accept_sampled, leading_true, select_row
from viasd_calib.decoding.drafting import Block
from viasd_calib.decoding.verification import RejectionSampler
from viasd_calib.slim.argmax import argmax


@dataclass(frozen=True)
class SlimDecision:
    """What the slim tier decided of a block, on the device.

    Attributes:
        accepted: leading drafted tokens kept, a scalar.
        regenerate: whether q' puts its own token after them, a scalar; otherwise q is asked.
        next_token: that token, a scalar.
        proposal_probs: what the kept tokens and q's slim token were drawn from, [k + 1, vocabulary]; None when greedy.
    """

    accepted: Tensor
    regenerate: Tensor
    next_token: Tensor
    proposal_probs: Tensor | None = None


def decide_greedy(masks: SlimMasks, scores: Tensor, gated: int) -> SlimDecision:
    """Left to right: keep a drafted token, and at the first that is not kept, regenerate or escalate.

    Args:
        masks: what q' may decide of the block.
        scores: q', processed, at the k places of the block and after it, [k + 1, vocabulary].
        gated: leading tokens that the draft gate has accepted.

    Example:
        >>> masks = SlimMasks(torch.tensor([True, False]), torch.tensor([True, True, False]))
        >>> decision = decide_greedy(masks, torch.eye(3), gated=0)
        >>> decision.accepted.item(), decision.regenerate.item(), decision.next_token.item()
        (1, True, 1)
    """
    choices = argmax(scores)  # [k + 1]
    possible = scores.gather(-1, choices[:, None])[:, 0] > -torch.inf  # processors may forbid all tokens of q'
    accepted = accept_by_slim(masks.accept, gated)
    return SlimDecision(accepted, select_row(masks.regenerate & possible, accepted), select_row(choices, accepted))


def decide_sampled(
    sampler: RejectionSampler, masks: SlimMasks, scores: Tensor, block: Block, gated: int
) -> SlimDecision:
    """The same where tokens are drawn.

    Where q' may decide, the drafted token goes through the speculative step from p to q', so that what
    is kept there is drawn from q'; at the first place where it may not, q decides. Whether it may is settled
    before the token is drawn (``SlimMasks.regenerate``), so that the audit can make the text exactly q's.
    """
    assert block.proposal_probs is not None, "a sampled token comes with its proposal"
    probs = scores.softmax(-1)  # [k + 1, vocabulary]
    regenerate = masks.regenerate & ~probs[:, 0].isnan()  # processors may forbid all tokens of q'
    uniforms = sampler.uniforms(len(block) - gated)
    passed = accept_sampled(block.tokens[gated:], block.proposal_probs[gated:], probs[gated:-1], uniforms)
    accepted = gated + torch.minimum(leading_true(regenerate[gated:-1]), passed)
    drawn = sampler.draw_after(probs, block.proposal_probs, accepted)
    proposal_probs = torch.cat([block.proposal_probs[:gated], probs[gated:]])
    return SlimDecision(accepted, select_row(regenerate, accepted), drawn, proposal_probs)
