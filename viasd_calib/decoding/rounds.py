"""The decoding methods, each a rule for one round; all share the catch-up pass.

``Autoregressive`` is catch-up with nothing drafted, ``Speculative`` catch-up with a drafted block, and
``ThreeTier`` puts the draft gate and the slim verifier before it. Same weights, same kernels, same drafter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from viasd_calib.decoding.choosing import SamplingChooser
from viasd_calib.decoding.features import DraftSaid, draft_features, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.policies import (
    SlimVerdict,
    Tier,
    accept_by_draft,
    accept_sampled,
    judge_calibrated,
    judge_ratio,
    leading_true,
    residual,
)
from viasd_calib.decoding.sampling import draw
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.summary import Summary, summarize
from viasd_calib.draft.base import StopRule, never_stop
from viasd_calib.errors import NumericsError, SamplingError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.spec import Audit, Gates

SUMMARY_TOP = 16
"""Tokens of p's distribution that features look at; traces hold as many."""


@dataclass(frozen=True)
class Block:
    """Drafted tokens on their way through the tiers.

    Attributes:
        tokens: [k], long; k may be 0.
        logits: the draft model's, [k, draft vocabulary]; None without a distribution.
        laws: what each token was drawn from, [k, vocabulary]; None when greedy.
    """

    tokens: Tensor
    logits: Tensor | None = None
    laws: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def behind(self, count: int) -> Block:
        """The block without its first ``count`` tokens."""
        return Block(
            self.tokens[count:],
            None if self.logits is None else self.logits[count:],
            None if self.laws is None else self.laws[count:],
        )


def no_block(session: Session) -> Block:
    """A block without tokens."""
    return Block(session.text[:0])


def catch_up(session: Session, block: Block, kind: Audit = "strict", tolerance: float = 0.5) -> None:
    """One q pass over the pending tokens and a drafted block: audit, verify, and one token of q's own.

    The pending tokens are audited first. Where all stand, q decides the block by the ordinary speculative
    rule; else the text is cut at the first offending token. Either way q's own token follows, unless the
    text is closed.

    Raises:
        NumericsError: q's logits are not finite.
    """
    start, pending = session.cache.exact, session.pending
    text = torch.cat([session.text[: session.length], block.tokens])  # [start + width]
    width = text.shape[0] - start
    window = CacheWindow(session.cache, start, width, start + width)
    states = session.verifier.full(text[None, start:], window, session.taps)
    logits = session.verifier.logits(states.last[0])  # [width, vocabulary]
    session.counts.full_passes += 1

    scores = session.chooser.scores(logits, text)
    verdict = session.chooser.verify(scores, text[start + 1 :], _laws(session, block), pending, kind, tolerance)
    finite = torch.isfinite(logits.amax(-1)).all().long()
    # The one place where the host waits for the device.
    kept, accepted, own, is_finite, *values = torch.cat(
        [torch.stack([verdict.kept, verdict.accepted, verdict.own, finite]), block.tokens]
    ).tolist()
    if not is_finite:
        raise NumericsError("the verifier's logits are not finite; load it in float32 or check its weights")

    if kept < pending:
        offending = start + 1 + kept
        session.counts.rejected += session.drafted[offending - session.prompt_length]
        session.cut(offending)
        session.emit(verdict.own[None], [own], Tier.ESCALATE, drafted=False)
    elif not session.closed:
        session.emit(block.tokens, values[:accepted], Tier.ESCALATE, drafted=True)
        session.counts.rejected += accepted < len(block) and not session.closed
        session.emit(verdict.own[None], [own], Tier.ESCALATE, drafted=False)
    session.settle()  # q's own token has not been through q
    if session.drafter is not None:
        seen = session.cache.exact
        session.drafter.observe(start, states.tapped[0, : seen - start])
        session.drafter.rollback(seen)


def _laws(session: Session, block: Block) -> Tensor | None:
    """What pending and drafted tokens were drawn from, [tokens, vocabulary]; None when greedy."""
    if session.chooser.sampling.greedy:
        return None
    rows = list(session.laws) if block.laws is None else [*session.laws, *block.laws.unbind()]
    return torch.stack(rows) if rows else session.text.new_zeros((0, session.verifier.config.vocab_size)).float()


class Method(ABC):
    """A way to decode: what one round does to a session."""

    name: ClassVar[str]
    needs_drafter: ClassVar[bool] = True
    audit: Audit = "strict"

    @abstractmethod
    def round(self, session: Session) -> None:
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

    def round(self, session: Session) -> None:
        catch_up(session, no_block(session))


@dataclass
class Speculative(Method):
    """Draft a block, let q verify it (Leviathan et al. 2023, algorithm 1), with the bonus token. Lossless.

    Attributes:
        draft_length: most tokens drafted a round.
        gate: predicts agreement; drafting stops behind a token that scores below ``stop_below``.
    """

    name: ClassVar[str] = "speculative"
    draft_length: int = 6
    gate: Gate | None = None
    stop_below: float = 0.0

    def round(self, session: Session) -> None:
        catch_up(session, draft(session, self.draft_length, self.gate, self.stop_below))


def draft(session: Session, length: int, gate: Gate | None, stop_below: float) -> Block:
    """Let the drafter propose up to ``length`` tokens, leaving room for q's own behind them."""
    assert session.drafter is not None, "this method needs a drafter"
    stop: StopRule = never_stop
    if gate is not None and stop_below > 0:
        stop = confidence_stop(gate, stop_below, unverified(session), session.drafter.vocabulary)
    text = session.text[: session.length]
    pick = session.chooser.picker(text, session.drafter.vocabulary, session.verifier.config.vocab_size)
    proposal = session.drafter.propose(text, draft_limit(session, length), stop, pick)
    return Block(proposal.tokens, proposal.logits, pick.laws(proposal.tokens))


def draft_limit(session: Session, length: int) -> int:
    """Most tokens to draft, so that the text keeps room for q's own behind them."""
    return max(min(length, session.room - 1), 0)


def unverified(session: Session) -> int:
    """Tokens of the text that neither q nor q' has seen, the last one not counted."""
    return session.length - 1 - session.cache.provisional


def confidence_stop(gate: Gate, stop_below: float, depth: int, vocabulary: Tensor | None) -> StopRule:
    """Stop drafting behind a token whose gate score is below ``stop_below``."""

    def stop(logits: Tensor, place: int) -> bool:
        said = summarize(logits[None], SUMMARY_TOP, vocabulary)
        depths = torch.tensor([depth + place], device=logits.device)
        score = gate(draft_features(DraftSaid(said.ids[:, 0], said, depths)))
        return bool(score[0] < stop_below)

    return stop


@dataclass(frozen=True)
class SlimRuling:
    """What the slim tier makes of a block.

    Attributes:
        accepted: leading drafted tokens kept, a scalar.
        regenerate: whether q' puts its own token behind them, a scalar.
        own: that token, a scalar.
        laws: what the kept tokens and q's slim token were drawn from, [k + 1, vocabulary]; None when greedy.
    """

    accepted: Tensor
    regenerate: Tensor
    own: Tensor
    laws: Tensor | None = None


@dataclass
class ThreeTier(Method):
    """Draft gate, slim verifier, full verifier (VIA-SD, arXiv 2606.12243), with an audit.

    With audit ``strict`` the text is q's own, token by token, whatever gates and route say; ``tolerant``
    and ``off`` are lossy, and a certificate says how far they stray.

    Attributes:
        gates: the rule and its bounds.
        draft_gate: predicts P(q's choice = drafted token) from the draft model alone.
        slim_gate: predicts it with q's slim verdict; none under the ``ratio`` convention.
        max_pending: most tokens that may wait for q.
    """

    name: ClassVar[str] = "three_tier"
    gates: Gates
    draft_gate: Gate | None = None
    slim_gate: Gate | None = None
    draft_length: int = 6
    max_pending: int = 12
    audit: Audit = "strict"
    tolerance: float = 0.5

    def round(self, session: Session) -> None:
        if session.closed:
            self._catch_up(session, no_block(session))
            return
        # Decided before anything is drawn: a choice that looked at the block would bend a sampled text.
        full = session.pending + draft_limit(session, self.draft_length) + 1 > self.max_pending
        block = self._draft(session)
        if full:
            self._catch_up(session, block)
            return
        said = self._draft_said(session, block)
        trusted = self._trusted(said)
        if len(block) and trusted == len(block):
            session.emit(block.tokens, block.tokens.tolist(), Tier.ACCEPT, drafted=True, laws=block.laws)
            return
        self._slim_round(session, block, said, trusted)

    def _draft(self, session: Session) -> Block:
        return draft(session, self.draft_length, self.draft_gate, self.gates.draft_stop_below)

    def _catch_up(self, session: Session, block: Block) -> None:
        catch_up(session, block, self.audit, self.tolerance)

    def _draft_said(self, session: Session, block: Block) -> DraftSaid:
        assert session.drafter is not None, "this method needs a drafter"
        depth = unverified(session) + torch.arange(len(block), device=session.text.device)  # [k]
        said = None
        if block.logits is not None:
            said = summarize(block.logits, SUMMARY_TOP, session.drafter.vocabulary)
        return DraftSaid(block.tokens, said, depth)

    def _trusted(self, said: DraftSaid) -> int:
        """Leading drafted tokens that the draft gate accepts unverified."""
        if self.draft_gate is None or self.gates.draft_accept_at > 1 or len(said.tokens) == 0:
            return 0
        return int(accept_by_draft(self.draft_gate(draft_features(said)), self.gates.draft_accept_at))

    def _slim_round(self, session: Session, block: Block, said: DraftSaid, trusted: int) -> None:
        """Run q' over what it has not seen and the block; keep, regenerate or escalate."""
        start, k = session.cache.provisional, len(block)
        text = torch.cat([session.text[: session.length], block.tokens])  # [start + width]
        width = text.shape[0] - start
        window = CacheWindow(session.cache, start, width, start + width)
        states = session.verifier.slim(text[None, start:], window, session.taps)
        logits = session.verifier.logits(states.last[0, session.length - 1 - start :])  # [k + 1, vocabulary]
        session.counts.slim_passes += 1
        ruling = self._rule(session, logits, session.chooser.scores(logits, text), block, said, trusted)
        accepted, regenerate, own, *values = torch.cat(
            [torch.stack([ruling.accepted, ruling.regenerate.long(), ruling.own]), block.tokens]
        ).tolist()

        session.emit(block.tokens, values[:accepted], Tier.ACCEPT, drafted=True, laws=ruling.laws)
        if regenerate and not session.closed:
            agrees = accepted < k and own == values[accepted]
            session.counts.rejected += accepted < k and not agrees
            law = None if ruling.laws is None else ruling.laws[accepted:]
            session.emit(ruling.own[None], [own], Tier.REGENERATE, drafted=agrees, laws=law)
        self._note_seen(session, start, states.tapped[0])
        if not regenerate and not session.closed:
            # Where the block is used up q' is unsure of the next token: q judges a fresh block with it.
            self._catch_up(session, block.behind(accepted) if accepted < k else self._draft(session))

    def _note_seen(self, session: Session, start: int, tapped: Tensor) -> None:
        """Record how far q' has seen the text: all but its last token, which opens the next pass."""
        seen = session.length - 1
        session.cache.mark_provisional(seen)
        assert session.drafter is not None, "this method needs a drafter"
        session.drafter.observe(start, tapped[: seen - start])
        session.drafter.rollback(seen)

    def _rule(
        self, session: Session, logits: Tensor, scores: Tensor, block: Block, said: DraftSaid, trusted: int
    ) -> SlimRuling:
        """The slim tier's ruling on a block.

        Args:
            logits: q' at the k places of the block and behind it, [k + 1, vocabulary].
            scores: the same, processed.
            trusted: leading tokens that the draft gate has accepted.
        """
        if isinstance(session.chooser, SamplingChooser):
            return self._rule_sampled(session, session.chooser, logits, scores, block, said, trusted)
        choices = scores.argmax(-1)  # [k + 1]
        verdict = self._judge(session, logits, said, trusted)
        return SlimRuling(verdict.accepted, verdict.regenerate, choices[verdict.accepted])

    def _judge(self, session: Session, logits: Tensor, said: DraftSaid, trusted: int) -> SlimVerdict:
        """Greedily: gates may look at the drafted tokens."""
        k = said.tokens.shape[0]
        if self.gates.escalate_below is not None:
            own = logits[:k].float().gather(-1, said.tokens[:, None])[:, 0]
            ratio = own - logits[:k].float().amax(-1)  # log r, [k]
            ratio[:trusted] = 0.0
            return judge_ratio(ratio, self.gates.accept_at, self.gates.escalate_below)
        accept, own = self._scores(session, logits, said)
        accept[:trusted] = 1.0
        assert self.gates.regenerate_at is not None, "the spec demands it"
        return judge_calibrated(accept, own, self.gates.accept_at, self.gates.regenerate_at)

    def _scores(self, session: Session, logits: Tensor, said: DraftSaid) -> tuple[Tensor, Tensor]:
        """Slim-gate scores of the drafted tokens [k], and of q's slim choices [k + 1]."""
        assert self.slim_gate is not None, "the spec demands it"
        place = torch.arange(said.tokens.shape[0] + 1, device=logits.device)
        return candidate_scores(self.slim_gate, logits, summarize(logits, 2), said, place, session.pending + place)

    def _rule_sampled(
        self,
        session: Session,
        chooser: SamplingChooser,
        logits: Tensor,
        scores: Tensor,
        block: Block,
        said: DraftSaid,
        trusted: int,
    ) -> SlimRuling:
        """When drawing: whether q' is asked at a place hangs on what was known before its token was drawn.

        Where q's slim choice clears ``regenerate_at``, the drafted token goes through the speculative step
        from p to q', so that what stands there is drawn from q' (DESIGN: that is its law); at the first
        place where it does not, q decides.
        """
        if self.gates.escalate_below is not None:
            raise SamplingError(
                "the ratio convention looks at the token that was drawn, so a sampled text would not be q's; "
                "choose temperature 0 or a spec with calibrated gates"
            )
        assert block.laws is not None, "a sampled token comes with its law"
        assert self.gates.regenerate_at is not None, "the spec demands it"
        expected = said if said.said is None else DraftSaid(said.said.ids[:, 0], said.said, said.depth)
        _, own = self._scores(session, logits, expected)
        probs = scores.softmax(-1)  # [k + 1, vocabulary]
        trust = own >= self.gates.regenerate_at  # [k + 1]
        laws = torch.cat([block.laws, torch.zeros_like(probs[:1])])  # [k + 1, vocabulary]
        kept = leading_true(trust[trusted:-1])
        stands = accept_sampled(
            block.tokens[trusted:], laws[trusted:-1], probs[trusted:-1], chooser.uniforms(len(block) - trusted)
        )
        accepted = trusted + torch.minimum(kept, stands)
        drawn = draw(residual(probs[accepted], laws[accepted]), chooser.generator)
        return SlimRuling(accepted, trust[accepted], drawn, torch.cat([laws[:trusted], probs[trusted:]]))


def candidate_scores(
    gate: Gate, logits: Tensor, slim: Summary, said: DraftSaid, place: Tensor, pending: Tensor
) -> tuple[Tensor, Tensor]:
    """Slim-gate scores of the k drafted tokens [k] and of q's slim choices [k + 1].

    Args:
        logits: q' at the k places of the block and behind it, [k + 1, vocabulary].
        slim: their summary.
        place: place in the block, [k + 1].
        pending: tokens since the last decided one, [k + 1].
    """
    k = said.tokens.shape[0]
    inside, behind = slim[:k], slim[k:]
    accept = gate(slim_features(said.tokens, logits[:k], inside, said, place[:k], pending[:k]))
    own = gate(slim_features(inside.ids[:, 0], logits[:k], inside, said, place[:k], pending[:k]))
    last = gate(slim_features(behind.ids[:, 0], logits[k:], behind, None, place[k:], pending[k:]))
    return accept, torch.cat([own, last])
