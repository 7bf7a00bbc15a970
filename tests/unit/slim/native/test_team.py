"""How many threads run the kernels beside other work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.slim.native import team
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.native.linear import native_linear
from viasd_calib.slim.native.team import LONGEST_PAUSE, SHORTEST_PAUSE, TRIAL, WEIGHT, Team

LACKING = why_no_kernels(torch.device("cpu"), torch.bfloat16)


def noted(one: Team, *late: bool) -> int:
    """Threads after calls of these kinds."""
    for each in late:
        one.note(each)
    return one.size


def test_late_calls_that_are_rare_are_chance() -> None:
    assert noted(Team(4), *[True, *[False] * WEIGHT] * 50) == 4
    assert noted(Team(4), True, True, *[False] * 2 * WEIGHT, True, True) == 4


def test_three_late_calls_near_each_other_take_a_thread_away() -> None:
    one = Team(4)
    assert noted(one, True, True, True) == 3
    assert noted(one, True, False, True, False, True) == 2
    assert noted(one, *[True] * 20) == 1


def test_one_more_is_tried_after_a_pause_and_kept_where_it_runs() -> None:
    one = Team(4)
    assert noted(one, True, True, True, *[False] * (SHORTEST_PAUSE - 1)) == 3
    assert noted(one, False) == 4
    assert noted(one, *[False] * TRIAL, True, False) == 4


def test_a_trial_that_fails_makes_the_next_pause_longer() -> None:
    one = Team(4)
    noted(one, True, True, True)
    pause = SHORTEST_PAUSE
    while pause < 2 * LONGEST_PAUSE:
        assert noted(one, *[False] * (min(pause, LONGEST_PAUSE) - 1)) == 3
        assert noted(one, False) == 4, "the trial"
        assert noted(one, *[False] * (TRIAL - 1), True) == 3, "a single late call ends it"
        pause *= 2


def test_another_number_of_threads_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team.TEAMS, "own", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    one = team.team()
    assert noted(one, True, True, True) == 3
    assert team.team() is one
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert (team.team().most, team.team().size) == (8, 8)


def test_each_thread_of_the_process_has_its_own() -> None:
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(team.team).result()
    assert theirs is not team.team()


@given(late=st.lists(st.booleans(), max_size=300), most=st.integers(1, 6))
def test_there_is_always_one_and_never_more_than_allowed(late: list[bool], most: int) -> None:
    one = Team(most)
    sizes = {noted(one, each) for each in late}
    assert all(1 <= size <= most for size in sizes)


@pytest.mark.skipif(LACKING is not None, reason=f"the kernels do not run here: {LACKING}")
def test_a_call_asks_for_the_team_s_threads_and_tells_it_what_became_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Told(Team):
        def note(self, late: bool) -> None:
            seen.append(self.size)
            super().note(True)

    monkeypatch.setattr(team.TEAMS, "own", Told(torch.get_num_threads()))
    layer = native_linear(torch.randn(64, 64), None)
    rows = torch.randn(3, 64)
    first = layer(rows)
    for _ in range(6):
        assert torch.equal(layer(rows), first)
    most = torch.get_num_threads()
    assert seen == [max(1, most - number // 3) for number in range(7)]
