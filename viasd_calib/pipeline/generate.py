"""One prompt, answered token by token; or the prompts of a file, one after the other."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from viasd_calib.devices import check_device
from viasd_calib.errors import PromptError, UsageError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_audit, check_spec, read_sampling_options
from viasd_calib.pipeline.logged import LoggedDecoding, check_log
from viasd_calib.pipeline.notices import notice, notice_uncertified
from viasd_calib.pipeline.opening import open_engine
from viasd_calib.pipeline.options import GenerateOptions
from viasd_calib.pipeline.prompt_choice import check_prompts
from viasd_calib.prompts import Prompt, read_prompt_file
from viasd_calib.prompts.problems import complaints


def answer(options: GenerateOptions, load: lazy_types.LoadVerifier | None = None) -> Iterator[tuple[str, str | None]]:
    """Answer a prompt; what is wrong with the options is said, and models are loaded, before this returns.

    Returns:
        The text that each token settles, with the name of its tier; at the end what was held back, with None.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    if options.prompt is None:
        raise UsageError("--prompt is missing; give it, or --prompts with a file of them")
    asked = command_line_prompt(options.prompt, options.system, options.chat_template_kwargs)
    answering = _Answering(options, load)

    from viasd_calib.models import encode_prompt

    ids = encode_prompt(answering.engine.verifier, asked, [], options.max_new_tokens)
    decoder = answering.decoder
    answering.prepare_passes([len(ids) + options.max_new_tokens])
    stream = answering.logged(asked, ids, decoder.stream(ids, options.max_new_tokens))
    return pieces(answering.engine.verifier, stream)


def answer_file(
    options: GenerateOptions, load: lazy_types.LoadVerifier | None = None
) -> Iterator[tuple[Prompt, list[str]]]:
    """Answer the prompts of a file, in their order; refusals as for :func:`answer`.

    Returns:
        Each prompt with the answers to its turns, once they are written and, with a log, logged.
    """
    if options.prompts is None or options.prompt is not None:
        raise UsageError("give --prompt or --prompts, one of them")
    for name in ("system", "chat_template_kwargs", "show_tiers"):
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} is for --prompt alone; leave it out with --prompts")
    found = read_prompt_file(options.prompts)
    for line in found.describe()[1:]:
        notice(line)
    prompts = found.prompts[: options.limit]
    answering = _Answering(options, load)

    from viasd_calib.models import encode_prompt

    verifier = answering.engine.verifier
    check_prompts(verifier, prompts, options.max_new_tokens)
    first_turns = [encode_prompt(verifier, prompt, [], options.max_new_tokens) for prompt in prompts]
    answering.prepare_passes([len(ids) + options.max_new_tokens for ids in first_turns])
    return (answering.answers(prompt) for prompt in prompts)


class _Answering:
    """A loaded engine, and the decoder of the next text: without a log always the same.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """

    def __init__(self, options: GenerateOptions, load: lazy_types.LoadVerifier | None) -> None:
        check_device(options.device)
        check_audit(options.audit, [options.method])
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        sampling = read_sampling_options(**{name: getattr(options, name) for name in names})
        path, spec = check_spec(options.spec, options.verifier, options.draft_model)
        monitor = check_log(options, sampling, spec)
        self._max_new_tokens = options.max_new_tokens
        self.engine = open_engine(path, spec, options, load, options.backend, [options.method])
        if options.method == "three_tier":
            notice_uncertified(self.engine.spec, options.audit)
        self._log: LoggedDecoding | None = None
        if options.log is not None and monitor is not None:
            fallback = options.fallback == "strict"
            self._log = LoggedDecoding(
                self.engine,
                options.log,
                monitor,
                audit=options.audit,
                fallback=fallback,
                drafting_pays_at=options.drafting_pays_at,
            )
        else:
            self._decoder = self.engine.decoder(
                options.method, options.audit, sampling, drafting_pays_at=options.drafting_pays_at
            )

    @property
    def decoder(self) -> lazy_types.Decoder:
        """For the next text."""
        return self._decoder if self._log is None else self._log.decoder

    def prepare_passes(self, lengths: Iterable[int]) -> None:
        """For texts of these lengths."""
        self.engine.prepare_passes(lengths, slim=self.decoder.strategy.asks_slim)

    def logged(
        self, prompt: Prompt, ids: list[int], stream: Generator[lazy_types.Emitted, None, lazy_types.Generation]
    ) -> Iterator[lazy_types.Emitted]:
        """The tokens of the answer to one turn; at its end it is logged, where there is a log."""
        from viasd_calib.decoding.conversation import Turn

        generation = yield from stream
        if self._log is not None:
            self._log.add(prompt, [Turn(ids, generation)])

    def answers(self, prompt: Prompt) -> tuple[Prompt, list[str]]:
        """Answer a prompt's turns, and log them, where there is a log."""
        from viasd_calib.decoding.conversation import converse

        verifier = self.engine.verifier
        turns = list(converse(self.decoder, verifier, prompt, self._max_new_tokens))
        if self._log is not None:
            self._log.add(prompt, turns)
        decode = verifier.tokenizer.decode
        return prompt, [str(decode(turn.generation.tokens, skip_special_tokens=True)) for turn in turns]


def command_line_prompt(
    turn: str, system: str | None = None, chat_template_kwargs: dict[str, Any] | None = None, option: str = "--prompt"
) -> Prompt:
    """What is asked on the command line.

    Args:
        option: that the turn was given with.

    Raises:
        PromptError: it is blank or no text, or the template's arguments are none; the option is named.
    """
    if not turn.strip():
        raise PromptError(f"{option} is empty; give it some text")
    fields = {"turns": [turn], "system": system, "chat_template_kwargs": chat_template_kwargs}
    try:
        return Prompt.model_validate({"id": "command line", **fields})
    except ValidationError as error:
        options = {"turns.0": option, "system": "--system", "chat_template_kwargs": "--chat-template-kwargs"}
        found = []
        for said in complaints(error, fields):
            field, rest = said.split(" ", 1)
            found.append(f"{options.get(field, field)} {rest}")
        raise PromptError("; ".join(found)) from error


def pieces(verifier: lazy_types.Verifier, stream: Iterable[lazy_types.Emitted]) -> Iterator[tuple[str, str | None]]:
    """The text that each token settles, with the name of its tier, and at the end what was held back, with None."""
    from viasd_calib.decoding.text_stream import TextStream

    text = TextStream(verifier.tokenizer)
    for emitted in stream:
        yield text.push(emitted.token), emitted.tier.name.lower()
    yield text.finish(), None
