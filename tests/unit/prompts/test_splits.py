from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from viasd_calib.prompts import Prompt, Split, SplitShares, select_split, split_of, split_sha256

SPLITS: tuple[Split, ...] = get_args(Split)


def spoken() -> st.SearchStrategy[str]:
    """Texts that are more than white space."""
    return st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def shares() -> st.SearchStrategy[SplitShares]:
    cuts = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
    return cuts.map(lambda c: SplitShares(fit=c[0], calibrate=c[1] - c[0], test=1 - c[1]))


@given(texts=st.lists(spoken(), min_size=1, unique=True), shares=shares())
def test_every_prompt_is_in_exactly_one_split(texts: list[str], shares: SplitShares) -> None:
    prompts = [Prompt(id=str(number), task="qa", turns=[text]) for number, text in enumerate(texts)]
    chosen = [prompt.id for split in SPLITS for prompt in select_split(prompts, split, shares)]
    assert Counter(chosen) == Counter(prompt.id for prompt in prompts)


@given(turns=st.lists(spoken(), min_size=1), id_=spoken(), task=spoken(), shares=shares())
def test_the_split_follows_from_the_turns_alone(turns: list[str], id_: str, task: str, shares: SplitShares) -> None:
    one = Prompt(id="a", task="qa", turns=turns, reference="r")
    other = Prompt(id=id_, task=task, turns=list(turns))
    assert one.sha256 == other.sha256
    assert split_of(one.sha256, shares) == split_of(other.sha256, shares)


@given(one=st.lists(spoken(), min_size=1), other=st.lists(spoken(), min_size=1))
def test_other_turns_have_another_hash(one: list[str], other: list[str]) -> None:
    same = Prompt(id="a", task="qa", turns=one).sha256 == Prompt(id="a", task="qa", turns=other).sha256
    assert same == (one == other)


def test_the_split_is_the_same_in_every_release() -> None:
    """Certificates and shipped checkpoints rest on it."""
    prompts = [Prompt(id=str(number), task="qa", turns=[f"question {number}"]) for number in range(8)]
    splits = [split_of(prompt.sha256, SplitShares()) for prompt in prompts]
    assert splits == ["fit", "fit", "fit", "calibrate", "test", "fit", "fit", "calibrate"]


def test_shares_are_held_roughly() -> None:
    prompts = [Prompt(id=str(number), task="qa", turns=[str(number)]) for number in range(2000)]
    shares = SplitShares(fit=0.2, calibrate=0.5, test=0.3)
    found = {split: len(select_split(prompts, split, shares)) / 2000 for split in SPLITS}
    assert found == pytest.approx({"fit": 0.2, "calibrate": 0.5, "test": 0.3}, abs=0.05)


@pytest.mark.parametrize("entries", [{"fit": 0.5}, {"fit": -0.1, "calibrate": 0.6, "test": 0.5}, {"train": 0.2}])
def test_refuses_shares_that_are_none(entries: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SplitShares(**entries)


def test_the_hash_of_a_split_ignores_the_order_and_sees_every_prompt() -> None:
    prompts = [Prompt(id=str(number), task="qa", turns=[str(number)]) for number in range(5)]
    assert split_sha256(prompts) == split_sha256(prompts[::-1])
    assert split_sha256(prompts) != split_sha256(prompts[:-1])
