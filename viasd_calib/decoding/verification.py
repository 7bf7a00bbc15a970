"""How tokens are chosen and verified: greedily, or drawn so that the text keeps q's distribution."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from viasd_calib.decoding.acceptance import accept_greedy, accept_sampled, audit, residual, select_row
from viasd_calib.decoding.draws import draw, process_rows
from viasd_calib.decoding.logit_statistics import CachedStatistics, StatisticsPick
from viasd_calib.decoding.sampling import Sampling, seed_of_text
from viasd_calib.decoding.stateless import follow_text
from viasd_calib.draft.base import GreedyPick, Pick
from viasd_calib.slim.argmax import argmax
from viasd_calib.slim.parts.head_vocab import over_vocabulary
from viasd_calib.spec import Audit


@dataclass(frozen=True)
class Verification:
    """What q decides of pending and drafted tokens, as device scalars.

    Attributes:
        kept: leading pending tokens that are kept.
        accepted: leading drafted tokens that are accepted, if all pending ones are kept.
        next_token: q's token after the last of these.
    """

    kept: Tensor
    accepted: Tensor
    next_token: Tensor

    def next_place(self, pending: int) -> Tensor:
        """Place of ``next_token`` among the verified ones, a scalar: after the last token that is kept."""
        return next_place(self.kept, self.accepted, pending)


class TokenSampler(ABC):
    """Chooses tokens from logits, for p, q' and q alike.

    Args:
        processors: what logits go through, all of them, in their order.
    """

    greedy: ClassVar[bool]
    """Whether the most likely token is taken, and nothing drawn."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors

    def scores(self, logits: Tensor, text: Tensor) -> Tensor:
        """Processed logits [rows, vocabulary]; the last row follows all of ``text`` ([length])."""
        if self.greedy and not self.processors:
            return logits
        return process_rows(self.processors, logits, text)  # in float32: bfloat16 would bend the draws

    def begin(self, prompt_length: int) -> Self:
        """The sampler along one text with a prompt of so many tokens: processors that roll back follow it."""
        following = [follow_text(processor, prompt_length) for processor in self.processors]
        if all(one is other for one, other in zip(following, self.processors, strict=True)):
            return self
        sampler = copy.copy(self)
        sampler.processors = LogitsProcessorList(following)
        return sampler

    @abstractmethod
    def for_text(self, number: int) -> TokenSampler:
        """The sampler for the text of this number in a batch: what one text draws depends on no other text."""

    @abstractmethod
    def picker(self, text: Tensor, vocab_size: int, statistics: CachedStatistics | None = None) -> Pick:
        """How a drafter picks tokens that go on from ``text``.

        Args:
            statistics: of the block's rows, where something else reads them too.
        """

    @abstractmethod
    def verify(
        self, scores: Tensor, tokens: Tensor, proposal_probs: Tensor | None, pending: int, kind: Audit, tolerance: float
    ) -> Verification:
        """Verify pending tokens and the drafted ones after them.

        Args:
            scores: q's, processed, at the places of the tokens and after them, [tokens + 1, vocabulary].
            tokens: [tokens], the first ``pending`` of which are pending.
            proposal_probs: what each was drawn from, [tokens, vocabulary]; None when greedy.
        """


class GreedySampler(TokenSampler):
    """The most likely token; drafted tokens are accepted where they are q's choice."""

    greedy = True

    def for_text(self, number: int) -> GreedySampler:
        return self

    def picker(self, text: Tensor, vocab_size: int, statistics: CachedStatistics | None = None) -> Pick:
        if not self.processors:
            return GreedyPick() if statistics is None else StatisticsPick(statistics)
        return ProcessedPick(self, text, vocab_size)

    def verify(
        self, scores: Tensor, tokens: Tensor, proposal_probs: Tensor | None, pending: int, kind: Audit, tolerance: float
    ) -> Verification:
        choices = argmax(scores)  # [tokens + 1]
        kept = audit(tokens[:pending], scores[:pending], choices[:pending], kind, tolerance)
        accepted = accept_greedy(tokens[pending:], choices[pending:-1])
        return Verification(kept, accepted, select_row(choices, next_place(kept, accepted, pending)))


class RejectionSampler(TokenSampler):
    """Draws; under audit ``strict`` every text has the probability that q's processed logits give it.

    Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1, with p or q' in the place of the proposal.

    Args:
        generator: to draw with, on the device where logits are.
    """

    greedy = False

    def __init__(self, processors: LogitsProcessorList, generator: torch.Generator) -> None:
        super().__init__(processors)
        self.generator = generator

    def for_text(self, number: int) -> RejectionSampler:
        seed = seed_of_text(self.generator.initial_seed(), number)
        return RejectionSampler(self.processors, torch.Generator(self.generator.device).manual_seed(seed))

    def picker(self, text: Tensor, vocab_size: int, statistics: CachedStatistics | None = None) -> Pick:
        return ProcessedPick(self, text, vocab_size, self.generator)

    def uniforms(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1): [count], float32."""
        return torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float32)

    def verify(
        self, scores: Tensor, tokens: Tensor, proposal_probs: Tensor | None, pending: int, kind: Audit, tolerance: float
    ) -> Verification:
        assert proposal_probs is not None, "a sampled token comes with its proposal"
        probs = scores.softmax(-1)  # [tokens + 1, vocabulary]
        uniforms = self.uniforms(tokens.shape[0])
        if kind == "strict":
            kept = accept_sampled(tokens[:pending], proposal_probs[:pending], probs[:pending], uniforms[:pending])
        else:
            kept = audit(tokens[:pending], scores[:pending], argmax(scores[:pending]), kind, tolerance)
            proposal_probs = torch.cat(
                [torch.zeros_like(proposal_probs[:pending]), proposal_probs[pending:]]
            )  # q's token is drawn afresh
        accepted = accept_sampled(tokens[pending:], proposal_probs[pending:], probs[pending:-1], uniforms[pending:])
        return Verification(kept, accepted, self.draw_after(probs, proposal_probs, next_place(kept, accepted, pending)))

    def draw_after(self, probs: Tensor, proposal_probs: Tensor, place: Tensor) -> Tensor:
        """Draw the token at ``place``: from what is left of the target after a rejected token, else from all of it.

        Args:
            probs: the target, [n + 1, vocabulary].
            proposal_probs: what the n tokens before it were drawn from, [n, vocabulary].
            place: a scalar, 0 to n; n is after them all.
        """
        against = torch.cat([proposal_probs, torch.zeros_like(probs[:1])])  # [n + 1, vocabulary]
        return draw(residual(select_row(probs, place), select_row(against, place)), self.generator)


def next_place(kept: Tensor, accepted: Tensor, pending: int) -> Tensor:
    """Place of q's own token, a scalar, from what was kept of ``pending`` tokens and accepted after them.

    Example:
        >>> [next_place(torch.tensor(kept), torch.tensor(2), pending=3).item() for kept in (1, 3)]
        [1, 5]
    """
    return torch.where(kept < pending, kept, pending + accepted)


def verify_against(sampler: RejectionSampler, tokens: Tensor, proposal_probs: Tensor, target: Tensor) -> Verification:
    """The speculative rule on drafted tokens alone, against any target ([k + 1, vocabulary])."""
    accepted = accept_sampled(tokens, proposal_probs, target[:-1], sampler.uniforms(len(tokens)))
    return Verification(tokens.new_zeros(()), accepted, sampler.draw_after(target, proposal_probs, accepted))


def make_sampler(
    sampling: Sampling, processors: Sequence[LogitsProcessor] = (), device: torch.device | str = "cpu"
) -> TokenSampler:
    """The sampler for some settings.

    Args:
        processors: a user's own logits processors.
        device: where logits are.
    """
    generator = None if sampling.greedy else torch.Generator(device).manual_seed(sampling.seed)
    return sampler_of(sampling.processors(processors), generator)


def sampler_of(processors: LogitsProcessorList, generator: torch.Generator | None) -> TokenSampler:
    """The sampler for a ready-made list of processors.

    Args:
        generator: to draw with, on the device where logits are; None takes the most likely token.
    """
    return GreedySampler(processors) if generator is None else RejectionSampler(processors, generator)


@dataclass
class ProcessedPick(Pick):
    """Puts a drafter's logits through the processors, over the verifier's whole vocabulary.

    Attributes:
        generator: to draw with; None takes the most likely token.
    """

    sampler: TokenSampler
    text: Tensor
    vocab_size: int
    generator: torch.Generator | None = None
    _proposal_probs: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor, drafted: Sequence[Tensor], vocabulary: Tensor | None) -> Tensor:
        whole = over_vocabulary(logits[None], vocabulary, self.vocab_size)  # [1, vocabulary]
        scores = self.sampler.scores(whole, torch.cat([self.text, *drafted]))  # [1, vocabulary]
        if self.generator is None:
            return argmax(scores)
        self._proposal_probs.append(scores.softmax(-1))
        return draw(self._proposal_probs[-1], self.generator)

    def proposal_probs(self, tokens: Tensor) -> Tensor | None:
        if self.generator is None:
            return None
        if self._proposal_probs:
            return torch.cat(self._proposal_probs)
        # What picks its tokens by itself proposes with certainty.
        return torch.nn.functional.one_hot(tokens, self.vocab_size).float()
