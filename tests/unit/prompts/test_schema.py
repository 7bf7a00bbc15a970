from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from viasd_calib.prompts import Message, Prompt, SplitShares, split_of
from viasd_calib.prompts.schema import DECIDED_HERE, LONGEST_TEXT

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "So."}
AGAIN = {"role": "user", "content": "And then?"}


def prompt(**fields: Any) -> Prompt:
    return Prompt(**{"id": "a", **fields})


@pytest.mark.parametrize(
    ("turns", "sha256"),
    [
        (["Why?"], "e554f91c2648e1b7936869efb3de6d7e630c5f53823d774f8212cfe94d3b440f"),
        (["Größe\n", "And then?"], "c8f640b3a87036c170497a59b4ed4183faf211c18340e7173bb1a802bf353909"),
    ],
)
def test_prompts_of_turns_alone_keep_the_hash_of_every_release(turns: list[str], sha256: str) -> None:
    found = prompt(turns=turns, task="qa", reference={"any": 1})
    assert found.sha256 == sha256
    assert prompt(turns=turns, system=None, messages=[], chat_template_kwargs={}).sha256 == sha256
    assert split_of(found.sha256, SplitShares()) == split_of(sha256, SplitShares())


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "Be brief."},
        {"system": ""},
        {"messages": [ASKED, ANSWERED]},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_is_asked_counts_towards_the_hash(fields: dict[str, Any]) -> None:
    one = prompt(turns=["Why?"], **fields)
    assert one.sha256 != prompt(turns=["Why?"]).sha256
    assert one.sha256 == Prompt(id="b", task="qa", reference=3, turns=["Why?"], **fields).sha256
    assert one.sha256 == Prompt.model_validate_json(one.model_dump_json()).sha256


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASKED], {"turns": ["Why?"]}),
        ([SYSTEM, ASKED], {"turns": ["Why?"], "system": "Be brief."}),
        ([ASKED, ANSWERED], {"turns": ["Why?"], "reference": "So."}),
        (
            [SYSTEM, ASKED, ANSWERED, AGAIN],
            {"turns": ["And then?"], "system": "Be brief.", "messages": [ASKED, ANSWERED]},
        ),
    ],
)  # fmt: skip
def test_a_whole_conversation_is_taken_apart(messages: list[dict[str, str]], expected: dict[str, Any]) -> None:
    """And is the same prompt as one whose parts were given."""
    whole = prompt(messages=messages)
    assert whole == prompt(**expected)
    assert whole == prompt(messages=[Message.model_validate(one) for one in messages])
    assert whole.sha256 == prompt(**expected).sha256


def test_a_reference_of_its_own_is_kept() -> None:
    assert prompt(messages=[ASKED, ANSWERED], reference="mine").reference == "mine"


def test_the_conversation_up_to_each_turn() -> None:
    asked = prompt(system="Be brief.", messages=[ASKED, ANSWERED], turns=["And then?", "Last?"])
    before = [SYSTEM, ASKED, ANSWERED, AGAIN]
    assert asked.conversation([]) == before
    answered = {"role": "assistant", "content": "This."}
    assert asked.conversation(["This."]) == [*before, answered, {"role": "user", "content": "Last?"}]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"messages": [ANSWERED]}, "turns"),
        ({"messages": [SYSTEM]}, "turns"),
        ({"messages": [ASKED, ANSWERED, ANSWERED]}, "turns"),
        ({"messages": [SYSTEM, ASKED], "system": "Other."}, "keep one of them"),
        ({"messages": [ASKED], "turns": ["And then?"]}, "put it into turns"),
        ({"messages": [{"role": "tool", "content": "3"}, ASKED]}, r"messages\.0\.role"),
        ({"messages": [{**ASKED, "name": "me"}]}, r"messages\.0\.name"),
        ({"turns": [" \n"]}, "is blank"),
        ({"turns": ["a\0b"]}, "NUL"),
        ({"turns": ["\ud83d"]}, "half a character"),
        ({"turns": ["a" * (LONGEST_TEXT + 1)]}, "characters, more than"),
        ({"turns": ["Why?"], "sytem": "Be brief."}, "sytem"),
        *[({"turns": ["Why?"], "chat_template_kwargs": {name: 1}}, "the decoder decides") for name in DECIDED_HERE],
    ],
)
def test_what_is_no_prompt_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        prompt(**fields)
