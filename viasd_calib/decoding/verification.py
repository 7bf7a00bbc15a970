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

from viasd_calib.decoding.acceptance import accept_greedy, accept_sampled, audit, residual, row
from viasd_calib.decoding.draws import draw, process_rows
from viasd_calib.decoding.logit_statistics import CachedStatistics, StatisticsPick
from viasd_calib.decoding.sampling import Sampling, seed_of_text
from viasd_calib.decoding.stateless import led
from viasd_calib.draft.base import GreedyPick, Pick, likeliest
from viasd_calib.slim.parts.head_vocab import over_vocabulary
from viasd_calib.spec import Audit


@dataclass(frozen=True)
class Verdict:
    """What q says of pending and drafted tokens, as device scalars.

    Attributes:
        kept: leading pending tokens that stand.
        accepted: leading drafted tokens that stand, if all pending ones do.
        own: q's token after the last one that stands.
    """

    kept: Tensor
    accepted: Tensor
    own: Tensor

    def place(self, pending: int) -> Tensor:
        """Where q's own token stands among the judged places: after the last token that stands."""
        return own_place(self.kept, self.accepted, pending)


class TokenSampler(ABC):
    """Chooses tokens from logits, for p, q' and q alike.

    Args:
        processors: what logits go through, all of them, in their order.
    """

    greedy: ClassVar[bool]
    """Whether the likeliest token is taken, and nothing drawn."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors

    def scores(self, logits: Tensor, text: Tensor) -> Tensor:
        """Processed logits [rows, vocabulary]; the last row follows all of ``text`` ([length])."""
        if self.greedy and not self.processors:
            return logits
        return process_rows(self.processors, logits, text)  # in float32: bfloat16 would bend the draws

    def begin(self, prompt_length: int) -> Self:
        """The sampler along one text with a prompt of so many tokens: processors that roll back are led along it."""
        along = [led(processor, prompt_length) for processor in self.processors]
        if all(one is other for one, other in zip(along, self.processors, strict=True)):
            return self
        sampler = copy.copy(self)
        sampler.processors = LogitsProcessorList(along)
        return sampler

    @abstractmethod
    def for_text(self, number: int) -> TokenSampler:
        """The sampler for the text of this number in a batch: what one text draws hangs on no other text."""

    @abstractmethod
    def picker(self, text: Tensor, vocab_size: int, reader: CachedStatistics | None = None) -> Pick:
        """How a drafter picks tokens that go on from ``text``.

        Args:
            reader: what reads the rows of the block, where somebody looks at them beside the pick.
        """

    @abstractmethod
    def verify(
        self, scores: Tensor, tokens: Tensor, proposal_probs: Tensor | None, pending: int, kind: Audit, tolerance: float
    ) -> Verdict:
        """q's verdict on pending tokens and the drafted ones after them.

        Args:
            scores: q's, processed, at the places of the tokens and after them, [tokens + 1, vocabulary].
            tokens: [tokens], the first ``pending`` of which are pending.
            proposal_probs: what each was drawn from, [tokens, vocabulary]; None when greedy.
        """


class GreedySampler(TokenSampler):
    """The likeliest token; drafted tokens stand where they are q's choice."""

    greedy = True

    def for_text(self, number: int) -> GreedySampler:
        return self

    def picker(self, text: Tensor, vocab_size: int, reader: CachedStatistics | None = None) -> Pick:
        if not self.processors:
            return GreedyPick() if reader is None else StatisticsPick(reader)
        return ProcessedPick(self, text, vocab_size)

    def verify(
        self, scores: Tensor, tokens: Tensor, proposal_probs: Tensor | None, pending: int, kind: Audit, tolerance: float
    ) -> Verdict:
        choices = likeliest(scores)  # [tokens + 1]
        kept = audit(tokens[:pending], scores[:pending], choices[:pending], kind, tolerance)
        accepted = accept_greedy(tokens[pending:], choices[pending:-1])
        return Verdict(kept, accepted, row(choices, own_place(kept, accepted, pending)))


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

    def picker(self, text: Tensor, vocab_size: int, reader: CachedStatistics | None = None) -> Pick:
        return ProcessedPick(self, text, vocab_size, self.generator)

    def uniforms(self, count: int) -> Tensor:
        """Coins in [0, 1): [count]."""
        return torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float32)

    def verify(
        self, scores: Tensor, tokens: Tensor, proposal_probs: Tensor | None, pending: int, kind: Audit, tolerance: float
    ) -> Verdict:
        assert proposal_probs is not None, "a sampled token comes with its proposal"
        probs = scores.softmax(-1)  # [tokens + 1, vocabulary]
        uniforms = self.uniforms(tokens.shape[0])
        if kind == "strict":
            kept = accept_sampled(tokens[:pending], proposal_probs[:pending], probs[:pending], uniforms[:pending])
        else:
            kept = audit(tokens[:pending], scores[:pending], likeliest(scores[:pending]), kind, tolerance)
            proposal_probs = torch.cat(
                [torch.zeros_like(proposal_probs[:pending]), proposal_probs[pending:]]
            )  # q's token is drawn afresh
        accepted = accept_sampled(tokens[pending:], proposal_probs[pending:], probs[pending:-1], uniforms[pending:])
        return Verdict(kept, accepted, self.draw_after(probs, proposal_probs, own_place(kept, accepted, pending)))

    def draw_after(self, probs: Tensor, proposal_probs: Tensor, place: Tensor) -> Tensor:
        """Draw the token at ``place``: from what is left of the target where a token has fallen, else from all of it.

        Args:
            probs: the target, [n + 1, vocabulary].
            proposal_probs: what the n tokens before it were drawn from, [n, vocabulary].
            place: a scalar, 0 to n; n stands after them all.
        """
        against = torch.cat([proposal_probs, torch.zeros_like(probs[:1])])  # [n + 1, vocabulary]
        return draw(residual(row(probs, place), row(against, place)), self.generator)


def own_place(kept: Tensor, accepted: Tensor, pending: int) -> Tensor:
    """Where q's own token stands, a scalar, from a verdict's counts and how many tokens were pending."""
    return torch.where(kept < pending, kept, pending + accepted)


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
        generator: to draw with, on the device where logits are; None takes the likeliest token.
    """
    return GreedySampler(processors) if generator is None else RejectionSampler(processors, generator)


@dataclass
class ProcessedPick(Pick):
    """Puts a drafter's logits through the processors, over the verifier's whole vocabulary.

    Attributes:
        generator: to draw with; None takes the likeliest token.
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
            return likeliest(scores)
        self._proposal_probs.append(scores.softmax(-1))
        return draw(self._proposal_probs[-1], self.generator)

    def proposal_probs(self, tokens: Tensor) -> Tensor | None:
        if self.generator is None:
            return None
        if self._proposal_probs:
            return torch.cat(self._proposal_probs)
        # A drafter that asks nobody proposes with certainty.
        return torch.nn.functional.one_hot(tokens, self.vocab_size).float()
