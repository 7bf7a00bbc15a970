from __future__ import annotations

import pytest
import torch

from viasd_calib.slim.cost import WARM_UP, interleaved_seconds, median_seconds

CPU = torch.device("cpu")


def test_functions_take_turns_in_an_order_drawn_anew() -> None:
    calls: list[str] = []
    runs = [lambda name=name: calls.append(name) for name in "abcd"]
    seconds = interleaved_seconds(runs, 5, CPU)
    rounds = ["".join(calls[place : place + 4]) for place in range(0, len(calls), 4)]
    assert len(rounds) == WARM_UP + 5
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1
    assert [len(taken) for taken in seconds] == [5] * 4  # the warm-up is not among them


def test_times_belong_to_their_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that the functions themselves move."""
    clock = [0.0]
    monkeypatch.setattr("viasd_calib.slim.cost.time.perf_counter", lambda: clock[0])

    def move(by: float) -> None:
        clock[0] += by

    runs = [lambda: move(1.0), lambda: move(8.0), lambda: move(2.0)]
    assert interleaved_seconds(runs, 3, CPU, after_each=lambda: move(64.0)) == [[1.0] * 3, [8.0] * 3, [2.0] * 3]
    assert median_seconds(runs, 3, CPU) == [1.0, 8.0, 2.0]
