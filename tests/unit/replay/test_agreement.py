"""Agreement on the places where q' is most_confident."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.replay.agreement import ComparedPlaces

PLACES = st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=30)


def compared(places: list[tuple[bool, float]]) -> ComparedPlaces:
    agrees, confidence = zip(*places, strict=True)
    return ComparedPlaces(torch.zeros(len(places)), torch.tensor(agrees), torch.tensor(confidence, dtype=torch.float64))


@given(PLACES, st.floats(0.01, 1))
def test_agreement_is_that_of_the_surest_places(places: list[tuple[bool, float]], share: float) -> None:
    count = max(1, round(share * len(places)))
    most_confident = sorted(places, key=lambda place: -place[1])[:count]
    assert abs(compared(places).agreement(share) - sum(agrees for agrees, _ in most_confident) / count) < 1e-6


@given(PLACES, PLACES)
def test_joined_places_are_those_of_all_texts(one: list[tuple[bool, float]], other: list[tuple[bool, float]]) -> None:
    joined, together = ComparedPlaces.joined([compared(one), compared(other)]), compared(one + other)
    assert torch.equal(joined.agrees, together.agrees)
    assert torch.equal(joined.confidence, together.confidence)
    assert len(joined.kl) == len(together.kl)
