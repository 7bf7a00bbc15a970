"""Writes what each test found to the step's log, and says on which device and with which models tests run."""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.record import CHECKS_VARIABLE, Check, CheckLog
from tests.gpu.settings import read_settings
from tests.gpu.targets import OpenTarget, find_targets, open_target

LOG = CheckLog(os.environ[CHECKS_VARIABLE]) if CHECKS_VARIABLE in os.environ else None
REPORTS: dict[str, list[pytest.TestReport]] = {}


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def pytest_collection_finish(session: pytest.Session) -> None:
    if LOG is not None:
        LOG.announce([_name(item.nodeid) for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    if LOG is not None:
        LOG.begin(_name(nodeid))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if LOG is None:
        return
    REPORTS.setdefault(report.nodeid, []).append(report)
    if report.when == "teardown":
        LOG.note(check_of(REPORTS.pop(report.nodeid)))


def check_of(phases: list[pytest.TestReport]) -> Check:
    """A check from the reports of a test's set-up, call and end."""
    failed = next((phase for phase in phases if phase.failed), None)
    skipped = next((phase for phase in phases if phase.skipped), None)
    check = Check(
        name=_name(phases[0].nodeid),
        outcome="passed",
        seconds=round(sum(phase.duration for phase in phases), 3),
        numbers=dict(phases[-1].user_properties),
    )
    if failed is not None:
        return check.model_copy(update={"outcome": "failed", "reason": failed.longreprtext[-2000:]})
    if skipped is not None:
        reason = skipped.longrepr[2] if isinstance(skipped.longrepr, tuple) else str(skipped.longrepr)
        return check.model_copy(update={"outcome": "not run", "reason": reason.removeprefix("Skipped: ")})
    return check


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run."""
    return torch.device(read_settings().device)


@pytest.fixture(scope="session")
def targets(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[OpenTarget]:
    """The tiny model, and the given ones, or else SmolLM2 where it is installed."""
    folder = tmp_path_factory.mktemp("targets")
    return [open_target(target, folder, device) for target in find_targets(read_settings())]
