"""Spec and benchmark in a report's words and rows: settings, draft model, route, gates, certificate."""

from __future__ import annotations

from markupsafe import Markup

from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.evaluation.bench import BenchResult
from viasd_calib.evaluation.method_columns import NOTHING, percent
from viasd_calib.slim.parts.base import route_words
from viasd_calib.spec import (
    CausalLMDraft,
    Certificate,
    CombinedDraft,
    DraftSpec,
    Gates,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    ShallowDraft,
    WeightFormat,
)


def setting_groups(spec: RoutingSpec, bench: BenchResult) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled groups of names and values."""
    verifier, decoding, settings = spec.verifier, spec.decoding, bench.settings
    revision = f", revision {verifier.revision}" if verifier.revision else ""
    measured = [
        ("prompts", f"{bench.n_prompts}"),
        ("new tokens", f"at most {settings.max_new_tokens} a turn"),
        ("dtype", settings.dtype),
        ("audit", settings.audit),
        ("seed", f"{settings.seed}"),
        *_provenance_rows(bench),
    ]
    models = [
        ("full verifier", f"{verifier.name_or_path}{revision}"),
        ("architecture", f"{verifier.architecture}, {verifier.num_layers} layers of width {verifier.hidden_size}"),
        ("draft model", _draft_words(spec.draft)),
        ("slim verifier", route_words(spec.route, verifier.num_layers)),
        ("relative cost", cost_words(spec.route)),
    ]
    decoder = [
        ("draft length", f"{decoding.draft_length}"),
        ("pending tokens", f"at most {decoding.max_pending}"),
        ("audit of the spec", decoding.audit),
        *_gate_rows(spec.gates),
        ("written by", f"{spec.producer.name} {spec.producer.version}"),
    ]
    hardware = [(name, f"{value}") for name, value in bench.hardware.items()]
    return [("Benchmark", measured), ("Hardware", hardware), ("Models", models), ("Decoder", decoder)]


def _provenance_rows(bench: BenchResult) -> list[tuple[str, str]]:
    """Which prompts, with which versions, when and of which policy."""
    found = bench.provenance
    if found is None:
        return []
    prompts = found.prompts
    fitted = " included" if prompts.fitted_included else f" left out: {prompts.left_out}"
    return [
        ("prompt file", f"{prompts.file}, split {prompts.split or 'all'}; prompts the spec was fitted on{fitted}"),
        ("prompts SHA-256", prompts.sha256),
        ("policy digest", found.policy_sha256),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("measured", f"{found.date:%Y-%m-%d %H:%M} UTC"),
    ]


def _draft_words(draft: DraftSpec) -> str:
    match draft:
        case CausalLMDraft():
            return f"{draft.name_or_path} (causal language model{_weight_words(draft.quantize)})"
        case PromptLookupDraft():
            return f"prompt lookup, n-grams of {draft.min_ngram} to {draft.max_ngram} tokens, no weights"
        case ShallowDraft():
            return (
                f"shallow, {draft.num_layers} layers, {draft.head_vocab:,} output tokens{_weight_words(draft.quantize)}"
            )
        case CombinedDraft(lookup=lookup):
            return f"prompt lookup from {lookup.min_ngram} tokens on, else {_draft_words(draft.model)}"


def _weight_words(quantize: WeightFormat | None) -> str:
    return "" if quantize is None else f", {quantize} weights"


def cost_words(route: Route) -> str:
    """What a slim pass was measured to cost."""
    cost = route.relative_cost
    if cost is None:
        return "not measured"
    widths = ", ".join(f"{cost.measured[width]:.2f} at width {width}" for width in sorted(cost.measured))
    return f"{widths} (a slim pass over a full pass, measured; {cost.device}, {cost.dtype})"


def _gate_rows(gates: Gates) -> list[tuple[str, str]]:
    rows = [
        ("gates", gates.convention),
        ("stop drafting below", f"{gates.draft_stop_below:.4g}"),
        ("draft gate accepts at", _threshold_words(gates.draft_accept_at)),
        ("accept at", _threshold_words(gates.accept_at)),
    ]
    if gates.regenerate_at is not None:
        rows.append(("regenerate at", _threshold_words(gates.regenerate_at)))
    if gates.escalate_below is not None:
        rows.append(("escalate below", f"{gates.escalate_below:.4g}"))
    return rows


def _threshold_words(threshold: float) -> str:
    return "never" if threshold > 1 else f"score {threshold:.4g}"


def certificate_rows(certificate: Certificate | None) -> list[tuple[str, str]]:
    """A certificate as rows of a table: what is named, and its value; none without a certificate."""
    if certificate is None:
        return []
    rows = [
        ("loss", f"{certificate.loss}: {loss_named(certificate.loss).meaning}"),
        ("bound", "none" if certificate.bound is None else percent(certificate.bound, 2)),
        ("confidence", percent(certificate.confidence, 0)),
        ("observed, mean over prompts", percent(certificate.observed, 2)),
        ("observed, by token (not bounded)", percent(certificate.observed_by_token, 2)),
        ("exact decoding, by rounding alone", percent(certificate.floor, 2)),
        ("p-value", NOTHING if certificate.p_value is None else f"{certificate.p_value:.3g}"),
        ("calibration prompts", f"{certificate.n_prompts}, at most {certificate.max_new_tokens} new tokens a turn"),
        ("candidates tested", f"{certificate.candidates_tested}"),
        ("procedure", certificate.procedure),
    ]
    if certificate.note:
        rows.append(("note", certificate.note))
    hashes = certificate.split_sha256.items()
    return [*rows, *((f"{split} split", Markup("SHA-256 <code>{}</code>").format(digest)) for split, digest in hashes)]
