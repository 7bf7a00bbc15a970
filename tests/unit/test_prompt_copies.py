"""Which prompts ask the same."""

from __future__ import annotations

import pytest

from viasd_calib.prompt_copies import SHORT, is_known, known_prompts, normalised_sha256, short_hashes, without_copies
from viasd_calib.prompts import Prompt


def prompt(*turns: str, **entries: object) -> Prompt:
    return Prompt.model_validate({"id": "a", "task": "qa", "turns": list(turns), **entries})


@pytest.mark.parametrize(
    "copy",
    [
        prompt("Why is the sky blue?", id="b", task="chat", reference="Rayleigh"),
        prompt("  Why is\n the\tsky   blue? "),
        prompt("WHY IS THE SKY BLUE?"),
        prompt("Why is the sky blue?", chat_template_kwargs={"enable_thinking": False}),
        prompt("Why is the\N{NO-BREAK SPACE}sky blue?"),
    ],
)
def test_a_copy_has_the_hash_of_its_original(copy: Prompt) -> None:
    original = prompt("Why is the sky blue?")
    assert normalised_sha256(copy) == normalised_sha256(original)
    assert without_copies([original, copy]) == [original]


def test_letters_may_be_written_in_two_ways() -> None:
    assert normalised_sha256(prompt("caf\N{LATIN SMALL LETTER E WITH ACUTE}")) == normalised_sha256(
        prompt("cafe\u0301")
    )


@pytest.mark.parametrize(
    "other",
    [
        prompt("Why is the sky red?"),
        prompt("Why is the sky blue?", "And at night?"),
        prompt("Whyis the sky blue?"),
        prompt("Why is the sky blue?", system="Be brief."),
        prompt(
            "Why is the sky blue?",
            messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        ),
    ],
)
def test_another_prompt_has_another(other: Prompt) -> None:
    original = prompt("Why is the sky blue?")
    assert normalised_sha256(other) != normalised_sha256(original)
    assert without_copies([original, other]) == [original, other]


def test_what_was_learned_from_is_known_by_its_text() -> None:
    original, copy, other = prompt("Why?"), prompt(" why? ", id="b"), prompt("How?")
    known = short_hashes([normalised_sha256(original), normalised_sha256(copy)])
    assert known == [normalised_sha256(original)[:SHORT]]
    assert known_prompts([copy, other, original], known) == [copy, original]
    assert not is_known(original, frozenset())


def test_traces_of_earlier_releases_know_a_prompt_as_it_was_written() -> None:
    original, copy = prompt("Why?"), prompt(" why? ")
    assert known_prompts([copy, original], short_hashes([original.sha256])) == [original]
