"""Other work on the machine, planted into a profile, changes neither its costs nor the plan made of them."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from tests.made_up_traces import made_up_table
from viasd_calib.decoding.policies import Policy
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.search import PolicyGrid, search
from viasd_calib.profiling.measure import summaries, time_rounds
from viasd_calib.profiling.noise import disturbed_share, noise_words, undisturbed
from viasd_calib.profiling.profile import PassShape, ProfileSettings
from viasd_calib.slim import cost
from viasd_calib.slim.cost import WARM_UP

SETTINGS = ProfileSettings(widths=(1, 4, 17), contexts=(64,), batches=(1,), repeats=12)
GRID = PolicyGrid(draft_lengths=(2, 4), stops=(0.0, 0.5), draft_bounds=(1.01,), thresholds=(0.5, 0.7), pending=(6, 12))
TRUE_COST = {"draft": 0.05, "slim": 0.4, "full": 1.0, "head": 0.1}


class BusyMachine:
    """A clock that passes move: by what they cost, times what other work makes of it in their round.

    Args:
        slowed: how many times as long passes take in a round.
        spikes: chance that one pass takes 50 times as long.
    """

    def __init__(self, slowed: dict[int, float], spikes: float = 0.0) -> None:
        self.now, self.calls, self.slowed, self.spikes = 0.0, 0, slowed, spikes
        self.draw = random.Random(1)
        self.shapes = list(SETTINGS.shapes())

    def perf_counter(self) -> float:
        return self.now

    def run(self, shape: PassShape) -> None:
        number = self.calls // len(self.shapes) - WARM_UP
        self.calls += 1
        spike = 50.0 if self.draw.random() < self.spikes else 1.0
        self.now += TRUE_COST[shape.tier] * self.slowed.get(number, 1.0) * spike

    def seconds(self, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
        """What a profile would time."""
        monkeypatch.setattr(cost, "time", self)
        passes = {shape: lambda shape=shape: self.run(shape) for shape in self.shapes}
        return time_rounds(passes, SETTINGS.repeats, torch.device("cpu"))


def plan(by_shape: dict[PassShape, float]) -> Policy:
    """The fastest policy at such costs."""
    full, slim = (
        [by_shape[PassShape(tier, min(w for w in SETTINGS.widths if w >= width), 64, 1)] for width in range(1, 18)]
        for tier in ("full", "slim")
    )
    priced = ReplayCosts(64, by_shape[PassShape("draft", 1, 64, 1)], full, slim)
    return search(GRID, {None: made_up_table(0.7, 0.9)}, [priced])[0].fastest.policy


SECOND_PROCESS = dict.fromkeys(range(3, 9), 8.0)
"""Half of the rounds."""


@pytest.mark.parametrize(
    "machine",
    [
        BusyMachine({}, spikes=0.1),
        BusyMachine(SECOND_PROCESS),
        BusyMachine({0: 30.0}),
        BusyMachine(SECOND_PROCESS, 0.05),
    ],
    ids=["spikes", "second process", "one round", "both"],
)
def test_other_work_does_not_change_costs_or_plan(machine: BusyMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = machine.seconds(monkeypatch)
    found = {one.shape: one.seconds for one in summaries(machine.shapes, seconds)}
    truth = {shape: TRUE_COST[shape.tier] for shape in machine.shapes}
    assert found == pytest.approx(truth)
    assert plan(found) == plan(truth)
    means = {shape: statistics.mean(taken) for shape, taken in zip(machine.shapes, seconds, strict=True)}
    assert means != pytest.approx(truth, rel=0.5), "what was planted is no small thing"


def test_a_noisy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, busy = (BusyMachine(slowed).seconds(monkeypatch) for slowed in ({}, SECOND_PROCESS))
    assert (disturbed_share(quiet), disturbed_share(busy)) == (0.0, 0.5)
    assert noise_words(disturbed_share(quiet)) is None
    assert "other work slowed 50 % of the timed rounds" in str(noise_words(disturbed_share(busy)))


def test_two_rounds_are_kept_at_least() -> None:
    """Where three in four are slowed and more, what is left is still the fastest."""
    assert undisturbed([[1.0, 2.0, 4.0, 8.0]]) == [0, 1]
    assert undisturbed([[5.0, 1.0]]) == [0, 1]
