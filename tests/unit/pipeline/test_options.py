"""Options of jobs: what several take is said once, and each is described where it is inherited too."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

from viasd_calib.cli.parser import run_command
from viasd_calib.pipeline import options
from viasd_calib.pipeline.options import BenchOptions, CalibrateOptions, CaptureOptions, PromptSource, ReportOptions

CLASSES = [
    kind for name, kind in inspect.getmembers(options, inspect.isclass)
    if name.endswith("Options") and kind.__module__ == options.__name__
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_every_option_is_described(kind: type) -> None:
    arguments = (kind.__doc__ or "").partition("\n\nArgs:\n")[2].splitlines()
    described = {line.strip().partition(":")[0] for line in arguments if line.startswith("    ") and line[4] != " "}
    assert {field.name for field in fields(kind)} <= described


def test_classes_are_found() -> None:
    assert {BenchOptions, CalibrateOptions, CaptureOptions, ReportOptions} <= set(CLASSES)


@pytest.mark.parametrize("kind", [BenchOptions, CalibrateOptions, CaptureOptions, ReportOptions])
def test_a_limit_is_described_alike(kind: type[PromptSource]) -> None:
    limit = "limit: take this many of the prompts that are left by split and exclusions"
    assert (kind.__doc__ or "").count("    limit: ") == (kind.__doc__ or "").count(limit) == 1


def test_options_cannot_be_changed() -> None:
    given = CaptureOptions(out="traces")
    with pytest.raises(FrozenInstanceError):
        given.out = "elsewhere"  # type: ignore[misc]


def test_a_command_is_called_with_its_options() -> None:
    called: list[CaptureOptions] = []

    def command(options: CaptureOptions) -> None:
        called.append(options)

    run_command(command, ["--out", "a", "--limit", "3", "--split", "null"], "viasd command")
    assert called == [CaptureOptions(out="a", limit=3, split=None)]
