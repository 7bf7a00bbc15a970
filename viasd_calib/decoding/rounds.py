"""The decoding methods, each a rule for one round; all share the catch-up pass.

``Autoregressive`` is catch-up with nothing drafted, ``Speculative`` catch-up with a drafted block, and
``ThreeTier`` puts the draft gate and the slim verifier before it. Same weights, same kernels, same drafter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import (
    Tier,
    Trust,
    accept_by_draft,
    accept_sampled,
    judge,
    leading_true,
    row,
)
from viasd_calib.decoding.drafting import Block, allowed_only, draft, draft_limit, draft_statistics, no_block
from viasd_calib.decoding.features import DraftStatistics, draft_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.slim_rules import SlimRule
from viasd_calib.decoding.verification import RejectionSampler, TokenSampler, Verdict
from viasd_calib.draft.base import likeliest
from viasd_calib.errors import NumericsError, SamplingError
from viasd_calib.passes.model_passes import FullPass, PassResult, SlimPass
from viasd_calib.passes.requests import Passes, Read
from viasd_calib.spec import Audit

NEVER = 1.01
"""A bound that no score reaches."""


@dataclass(frozen=True)
class Judged:
    """What a q pass has to judge: n pending and drafted tokens.

    Attributes:
        scores: q's processed logits at their places and after them, [n + 1, vocabulary].
        tokens: [n], the first ``pending`` of which are pending.
        proposal_probs: what each was drawn from, [n, vocabulary]; None when greedy.
        block: the drafted ones.
    """

    scores: Tensor
    tokens: Tensor
    proposal_probs: Tensor | None
    pending: int
    block: Block


Verification = Callable[[TokenSampler, Judged], Verdict]
"""How q judges pending and drafted tokens."""


def audited(kind: Audit, tolerance: float = 0.5) -> Verification:
    """Audit the pending tokens as ``kind`` says, and the drafted ones by the ordinary speculative rule."""

    def verify(sampler: TokenSampler, judged: Judged) -> Verdict:
        return sampler.verify(judged.scores, judged.tokens, judged.proposal_probs, judged.pending, kind, tolerance)

    return verify


strictly = audited("strict")
"""The lossless verification."""


def catch_up(session: Session, block: Block, verify: Verification = strictly) -> Passes[None]:
    """One q pass over the pending tokens and a drafted block: audit, verify, and one token of q's own.

    The pending tokens are audited first. Where all stand, q decides the block by the ordinary speculative
    rule; else the text is cut at the first offending token. Either way q's own token follows, unless the
    text is closed.

    Args:
        verify: how q judges.

    Raises:
        NumericsError: q's logits are not finite.
        SamplingError: logits processors leave no token at a place that q decides.
    """
    start, pending = session.row.exact, session.pending
    text = torch.cat([session.text[: session.length], block.tokens])  # [start + width]
    width = text.shape[0] - start
    result: PassResult = yield FullPass(
        session.verifier, session.row, start, text[start:], wanted=width, taps=session.taps
    )
    logits = result.logits  # [width, vocabulary]
    session.counts.full_passes += 1

    scores = session.sampler.scores(logits, text)
    verdict = verify(
        session.sampler, Judged(scores, text[start + 1 :], _proposal_probs(session, block), pending, block)
    )
    finite = torch.isfinite(logits.amax(-1))  # [width]
    sayable = finite if scores is logits else torch.isfinite(scores.amax(-1))  # [width]
    flags = torch.stack([finite.all(), leading_true(sayable) > verdict.place(pending)]).long()
    # Beside the end of a text, the one place where the host waits for the device.
    kept, accepted, own, is_finite, is_sayable, *values = yield Read(
        torch.cat([torch.stack([verdict.kept, verdict.accepted, verdict.own]), flags, block.tokens])
    )
    if not is_finite:
        raise NumericsError("the verifier's logits are not finite; load it in float32 or check its weights")

    if kept < pending:
        offending = start + 1 + kept
        session.counts.rejected += session.drafted[offending - session.prompt_length]
        session.cut(offending)
        _refuse_unsayable(is_sayable)
        session.emit(verdict.own[None], [own], Tier.ESCALATE, drafted=False)
    elif not session.closed:
        session.emit(block.tokens, values[:accepted], Tier.ESCALATE, drafted=True)
        session.counts.rejected += accepted < len(block) and not session.closed
        if not session.closed:
            _refuse_unsayable(is_sayable)
        session.emit(verdict.own[None], [own], Tier.ESCALATE, drafted=False)
    session.settle()  # q's own token has not been through q
    if session.drafter is not None:
        seen = session.row.exact
        session.drafter.observe(start, result.tapped[: seen - start])
        session.drafter.rollback(seen)


def _refuse_unsayable(is_sayable: int) -> None:
    """Refuse to emit q's own token where nothing can be said; the first token of the vocabulary would be written."""
    if not is_sayable:
        raise SamplingError(
            "the logits processors leave no token that may follow (all scores are -inf, or one is infinite or NaN); "
            "let them allow the end of the text, or mend their settings"
        )


def _proposal_probs(session: Session, block: Block) -> Tensor | None:
    """What pending and drafted tokens were drawn from, [tokens, vocabulary]; None when greedy."""
    if session.sampler.greedy:
        return None
    rows = (
        list(session.proposal_probs)
        if block.proposal_probs is None
        else [*session.proposal_probs, *block.proposal_probs.unbind()]
    )
    return torch.stack(rows) if rows else session.text.new_zeros((0, session.verifier.config.vocab_size)).float()


class Method(ABC):
    """A way to decode: what one round does to a session.

    A round is written for one text, as a generator that yields the passes it needs; the texts of a batch run theirs
    together.
    """

    name: ClassVar[str]
    needs_drafter: ClassVar[bool] = True
    audit: Audit = "strict"

    @property
    def asks_slim(self) -> bool:
        """Whether rounds may run q'."""
        return True

    @abstractmethod
    def round(self, session: Session) -> Passes[None]:
        """Add at least one token to an open session, or settle a closed one."""

    def finished(self, session: Session) -> bool:
        """Whether the text is closed and every token of it final."""
        return session.closed and (self.audit == "off" or session.pending == 0)

    def final_length(self, session: Session) -> int:
        """Leading tokens that no later round can change."""
        return session.length if self.audit == "off" else session.decided


class Autoregressive(Method):
    """q alone, one token a pass. Lossless by definition; the reference of every comparison."""

    name = "autoregressive"
    needs_drafter = False
    asks_slim = False

    def round(self, session: Session) -> Passes[None]:
        return catch_up(session, no_block(session))


@dataclass
class Speculative(Method):
    """Draft a block, let q verify it (Leviathan et al. 2023, algorithm 1), with the bonus token. Lossless.

    Attributes:
        draft_length: most tokens drafted a round.
        gate: predicts agreement; drafting stops where the whole block's chance falls below ``stop_below``.
    """

    name: ClassVar[str] = "speculative"
    asks_slim = False
    draft_length: int = 6
    gate: Gate | None = None
    stop_below: float = 0.0

    def round(self, session: Session) -> Passes[None]:
        block = yield from draft(session, self.draft_length, self.gate, self.stop_below)
        yield from catch_up(session, block, self.verification())

    def verification(self) -> Verification:
        """How q judges the block; what makes a lossy rule of it overrides this."""
        return strictly


@dataclass(frozen=True)
class SlimRuling:
    """What the slim tier makes of a block.

    Attributes:
        accepted: leading drafted tokens kept, a scalar.
        regenerate: whether q' puts its own token after them, a scalar.
        own: that token, a scalar.
        proposal_probs: what the kept tokens and q's slim token were drawn from, [k + 1, vocabulary]; None when greedy.
    """

    accepted: Tensor
    regenerate: Tensor
    own: Tensor
    proposal_probs: Tensor | None = None


@dataclass
class ThreeTier(Method):
    """Draft gate, slim verifier, full verifier (VIA-SD, arXiv 2606.12243), with an audit.

    With audit ``strict`` the text is q's own, token by token, or drawn from q's distribution, whatever
    gates and route say; ``tolerant`` and ``off`` are lossy, and a certificate says how far they diverge.

    Attributes:
        rule: where q' may decide; None leaves the slim tier out, and q decides what the draft gate does not.
            It is asked only while ``max_pending`` leaves room for a whole block and a token after it.
        draft_gate: predicts P(q's choice = drafted token) from the draft model alone.
        draft_accept_at: leading drafted tokens that score as high are accepted unverified; above 1, none.
        draft_stop_below: drafting stops after the token up to which the block's chance falls below.
        draft_length: most tokens drafted a round.
        max_pending: most tokens that may wait for q.
    """

    name: ClassVar[str] = "three_tier"
    rule: SlimRule | None
    draft_gate: Gate | None = None
    draft_accept_at: float = NEVER
    draft_stop_below: float = 0.0
    draft_length: int = 6
    max_pending: int = 12
    audit: Audit = "strict"
    tolerance: float = 0.5

    @property
    def asks_slim(self) -> bool:
        """Whether there is a rule that q' could decide by."""
        return self.rule is not None

    def round(self, session: Session) -> Passes[None]:
        if session.closed:
            yield from self._catch_up(session, no_block(session))
            return
        # Decided before anything is drawn: a choice that looked at the block would bend a sampled text.
        full = session.pending + draft_limit(session, self.draft_length) + 1 > self.max_pending
        block = yield from self._draft(session)
        if full:
            yield from self._catch_up(session, block)
            return
        trusted = yield from self._trusted(session, block)
        if trusted and len(trusted) == len(block):
            self._accept(session, block, trusted)
        elif self.rule is None:
            self._accept(session, block, trusted)
            if not session.closed:
                yield from self._catch_up(session, block.after(len(trusted)))
        else:
            yield from self._slim_round(session, self.rule, block, len(trusted))

    def _draft(self, session: Session) -> Passes[Block]:
        block = yield from draft(session, self.draft_length, self.draft_gate, self.draft_stop_below)
        if self.audit == "strict":  # q refuses what processors forbid
            return block
        return (yield from allowed_only(session, block))

    def _accept(self, session: Session, block: Block, trusted: list[int]) -> None:
        """Emit leading drafted tokens that nobody verifies."""
        session.emit(block.tokens, trusted, Tier.ACCEPT, drafted=True, proposal_probs=block.proposal_probs)

    def _catch_up(self, session: Session, block: Block) -> Passes[None]:
        return catch_up(session, block, audited(self.audit, self.tolerance))

    def _trusted(self, session: Session, block: Block) -> Passes[list[int]]:
        """Leading drafted tokens that the draft gate accepts unverified."""
        if self.draft_gate is None or self.draft_accept_at > 1 or len(block) == 0:
            return []
        if block.watch is None:
            scores = self.draft_gate(draft_features(draft_statistics(session, block, 1)))  # [k]
        else:
            scores = torch.cat(block.watch.scores)
        count = accept_by_draft(scores, self.draft_accept_at)
        read: list[int] = yield Read(torch.cat([count[None], block.tokens]))
        return read[1:][: read[0]]

    def _slim_round(self, session: Session, rule: SlimRule, block: Block, trusted: int) -> Passes[None]:
        """Run q' over what it has not seen and the block; keep, regenerate or escalate."""
        start, k = session.row.provisional, len(block)
        said = draft_statistics(session, block, rule.draft_top)
        text = torch.cat([session.text[: session.length], block.tokens])  # [start + width]
        result: PassResult = yield SlimPass(
            session.verifier, session.row, start, text[start:], wanted=k + 1, taps=session.taps
        )
        logits = result.logits  # [k + 1, vocabulary]
        session.counts.slim_passes += 1
        scores = session.sampler.scores(logits, text)  # [k + 1, vocabulary]
        if isinstance(session.sampler, RejectionSampler):
            trust = self._undrawn_trust(session, rule, logits, said)
            ruling = rule_sampled(session.sampler, trust, scores, block, trusted)
        else:
            ruling = rule_greedily(rule.trust(logits, said, session.pending), scores, trusted)
        accepted, regenerate, own, *values = yield Read(
            torch.cat([torch.stack([ruling.accepted, ruling.regenerate.long(), ruling.own]), block.tokens])
        )

        session.emit(block.tokens, values[:accepted], Tier.ACCEPT, drafted=True, proposal_probs=ruling.proposal_probs)
        if regenerate and not session.closed:
            agrees = accepted < k and own == values[accepted]
            session.counts.rejected += accepted < k and not agrees
            proposal = None if ruling.proposal_probs is None else ruling.proposal_probs[accepted:]
            session.emit(ruling.own[None], [own], Tier.REGENERATE, drafted=agrees, proposal_probs=proposal)
        self._note_seen(session, start, result.tapped)
        if not regenerate and not session.closed:
            # Where the block is used up q' is unsure of the next token: q judges a fresh block with it.
            rest = block.after(accepted) if accepted < k else (yield from self._draft(session))
            yield from self._catch_up(session, rest)

    def _note_seen(self, session: Session, start: int, tapped: Tensor) -> None:
        """Record how far q' has seen the text: all but its last token, which opens the next pass."""
        seen = session.length - 1
        session.row.mark_provisional(seen)
        assert session.drafter is not None, "this method needs a drafter"
        session.drafter.observe(start, tapped[: seen - start])
        session.drafter.rollback(seen)

    def _undrawn_trust(self, session: Session, rule: SlimRule, logits: Tensor, said: DraftStatistics) -> Trust:
        """The rule's trust from what is known before tokens are drawn: p's choices stand for the drawn ones.

        Raises:
            SamplingError: the rule looks at the drawn token, and the audit is to keep the text q's.
        """
        if not rule.sees_draw:
            expected = said if said.said is None else DraftStatistics(said.said.ids[:, 0], said.said, said.depth)
            return rule.trust(logits, expected, session.pending)
        if self.audit == "strict":
            raise SamplingError(
                "this rule looks at the token that was drawn, so a sampled text would not be q's; "
                "choose temperature 0, calibrated gates, or another audit"
            )
        return rule.trust(logits, said, session.pending)


def rule_greedily(trust: Trust, scores: Tensor, trusted: int) -> SlimRuling:
    """The slim tier's ruling where the likeliest token is taken.

    Args:
        trust: what q' may decide of the block.
        scores: q', processed, at the k places of the block and after it, [k + 1, vocabulary].
        trusted: leading tokens that the draft gate has accepted.
    """
    accept = trust.accept.clone()
    accept[:trusted] = True
    choices = likeliest(scores)  # [k + 1]
    sayable = scores.gather(-1, choices[:, None])[:, 0] > -torch.inf  # processors may forbid all that q' can say
    verdict = judge(Trust(accept, trust.own & sayable))
    return SlimRuling(verdict.accepted, verdict.regenerate, row(choices, verdict.accepted))


def rule_sampled(sampler: RejectionSampler, trust: Trust, scores: Tensor, block: Block, trusted: int) -> SlimRuling:
    """The same where tokens are drawn.

    Where q' may decide, the drafted token goes through the speculative step from p to q', so that what
    stands there is drawn from q'; at the first place where it may not, q decides. Whether it may is settled
    before the token is drawn (``Trust.own``), so that the audit can make the text exactly q's.
    """
    assert block.proposal_probs is not None, "a sampled token comes with its proposal"
    probs = scores.softmax(-1)  # [k + 1, vocabulary]
    own = trust.own & ~probs[:, 0].isnan()  # processors may forbid all that q' can say
    uniforms = sampler.uniforms(len(block) - trusted)
    stands = accept_sampled(block.tokens[trusted:], block.proposal_probs[trusted:], probs[trusted:-1], uniforms)
    accepted = trusted + torch.minimum(leading_true(own[trusted:-1]), stands)
    drawn = sampler.draw_after(probs, block.proposal_probs, accepted)
    return SlimRuling(accepted, row(own, accepted), drawn, torch.cat([block.proposal_probs[:trusted], probs[trusted:]]))
