"""Catch-up, which all strategies share: one pass of q over all that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import Tier, leading_true
from viasd_calib.decoding.drafting import Block, no_block
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.verification import TokenSampler, Verification
from viasd_calib.errors import NumericsError, SamplingError
from viasd_calib.passes.model_passes import FullPass, PassResult
from viasd_calib.passes.requests import Passes, Read
from viasd_calib.slim.argmax import largest_logit
from viasd_calib.spec import Audit


@dataclass(frozen=True)
class VerificationInputs:
    """What a full pass verifies: n pending and drafted tokens.

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


VerificationRule = Callable[[TokenSampler, VerificationInputs], Verification]
"""How q verifies pending and drafted tokens."""


def audited(audit: Audit, tolerance: float = 0.5) -> VerificationRule:
    """Put the pending tokens through an audit, and the drafted ones through the ordinary speculative rule."""

    def verify(sampler: TokenSampler, inputs: VerificationInputs) -> Verification:
        return sampler.verify(inputs.scores, inputs.tokens, inputs.proposal_probs, inputs.pending, audit, tolerance)

    return verify


lossless_rule = audited("strict")
"""The rule that keeps the text q's own."""


def catch_up(session: Session, block: Block, rule: VerificationRule = lossless_rule) -> Passes[None]:
    """One q pass over the pending tokens and a drafted block: audit, verify, and one token of q's own.

    The pending tokens are audited first. Where all are kept, q decides the block by the ordinary speculative
    rule; else the text is cut at the first refused token. Either way q's own token follows, unless the
    text is closed.

    Args:
        rule: how q verifies.

    Raises:
        NumericsError: q's logits are not finite.
        SamplingError: logits processors leave no token at a place that q decides.
    """
    # Full pass.
    start, pending = session.row.exact, session.pending
    text = torch.cat([session.text[: session.length], block.tokens])  # [start + width]
    width = text.shape[0] - start
    result: PassResult = yield FullPass(
        session.verifier, session.row, start, text[start:], wanted=width, taps=session.taps
    )
    session.counts.full_passes += 1

    # Audit and verify.
    scores = session.sampler.scores(result.logits, text)  # [width, vocabulary]
    inputs = VerificationInputs(scores, text[start + 1 :], _proposal_probs(session, block), pending, block)
    found = rule(session.sampler, inputs)
    finite, possible = _decidable(result.logits, scores)
    flags = torch.stack([finite.all(), leading_true(possible) > found.next_place(pending)]).long()
    # Beside the end of a text, the one place where the host waits for the device.
    kept, accepted, token, all_finite, next_possible, *drafted = yield Read(
        torch.cat([torch.stack([found.kept, found.accepted, found.next_token]), flags, block.tokens])
    )
    _refuse_not_finite(all_finite)
    session.note_audited(result.logits, kept)

    # Emit.
    kept_drafts = session.drafts_among(kept) + (accepted if kept == pending else 0)
    if kept < pending:
        refused = start + 1 + kept
        session.counts.rejected += session.drafted[refused - session.prompt_length]
        session.cut(refused)
    elif not session.closed:
        session.emit(block.tokens, drafted[:accepted], Tier.ESCALATE, drafted=True)
        session.counts.rejected += accepted < len(block) and not session.closed
    if not session.closed:
        _refuse_impossible(next_possible)
        session.emit(found.next_token[None], [token], Tier.ESCALATE, drafted=False)
    session.settle()  # q's own token has not been through q
    session.note_decided(kept_drafts)
    if session.drafter is not None:
        seen = session.row.exact
        session.drafter.observe(start, result.tapped[: seen - start])
        session.drafter.rollback(seen)


def choose_next(session: Session, logits: Tensor) -> Passes[tuple[Tensor, int]]:
    """The token after the text, by logits alone, as where nothing was drafted: on the device ([]) and on the host.

    Args:
        logits: of whichever model decides it, [1, vocabulary].

    Raises:
        NumericsError: logits that are not finite.
        SamplingError: logits processors leave no token.
    """
    block = no_block(session)
    scores = session.sampler.scores(logits, session.text[: session.length])  # [1, vocabulary]
    inputs = VerificationInputs(scores, block.tokens, _proposal_probs(session, block), 0, block)
    found = lossless_rule(session.sampler, inputs)
    flags = torch.cat(_decidable(logits, scores)).long()  # [2]
    token, finite, possible = yield Read(torch.cat([found.next_token[None], flags]))
    _refuse_not_finite(finite)
    _refuse_impossible(possible)
    return found.next_token, token


def _decidable(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of logits and of scores made from them, whether the logits are finite, and whether a token may follow.

    Both [rows], bool. Scores that are the logits themselves, as where no processor is asked, are read once.
    """
    finite = torch.isfinite(largest_logit(logits))
    return finite, finite if scores is logits else torch.isfinite(largest_logit(scores))


def _refuse_not_finite(finite: int) -> None:
    if not finite:
        raise NumericsError("the verifier's logits are not finite; load it in float32 or check its weights")


def _refuse_impossible(possible: int) -> None:
    """Refuse to emit q's own token where none is possible; the first of the vocabulary would be written."""
    if not possible:
        raise SamplingError(
            "the logits processors leave no token that may follow (all scores are -inf, or one is infinite or NaN); "
            "let them allow the end of the text, or mend their settings"
        )


def _proposal_probs(session: Session, block: Block) -> Tensor | None:
    """What pending and drafted tokens were drawn from, [tokens, vocabulary]; None when greedy."""
    if session.sampler.greedy:
        return None
    drafted = () if block.proposal_probs is None else block.proposal_probs.unbind()
    rows = [*session.proposal_probs, *drafted]
    return torch.stack(rows) if rows else session.text.new_zeros((0, session.verifier.config.vocab_size)).float()
