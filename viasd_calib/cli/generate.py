"""``viasd generate``: answer one prompt, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from viasd_calib.choices import Backend, StrategyName
from viasd_calib.cli.notices import notice_uncertified
from viasd_calib.cli.printing import print_answer, print_tiers
from viasd_calib.devices import check_device
from viasd_calib.errors import PromptError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_spec, read_sampling_options
from viasd_calib.pipeline.numbers import Count, Nonnegative, OptionalCount, Positive, Seed, Share, ShareOrNone
from viasd_calib.prompts import Prompt
from viasd_calib.prompts.problems import complaints
from viasd_calib.spec import Audit, DType


def answer(
    spec: str,
    prompt: str,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_new_tokens: Count = 128,
    method: StrategyName = "three_tier",
    audit: Audit | None = None,
    show_tiers: bool = False,
    temperature: Nonnegative = 0.0,
    top_k: OptionalCount = 0,
    top_p: Share = 1.0,
    min_p: ShareOrNone = 0.0,
    repetition_penalty: Positive = 1.0,
    seed: Seed = 0,
    verifier: str | None = None,
    draft_model: str | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
    _load: lazy_types.LoadVerifier | None = None,
) -> None:
    """Answer a prompt with a routing spec, streaming each token once it is final.

    Args:
        spec: path of the routing spec.
        prompt: the user's turn.
        system: the system's message; where it is left out the chat template decides.
        chat_template_kwargs: what the chat template is told beside them, as JSON: '{"enable_thinking": false}'.
        max_new_tokens: longest answer.
        method: as in viasd bench.
        audit: in place of the spec's own.
        show_tiers: show which tier decided each token: by colour, or where the output is no terminal, in a line a
            token with the tier, a tab and the text as JSON.
        temperature: 0 takes the likeliest token.
        top_k: draw from so many of the likeliest tokens; 0 for all.
        top_p: draw from the smallest set of tokens with this share of the mass.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
        repetition_penalty: divides the scores of tokens that the text holds already.
        seed: of the draws.
        verifier: where to find the verifier, in place of the name in the spec.
        draft_model: the same for the draft model, where the spec names one.
        dtype: in place of the spec's.
        device: where models run.
        backend: what runs them: eager, packed (CPU) or compiled (minutes to compile first); the faster one of the
            first two where it is left out.
    """
    check_device(device)
    sampling = read_sampling_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    asked = command_line_prompt(prompt, system, chat_template_kwargs)
    spec, read = check_spec(spec, verifier, draft_model)

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.models import encode_prompt, load_verifier

    load = _load or load_verifier
    engine = load_engine(
        spec,
        spec=read,
        verifier=verifier,
        draft_model=draft_model,
        dtype=dtype,
        device=device,
        backend=backend,
        load=load,
    )
    if method == "three_tier":
        notice_uncertified(engine.spec, audit)
    decoder = engine.decoder(method, audit, sampling)
    ids = encode_prompt(engine.verifier, asked, [], max_new_tokens)
    engine.prepare_passes([len(ids) + max_new_tokens], slim=decoder.strategy.asks_slim)
    begin = time.perf_counter()
    answered = pieces(engine.verifier, decoder.stream(ids, max_new_tokens))
    if not show_tiers:
        print_answer(answered)
        return
    count = print_tiers(answered)
    print(f"{count} tokens, {count / (time.perf_counter() - begin):.1f} tokens/s", file=sys.stderr)


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
