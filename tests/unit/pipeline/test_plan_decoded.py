"""Which prompts a plan decodes at which context, and what follows from what that shows."""

from __future__ import annotations

import pytest

from tests.timings import make_timing
from viasd_calib.decoding.policies import Policy
from viasd_calib.models import Verifier
from viasd_calib.pipeline.plan_decoded import Decoded, PlacedPrompts, allowed_kinds, group_prompts, together
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.search import Predicted, Predictions
from viasd_calib.prompts import Prompt, draw_prompts

CONTEXTS = [100, 400, 1600]


def made_up(context: int, count: int) -> list[Prompt]:
    return [Prompt(id=f"{context}/{number}", turns=[f"{context} {number}"]) for number in range(count)]


def placed(*counts: int, max_new_tokens: int = 60) -> PlacedPrompts:
    """So many prompts at each context."""
    found = {context: made_up(context, count) for context, count in zip(CONTEXTS, counts, strict=True)}
    return PlacedPrompts(found, max_new_tokens)


def test_a_prompt_is_placed_by_its_first_turn_and_half_of_its_answer(tiny_verifier: Verifier) -> None:
    """The chat template adds three tokens; the contexts of 16 and 48 meet at 27."""
    shorter, longer, twice = (
        Prompt(id=id_, turns=turns)
        for id_, turns in {
            "shorter": ["w1 " * 20], "longer": ["w1 " * 21], "twice": ["w1 w2", "w3 " * 60],
        }.items()
    )  # fmt: skip
    found = PlacedPrompts.of(tiny_verifier, [longer, shorter, twice], [16, 48, 300], max_new_tokens=8)
    assert found.by_context == {16: [shorter, twice], 48: [longer], 300: []}
    found = PlacedPrompts.of(tiny_verifier, [longer, shorter, twice], [16, 48, 300], max_new_tokens=10)
    assert found.by_context == {16: [twice], 48: [longer, shorter], 300: []}
    assert found.lengths_at(48) == "23 to 115 tokens"


def test_each_context_draws_its_prompts_by_hash() -> None:
    source = placed(20, 9, 6)
    found = group_prompts(source, 8, batch=1)
    assert {context: len(own) for context, own in found.by_context.items()} == {100: 8, 400: 8, 1600: 6}
    assert found.by_context[100] == draw_prompts(source.by_context[100], 8)
    assert found.words == []
    assert [len(own) for own in group_prompts(source, None, batch=1).by_context.values()] == [20, 9, 6]


def test_contexts_with_too_few_prompts_follow_the_nearest() -> None:
    found = group_prompts(placed(5, 6, 0), 24, batch=1)
    assert [*found.by_context] == [400]
    assert found.words == [
        "At context 100 too few prompts are as short (5 of the 6 that an interval takes): decided as at 400; give some "
        "of at most 170 tokens with --prompts.",
        "At context 1600 too few prompts are as long (0 of the 6 that an interval takes): decided as at 400; give some "
        "of 771 tokens or more with --prompts.",
    ]
    found = group_prompts(placed(6, 0, 6), 24, batch=1)
    assert [*found.by_context] == [100, 1600]
    assert found.words == [
        "At context 400 too few prompts are as long (0 of the 6 that an interval takes): decided as at 100; give some "
        "of 171 to 770 tokens with --prompts."
    ]


def test_where_no_prompt_is_short_enough_answers_must_be_shorter() -> None:
    """Half of an answer is as long as the texts of the first context."""
    found = group_prompts(placed(0, 6, 6, max_new_tokens=400), 24, batch=1)
    assert found.words[0].endswith("decided as at 400; ask for fewer tokens with --max-new-tokens.")


def test_a_batch_takes_as_many_times_the_prompts() -> None:
    source = placed(30, 24, 23)
    found = group_prompts(source, 24, batch=4)
    assert {context: len(own) for context, own in found.by_context.items()} == {100: 24, 400: 24}
    assert found.words[0].startswith(
        "At context 1600 too few prompts are as long (23 of the 24 that an interval takes in batches of 4): decided as "
        "at 400; "
    )


@pytest.mark.parametrize(
    ("counts", "limit", "batch", "context", "words"),
    [
        (
            (2, 5, 4), 10, 1, 400,
            "No context has the 6 prompts that an interval takes (2 at 100, 5 at 400, 4 at 1600): 10 are decoded "
            "together, as at context 400; give more prompts with --prompts.",
        ),
        (
            (30, 40, 0), 24, 16, 400,
            "No context has the 96 prompts that an interval takes in batches of 16 (24 at 100, 24 at 400, 0 at 1600): "
            "24 are decoded together, as at context 400; give more prompts with --prompts and raise --limit to 96 at "
            "least.",
        ),
        (
            (0, 9, 0), 5, 1, 400,
            "No context has the 6 prompts that an interval takes (0 at 100, 5 at 400, 0 at 1600): 5 are decoded "
            "together, as at context 400; raise --limit to 6 at least.",
        ),
        (
            (3, 3, 3), None, 1, 100,
            "No context has the 6 prompts that an interval takes (3 at 100, 3 at 400, 3 at 1600): 9 are decoded "
            "together, as at context 100; give more prompts with --prompts.",
        ),
    ],
)  # fmt: skip
def test_where_no_context_has_enough_all_are_decoded_together(
    counts: tuple[int, int, int], limit: int | None, batch: int, context: int, words: str
) -> None:
    source = placed(*counts)
    found = group_prompts(source, limit, batch)
    assert found.words == [words]
    assert [*found.by_context] == [context]
    every = [prompt for own in source.by_context.values() for prompt in own]
    assert found.by_context[context] == draw_prompts(every, limit)
    assert together(source, limit).by_context == found.by_context


def test_what_was_shown_holds_at_its_context_and_at_those_nearest_to_it() -> None:
    """Drafting is slower at 400 and the slim tier faster there; 1600 was not decoded."""
    nothing, drafted = Policy("none", 0), Policy(None, 4)
    tiers = Policy(None, 4, accept_at=0.5, max_pending=9)
    slim = Policy("slim", 0, accept_at=0.5)
    predictions = [
        Predictions(
            ReplayCosts(context, 0.1, [1.0], [0.2]),
            [Predicted(one, 1.0, 1, 0, 0, 1, 0) for one in (nothing, drafted, tiers, slim)],
        )
        for context in CONTEXTS
    ]

    def shown(with_slim: float, speculative: float) -> Decoded:
        decision = make_timing(with_slim, 2.0).decision
        return Decoded(decision, {"no drafting": 2.0, "speculative": speculative, "three tiers": with_slim})

    decoded = {100: shown(with_slim=3.0, speculative=1.0), 400: shown(with_slim=1.0, speculative=3.0)}
    kinds, words = allowed_kinds(predictions, decoded, batch=4)
    faster = {"no drafting", "three tiers", "three tiers without a draft model"}
    assert kinds == [{"no drafting", "speculative"}, faster, faster]
    assert words == [
        "No slim tier at context 100: decoded in batches of 4 texts (8 of them) it is not shown to be faster than what "
        "is without it, 0.67 [0.67, 0.67] times.",
        "Decoded at context 400 in batches of 4 texts (8 of them), the slim tier is faster: 2.00 [2.00, 2.00] times.",
        "Left out at context 400 in batches of 4: speculative took 3000.00 ms a token where it was decoded, and no "
        "drafting 2000.00.",
    ]
    kinds, words = allowed_kinds(predictions, {400: decoded[400]}, batch=1)
    assert kinds == [faster] * 3
    assert words[0] == "Decoded on 8 prompts, the slim tier is faster: 2.00 [2.00, 2.00] times."
