"""q-free features of a drafted token and of q's slim choice in its place.

Every feature is known before q runs. ``DRAFT_FEATURES`` need the draft model alone, ``SLIM_FEATURES``
need a slim pass as well. One function computes each set, for decoder, calibration and tests alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.top_k import TopKStatistics
from viasd_calib.spec import DRAFT_FEATURES as DRAFT_FEATURES
from viasd_calib.spec import SLIM_FEATURES as SLIM_FEATURES

TRACED_TOP_K = 16
"""Tokens of p's distribution that its divergence from q' is taken over; traces hold as many."""

MARGIN_CAP = 20.0
"""Margins are cut at so many nats; a drafter without a distribution has none."""

LEAST_MASS = 1e-6
"""Probability that a bucket of tokens is held to have at least; float32 sums are no surer."""


@dataclass(frozen=True)
class DraftStatistics:
    """The draft model's statistics of k drafted tokens, for features.

    Attributes:
        tokens: verifier ids, [k].
        top_k: of its distributions, leading shape [k]; None without a distribution. ``draft_kl_slim`` looks
            at ``TRACED_TOP_K`` of their tokens, all else at one.
        depth: drafted, unverified tokens before each, [k].
    """

    tokens: Tensor
    top_k: TopKStatistics | None
    depth: Tensor


def draft_features(draft: DraftStatistics, names: Collection[str] = DRAFT_FEATURES) -> dict[str, Tensor]:
    """Features of drafted tokens from the draft model alone; each is float32 [k].

    A drafter without a distribution is certain of its tokens, as prompt lookup beside a draft model is.

    Args:
        names: which of ``DRAFT_FEATURES`` are wanted; others are not computed.
    """
    depth = draft.depth.float()  # [k]
    top_k, zeros = draft.top_k, torch.zeros_like(depth)

    def margin() -> Tensor:
        return torch.full_like(depth, MARGIN_CAP) if top_k is None else top_k.margin.clamp(max=MARGIN_CAP)

    def log_top1() -> Tensor:
        return zeros if top_k is None else top_k.log_probs[..., 0]

    def certain() -> Tensor:
        return (margin() >= MARGIN_CAP).float()

    compute: dict[str, Callable[[], Tensor]] = {
        "draft_entropy": lambda: zeros if top_k is None else top_k.entropy,
        "draft_log_top1": log_top1,
        "draft_margin": margin,
        "draft_depth": lambda: depth,
        "draft_log_odds": lambda: log_odds(log_top1()) * (1 - certain()),
        "draft_certain": certain,
        "draft_certain_depth": lambda: certain() * depth,
    }
    return {name: compute[name]() for name in names}


def log_odds(log_probs: Tensor) -> Tensor:
    """log p / (1 - p) of log-probabilities, at most ``MARGIN_CAP``: the score of a drafter that is calibrated itself.

    Example:
        >>> log_odds(torch.tensor([0.5, 0.75, 1.0]).log()).tolist()
        [0.0, 1.0986123085021973, 20.0]
    """
    return (log_probs - (-torch.expm1(log_probs)).log()).clamp(max=MARGIN_CAP)


def slim_features(
    log_ratio: Tensor,
    slim_logits: Tensor,
    slim: TopKStatistics,
    draft: DraftStatistics | None,
    place: Tensor,
    pending: Tensor,
    names: Collection[str] = SLIM_FEATURES,
) -> dict[str, Tensor]:
    """Features of candidate tokens under the slim verifier; each is float32 [k].

    Args:
        log_ratio: log-probability of each candidate under q' less that of q's slim choice, [k]; the candidates are
            drafted tokens, or q's slim choices themselves, for which it is 0.
        slim_logits: q' at the places the candidates would take, [k, vocabulary].
        slim: statistics of ``slim_logits``.
        draft: the draft model's statistics at these places; None where it proposed nothing.
        place: place in the block, [k].
        pending: tokens since the last one that q has decided, [k].
        names: which of ``SLIM_FEATURES`` are wanted; others are not computed.
    """
    zeros = torch.zeros_like(slim.entropy)
    top_k = None if draft is None else draft.top_k
    compute: dict[str, Callable[[], Tensor]] = {
        "slim_entropy": lambda: slim.entropy,
        "slim_log_top1": lambda: slim.log_probs[..., 0],
        "slim_margin": lambda: slim.margin.clamp(max=MARGIN_CAP),
        "log_ratio": lambda: log_ratio_feature(log_ratio),
        "has_draft": lambda: zeros if draft is None else torch.ones_like(zeros),
        "same_choice": lambda: zeros if draft is None else (draft.tokens == slim.ids[..., 0]).float(),
        "draft_kl_slim": lambda: (
            zeros
            if top_k is None
            else top_k_kl(top_k.ids, top_k.log_probs, slim_logits, slim.log_sum_exp).clamp(max=MARGIN_CAP)
        ),
        "draft_log_top1": lambda: zeros if top_k is None else top_k.log_probs[..., 0],
        "draft_entropy": lambda: zeros if top_k is None else top_k.entropy,
        "block_place": lambda: place.float(),
        "pending": lambda: pending.float(),
        "slim_log_margin": lambda: slim.margin.clamp(max=MARGIN_CAP).log1p(),
        "log_log_ratio": lambda: log_log_ratio_feature(log_ratio),
    }
    return {name: compute[name]() for name in names}


def log_ratio_feature(log_ratio: Tensor) -> Tensor:
    """The feature of candidates whose log-probabilities under q' are so much below that of q's slim choice: [k]."""
    return log_ratio.clamp(min=-MARGIN_CAP)


def log_log_ratio_feature(log_ratio: Tensor) -> Tensor:
    """The same on a scale that is fine near 0, -log(1 - log ratio): [k]."""
    return -torch.log1p(-log_ratio_feature(log_ratio))


RATIO_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_ratio": log_ratio_feature,
    "log_log_ratio": log_log_ratio_feature,
}
"""What differs between a drafted token and q's slim choice at one place, of the log ratio of each."""


def top_k_kl(ids: Tensor, log_probs: Tensor, slim_logits: Tensor, slim_log_sum_exp: Tensor) -> Tensor:
    """KL(p || q') over p's top k tokens and one bucket for all others, in nats: [places].

    Those of the top k that q' cannot emit (logit -inf) are a second bucket, for which q' is held to have
    ``LEAST_MASS``: else the least probable of them would make the divergence infinite.

    Args:
        ids: p's top k tokens, [places, k], long.
        log_probs: p's of them, [places, k].
        slim_logits: of q', [places, vocabulary].
        slim_log_sum_exp: of these, [places].
    """
    slim_top = slim_logits.gather(-1, ids).float() - slim_log_sum_exp[..., None]  # [places, k]
    possible, probs = ~slim_top.isneginf(), log_probs.exp()
    inside = torch.where((probs > 0) & possible, probs * (log_probs - slim_top), 0.0).sum(-1)  # 0 log 0 is 0
    impossible = probs.masked_fill(possible, 0.0).sum(-1).clamp(min=LEAST_MASS)
    rest = (1 - probs.sum(-1)).clamp(min=LEAST_MASS)
    slim_rest = (1 - slim_top.exp().sum(-1)).clamp(min=LEAST_MASS)
    buckets = impossible * (impossible / LEAST_MASS).log() + rest * (rest / slim_rest).log()
    return (inside + buckets).clamp(min=0)
