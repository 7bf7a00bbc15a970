"""Options of jobs: what several take is said once, and each is described where it is inherited too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from viasd_calib.choices import BENCH_METHODS
from viasd_calib.cli.parser import run_command
from viasd_calib.errors import BenchError, UsageError
from viasd_calib.pipeline import options
from viasd_calib.pipeline.lists import parse_methods
from viasd_calib.pipeline.options import BenchOptions, CalibrateOptions, CaptureOptions, ReportOptions
from viasd_calib.pipeline.shared_options import PromptSource

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


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (CaptureOptions, {"out": "a", "dtype": "fp8"}, "dtype is 'fp8'; give one of float32, bfloat16, float16"),
        (CaptureOptions, {"out": "a", "limit": 0}, "limit is 0; give a whole number, at least 1, or null"),
        (CaptureOptions, {"out": "a", "limit": "2"}, "limit is '2'; give a whole number"),
        (CaptureOptions, {"out": None}, "out is None; give text"),
        (
            CalibrateOptions,
            {"fit": "a", "out": "b", "loss": "foo"},
            "loss is 'foo'; give one of any_diver",
        ),
        (CalibrateOptions, {"fit": "a", "out": "b", "fractions": (0.5, 0.1)}, "each larger than the one before"),
        (CalibrateOptions, {"fit": "a", "out": "b", "fractions": ()}, "give one or more"),
        (BenchOptions, {"spec": "a", "json": "b", "audit": "foo"}, "audit is 'foo'; give one of strict, tolerant, off"),
        (BenchOptions, {"spec": "a", "json": "b", "methods": 3}, "methods is 3; give text, or a list"),
    ],
)
def test_what_an_annotation_does_not_allow_is_refused(
    kind: Callable[..., object], given: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        kind(**given)
    assert message in str(refused.value)


def test_paths_and_lists_are_taken() -> None:
    given = BenchOptions(spec=Path("a"), json="b", methods=["three_tier"], limit=3)  # type: ignore[arg-type]
    assert parse_methods(given.methods, BENCH_METHODS, BenchError) == ["three_tier"]


def test_a_command_is_called_with_its_options() -> None:
    called: list[CaptureOptions] = []

    def command(options: CaptureOptions) -> None:
        called.append(options)

    run_command(command, ["--out", "a", "--limit", "3", "--split", "null"], "viasd command")
    assert called == [CaptureOptions(out="a", limit=3, split=None)]
