"""Drafting a block, and what the draft gate makes of it on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import leading_true
from viasd_calib.decoding.draws import looks_at_scores_alone
from viasd_calib.decoding.features import DraftStatistics, draft_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import LogitStatistics, join_statistics, logit_statistics
from viasd_calib.decoding.logit_statistics import CachedStatistics
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.top_k import TopKStatistics, top_k_of
from viasd_calib.draft.base import StopRule, never_stop
from viasd_calib.draft.combined import certain_logits
from viasd_calib.passes.requests import Passes, Read


@dataclass
class Watch:
    """The draft gate on a block that is being drafted.

    Attributes:
        depth: unverified tokens before the block's first.
        reader: reads the rows.
        scores: the gate's, of the tokens so far, [1] each.
    """

    gate: Gate
    stop_below: float
    depth: int
    reader: CachedStatistics = field(default_factory=CachedStatistics)
    scores: list[Tensor] = field(default_factory=list)
    _chance: Tensor | None = None

    def stop(self, logits: Tensor, place: int) -> Tensor:
        """A stop rule: after the token at which the chance that the whole block stands falls below ``stop_below``.

        That chance is the product of the scores: each is of a token given that all before it stand.
        """
        said = top_k_of(self.reader.read(logits, place), logits[None], 1)
        depths = torch.full((1,), self.depth + place, device=logits.device)
        score = self.gate(draft_features(DraftStatistics(said.ids[:, 0], said, depths)))  # [1]
        self.scores.append(score)
        self._chance = score if self._chance is None else self._chance * score
        return self._chance < self.stop_below


@dataclass(frozen=True)
class Block:
    """Drafted tokens on their way through the tiers.

    Attributes:
        tokens: [k], long; k may be 0.
        logits: the draft model's, [k, draft vocabulary]; None without a distribution.
        proposal_probs: what each token was drawn from, [k, vocabulary]; None when greedy.
        vocabulary: verifier ids of the logits' columns, [draft vocabulary]; None where they are the verifier's.
        watch: the draft gate that saw every token drafted; None where none did.
    """

    tokens: Tensor
    logits: Tensor | None = None
    proposal_probs: Tensor | None = None
    vocabulary: Tensor | None = None
    watch: Watch | None = None

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
    def reading(self) -> LogitStatistics | None:
        """What the logits say, [k]; None without a distribution."""
        if self.logits is None:
            return None
        return logit_statistics(self.logits) if self.watch is None else join_statistics(self.watch.reader.readings)

    def said(self, top: int) -> TopKStatistics | None:
        """The same as a summary of the ``top`` likeliest tokens; None where nothing is asked."""
        if top == 0 or self.logits is None or self.reading is None:
            return None
        return top_k_of(self.reading, self.logits, top, self.vocabulary)


def no_block(session: Session) -> Block:
    """A block without tokens."""
    return Block(session.text[:0])


def draft(session: Session, length: int, gate: Gate | None, stop_below: float) -> Passes[Block]:
    """Let the drafter propose up to ``length`` tokens, leaving room for q's own after them.

    Args:
        gate: predicts agreement; drafting stops where the whole block's chance falls below ``stop_below``.
    """
    assert session.drafter is not None, "this method needs a drafter"
    watch: Watch | None = None
    stop: StopRule = never_stop
    if gate is not None and stop_below > 0:
        watch = Watch(gate, stop_below, unverified(session))
        stop = watch.stop
    text = session.text[: session.length]
    reader = None if watch is None else watch.reader
    pick = session.sampler.picker(text, session.verifier.config.vocab_size, reader)
    proposal = yield from session.drafter.propose(text, draft_limit(session, length), stop, pick)
    if watch is not None and not 0 < len(proposal) == len(watch.scores):  # a looked-up block is not asked about
        watch = None
    return Block(proposal.tokens, proposal.logits, pick.proposal_probs(proposal.tokens), proposal.vocabulary, watch)


def allowed_only(session: Session, block: Block) -> Passes[Block]:
    """The leading tokens of a block that the logits processors allow.

    What looks tokens up asks no processor, and where nobody verifies, nobody else would.
    """
    sampler, tokens = session.sampler, block.tokens
    if len(block) == 0 or looks_at_scores_alone(sampler.processors):
        return block
    text = torch.cat([session.text[: session.length], tokens[:-1]])
    sure = certain_logits(tokens, session.verifier.config.vocab_size)  # no cut by mass takes the sure token away
    scores = sampler.scores(sure, text)  # [k, vocabulary]
    allowed = scores.gather(-1, tokens[:, None])[:, 0] > -torch.inf
    (count,) = yield Read(leading_true(allowed)[None])
    return block.front(count)


def draft_limit(session: Session, length: int) -> int:
    """Most tokens to draft, so that the text keeps room for q's own after them."""
    return max(min(length, session.room - 1), 0)


def unverified(session: Session) -> int:
    """Tokens of the text that neither q nor q' has seen, the last one not counted."""
    return session.length - 1 - session.row.provisional


def draft_statistics(session: Session, block: Block, top: int) -> DraftStatistics:
    """What the draft model said of a block after the text, with its ``top`` likeliest tokens."""
    depth = unverified(session) + torch.arange(len(block), device=session.text.device)  # [k]
    return DraftStatistics(block.tokens, block.said(top), depth)
