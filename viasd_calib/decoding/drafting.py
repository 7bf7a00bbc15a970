"""Drafting a block, and stopping early where the draft gate predicts a rejection."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import leading_true, stops_drafting
from viasd_calib.decoding.draws import ignore_text
from viasd_calib.decoding.features import DraftStatistics, draft_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import LogitStatistics, join_statistics, logit_statistics
from viasd_calib.decoding.logit_statistics import CachedStatistics
from viasd_calib.decoding.rolling_acceptance import RollingAcceptance, after_catch_up, length_now
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.top_k import TopKStatistics, top_k_of
from viasd_calib.draft.base import StopRule, never_stop
from viasd_calib.draft.combined import certain_logits
from viasd_calib.passes.requests import Passes, Read


@dataclass
class EarlyStop:
    """The draft gate on a block that is being drafted: stops where q is likely to reject a token of it.

    Attributes:
        depth: unverified tokens before the block's first.
        statistics: of the logits so far.
        scores: the gate's, of the tokens so far, [1] each, in [0, 1].
    """

    gate: Gate
    stop_below: float
    depth: int
    statistics: CachedStatistics = field(default_factory=CachedStatistics)
    scores: list[Tensor] = field(default_factory=list)
    _product: Tensor | None = None

    def stop(self, logits: Tensor, place: int) -> Tensor:
        """A stop rule: after the token at which P(q accepts the whole block) falls below ``stop_below``.

        It is the product of the scores: each is of a token given that all before it are accepted.
        """
        top = top_k_of(self.statistics.at(logits, place), logits[None], 1)
        depths = torch.full((1,), self.depth + place, device=logits.device)
        score = self.gate(draft_features(DraftStatistics(top.ids[:, 0], top, depths), self.gate.names))  # [1]
        self.scores.append(score)
        self._product = score if self._product is None else self._product * score
        return stops_drafting(self._product, self.stop_below)


@dataclass(frozen=True)
class Block:
    """Drafted tokens on their way through the tiers.

    Attributes:
        tokens: [k], long; k may be 0.
        logits: the draft model's, [k, draft vocabulary]; None without a distribution.
        proposal_probs: what each token was drawn from, [k, vocabulary]; None when greedy.
        vocabulary: verifier ids of the logits' columns, [draft vocabulary]; None where they are the verifier's.
        early_stop: the draft gate's scores and statistics of every token; None where it was not asked.
    """

    tokens: Tensor
    logits: Tensor | None = None
    proposal_probs: Tensor | None = None
    vocabulary: Tensor | None = None
    early_stop: EarlyStop | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def after(self, count: int) -> Block:
        """The block without its first ``count`` tokens."""
        return Block(
            self.tokens[count:],
            None if self.logits is None else self.logits[count:],
            None if self.proposal_probs is None else self.proposal_probs[count:],
            self.vocabulary,
        )

    def front(self, count: int) -> Block:
        """Its first ``count`` tokens."""
        if count == len(self):
            return self
        return Block(
            self.tokens[:count],
            None if self.logits is None else self.logits[:count],
            None if self.proposal_probs is None else self.proposal_probs[:count],
            self.vocabulary,
        )

    @cached_property
    def statistics(self) -> LogitStatistics | None:
        """Of the logits, [k]; None without a distribution."""
        if self.logits is None:
            return None
        if self.early_stop is None:
            return logit_statistics(self.logits)
        return join_statistics(self.early_stop.statistics.rows)

    def top_k(self, k: int) -> TopKStatistics | None:
        """The same with the ``k`` most likely tokens; None where k is 0, or without a distribution."""
        if k == 0 or self.logits is None or self.statistics is None:
            return None
        return top_k_of(self.statistics, self.logits, k, self.vocabulary)


def no_block(session: Session) -> Block:
    """A block without tokens."""
    text = session.text[:0]
    if session.sampler.greedy:
        return Block(text)
    return Block(text, proposal_probs=text.new_zeros((0, session.verifier.config.vocab_size)).float())


def draft(session: Session, length: int, gate: Gate | None, stop_below: float) -> Passes[Block]:
    """Let the drafter propose up to ``length`` tokens, leaving room for q's own after them.

    Args:
        gate: predicts agreement; drafting stops where P(q accepts the whole block) falls below ``stop_below``.
    """
    assert session.drafter is not None, "this strategy needs a drafter"
    early_stop: EarlyStop | None = None
    stop: StopRule = never_stop
    if gate is not None and stop_below > 0:
        early_stop = EarlyStop(gate, stop_below, unverified(session))
        stop = early_stop.stop
    text = session.text[: session.length]
    statistics = None if early_stop is None else early_stop.statistics
    pick = session.sampler.picker(text, session.verifier.config.vocab_size, statistics)
    proposal = yield from session.drafter.propose(text, draft_limit(session, length), stop, pick)
    if early_stop is not None and not 0 < len(proposal) == len(early_stop.scores):  # a looked-up block has no scores
        early_stop = None
    probs = pick.proposal_probs(proposal.tokens)
    session.drafts += len(proposal)
    return Block(proposal.tokens, proposal.logits, probs, proposal.vocabulary, early_stop)


def allowed_only(session: Session, block: Block) -> Passes[Block]:
    """The leading tokens of a block that the logits processors allow.

    Prompt lookup asks no processor, and without verification nothing else would.
    """
    sampler, tokens = session.sampler, block.tokens
    if len(block) == 0 or ignore_text(sampler.processors):
        return block
    text = torch.cat([session.text[: session.length], tokens[:-1]])
    certain = certain_logits(tokens, session.verifier.config.vocab_size)  # no cut by mass removes a certain token
    scores = sampler.scores(certain, text)  # [k, vocabulary]
    allowed = scores.gather(-1, tokens[:, None])[:, 0] > -torch.inf
    (count,) = yield Read(leading_true(allowed)[None])
    return block.front(count)


def watched_length(session: Session, length: int, pays_at: float | None) -> int:
    """Most tokens that a round drafts where drafting is watched: ``length``, or fewer where it has not paid.

    It is asked once a round, and follows from what q has decided before the round.

    Args:
        pays_at: the least share of drafted tokens that must be kept; None for ``length`` always.
    """
    found, session.decided_drafts = session.decided_drafts, None
    if pays_at is None or length == 0:
        return length
    state = session.acceptance or RollingAcceptance[float].begin(length)
    if found is not None:
        state = after_catch_up(state, found.drafted, found.kept, found.refused, length, pays_at)
    session.acceptance = state
    return int(length_now(state, length))


def draft_limit(session: Session, length: int) -> int:
    """Most tokens to draft, so that the text keeps room for q's own after them."""
    return max(min(length, session.room - 1), 0)


def unverified(session: Session) -> int:
    """Tokens of the text that neither q nor q' has seen, the last one not counted."""
    return session.length - 1 - session.row.provisional


def draft_statistics(session: Session, block: Block, top: int) -> DraftStatistics:
    """The draft model's statistics of a block after the text, with its ``top`` most likely tokens."""
    depth = unverified(session) + torch.arange(len(block), device=session.text.device)  # [k]
    return DraftStatistics(block.tokens, block.top_k(top), depth)
