"""The decoder: a verifier, a drafter and a strategy, ready to answer prompts."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.certified import CertifiedLength
from viasd_calib.decoding.ending import (
    Cancelled,
    Ending,
    InNewText,
    is_cancelled,
    latched,
    stop_string_criterion,
)
from viasd_calib.decoding.sampling import Sampling, read_sampling
from viasd_calib.decoding.session import (
    Counts,
    Generation,
    Session,
    keep_sessions,
    new_session,
    open_session,
    read_prompt,
)
from viasd_calib.decoding.stateless import follow_text, read_criteria, read_processors
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.verification import TokenSampler, make_sampler
from viasd_calib.draft.base import Drafter, TextDrafter
from viasd_calib.errors import MethodError, ModelError, SamplingError
from viasd_calib.models import Verifier
from viasd_calib.passes.requests import Passes, finish
from viasd_calib.passes.scheduling import run_together
from viasd_calib.slim.cache import check_context
from viasd_calib.slim.dropout import refuse_dropout
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.in_process import InProcess
from viasd_calib.token_ids import TokenIds, read_batch, read_count, read_token_ids


@dataclass(frozen=True)
class Emitted:
    """One final token of a stream."""

    token: int
    tier: Tier


class Decoder(InProcess):
    """Answers prompts with one strategy, any number of them at a time: in turns, or from several threads.

    What a text needs is its own: cache, draft state, counts, and when sampling a generator. Text number n, from 0 in
    the order in which texts are begun, is drawn with the seed ``seed_of_text(seed, n)``
    (:func:`~viasd_calib.decoding.sampling.seed_of_text`); a request that is to repeat whatever else is served gives its
    number, or takes a decoder of its own.

    Args:
        verifier: the opened verifier.
        drafter: the draft model; None for strategies that need none.
        strategy: what a round does.
        eos_ids: tokens that end a text.
        sampling: how tokens are chosen; greedily where it is left out.
        processors: a user's own logits processors, for p, q' and q alike.
        tokenizer: the verifier's; stop strings need it.
        sampler: a ready-made one, in place of ``sampling`` and ``processors``.
        certified_tokens: most new tokens that a certificate holds for, if texts may diverge; more give a warning.
        assume_stateless: accept processors and stopping criteria of one's own without proof that they are functions
            of what they are given; without it, those that may remember earlier calls are refused
            (:mod:`~viasd_calib.decoding.stateless`).
        judge: keep what each catch-up finds of the pending tokens that its audit keeps
            (``Generation.deficits``). It costs one difference of logits a token, and
            the host waits for it once, at the end of the text. Tokens that are pending there are seen by q in one more
            pass, under audit ``off`` too.

    Raises:
        ModelError: ``verifier`` is not opened.
        MethodError: ``judge``, and the strategy takes no audit.
        SamplingError: ``sampling`` or ``processors`` are of the wrong kind, or a processor may remember earlier calls;
            or ``judge``, and the most likely token is not what is taken.
    """

    def __init__(
        self,
        verifier: RoutedModel,
        drafter: Drafter | None,
        strategy: Strategy,
        eos_ids: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        processors: Sequence[LogitsProcessor] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampler: TokenSampler | None = None,
        certified_tokens: int | None = None,
        assume_stateless: bool = False,
        judge: bool = False,
    ) -> None:
        if isinstance(verifier, Verifier):
            raise ModelError(
                "Decoder takes a RoutedModel, not a Verifier; give engine.routed, or what load_routed makes"
            )
        self.verifier = verifier
        self.drafter = drafter if strategy.needs_drafter else None
        self.strategy = strategy
        self.eos_ids = eos_ids
        self.assume_stateless = assume_stateless
        self.sampler = sampler or make_sampler(
            read_sampling(sampling), read_processors(processors, assume_stateless), verifier.device
        )
        self.tokenizer = tokenizer
        self.judge = judge
        if judge:
            self._check_judged()
        self._certified = CertifiedLength(certified_tokens)
        self._numbers = itertools.count()  # of the texts that are begun

    def _check_judged(self) -> None:
        """Refuse to judge where catch-up does not see each token, or q's most likely one is not what is taken."""
        if not self.strategy.takes_audit:
            raise MethodError(
                f"texts of {self.strategy.name} cannot be judged while they are decoded: it takes no audit; "
                "use three_tier"
            )
        if not self.sampler.greedy or self.sampler.processors:
            raise SamplingError(
                "texts are judged where they are greedy and without logits processors alone; choose temperature 0 "
                "without other settings, or do not judge"
            )

    def __repr__(self) -> str:
        """In one line."""
        choice = "greedy" if self.sampler.greedy else "sampling"
        drafter = type(self.drafter).__name__ if self.drafter is not None else "no drafter"
        return f"Decoder({self.strategy.name}, audit={self.strategy.audit!r}, {choice}, {drafter})"

    def generate(
        self,
        prompt: TokenIds,
        max_new_tokens: int,
        *,
        stop_strings: str | Sequence[str] = (),
        criteria: Sequence[StoppingCriteria] = (),
        cancelled: Cancelled | None = None,
        number: int | None = None,
    ) -> Generation:
        """Decode one text.

        Args:
            prompt: token ids, at least one; a list, or a tensor of shape [length] or [1, length].
            max_new_tokens: most tokens to add.
            stop_strings: the text ends after the token that completes one of them in the new text.
            criteria: transformers' stopping criteria, on prompt and new text; which may run: see
                :mod:`~viasd_calib.decoding.stateless`.
            cancelled: asked once a round; what is final when it is true is the text.
            number: the text's own, from which its draws follow; the next one where it is left out.

        Raises:
            PromptError: the prompt is not the ids of one text or does not fit the context, another argument is of
                the wrong kind, or a stop string cannot be written.
            SamplingError: a stopping criterion may remember earlier calls, or logits processors leave no token.
            ModelError: a model is in training mode, where it would drop something out.
            NumericsError: the verifier's logits are not finite.
        """
        ids, count = self._read(prompt, max_new_tokens)
        ending = self._ending(len(ids), self._stop_criterion(stop_strings), criteria)
        session = self._open(ids, count, ending, self._sampler_of(number, len(ids)))
        while self._advance(session, cancelled):
            pass
        return self._result(session)

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[TokenIds] | Tensor,
        max_new_tokens: int,
        *,
        batch_size: int = 8,
        stop_strings: str | Sequence[str] = (),
        criteria: Sequence[StoppingCriteria] = (),
        cancelled: Cancelled | None = None,
    ) -> list[Generation]:
        """Decode texts together, each as :meth:`generate` decodes it alone.

        The texts share passes and a cache, and one that is finished leaves both. Greedily, each is the text that it is
        alone, with the same tiers and counts: in float32, and in bfloat16 where the kernels of backend ``native`` run
        all sublayers of verifier and draft model, as they give the same bits in a batch. Elsewhere in bfloat16 a near
        tie may be decided otherwise, as rounding differs between shapes. (Shallow drafters run as modules in a batch:
        where the kernels run the verifier, exact texts are the same with them, too; tiers and counts may differ.)

        Sampled, the text of ``prompts[n]`` is the one that a decoder with the seed ``seed_of_text(seed, n)`` draws for
        it first, whatever the batch size and whatever texts the decoder has begun before; under a plan whose policies
        differ by batch the batch size changes the draws, and their distribution stays q's.

        Args:
            prompts: token ids of each prompt, one at least; of any lengths.
            max_new_tokens: most tokens to add to each.
            batch_size: most texts at a time. The next batch begins when the last text of one is finished; prompts are
                taken in their order, so put those of like length together.
            stop_strings: as for :meth:`generate`.
            criteria: the same; each text is shown to them alone.
            cancelled: asked once a round of each text; once it is true, all texts end where they are final, those
                whose turn has not come with no token.

        Returns:
            A generation for each prompt, in their order.

        Raises:
            PromptError: as for :meth:`generate`, naming the prompt, or ``batch_size`` is below 1.
            ModelError: a model is in training mode, where it would drop something out.
            NumericsError: the verifier's logits are not finite; no text is returned.
        """
        self._refuse_dropout()
        size, count = read_count(batch_size, "batch_size"), read_count(max_new_tokens, "max_new_tokens")
        texts = read_batch(prompts, self.verifier.config.vocab_size)
        for ids in texts:
            check_context(self.verifier.config, len(ids) + count)
        self._certified.notice(count)
        stop = self._stop_criterion(stop_strings)
        endings = [self._ending(len(ids), stop, criteria) for ids in texts]
        asked = latched(cancelled)
        done: list[Generation] = []
        for begin in range(0, len(texts), size):
            numbers = range(begin, min(begin + size, len(texts)))
            if asked():
                done += [Generation([], [], [], Counts()) for _ in numbers]
                continue
            sessions = self._open_batch([texts[number] for number in numbers], count, endings, begin)
            self._decode_together(sessions, asked)
            done += [self._result(session) for session in sessions]
        return done

    def _open_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, endings: Sequence[Ending], begin: int
    ) -> list[Session]:
        """Sessions for the prompts from number ``begin`` on, over one cache; their prompts are read."""
        capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
        rows = self.verifier.new_cache(capacity, len(prompts)).rows()
        drafters: Sequence[TextDrafter | None] = [None] * len(prompts)
        if self.drafter is not None:
            drafters = self.drafter.start_rows(capacity, len(prompts))
        sessions = [
            new_session(
                self.verifier,
                drafter,
                prompt,
                len(prompt) + max_new_tokens,
                endings[number],
                self.sampler.for_text(number).begin(len(prompt)),
                row,
            )
            for number, (prompt, drafter, row) in enumerate(zip(prompts, drafters, rows, strict=True), begin)
        ]
        deque(run_together([read_prompt(session) for session in sessions]), maxlen=0)
        if self.judge:
            for session in sessions:
                session.judge()
        return sessions

    def _decode_together(self, sessions: Sequence[Session], cancelled: Cancelled | None) -> None:
        live = dict(enumerate(sessions))
        for ended in run_together([self._text(session, cancelled) for session in sessions]):
            for place in ended:
                del live[place]
            keep_sessions(list(live.values()))

    def _text(self, session: Session, cancelled: Cancelled | None) -> Passes[None]:
        """All rounds of an open session."""
        while not self._finished(session) and not is_cancelled(cancelled):
            yield from self.strategy.round(session)

    def _finished(self, session: Session) -> bool:
        """Whether no round is left; a judged text has one more where tokens are pending at its end."""
        return self.strategy.finished(session) and not (self.judge and session.pending)

    def _result(self, session: Session) -> Generation:
        """What is final of a text."""
        if not self._finished(session):
            session.cut(self.strategy.final_length(session))
        return session.result()

    def stream(
        self,
        prompt: TokenIds,
        max_new_tokens: int,
        *,
        stop_strings: str | Sequence[str] = (),
        criteria: Sequence[StoppingCriteria] = (),
        cancelled: Cancelled | None = None,
        number: int | None = None,
    ) -> Generator[Emitted, None, Generation]:
        """Decode one text and yield each token once it is final; arguments and errors as for :meth:`generate`.

        With audit ``off`` that is when it is emitted, otherwise once q has decided it. Wrong arguments are refused
        by the call itself. The iterator may be left or closed at any place, and others may be read in between. What
        ``yield from`` makes of it, once it is read to its end, is the text as :meth:`generate` would have returned it.
        """
        ids, count = self._read(prompt, max_new_tokens)
        ending = self._ending(len(ids), self._stop_criterion(stop_strings), criteria)
        return self._emitted(ids, count, ending, self._sampler_of(number, len(ids)), cancelled)

    def _read(self, prompt: TokenIds, max_new_tokens: int) -> tuple[list[int], int]:
        """A prompt's ids and the most tokens to add, in plain integers that fit the verifier."""
        self._refuse_dropout()
        ids = read_token_ids(prompt, self.verifier.config.vocab_size)
        count = read_count(max_new_tokens, "max_new_tokens")
        check_context(self.verifier.config, len(ids) + count)
        self._certified.notice(count)
        return ids, count

    def _refuse_dropout(self) -> None:
        networks = () if self.drafter is None else self.drafter.networks
        refuse_dropout((self.verifier.model, *self.verifier.slim_networks, *networks))

    def _sampler_of(self, number: int | None, prompt_length: int) -> TokenSampler:
        """Taken by the call, so that texts are numbered in the order of calls, not in that of first tokens."""
        return self.sampler.for_text(next(self._numbers) if number is None else number).begin(prompt_length)

    def _emitted(
        self, ids: list[int], count: int, ending: Ending, sampler: TokenSampler, cancelled: Cancelled | None
    ) -> Generator[Emitted, None, Generation]:
        """The tokens that each round makes final."""
        session, yielded = self._open(ids, count, ending, sampler), 0
        while self._advance(session, cancelled):
            final = self.strategy.final_length(session)
            tokens = session.text[session.prompt_length + yielded : final].tolist()
            yield from (Emitted(*pair) for pair in zip(tokens, session.tiers[yielded:], strict=False))
            yielded += len(tokens)
        return self._result(session)

    def _stop_criterion(self, stop_strings: str | Sequence[str]) -> StopStringCriteria | None:
        """Made once for all texts: it looks through the whole vocabulary."""
        return stop_string_criterion(self.tokenizer, stop_strings) if stop_strings else None

    def _ending(
        self, prompt_length: int, stop: StopStringCriteria | None, criteria: Sequence[StoppingCriteria]
    ) -> Ending:
        own = [] if stop is None else [InNewText(stop, prompt_length)]
        following = [follow_text(one, prompt_length + 1) for one in read_criteria(criteria, self.assume_stateless)]
        return Ending(self.eos_ids, StoppingCriteriaList([*following, *own]))

    # Plain functions, so that no text that waits for its next round holds the caller in inference mode.
    @torch.inference_mode()
    def _open(self, ids: list[int], count: int, ending: Ending, sampler: TokenSampler) -> Session:
        """A text whose prompt is read."""
        session = open_session(self.verifier, self.drafter, ids, count, ending, sampler)
        if self.judge:
            session.judge()
        return session

    @torch.inference_mode()
    def _advance(self, session: Session, cancelled: Cancelled | None) -> bool:
        """Run the next round; whether there was one to run."""
        if self._finished(session) or is_cancelled(cancelled):
            return False
        finish(self.strategy.round(session))
        return True
