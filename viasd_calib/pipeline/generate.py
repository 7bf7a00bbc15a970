"""One prompt, answered token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from viasd_calib.devices import check_device
from viasd_calib.errors import PromptError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_audit, check_spec, read_sampling_options
from viasd_calib.pipeline.notices import notice_uncertified
from viasd_calib.pipeline.opening import open_engine
from viasd_calib.pipeline.options import GenerateOptions
from viasd_calib.prompts import Prompt
from viasd_calib.prompts.problems import complaints


def answer(options: GenerateOptions, load: lazy_types.LoadVerifier | None = None) -> Iterator[tuple[str, str | None]]:
    """Answer a prompt; what is wrong with the options is said, and models are loaded, before this returns.

    Returns:
        The text that each token settles, with the name of its tier; at the end what was held back, with None.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    check_device(options.device)
    check_audit(options.audit, [options.method])
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = read_sampling_options(**{name: getattr(options, name) for name in names})
    asked = command_line_prompt(options.prompt, options.system, options.chat_template_kwargs)
    path, spec = check_spec(options.spec, options.verifier, options.draft_model)

    from viasd_calib.models import encode_prompt

    engine = open_engine(path, spec, options, load, options.backend, [options.method])
    if options.method == "three_tier":
        notice_uncertified(engine.spec, options.audit)
    decoder = engine.decoder(options.method, options.audit, sampling)
    ids = encode_prompt(engine.verifier, asked, [], options.max_new_tokens)
    engine.prepare_passes([len(ids) + options.max_new_tokens], slim=decoder.strategy.asks_slim)
    return pieces(engine.verifier, decoder.stream(ids, options.max_new_tokens))


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
