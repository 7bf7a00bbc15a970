"""The rules of the decoder, as pure functions on tensors; decoder, replay and tests use these alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

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


def accept_by_draft(scores: Tensor, accept_at: float) -> Tensor:
    """Tier 1: leading drafted tokens whose calibrated score ([k]) clears the bound: scalar, long."""
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
    falls, every token has q's distribution. Lossless.

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
    own, other = (rows.gather(-1, drafted[:, None])[:, 0] for rows in (proposal_probs, probs))  # [k] each
    return leading_true(uniforms * own < other)


def residual(probs: Tensor, proposal: Tensor) -> Tensor:
    """What is left of q where a token drawn from p has fallen: max(q - p, 0), not normalised.

    Args:
        probs: q, [..., vocabulary].
        proposal: p, [..., vocabulary]; 0 where nothing has fallen, which leaves q.

    Example:
        >>> residual(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])).tolist()
        [0.25, 0.0]
    """
    left = (probs - proposal).clamp(min=0)
    # Where p is q but for rounding, nothing is left, and q itself is as good.
    return torch.where(left.sum(-1, keepdim=True) > 0, left, probs)


def row(rows: Tensor, place: Tensor) -> Tensor:
    """``rows[place]`` for a scalar ``place`` on the device, without waiting for it; indexing would.

    Example:
        >>> row(torch.tensor([4, 5, 6]), torch.tensor(2)).item()
        6
    """
    return rows.index_select(0, place[None])[0]


@dataclass(frozen=True)
class Trust:
    """What a rule lets the slim tier decide of a block of k drafted tokens.

    Attributes:
        accept: drafted tokens that may be kept, [k], bool.
        own: places, and the one after the block, at which q' may put its own token, [k + 1], bool.
    """

    accept: Tensor
    own: Tensor


@dataclass(frozen=True)
class SlimVerdict:
    """What the slim tier decided of a block, as device scalars.

    Attributes:
        accepted: leading drafted tokens kept.
        regenerate: whether q' puts its own token after them; otherwise q is asked.
    """

    accepted: Tensor
    regenerate: Tensor


def judge(trust: Trust) -> SlimVerdict:
    """Left to right: accept, and at the first token that is not, regenerate or escalate.

    Example:
        >>> verdict = judge(Trust(torch.tensor([True, False]), torch.tensor([True, True, False])))
        >>> verdict.accepted.item(), verdict.regenerate.item()
        (1, True)
    """
    accepted = leading_true(trust.accept)
    return SlimVerdict(accepted, row(trust.own, accepted))


def trust_scores(accept: Tensor, own: Tensor, accept_at: float, regenerate_at: float) -> Trust:
    """The calibrated rule: a drafted token is accepted at its bound, q's slim choice regenerated at its own.

    Args:
        accept: scores of the k drafted tokens, [k].
        own: scores of q's slim choices at the k places and after them, [k + 1].
    """
    return Trust(accept >= accept_at, own >= regenerate_at)


def trust_ratio(log_ratio: Tensor, accept_at: float, escalate_below: float) -> Trust:
    """The published rule on r = q'(v) / max q' (arXiv 2606.12243): accept, regenerate, escalate by bands.

    After a block that is accepted whole, q' stands by no draft and q is asked.

    Args:
        log_ratio: log r of the k drafted tokens, [k].

    Example:
        >>> verdict = judge(trust_ratio(torch.tensor([0.9, 0.6]).log(), accept_at=0.8, escalate_below=0.5))
        >>> verdict.accepted.item(), verdict.regenerate.item()
        (1, True)
    """
    ratio = log_ratio.exp()
    own = torch.cat([ratio >= escalate_below, ratio.new_zeros(1, dtype=torch.bool)])
    return Trust(ratio >= accept_at, own)


def trust_margin(drafted: Tensor, choices: Tensor, margin: Tensor, least: float) -> Trust:
    """TriSpec's rule (arXiv 2601.23180): q' is trusted where its two likeliest tokens lie far enough apart.

    Args:
        drafted: [k], long.
        choices: q's slim choices at the k places and after them, [k + 1], long.
        margin: probability of the likeliest token less that of the second, [k + 1].
        least: the paper's lambda.

    Example:
        >>> choices, margin = torch.tensor([4, 5, 6]), torch.tensor([0.9, 0.9, 0.1])
        >>> verdict = judge(trust_margin(torch.tensor([4, 9]), choices, margin, 0.5))
        >>> verdict.accepted.item(), verdict.regenerate.item()
        (1, True)
    """
    own = margin >= least
    return Trust(own[:-1] & (drafted == choices[:-1]), own)


def audit(pending: Tensor, logits: Tensor, choices: Tensor, kind: Audit, tolerance: float) -> Tensor:
    """How many leading pending tokens stand before q: scalar, long.

    ``strict`` keeps a token that is q's choice, ``tolerant`` one with q(x) / max q >= ``tolerance``,
    ``off`` keeps all.

    Args:
        pending: [n], long.
        logits: q's, at the places of the pending tokens, [n, vocabulary].
        choices: q's likeliest tokens there, [n], long.

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
    own, best = logits.gather(-1, torch.stack([pending, choices], -1)).float().unbind(-1)  # [n] each
    return leading_true((own - best).exp() >= tolerance)  # q(x) / max q
