"""What long jobs tell, and that nothing is shown unless somebody asked."""

from __future__ import annotations

from contextlib import closing

import pytest

from viasd_calib.cli.bars import Screen
from viasd_calib.progress import Reporter, Steps, reporting, say, steps, tracked


class Noted(Reporter):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def start(self, description: str, total: int, unit: str, *, done: int = 0, timed: bool = False) -> Steps:
        self.told.append((description, total, unit, done, timed))
        return NotedSteps(self.told)

    def say(self, line: str) -> None:
        self.told.append(line)


class NotedSteps(Steps):
    def __init__(self, told: list[object]) -> None:
        self.told = told

    def advance(self, count: int = 1) -> None:
        self.told.append(count)

    def finish(self) -> None:
        self.told.append("finished")


def test_jobs_tell_whoever_listens() -> None:
    noted = Noted()
    with reporting(noted):
        say("begins")
        with steps("bench", 3, "prompts", done=1, timed=True) as running:
            running.advance(2)
    assert noted.told == ["begins", ("bench", 3, "prompts", 1, True), 2, "finished"]


def test_a_job_that_fails_or_ends_early_is_finished() -> None:
    noted = Noted()
    with reporting(noted):
        with pytest.raises(ValueError, match="broken"), steps("a", 1, "b"):
            raise ValueError("broken")
        with closing(tracked("abc", "letters", 3, "letters")) as shown:
            next(shown)
            next(shown)
    assert noted.told == [("a", 1, "b", 0, False), "finished", ("letters", 3, "letters", 0, False), 1, "finished"]


def test_nothing_is_shown_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    say("a line")
    assert [*tracked([1, 2], "numbers", 2, "numbers")] == [1, 2]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("timed", [False, True])
def test_the_command_line_draws_bars(timed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(Screen()):
        with steps("bench", 4, "prompts", done=1, timed=timed) as running:
            running.advance()
            running.advance(2)
        say("8 prompts are read")
    shown = capsys.readouterr().out
    assert "bench" in shown
    assert "4/4" in shown
    assert "8 prompts are read" in shown
