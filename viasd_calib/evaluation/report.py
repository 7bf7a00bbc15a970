"""The report: what was measured, what is certified, and pictures of both, in one HTML file.

The file stands alone: style and pictures are part of it, it runs no script and asks no server for anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.calibration.paired import FEWEST_PROMPTS, Interval
from viasd_calib.calibration.policy_timing import CLOSE
from viasd_calib.calibration.risk import certified
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation import plots
from viasd_calib.evaluation.bench import BenchResult
from viasd_calib.evaluation.break_even import RULE, BreakEven, break_even_of, break_even_words
from viasd_calib.evaluation.gate_rows import GATE_HEADINGS, gate_rows
from viasd_calib.evaluation.method_columns import COLUMNS, decimal, percent, ratio
from viasd_calib.evaluation.metrics import MethodResult
from viasd_calib.evaluation.policy_rows import POLICY_HEADINGS, policy_rows, prediction_sentence
from viasd_calib.evaluation.report_rows import certificate_rows, setting_groups
from viasd_calib.files import write_text
from viasd_calib.slim.parts.base import route_words
from viasd_calib.spec import (
    Certificate,
    RoutingSpec,
)

if TYPE_CHECKING:
    from viasd_calib.calibration.certify import TestedCandidate
    from viasd_calib.calibration.policy_timing import PolicyTiming
    from viasd_calib.calibration.reliability import Reliability
    from viasd_calib.profiling.recording import TypicalRound

HEADLINE_METHODS = ("three_tier", "speculative", "autoregressive")
"""The headline is about the first of these that was run."""


@dataclass(frozen=True)
class SampleText:
    """One decoded text, token by token; ``pieces``, ``tiers`` and ``drafted`` are of one length.

    Attributes:
        prompt: what was asked.
        pieces: the decoded token strings.
        tiers: which tier decided each.
        drafted: whether each was proposed by the draft model.
    """

    prompt: str
    pieces: list[str]
    tiers: list[Tier]
    drafted: list[bool]


@dataclass(frozen=True)
class ReportInputs:
    """Everything a report is made of.

    Attributes:
        spec: the routing spec.
        bench: the benchmark of its decoder.
        reliability: of the gates, by ``draft`` and ``slim``; empty where they were not assessed.
        tiers: the tier of every token, per decoded text; may be empty.
        sample: one text to colour by tier.
        candidates: in the order they were tested, most careful first; may be empty.
        rounds: a recorded round of each of some methods; may be empty.
        timing: policies that a replay predicted and that were decoded; None where nothing was calibrated.
    """

    spec: RoutingSpec
    bench: BenchResult
    reliability: dict[str, Reliability]
    tiers: list[list[Tier]]
    sample: SampleText | None
    candidates: list[TestedCandidate]
    rounds: dict[str, TypicalRound]
    timing: PolicyTiming | None = None


def write_report(inputs: ReportInputs, path: Path) -> None:
    """Write the report as one HTML file, atomically.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    write_text(path, render_report(inputs))


def render_report(inputs: ReportInputs) -> str:
    """The report as one HTML document."""
    environment = Environment(
        loader=PackageLoader("viasd_calib.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "ratio": ratio, "method": plots.method_label}
    return environment.get_template("report.html.j2").render(_context(inputs))


def _context(inputs: ReportInputs) -> dict[str, Any]:
    spec, bench, timing = inputs.spec, inputs.bench, inputs.timing
    break_even = break_even_of(spec, bench)
    name = next((name for name in HEADLINE_METHODS if name in bench.methods), next(iter(bench.methods)))
    return {
        "spec": spec,
        "bench": bench,
        "name": name,
        "row": bench.methods[name],
        "comparisons": _comparisons(bench.methods[name]),
        "gate_headings": GATE_HEADINGS,
        "gates": gate_rows(inputs.reliability),
        "certificate_sentence": certificate_sentence(spec.certificate),
        "notes": _notes(spec, bench),
        "settings": setting_groups(spec, bench),
        "columns": COLUMNS,
        "certificate": certificate_rows(spec.certificate),
        "candidates": _candidate_rows(inputs.candidates, spec.certificate),
        "pictures": _pictures(inputs, break_even),
        "break_even": break_even,
        "break_even_rule": RULE,
        "break_even_words": break_even_words(break_even, spec),
        "timing": timing,
        "close": CLOSE,
        "policy_headings": POLICY_HEADINGS,
        "policies": [] if timing is None else policy_rows(timing),
        "prediction_sentence": "" if timing is None else prediction_sentence(timing),
        "rounds": inputs.rounds,
        "route_words": route_words(spec.route, spec.verifier.num_layers),
        "fewest_prompts": FEWEST_PROMPTS,
        "places_per_bin": plots.PLACES_PER_BIN,
        "sample": _sample(inputs.sample),
        "legend": [(f"t{tier.value}", plots.TIER_NAMES[tier], MEANINGS[tier]) for tier in Tier],
    }


MEANINGS = {
    Tier.ACCEPT: "the draft token was kept on a gate's word",
    Tier.REGENERATE: "the slim verifier put its own token",
    Tier.ESCALATE: "the full verifier decided",
}


# Sentences


@dataclass(frozen=True)
class Comparison:
    """The headline's speedup over another method, and what its interval shows."""

    against: str
    speedup: Interval

    @property
    def finding(self) -> str:
        """Whether the interval lies above 1, below it, or holds it; nothing of that without one."""
        bounds = self.speedup.bounds
        if bounds is None:
            return f"{self.speedup.n} of the {FEWEST_PROMPTS} prompts that an interval takes, so nothing is shown"
        low, high = bounds
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
        return f"95\xa0% interval {low:.2f} to\xa0{high:.2f}: {verdict}"


def _comparisons(row: MethodResult) -> list[Comparison]:
    found = {"autoregressive": row.speedup_vs_autoregressive, "speculative": row.speedup_vs_speculative}
    return [Comparison(name, speedup) for name, speedup in found.items() if speedup and _says_something(speedup)]


def _says_something(speedup: Interval) -> bool:
    return not (speedup.median == 1 and speedup.bounds in (None, (1, 1)))  # a method against itself


def certificate_sentence(certificate: Certificate | None) -> str:
    """What is certified, in one sentence; a spec without a bound has audit strict."""
    if certificate is None or certificate.bound is None:
        begin = "No certificate" if certificate is None else "No bound certified for this policy"
        return f"{begin}, audit strict: every token is the full verifier's choice."
    return (
        f"Certified with {percent(certificate.confidence, 0)} confidence: on prompts like the calibration prompts, "
        f"at most {percent(certificate.bound)} {loss_named(certificate.loss).claim}."
    )


def _notes(spec: RoutingSpec, bench: BenchResult) -> list[str]:
    """What a reader could miss when holding the benchmark against the certificate."""
    notes: list[str] = []
    settings, certificate = bench.settings, spec.certificate
    if settings.audit != spec.decoding.audit:
        notes.append(
            f"This benchmark ran with audit {settings.audit}; "
            f"the spec decodes with audit {spec.decoding.audit} unless told otherwise."
        )
    if settings.dtype != "float32" and settings.audit == "strict":
        notes.append(
            f"Audit strict makes every token the full verifier's choice. In {settings.dtype} that choice itself can "
            "differ between passes of different width where two tokens are nearly tied; "
            "it is why texts may not be identical."
        )
    if certificate is None or certificate.bound is None:
        return notes
    if settings.max_new_tokens != certificate.max_new_tokens:
        notes.append(
            f"The certificate is for texts of at most {certificate.max_new_tokens} new tokens a turn; "
            f"this benchmark asked for {settings.max_new_tokens}."
        )
    measured = bench.methods.get("three_tier")
    if measured is not None and measured.divergence > certificate.bound:
        notes.append(
            f"On these prompts the divergence, {percent(measured.divergence, 2)} of all tokens, lies above the "
            f"certified bound of {percent(certificate.bound)}. "
            "The bound is on the mean of the prompts' own shares, over prompts like the calibration prompts."
        )
    return notes


def _held(candidates: Sequence[TestedCandidate], certificate: Certificate | None) -> list[bool]:
    count = 0
    if certificate is not None:
        count = certified([candidate.p_value for candidate in candidates], certificate.level)
    return [place < count for place in range(len(candidates))]


def _candidate_rows(candidates: Sequence[TestedCandidate], certificate: Certificate | None) -> list[list[str]]:
    return [
        [
            f"{number}",
            f"{one.bound:.4f}",
            percent(one.observed_loss, 2),
            f"{one.n_prompts}",
            f"{one.p_value:.3g}",
            decimal(one.full_passes_per_token),
            "yes" if held else "no",
        ]
        for number, (one, held) in enumerate(zip(candidates, _held(candidates, certificate), strict=True), start=1)
    ]


# Pictures


def _pictures(inputs: ReportInputs, break_even: BreakEven | None) -> dict[str, Markup]:
    """The pictures there is something to draw for, by name."""
    spec, bench, candidates = inputs.spec, inputs.bench, inputs.candidates
    bound = spec.certified_bound
    layers = spec.verifier.num_layers
    figures = {"route": (plots.route_map(spec.route, layers), f"Map of the route: {route_words(spec.route, layers)}.")}
    if inputs.reliability:
        figures["reliability"] = (plots.reliability_diagram(inputs.reliability), _reliability_alt(inputs.reliability))
    if any(inputs.tiers):
        figures["tiers"] = (plots.tier_shares(inputs.tiers), _tiers_alt(inputs.tiers))
    tasks = [task.methods for task in bench.by_task.values()]
    figures["speed"] = (plots.speed_against_loss(bench.methods, tasks, bound), _speed_alt(bench.methods))
    if break_even is not None:
        figures["break_even"] = (plots.break_even_picture(break_even), break_even_words(break_even, spec))
    speedups = [] if inputs.timing is None else inputs.timing.speedups()
    if inputs.timing is not None and speedups:
        figures["predicted"] = (plots.predicted_against_decoded(speedups), prediction_sentence(inputs.timing))
    if inputs.rounds:
        recorded = {name: typical.recorded for name, typical in inputs.rounds.items()}
        figures["rounds"] = (plots.round_timelines(recorded), _rounds_alt(inputs.rounds))
    if candidates:
        held = _held(candidates, spec.certificate)
        losses = [one.observed_loss for one in candidates]
        passes = [one.full_passes_per_token for one in candidates]
        figures["candidates"] = (
            plots.candidates_tested(losses, passes, held, bound),
            f"Full passes per token against observed loss: candidates {len(candidates)}, certified {sum(held)}.",
        )
    return {name: Markup(plots.inline_svg(figure, name, alt)) for name, (figure, alt) in figures.items()}


def _reliability_alt(gates: Mapping[str, Reliability]) -> str:
    parts = [
        f"{name} gate, calibration error {gate.expected_calibration_error:.3f}, AUROC {gate.auroc:.2f}, "
        f"{sum(gate.count):,} candidates"
        for name, gate in gates.items()
    ]
    return f"Reliability diagram: {'; '.join(parts)}."


def _tiers_alt(tiers: Sequence[Sequence[Tier]]) -> str:
    flat = [tier for text in tiers for tier in text]
    shares = ", ".join(f"{plots.TIER_NAMES[tier]} {percent(flat.count(tier) / len(flat), 0)}" for tier in Tier)
    return f"Tier shares by place in {len(tiers)} texts; over all places {shares}."


def _rounds_alt(rounds: Mapping[str, TypicalRound]) -> str:
    parts = []
    for name, typical in rounds.items():
        one = typical.recorded
        spent = ", ".join(f"{plots.ROUND_NAMES[row]} {1000 * seconds:.1f}" for row, seconds in one.spent().items())
        parts.append(f"{plots.method_label(name)} {1000 * one.seconds:.1f} milliseconds: {spent}")
    return f"Timeline of one round; {'; '.join(parts)}."


def _speed_alt(methods: Mapping[str, MethodResult]) -> str:
    parts = [
        f"{plots.method_label(name)} {row.tokens_per_second:.1f} tokens per second, "
        f"divergence {percent(row.divergence, 2)}"
        for name, row in methods.items()
    ]
    return f"Speed against loss: {'; '.join(parts)}."


@dataclass(frozen=True)
class ColouredToken:
    """One token of the coloured text: CSS class, title and what is shown."""

    style: str
    title: str
    text: str


def _sample(sample: SampleText | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    spans = [
        ColouredToken(
            style=f"t{tier.value}{' drafted' if drafted else ''}",
            title=f"{plots.TIER_NAMES[tier]}, {'drafted' if drafted else 'not drafted'}",
            text=piece.replace("\n", "↵\n"),
        )
        for piece, tier, drafted in zip(sample.pieces, sample.tiers, sample.drafted, strict=True)
    ]
    return {"prompt": sample.prompt, "spans": spans}
