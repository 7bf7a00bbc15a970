"""Acceptance functions: what is kept of drafted and pending tokens, as pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

from viasd_calib.slim.argmax import largest_logit
from viasd_calib.spec import Audit


class Tier(IntEnum):
    """Which tier decided a token."""

    ACCEPT = 1
    REGENERATE = 2
    ESCALATE = 3


def leading_true(flags: Tensor) -> Tensor:
    """How many flags ([k], bool) are true before the first false one: scalar, long.

    Example:
        >>> leading_true(torch.tensor([True, True, False, True])).item()
        2
    """
    return flags.long().cumprod(-1).sum(-1)


def stops_drafting(chance: Tensor, stop_below: float | Tensor) -> Tensor:
    """Whether drafting stops after a token up to which P(q accepts the whole block) is ``chance``: bool, like it."""
    return chance < stop_below


def drafted_until_stop(scores: Tensor, stop_below: float | Tensor) -> Tensor:
    """How many tokens of blocks of up to k are drafted: up to the first after which drafting stops, [...], long.

    Args:
        scores: the draft gate's, of each token given that all before it are q's choice, [..., k].
        stop_below: bound of the product of the scores so far; one, or [..., 1].

    Example:
        >>> drafted_until_stop(torch.tensor([0.9, 0.4, 0.9]), 0.5).item()
        2
    """
    return (leading_true(~stops_drafting(scores.cumprod(-1), stop_below)) + 1).clamp(max=scores.shape[-1])


Whole = TypeVar("Whole", int, Tensor)


def must_catch_up(pending: Whole, drafted: Whole, max_pending: Whole) -> Whole | bool:
    """Whether a round lets q decide: a block of ``drafted`` tokens and one after it would be more than may wait.

    Example:
        >>> must_catch_up(6, 4, 12), must_catch_up(8, 4, 12)
        (False, True)
    """
    return pending + drafted + 1 > max_pending


def accept_by_draft_gate(scores: Tensor, accept_at: float | Tensor) -> Tensor:
    """Tier 1: leading drafted tokens whose calibrated score ([k], in [0, 1]) meets the threshold: scalar, long.

    Example:
        >>> accept_by_draft_gate(torch.tensor([0.9, 0.8, 0.4, 0.9]), accept_at=0.8).item()
        2
    """
    return leading_true(scores >= accept_at)


def accept_greedy(drafted: Tensor, choices: Tensor) -> Tensor:
    """The greedy speculative rule: leading drafted tokens ([k]) equal to q's choices ([k]): scalar, long.

    Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1 at temperature 0. Lossless.

    Example:
        >>> accept_greedy(torch.tensor([4, 5, 6]), torch.tensor([4, 9, 6])).item()
        1
    """
    return leading_true(drafted == choices)


def accept_sampled(drafted: Tensor, proposal_probs: Tensor, probs: Tensor, uniforms: Tensor) -> Tensor:
    """The speculative rule: leading drafted tokens x with uniform < q(x) / p(x): scalar, long.

    Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1. With :func:`residual` after the first token that
    is rejected, every token has q's distribution. Lossless.

    Args:
        drafted: [k], long.
        proposal_probs: what each was drawn from, p, [k, vocabulary].
        probs: q at the same places, [k, vocabulary].
        uniforms: uniform in [0, 1), [k].

    Example:
        >>> proposal, probs = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
        >>> [accept_sampled(torch.tensor([x]), proposal, probs, torch.tensor([0.5])).item() for x in (0, 1)]
        [1, 0]
    """
    proposed, target = (rows.gather(-1, drafted[:, None])[:, 0] for rows in (proposal_probs, probs))  # [k] each
    return leading_true(uniforms * proposed < target)


def residual(probs: Tensor, proposal: Tensor) -> Tensor:
    """What is left of q where a token drawn from p was rejected: max(q - p, 0), not normalised.

    Args:
        probs: q, [..., vocabulary].
        proposal: p, [..., vocabulary]; 0 where nothing was rejected, which leaves q.

    Example:
        >>> residual(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])).tolist()
        [0.25, 0.0]
    """
    left = (probs - proposal).clamp(min=0)
    # Where p is q but for rounding, nothing is left, and q itself is as good.
    return torch.where(left.sum(-1, keepdim=True) > 0, left, probs)


def select_row(rows: Tensor, place: Tensor) -> Tensor:
    """``rows[place]`` for a scalar ``place`` on the device, without waiting for it; indexing would.

    Example:
        >>> select_row(torch.tensor([4, 5, 6]), torch.tensor(2)).item()
        6
    """
    return rows.index_select(0, place[None])[0]


@dataclass(frozen=True)
class SlimMasks:
    """What a slim rule lets q' decide of a block of k drafted tokens.

    Attributes:
        accept: drafted tokens that may be kept, [k], bool.
        regenerate: places, and the one after the block, at which q' may put its own token, [k + 1], bool.
    """

    accept: Tensor
    regenerate: Tensor


def accept_by_slim(accept: Tensor, gated: int | Tensor) -> Tensor:
    """Leading drafted tokens that the draft gate or q' keeps: [...], long.

    Args:
        accept: whether q' keeps each, [..., k], bool.
        gated: leading ones that the draft gate has accepted; one number, or [..., 1].

    Example:
        >>> accept_by_slim(torch.tensor([False, True, False]), gated=1).item()
        2
    """
    return leading_true(accept | (torch.arange(accept.shape[-1], device=accept.device) < gated))


def accept_by_score(
    accept: Tensor, regenerate: Tensor, accept_at: float | Tensor, regenerate_at: float | Tensor
) -> SlimMasks:
    """The calibrated rule: a drafted token and q's slim choice have a threshold each.

    Args:
        accept: scores of the k drafted tokens, [k], in [0, 1].
        regenerate: scores of q's slim choices at the k places and after them, [k + 1], in [0, 1].

    Example:
        >>> masks = accept_by_score(torch.tensor([0.9, 0.6]), torch.tensor([0.9, 0.8, 0.1]), 0.8, 0.7)
        >>> masks.accept.tolist(), masks.regenerate.tolist()
        ([True, False], [True, True, False])
    """
    return SlimMasks(accept >= accept_at, regenerate >= regenerate_at)


def accept_by_ratio(log_ratio: Tensor, accept_at: float, escalate_below: float) -> SlimMasks:
    """The published rule on r = q'(v) / max q' (arXiv 2606.12243): accept, regenerate, escalate by bands.

    After a block that is accepted whole there is no drafted token, and q is asked.

    Args:
        log_ratio: log r of the k drafted tokens, [k], at most 0.

    Example:
        >>> masks = accept_by_ratio(torch.tensor([0.9, 0.6]).log(), accept_at=0.8, escalate_below=0.5)
        >>> masks.accept.tolist(), masks.regenerate.tolist()
        ([True, False], [True, True, False])
    """
    ratio = log_ratio.exp()
    regenerate = torch.cat([ratio >= escalate_below, ratio.new_zeros(1, dtype=torch.bool)])
    return SlimMasks(ratio >= accept_at, regenerate)


def accept_by_margin(drafted: Tensor, choices: Tensor, margin: Tensor, least: float) -> SlimMasks:
    """TriSpec's rule (arXiv 2601.23180): q' may decide where its two most likely tokens are far enough apart.

    Args:
        drafted: [k], long.
        choices: q's slim choices at the k places and after them, [k + 1], long.
        margin: probability of the most likely token less that of the second, [k + 1], in [0, 1].
        least: the paper's lambda.

    Example:
        >>> choices, margin = torch.tensor([4, 5, 6]), torch.tensor([0.9, 0.9, 0.1])
        >>> masks = accept_by_margin(torch.tensor([4, 9]), choices, margin, 0.5)
        >>> masks.accept.tolist(), masks.regenerate.tolist()
        ([True, False], [True, True, False])
    """
    certain = margin >= least
    return SlimMasks(certain[:-1] & (drafted == choices[:-1]), certain)


def token_deficits(logits: Tensor, tokens: Tensor) -> Tensor:
    """How far tokens lie below q's choice at their places: max_v log q(v) - log q(token), a difference of logits.

    Args:
        logits: q's at the places of the tokens, [n, vocabulary].
        tokens: [n], long.

    Returns:
        [n], float32, in nats, at least 0; 0 at q's choice.

    Example:
        >>> token_deficits(torch.tensor([[2.0, 1.5], [2.0, 0.0]]), torch.tensor([1, 0])).tolist()
        [0.5, 0.0]
    """
    kept = logits.gather(-1, tokens[:, None])[:, 0]  # [n]
    return largest_logit(logits) - kept.float()


def audit(pending: Tensor, logits: Tensor, choices: Tensor, kind: Audit, tolerance: float) -> Tensor:
    """How many leading pending tokens q keeps: scalar, long.

    ``strict`` keeps a token that is q's choice, ``tolerant`` one with q(x) / max q >= ``tolerance``,
    ``off`` keeps all.

    Args:
        pending: [n], long.
        logits: q's, at the places of the pending tokens, [n, vocabulary].
        choices: q's most likely tokens there, [n], long.

    Example:
        >>> pending, choices = torch.tensor([1, 1]), torch.tensor([0, 0])
        >>> logits = torch.tensor([[2.0, 1.9], [2.0, 0.0]])
        >>> [audit(pending, logits, choices, kind, 0.5).item() for kind in ("strict", "tolerant", "off")]
        [0, 1, 2]
    """
    if kind == "off":
        return torch.full((), pending.shape[0], device=pending.device)
    if kind == "strict":
        return accept_greedy(pending, choices)
    kept, best = logits.gather(-1, torch.stack([pending, choices], -1)).float().unbind(-1)  # [n] each
    return leading_true((kept - best).exp() >= tolerance)  # q(x) / max q
