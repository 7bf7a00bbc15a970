"""Whether a spec's slim pass costs less than the full passes that it saves, from what was measured of both."""

from __future__ import annotations

from typing import NamedTuple

from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.bench import BenchResult
from viasd_calib.spec import RoutingSpec

RULE = (
    "A slim pass pays for itself where its cost over that of a full pass and the full passes that still follow it come "
    "to less than 1, as a block otherwise takes one full pass."
)


class BreakEven(NamedTuple):
    """A spec on the break-even of its slim tier.

    Attributes:
        costs: of a slim pass over those of a full pass of the same width, by width in tokens.
        escalated: full passes a slim pass, where the benchmark decoded with three tiers.
        cost_setting: device and number format that the costs were measured on.
        bench_setting: those of the benchmark.
        speed: tokens per second of three tiers over those of speculative decoding; None where that was not run.
    """

    costs: dict[int, float]
    escalated: float
    cost_setting: str
    bench_setting: str
    speed: Interval | None

    @property
    def sums(self) -> tuple[float, float]:
        """The least and the largest of cost and full passes together; below 1 the slim tier gains."""
        return min(self.costs.values()) + self.escalated, max(self.costs.values()) + self.escalated


def break_even_of(spec: RoutingSpec, bench: BenchResult) -> BreakEven | None:
    """Where a spec lies; None where its cost was not measured, or q' was not asked in the benchmark."""
    cost, row = spec.route.relative_cost, bench.methods.get("three_tier")
    if cost is None or row is None or not row.slim_passes_per_token:
        return None
    device = bench.hardware.get("device", "a device that it does not name")
    return BreakEven(
        costs=cost.measured,
        escalated=row.full_passes_per_token / row.slim_passes_per_token,
        cost_setting=f"{cost.device}, {cost.dtype}",
        bench_setting=f"{device}, {bench.settings.dtype}",
        speed=row.speedup_vs_speculative,
    )


def break_even_words(found: BreakEven | None, spec: RoutingSpec) -> str:
    """Where a spec lies, in words, and what was decoded; or why it lies nowhere."""
    if found is None and spec.route.relative_cost is None:
        return "What a slim pass costs was not measured for this spec, so there is no point to draw."
    if found is None:
        return "This benchmark's three-tier decoding never asked the slim verifier, so there is no point to draw."
    low, high = found.sums
    verdict = "below 1" if high < 1 else "not below 1" if low >= 1 else "below 1 at some widths alone"
    return (
        f"A slim pass costs {_range(min(found.costs.values()), max(found.costs.values()))} of a full one and "
        f"{found.escalated:.2f} full passes follow it, together {_range(low, high)}: {verdict}.{_decoded(found.speed)}"
    )


def _range(low: float, high: float) -> str:
    first, last = f"{low:.2f}", f"{high:.2f}"
    return first if first == last else f"{first} to {last}"


def _decoded(speed: Interval | None) -> str:
    if speed is None:
        return ""
    few = "" if speed.bounds is not None else f" on {speed.n} prompts, too few for an interval"
    return f" Decoded, three tiers had {speed.words} times the speed of speculative decoding{few}."
