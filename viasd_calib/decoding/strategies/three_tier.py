"""Three-tier decoding: draft gate, slim verifier, full verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import SlimMasks, Tier, accept_by_draft_gate, must_catch_up
from viasd_calib.decoding.catch_up import audited, catch_up
from viasd_calib.decoding.drafting import (
    Block,
    allowed_only,
    draft,
    draft_limit,
    draft_statistics,
    no_block,
    watched_length,
)
from viasd_calib.decoding.features import DraftStatistics, draft_features
from viasd_calib.decoding.gates import Gate, draft_gate
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.slim_decision import SlimDecision, decide_greedy, decide_sampled
from viasd_calib.decoding.slim_rules.base import SlimRule, slim_rule
from viasd_calib.decoding.strategies.base import Strategy, register
from viasd_calib.decoding.verification import RejectionSampler
from viasd_calib.errors import SamplingError
from viasd_calib.passes.model_passes import PassResult, SlimPass
from viasd_calib.passes.requests import Passes, Read
from viasd_calib.spec import Audit, Decoding, Gates

NEVER = 1.01
"""A threshold that no score reaches."""


@register(lossless=False, takes_audit=True)
@dataclass
class ThreeTier(Strategy):
    """Draft gate, slim verifier, full verifier (VIA-SD, arXiv 2606.12243), with an audit.

    With audit ``strict`` the text is q's own, token by token, or drawn from q's distribution, whatever
    gates and route decide; ``tolerant`` and ``off`` are lossy, and a certificate states how far they diverge.

    Attributes:
        rule: where q' may decide; None leaves the slim tier out, and q decides what the draft gate does not.
            It is asked only while ``max_pending`` leaves room for a whole block and a token after it.
        draft_gate: predicts P(q's choice = drafted token) from the draft model alone.
        draft_accept_at: leading drafted tokens that score as high are accepted unverified; above 1, none.
        draft_stop_below: drafting stops after the token up to which the probability that q accepts the block falls
            below.
        draft_length: most tokens drafted a round; at 0 no drafter is needed, and q' writes token by token, or q
            where there is no rule.
        max_pending: most tokens that may wait for q.
        drafting_pays_at: the least share of a text's drafted tokens that must be kept for drafting to go on unreduced
            (:mod:`~viasd_calib.decoding.rolling_acceptance`); None for always.
    """

    rule: SlimRule | None
    draft_gate: Gate | None = None
    draft_accept_at: float = NEVER
    draft_stop_below: float = 0.0
    draft_length: int = 6
    max_pending: int = 12
    audit: Audit = "strict"
    tolerance: float = 0.5
    drafting_pays_at: float | None = None

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        own = decoding.drafter is None  # the draft gate knows the draft model alone
        return cls(
            rule=slim_rule(gates, device),
            draft_gate=draft_gate(gates, device) if own else None,
            draft_accept_at=gates.draft_accept_at if own else NEVER,
            draft_stop_below=gates.draft_stop_below if own else 0.0,
            draft_length=0 if decoding.drafter in ("slim", "none") else decoding.draft_length,
            max_pending=decoding.max_pending,
            audit=decoding.audit,
            tolerance=decoding.tolerance,
            drafting_pays_at=decoding.drafting_pays_at,
        )

    @property
    def asks_slim(self) -> bool:
        """Whether there is a rule that q' could decide by."""
        return self.rule is not None

    def round(self, session: Session) -> Passes[None]:
        if session.closed:
            yield from self._catch_up(session, no_block(session))
            return
        # Decided before anything is drawn: a choice that depended on the block would bias a sampled text.
        length = watched_length(session, self.draft_length, self.drafting_pays_at)
        full = must_catch_up(session.pending, draft_limit(session, length), self.max_pending)

        block = yield from self._draft(session, length)
        if full:
            yield from self._catch_up(session, block)
            return

        gated = yield from self._draft_gate_accepts(session, block)
        if self.rule is None or (gated and len(gated) == len(block)):
            session.emit(block.tokens, gated, Tier.ACCEPT, drafted=True, proposal_probs=block.proposal_probs)
            if gated and len(gated) == len(block):
                return
            undecided = block.after(len(gated))
        else:
            text = torch.cat([session.text[: session.length], block.tokens])
            result = yield from self._slim_pass(session, text, len(block) + 1)
            scores = session.sampler.scores(result.logits, text)  # [k + 1, vocabulary]
            decision = self._decide(session, self.rule, block, result.logits, scores, len(gated))
            accepted, regenerated = yield from self._emit_decision(session, block, decision)
            self._mark_seen_by_slim(session, result.tapped)
            if regenerated or session.closed:
                return
            # Where the block is used up q' is unsure of the next token: q verifies a fresh block with it.
            undecided = block.after(accepted) if accepted < len(block) else (yield from self._draft(session, length))

        if not session.closed:
            yield from self._catch_up(session, undecided)

    def _draft(self, session: Session, length: int) -> Passes[Block]:
        if length == 0:
            return no_block(session)
        block = yield from draft(session, length, self.draft_gate, self.draft_stop_below)
        if self.audit == "strict":  # q refuses what processors forbid
            return block
        return (yield from allowed_only(session, block))

    def _draft_gate_accepts(self, session: Session, block: Block) -> Passes[list[int]]:
        """Leading drafted tokens that the draft gate accepts unverified."""
        if self.draft_gate is None or self.draft_accept_at > 1 or len(block) == 0:
            return []
        if block.early_stop is None:
            scores = self.draft_gate(draft_features(draft_statistics(session, block, 1), self.draft_gate.names))  # [k]
        else:
            scores = torch.cat(block.early_stop.scores)
        count = accept_by_draft_gate(scores, self.draft_accept_at)
        read: list[int] = yield Read(torch.cat([count[None], block.tokens]))
        return read[1:][: read[0]]

    def _slim_pass(self, session: Session, text: Tensor, wanted: int) -> Passes[PassResult]:
        """Run q' over what it has not seen of ``text`` ([length]), for logits at the last places."""
        start = session.row.provisional
        session.counts.slim_passes += 1
        result: PassResult = yield SlimPass(
            session.verifier, session.row, start, text[start:], wanted=wanted, taps=session.taps
        )
        return result

    def _decide(
        self, session: Session, rule: SlimRule, block: Block, logits: Tensor, scores: Tensor, gated: int
    ) -> SlimDecision:
        """Let the rule decide from left to right: keep, regenerate or escalate.

        Args:
            logits: q' at the k places of the block and after it, [k + 1, vocabulary].
            scores: the same, processed.
            gated: leading tokens that the draft gate has accepted.
        """
        statistics = draft_statistics(session, block, rule.draft_top)
        if isinstance(session.sampler, RejectionSampler):
            masks = self._masks_before_draw(session, rule, logits, statistics)
            return decide_sampled(session.sampler, masks, scores, block, gated)
        return decide_greedy(rule.masks(logits, statistics, session.pending), scores, gated)

    def _emit_decision(self, session: Session, block: Block, decision: SlimDecision) -> Passes[tuple[int, bool]]:
        """Emit what q' has decided: how many drafted tokens it kept, and whether it regenerated one."""
        scalars = torch.stack([decision.accepted, decision.regenerate.long(), decision.next_token])
        accepted, regenerate, token, *drafted = yield Read(torch.cat([scalars, block.tokens]))
        probs = decision.proposal_probs
        session.emit(block.tokens, drafted[:accepted], Tier.ACCEPT, drafted=True, proposal_probs=probs)
        if regenerate and not session.closed:
            inside = accepted < len(block)
            agrees = inside and token == drafted[accepted]
            session.counts.rejected += inside and not agrees
            after = None if probs is None else probs[accepted:]
            session.emit(decision.next_token[None], [token], Tier.REGENERATE, drafted=agrees, proposal_probs=after)
        return accepted, bool(regenerate)

    def _mark_seen_by_slim(self, session: Session, tapped: Tensor) -> None:
        """Record how far q' has seen the text: all but its last token, which opens the next pass."""
        start, seen = session.row.provisional, session.length - 1
        session.row.mark_provisional(seen)
        if session.drafter is not None:
            session.drafter.observe(start, tapped[: seen - start])
            session.drafter.rollback(seen)

    def _masks_before_draw(self, session: Session, rule: SlimRule, logits: Tensor, draft: DraftStatistics) -> SlimMasks:
        """The rule's masks from what is known before tokens are drawn: p's most likely ones in place of the drawn ones.

        Raises:
            SamplingError: the rule depends on the drawn token, and the audit is to keep the text q's.
        """
        if not rule.sees_draw:
            top = draft.top_k
            expected = draft if top is None else DraftStatistics(top.ids[:, 0], top, draft.depth)
            return rule.masks(logits, expected, session.pending)
        if self.audit == "strict":
            raise SamplingError(
                "this rule looks at the token that was drawn, so a sampled text would not be q's; "
                "choose temperature 0, calibrated gates, or another audit"
            )
        return rule.masks(logits, draft, session.pending)

    def _catch_up(self, session: Session, block: Block) -> Passes[None]:
        return catch_up(session, block, audited(self.audit, self.tolerance))
