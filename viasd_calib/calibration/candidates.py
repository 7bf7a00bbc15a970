"""Candidate thresholds for the gates, proposed from traces; on-policy certification decides among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from viasd_calib.calibration.scoring import ScoredText, join
from viasd_calib.choices import FRACTIONS
from viasd_calib.decoding.gates import Gate
from viasd_calib.errors import CalibrationError
from viasd_calib.spec import Gates, LogisticGate

DEFAULT_STOP = 0.4
"""Drafting stops where the whole block is kept with less than this probability, as long as nothing better is known."""


@dataclass(frozen=True)
class TierScores:
    """Gate scores of held-back places, and whether the candidates were q's choice; each [places].

    Attributes:
        depth: drafted, unverified tokens before the place.
        draft: draft-gate score of the drafted token.
        accept: slim-gate score of the drafted token.
        own: slim-gate score of q's slim choice.
    """

    depth: Tensor
    draft: Tensor
    draft_agrees: Tensor
    accept: Tensor
    own: Tensor
    own_agrees: Tensor

    def __post_init__(self) -> None:
        if len({getattr(self, field.name).shape for field in fields(self)}) != 1:
            raise CalibrationError("scores of the tiers must be of the same places; fit the gates again")


def tier_scores(draft: LogisticGate, slim: LogisticGate, texts: Sequence[ScoredText]) -> TierScores:
    """Score every place of held-back texts with fitted gates.

    Where nothing was proposed the scores of the drafted token are 0, so that no tier takes it, and q's slim choice is
    scored as one that stands alone.
    """
    drafts, accepts, owns, alone = (
        join([getattr(text, name) for text in texts]) for name in ("draft", "accept", "own", "own_alone")
    )
    proposed = torch.cat([text.proposed for text in texts])
    draft_gate, slim_gate = Gate(draft), Gate(slim)
    return TierScores(
        drafts.features["draft_depth"].long(),
        draft_gate(drafts.features) * proposed, drafts.agrees,
        slim_gate(accepts.features) * proposed,
        torch.where(proposed, slim_gate(owns.features), slim_gate(alone.features)), owns.agrees,
    )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """Gates with thresholds, and what a replay of traces expects of them.

    Attributes:
        gates: ready for a spec.
        threshold: the score at which any tier trusts a token; one threshold for all, since a token's risk is its
            score whichever tier asks.
        replayed_loss: *simulated* share of tokens that would be emitted and are not q's choice.
        replayed_trust: *simulated* share of tokens that would not need q.
    """

    gates: Gates
    threshold: float
    replayed_loss: float
    replayed_trust: float


def propose(
    draft: LogisticGate,
    slim: LogisticGate,
    scores: TierScores,
    max_loss: float,
    fractions: Sequence[float] = FRACTIONS,
    stop_below: float = DEFAULT_STOP,
) -> list[Candidate]:
    """Candidates whose replayed loss is a fraction of ``max_loss``, most careful first.

    The replay is *simulated*: it takes each traced place by itself, as if all before it were q's own.

    Args:
        scores: of texts the gates were not fitted on.
        fractions: rising; of ``max_loss``.
        stop_below: chance of the whole block below which drafting stops.
    """
    candidates: list[Candidate] = []
    for fraction in fractions:
        threshold = lowest_threshold(scores, fraction * max_loss)
        if candidates and threshold >= candidates[-1].threshold:
            continue
        loss, trust = replay(scores, threshold)
        gates = Gates(
            draft=draft,
            slim=slim,
            draft_stop_below=stop_below,
            draft_accept_at=threshold,
            accept_at=threshold,
            regenerate_at=threshold,
        )
        candidates.append(Candidate(gates, threshold, loss, trust))
    return candidates


def replay(scores: TierScores, threshold: float) -> tuple[float, float]:
    """*Simulated* loss and trust of one threshold: the draft gate, then q' on the draft, then q' alone.

    Example:
        >>> yes, no = torch.tensor([True]), torch.tensor([False])
        >>> sure, unsure = torch.tensor([0.9]), torch.tensor([0.1])
        >>> replay(TierScores(torch.tensor([0]), unsure, no, sure, sure, yes), threshold=0.5)
        (1.0, 1.0)
    """
    by_draft = scores.draft >= threshold
    by_accept = ~by_draft & (scores.accept >= threshold)
    by_own = ~by_draft & ~by_accept & (scores.own >= threshold)
    wrong = ((by_draft | by_accept) & ~scores.draft_agrees) | (by_own & ~scores.own_agrees)
    trusted = by_draft | by_accept | by_own
    return float(wrong.float().mean()), float(trusted.float().mean())


def lowest_threshold(scores: TierScores, max_loss: float) -> float:
    """The lowest of a grid of thresholds whose replayed loss, and that of all above it, is within ``max_loss``."""
    grid = 1 - torch.logspace(-4, -0.3, 75, dtype=torch.float64)  # 0.9999 down to 0.5
    best = 1.0
    for threshold in grid.tolist():
        if replay(scores, threshold)[0] > max_loss:
            break
        best = threshold
    return best
