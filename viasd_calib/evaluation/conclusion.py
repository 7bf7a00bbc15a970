"""A benchmark in words: what was gained over the baselines, and why not more."""

from __future__ import annotations

from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.calibration.paired import Interval
from viasd_calib.calibration.policy_timing import PolicyTiming
from viasd_calib.choices import StrategyName
from viasd_calib.evaluation.bench import BenchResult
from viasd_calib.spec import RoutingSpec

COST_WIDTH = 4
"""Tokens of the pass whose cost is named, if it was measured; a block is about as long."""


def recommended_method(result: BenchResult) -> StrategyName:
    """The strategy to decode with: ``three_tier``, unless a baseline is faster on these prompts.

    A baseline is faster where the whole 95 % interval of the three-tier speed-up over it lies below 1; of two such,
    the one with more tokens a second.
    """
    three_tier = result.methods["three_tier"]
    over: dict[StrategyName, Interval | None] = {
        "autoregressive": three_tier.speedup_vs_autoregressive,
        "speculative": three_tier.speedup_vs_speculative,
    }
    faster = [name for name, interval in over.items() if interval and interval.bounds and interval.bounds[1] < 1]
    return max(faster, key=lambda name: result.methods[name].tokens_per_second, default="three_tier")


def conclusion(result: BenchResult, spec: RoutingSpec, timing: PolicyTiming) -> list[str]:
    """What a benchmark of a spec and the timing of its calibration come to: sentences, the most important first.

    Args:
        result: with ``autoregressive``, ``speculative`` and ``three_tier``.
        timing: of ``viasd calibrate``; says whether the slim tier pays.
    """
    three_tier = result.methods["three_tier"]
    sentences = [
        _compared(three_tier.speedup_vs_autoregressive, "autoregressive"),
        _compared(three_tier.speedup_vs_speculative, "speculative"),
        _text_of(spec),
        _slim_tier(spec, timing),
    ]
    drafted = timing.drafter_words()
    if drafted is not None and spec.decoding.drafter is not None:
        sentences.append(drafted)
    best = recommended_method(result)
    if best != "three_tier":
        sentences.append(f"On these prompts {best} decoding is the fastest: decode with --method {best}.")
    return sentences


def in_one_line(result: BenchResult) -> str:
    """Tokens a second of the strategies of a benchmark, where the verifier's layers were, and what three tiers gain."""
    places = {None: "all in memory", "disk": "layers read from disk", "cpu": "layers read from the host's memory"}
    where = places[None if result.offload is None else result.offload.kind]
    speeds = ", ".join(f"{name} {method.tokens_per_second:.1f}" for name, method in result.methods.items())
    found = result.methods["three_tier"].speedup_vs_speculative
    if found is None:
        return f"{where}: {speeds} tokens/s"
    return f"{where}: {speeds} tokens/s; three tiers are {found.words} times as fast as speculative"


def _compared(interval: Interval | None, baseline: str) -> str:
    """A speed-up with its interval, and what it shows."""
    if interval is None:
        return f"Three-tier decoding was not compared with {baseline} decoding."
    found = f"Three-tier decoding ran at {interval.median:.2f} of the speed of {baseline} decoding"
    if interval.bounds is None:
        return f"{found}, on {interval.n} prompts, which are too few to show anything."
    low, high = interval.bounds
    shown = "it is faster" if low > 1 else "it is slower" if high < 1 else "no difference is shown"
    return f"{found} (95 % interval {low:.2f} to {high:.2f}, {interval.n} prompts): {shown}."


def _text_of(spec: RoutingSpec) -> str:
    certificate = spec.certificate
    if spec.decoding.audit == "strict":
        return "Its text is the full verifier's own (audit strict)."
    if certificate is None or certificate.bound is None:
        return (
            f"Its text may diverge from the full verifier's (audit {spec.decoding.audit}), and nothing bounds how far."
        )
    return (
        f"At most {certificate.bound:.1%} {loss_named(certificate.loss).claim}, with confidence "
        f"{certificate.confidence:.0%} (audit {spec.decoding.audit})."
    )


def _slim_tier(spec: RoutingSpec, timing: PolicyTiming) -> str:
    found = timing.decision
    times = f"a token took {1000 * found.with_slim:.1f} ms with it and {1000 * found.without_slim:.1f} ms without"
    speed = found.slim_speed
    if speed.bounds is None:
        return f"Whether the slim tier pays was not decided: {speed.n} prompts are too few ({times})."
    times += f", {speed.words} of the speed on {speed.n} prompts"
    if timing.pays:
        return f"The slim tier pays: {times}."
    shown = "does not pay" if speed.leaves_out_one else "is not shown to pay"
    return (
        f"The slim tier {shown} here and is left out: {times}. {_cost(spec)}To gain, a slim pass must cost less "
        f"or agree more often ({_better(spec)}), or a full pass must be dear (docs/which-policy.md)."
    )


def _better(spec: RoutingSpec) -> str:
    """What may make a slim verifier better."""
    if spec.route.low_bit is None:
        return "low bits: configs/fit/low-bit.yaml; or train longer: configs/fit/smollm2-135m.yaml"
    return "a drafter that is right more often, as one on your own prompts: train/README.md"


def _cost(spec: RoutingSpec) -> str:
    if spec.route.relative_cost is None:
        return ""
    measured = spec.route.relative_cost.measured
    width = min(measured, key=lambda one: abs(one - COST_WIDTH))
    return f"A slim pass costs {measured[width]:.2f} of a full one. "
