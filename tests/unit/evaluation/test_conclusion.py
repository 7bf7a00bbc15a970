"""A benchmark in words: who is faster, what the text is, and why the slim tier is in or out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.timings import make_timing
from tests.unit.evaluation.test_report import bench, certificate, method, spec
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.conclusion import conclusion, in_one_line, recommended_method
from viasd_calib.evaluation.metrics import MethodResult
from viasd_calib.evaluation.offload_result import OffloadResult
from viasd_calib.schema.route import RelativeCost

FASTER = Interval(median=1.2, low=1.1, high=1.3, n=10)
SLOWER = Interval(median=0.8, low=0.7, high=0.9, n=10)
EQUAL = Interval(median=1.0, low=0.9, high=1.1, n=10)
FEW = Interval(median=0.8, low=None, high=None, n=3)
LEFT_OUT = make_timing(0.05, 0.03)
NOT_SHOWN = make_timing(0.029, 0.03, slim_speed=Interval(median=1.03, low=0.95, high=1.1, n=24))
PAYS = make_timing(0.02, 0.03)
UNDECIDED = make_timing(0.02, 0.03, n_prompts=2)


def methods(
    autoregressive: Interval | None, speculative: Interval | None, speed_of_speculative: float = 30.0
) -> dict[str, MethodResult]:
    """Three-tier decoding with these speed-ups, beside 20 tokens/s of autoregressive decoding."""
    return {
        "autoregressive": method(20.0),
        "speculative": method(speed_of_speculative),
        "three_tier": method(25.0, speculative).model_copy(update={"speedup_vs_autoregressive": autoregressive}),
    }


@pytest.mark.parametrize(
    ("autoregressive", "speculative", "speed", "best"),
    [
        (FASTER, FASTER, 30.0, "three_tier"),
        (EQUAL, EQUAL, 30.0, "three_tier"),
        (FEW, FEW, 30.0, "three_tier"),
        (None, None, 30.0, "three_tier"),
        (SLOWER, EQUAL, 30.0, "autoregressive"),
        (FASTER, SLOWER, 30.0, "speculative"),
        (SLOWER, SLOWER, 30.0, "speculative"),
        (SLOWER, SLOWER, 10.0, "autoregressive"),
    ],
)
def test_a_baseline_is_recommended_where_it_is_shown_to_be_faster(
    autoregressive: Interval | None, speculative: Interval | None, speed: float, best: str
) -> None:
    result = bench(methods(autoregressive, speculative, speed))
    assert recommended_method(result) == best
    told = [line for line in conclusion(result, spec(), PAYS) if "--method" in line]
    assert told == ([] if best == "three_tier" else [
        f"On these prompts {best} decoding is the fastest: decode with --method {best}."
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (
            FASTER,
            "ran at 1.20 of the speed of autoregressive decoding (95 % interval 1.10 to 1.30, 10 prompts): it is f",
        ),
        (
            SLOWER,
            "ran at 0.80 of the speed of autoregressive decoding (95 % interval 0.70 to 0.90, 10 prompts): it is s",
        ),
        (EQUAL, "(95 % interval 0.90 to 1.10, 10 prompts): no difference is shown."),
        (FEW, "ran at 0.80 of the speed of autoregressive decoding, on 3 prompts, which are too few to show anything."),
        (None, "was not compared with autoregressive decoding."),
    ],
)
def test_a_speedup_is_said_with_what_it_shows(interval: Interval | None, words: str) -> None:
    assert words in conclusion(bench(methods(interval, EQUAL)), spec(), PAYS)[0]


def test_the_text_is_the_verifiers_or_bounded_or_neither() -> None:
    result = bench(methods(FASTER, EQUAL))
    lossy = spec(certificate=certificate(bound=0.05, confidence=0.9))
    (said,) = [line for line in conclusion(result, lossy, PAYS) if "confidence" in line]
    assert said == f"At most 5.0% {loss_named('divergence').claim}, with confidence 90% (audit off)."
    exact = lossy.model_copy(update={"decoding": lossy.decoding.model_copy(update={"audit": "strict"})})
    assert conclusion(result, exact, PAYS)[2] == "Its text is the full verifier's own (audit strict)."
    unbound = lossy.model_copy(update={"certificate": None})
    assert "nothing bounds how far" in conclusion(result, unbound, PAYS)[2]


def test_the_slim_tier_is_in_or_out_for_a_stated_reason() -> None:
    result, of = bench(methods(FASTER, EQUAL)), spec()
    route = of.route.model_copy(
        update={"relative_cost": RelativeCost(measured={1: 0.9, 4: 0.5, 8: 0.7}, device="cpu", dtype="float32")}
    )
    of = of.model_copy(update={"route": route})
    assert conclusion(result, of, PAYS)[3] == (
        "The slim tier pays: a token took 20.0 ms with it and 30.0 ms without, 1.50 [1.50, 1.50] of the speed on 8 "
        "prompts."
    )
    left_out = conclusion(result, of, LEFT_OUT)[3]
    assert "does not pay here and is left out: a token took 50.0 ms with it and 30.0 ms without, 0.60" in left_out
    assert "A slim pass costs 0.50 of a full one" in left_out
    open_still = conclusion(result, of, NOT_SHOWN)[3]
    assert "is not shown to pay here and is left out" in open_still
    assert "1.03 [0.95, 1.10] of the speed on 24 prompts" in open_still
    assert "was not decided: 2 prompts are too few" in conclusion(result, of, UNDECIDED)[3]


def test_each_sentence_has_the_speedup_over_its_baseline() -> None:
    said = conclusion(bench(methods(FASTER, SLOWER)), spec(), PAYS)
    assert "at 1.20 of the speed of autoregressive decoding" in said[0]
    assert "at 0.80 of the speed of speculative decoding" in said[1]


@pytest.mark.parametrize(
    ("kind", "speculative", "line"),
    [
        (None, FASTER, "all in memory: {}; three tiers are 1.20 [1.10, 1.30] times as fast as speculative"),
        ("disk", FEW, "layers read from disk: {}; three tiers are 0.80 times as fast as speculative"),
        ("cpu", None, "layers read from the host's memory: {}"),
    ],
)
def test_a_benchmark_in_one_line(kind: Any, speculative: Interval | None, line: str) -> None:
    result = bench(methods(FASTER, speculative))
    if kind is not None:
        read = OffloadResult(kind=kind, resident_bytes=1, cold_bytes=1, cold_bytes_per_second=1.0, peak_memory_bytes={})
        result = result.model_copy(update={"offload": read})
    speeds = "autoregressive 20.0, speculative 30.0, three_tier 25.0 tokens/s"
    assert in_one_line(result) == line.format(speeds)
