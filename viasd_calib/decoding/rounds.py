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

from viasd_calib.decoding.features import DraftSaid, draft_features, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.policies import (
    SlimVerdict,
    Tier,
    accept_by_draft,
    accept_greedy,
    audit,
    judge_calibrated,
    judge_ratio,
)
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.summary import Summary, summarize
from viasd_calib.draft.base import Proposal, StopRule, never_stop
from viasd_calib.errors import NumericsError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.spec import Audit, Gates

SUMMARY_TOP = 16
"""Tokens of p's distribution that features look at; traces hold as many."""


def catch_up(session: Session, block: Tensor, kind: Audit = "strict", tolerance: float = 0.5) -> None:
    """One q pass over the pending tokens and a drafted block: audit, verify, and one token of q's own.

    The pending tokens are audited first. Where all stand, q's greedy choices decide the block by the
    ordinary speculative rule; else the text is cut at the first offending token. Either way q's own token
    follows, unless the text is closed.

    Args:
        block: drafted tokens behind the text, [k], long; k may be 0.

    Raises:
        NumericsError: q's logits are not finite.
    """
    start, pending, drafted = session.cache.exact, session.pending, block.shape[0]
    ids = torch.cat([session.text[start : session.length], block])  # [width]
    width = ids.shape[0]
    states = session.verifier.full(ids[None], CacheWindow(session.cache, start, width, start + width), session.taps)
    logits = session.verifier.logits(states.last[0])  # [width, vocabulary]
    session.counts.full_passes += 1

    choices = logits.argmax(-1)  # [width]
    kept = audit(session.text[start + 1 : session.length], logits[:pending], kind, tolerance)
    accepted = accept_greedy(block, choices[pending : pending + drafted])
    finite = torch.isfinite(logits.amax(-1)).all()
    # The one place where the host waits for the device.
    n_kept, n_accepted, is_finite, *values = torch.cat(
        [torch.stack([kept, accepted, finite.long()]), choices, block]
    ).tolist()
    if not is_finite:
        raise NumericsError("the verifier's logits are not finite; load it in float32 or check its weights")

    if n_kept < pending:
        offending = start + 1 + n_kept
        session.counts.rejected += session.drafted[offending - session.prompt_length]
        session.cut(offending)
        session.emit(choices[n_kept:], values[n_kept : n_kept + 1], Tier.ESCALATE, drafted=False)
    elif not session.closed:
        session.emit(block, values[width : width + n_accepted], Tier.ESCALATE, drafted=True)
        session.counts.rejected += n_accepted < drafted and not session.closed
        bonus = pending + n_accepted
        session.emit(choices[bonus:], values[bonus : bonus + 1], Tier.ESCALATE, drafted=False)
    seen = session.length - 1  # q's own token has not been through q
    session.cache.mark_exact(seen)
    if session.drafter is not None:
        session.drafter.observe(start, states.tapped[0, : seen - start])
        session.drafter.rollback(seen)


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
        catch_up(session, session.text[:0])


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
        catch_up(session, draft(session, self.draft_length, self.gate, self.stop_below).tokens)


def draft(session: Session, length: int, gate: Gate | None, stop_below: float) -> Proposal:
    """Let the drafter propose up to ``length`` tokens, leaving room for q's own behind them."""
    assert session.drafter is not None, "this method needs a drafter"
    limit = max(min(length, session.room - 1), 0)
    stop: StopRule = never_stop
    if gate is not None and stop_below > 0:
        stop = confidence_stop(gate, stop_below, unverified(session), session.drafter.vocabulary)
    return session.drafter.propose(session.text[: session.length], limit, stop)


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
            self._catch_up(session, session.text[:0])
            return
        proposal = draft(session, self.draft_length, self.draft_gate, self.gates.draft_stop_below)
        block = proposal.tokens
        if session.pending + len(proposal) + 1 > self.max_pending:
            self._catch_up(session, block)
            return
        said = self._draft_said(session, proposal)
        trusted = self._trusted(said)
        if len(proposal) and trusted == len(proposal):
            session.emit(block, block.tolist(), Tier.ACCEPT, drafted=True)
            return
        self._slim_round(session, block, said, trusted)

    def _catch_up(self, session: Session, block: Tensor) -> None:
        catch_up(session, block, self.audit, self.tolerance)

    def _draft_said(self, session: Session, proposal: Proposal) -> DraftSaid:
        assert session.drafter is not None, "this method needs a drafter"
        k = len(proposal)
        depth = unverified(session) + torch.arange(k, device=session.text.device)  # [k]
        said = None
        if proposal.logits is not None:
            said = summarize(proposal.logits, SUMMARY_TOP, session.drafter.vocabulary)
        return DraftSaid(proposal.tokens, said, depth)

    def _trusted(self, said: DraftSaid) -> int:
        """Leading drafted tokens that the draft gate accepts unverified."""
        if self.draft_gate is None or self.gates.draft_accept_at > 1 or len(said.tokens) == 0:
            return 0
        return int(accept_by_draft(self.draft_gate(draft_features(said)), self.gates.draft_accept_at))

    def _slim_round(self, session: Session, block: Tensor, said: DraftSaid, trusted: int) -> None:
        """Run q' over what it has not seen and the block; keep, regenerate or escalate."""
        start, k = session.cache.provisional, block.shape[0]
        ids = torch.cat([session.text[start : session.length], block])  # [width]
        width = ids.shape[0]
        window = CacheWindow(session.cache, start, width, start + width)
        states = session.verifier.slim(ids[None], window, session.taps)
        logits = session.verifier.logits(states.last[0, session.length - 1 - start :])  # [k + 1, vocabulary]
        session.counts.slim_passes += 1
        verdict, choices = self._judge(session, logits, said, trusted)
        accepted, regenerate, *values = torch.cat(
            [torch.stack([verdict.accepted, verdict.regenerate.long()]), choices, block]
        ).tolist()

        session.emit(block, values[k + 1 : k + 1 + accepted], Tier.ACCEPT, drafted=True)
        if regenerate and not session.closed:
            agrees = accepted < k and values[accepted] == values[k + 1 + accepted]
            session.counts.rejected += accepted < k and not agrees
            session.emit(choices[accepted:], values[accepted : accepted + 1], Tier.REGENERATE, drafted=agrees)
        self._note_seen(session, start, states.tapped[0])
        if not regenerate and not session.closed:
            rest = block[accepted:]
            if accepted == k:  # q' is unsure of the next token: give q a fresh block to judge with it
                rest = draft(session, self.draft_length, self.draft_gate, self.gates.draft_stop_below).tokens
            self._catch_up(session, rest)

    def _note_seen(self, session: Session, start: int, tapped: Tensor) -> None:
        """Record how far q' has seen the text: all but its last token, which opens the next pass."""
        seen = session.length - 1
        session.cache.mark_provisional(seen)
        assert session.drafter is not None, "this method needs a drafter"
        session.drafter.observe(start, tapped[: seen - start])
        session.drafter.rollback(seen)

    def _judge(self, session: Session, logits: Tensor, said: DraftSaid, trusted: int) -> tuple[SlimVerdict, Tensor]:
        """The slim tier's verdict on a block, and q's slim choices [k + 1]."""
        k = said.tokens.shape[0]
        slim = summarize(logits, 2)
        choices = slim.ids[:, 0]  # [k + 1]
        if self.gates.escalate_below is not None:
            own = logits[:k].float().gather(-1, said.tokens[:, None])[:, 0]
            ratio = own - logits[:k].float().amax(-1)  # log r, [k]
            ratio[:trusted] = 0.0
            return judge_ratio(ratio, self.gates.accept_at, self.gates.escalate_below), choices
        assert self.slim_gate is not None, "the spec demands it"
        assert self.gates.regenerate_at is not None, "the spec demands it"
        place = torch.arange(k + 1, device=logits.device)
        accept, own = candidate_scores(self.slim_gate, logits, slim, said, place, session.pending + place)
        accept[:trusted] = 1.0
        return judge_calibrated(accept, own, self.gates.accept_at, self.gates.regenerate_at), choices


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
