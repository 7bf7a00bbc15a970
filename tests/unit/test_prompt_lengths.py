"""Every prompt is looked at before any is answered; the tiny verifier has 256 positions, its template takes three."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tiny
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.errors import PromptError
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.prompt_lengths import check_lengths, encode_turn, look_at_lengths, unused_template_arguments
from viasd_calib.prompts import Message, Prompt
from viasd_calib.slim.forward import RoutedModel


def of_words(id_: str, *counts: int) -> Prompt:
    return Prompt(id=id_, turns=[" ".join(["w1"] * count) for count in counts])


def test_all_prompts_that_do_not_fit_are_named_together(tiny_verifier: Verifier) -> None:
    short, long, later = of_words("short", 5), of_words("long", 300), of_words("later", 5, 250)
    with pytest.raises(PromptError) as caught:
        check_lengths(tiny_verifier, [short, long, short, later], 8)
    first, *lines = str(caught.value).split("\n  ")
    assert first == "2 of 4 prompts cannot be answered:"
    assert lines[0].startswith("prompt 'long' has 303 tokens; with 8 new ones it exceeds the verifier's context of 256")
    assert lines[1].startswith("prompt 'later' has 260 tokens")
    with pytest.raises(PromptError, match=r"^prompt 'long' has 303 tokens"):
        check_lengths(tiny_verifier, [short, long], 8)


def test_the_first_few_are_named_and_all_are_counted(tiny_verifier: Verifier) -> None:
    with pytest.raises(PromptError) as caught:
        check_lengths(tiny_verifier, [of_words(f"p{n}", 300 + n) for n in range(30)], 8)
    first, *lines, also = str(caught.value).split("\n  ")
    assert (first, len(lines)) == ("30 of 30 prompts cannot be answered:", 5)
    assert also.startswith("and 25 others: 'p5', 'p6', ")
    assert also.endswith("'p19', ...")


def test_a_prompt_that_just_fits(tiny_verifier: Verifier) -> None:
    found = look_at_lengths(tiny_verifier, [of_words("fits", 245), of_words("not", 246)], 8)
    assert (found.checked, [id_ for id_, _ in found.refused], found.may_end_early) == (2, ["not"], [])


def test_what_was_said_before_counts(tiny_verifier: Verifier) -> None:
    before = [Message(role="user", content="w1 " * 200), Message(role="assistant", content="w2")]
    prompt = Prompt(id="a", system="w3 " * 50, messages=before, turns=["w4"])
    assert look_at_lengths(tiny_verifier, [prompt], 8).refused
    assert not look_at_lengths(tiny_verifier, [prompt.model_copy(update={"system": "w3"})], 8).refused


def test_later_turns_may_find_no_room_behind_long_answers(tmp_path: Path) -> None:
    """Such a conversation ends before them; it is said beforehand and is no error."""
    verifier = load_verifier(str(save_tiny(tmp_path, eos=None)))
    prompt, other = of_words("long", 214, 10, 3), of_words("short", 5, 5, 5)
    assert check_lengths(verifier, [prompt, other], 20).may_end_early == ["long"]
    decoder = Decoder(RoutedModel(verifier.model), None, Autoregressive(), verifier.eos_ids)
    turns = list(converse(decoder, verifier, prompt, 20))
    assert 0 < len(turns) < 3
    answers = [str(verifier.tokenizer.decode(turn.generation.tokens, skip_special_tokens=True)) for turn in turns]
    assert encode_turn(verifier, prompt, answers, 20) is None
    assert encode_turn(verifier, prompt, answers[:-1], 20) == turns[-1].prompt_ids
    with pytest.raises(PromptError, match="with 200 new ones"):
        encode_turn(verifier, prompt, answers, 200)


def test_arguments_that_no_template_holds_are_named(tiny_verifier: Verifier, tmp_path: Path) -> None:
    prompts = [Prompt(id="a", turns=["w1"], chat_template_kwargs={name: 1}) for name in ("messages", "enable_thinkin")]
    assert unused_template_arguments(tiny_verifier, prompts) == ["enable_thinkin"]
    folder = save_tiny(tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert unused_template_arguments(load_verifier(str(folder)), prompts) == ["enable_thinkin", "messages"]
