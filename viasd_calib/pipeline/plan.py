"""Which policy decodes at which context length and batch, by a replay of traces at measured costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from viasd_calib.devices import check_device
from viasd_calib.errors import PlanningError, TraceError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_out_file, check_spec, check_traces
from viasd_calib.pipeline.lists import parse_counts, split_names
from viasd_calib.pipeline.opening import offload_of, open_engine
from viasd_calib.pipeline.options import PlanOptions
from viasd_calib.pipeline.plan_certified import (
    candidate_decoders,
    certified_words,
    listed_candidates,
    refuse_other_than_certified,
    with_certified,
)
from viasd_calib.pipeline.profile import profile_settings
from viasd_calib.pipeline.prompt_choice import check_prompts, load_prompts, of_split
from viasd_calib.profiling.profile import check_profile, load_profile
from viasd_calib.prompts import SplitShares, draw_prompts
from viasd_calib.spec import OffloadRef, PlanEntry, RoutingSpec, save_spec

WIDTHS = (1, 2, 4, 8, 16, 21)
"""Of the passes that are timed; the last one is the widest of the grid."""
COST_REPEATS = 15
"""Timed rounds over the passes where no profile is given."""
HOST_PROMPTS = 8
"""Prompts, at most, on which it is measured what rounds take beside their passes."""
HOST_DRAFT_LENGTH = 6
"""Most tokens drafted a round there."""


@dataclass(frozen=True)
class PlanResult:
    """A plan, and what it rests on.

    Attributes:
        spec: as written: with the plan, or decoding by a certified candidate.
        predictions: *simulated*, by batch: at each context.
        decoded: by batch and context: what the policies took there, and the decision between them. What is planned at
            another context follows the nearest of these, by ratio.
        words: why the plan is as it is.
    """

    spec: RoutingSpec
    predictions: dict[int, list[lazy_types.Predictions]]
    decoded: dict[int, dict[int, lazy_types.Decoded]]
    words: list[str]


def plan(options: PlanOptions, load: lazy_types.LoadVerifier | None = None) -> PlanResult:
    """Replay traces under a grid of policies, decode the fastest of each kind, and write the spec with a plan.

    A policy with the slim tier is planned only where decoding shows it to be faster than all without it, and one that
    drafts only where it was not slower than no drafting. That is decided at each context that enough prompts are about
    as long as; others follow the nearest of these.

    With ``certified`` the spec decodes by one of the candidates that its certificate lists, in place of a plan, where
    that is shown to be faster than exact decoding. A candidate decodes in the same way at every context, so that all
    prompts are then decoded as one group, by candidates and by what is predicted at the context that most of them are
    near to.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    contexts = sorted(set(options.contexts))
    batches = parse_counts("--batches", options.batches, PlanningError)
    if options.certified and batches != [1]:
        raise PlanningError(
            "--certified compares policies on single texts, and one that is certified decodes without a plan; leave "
            "out --batches, or --certified"
        )
    check_out_file("--out", options.out)
    check_device(options.device)
    path, spec = check_spec(options.spec, options.verifier, options.draft_model)
    if Path(options.out).resolve().parent != Path(path).resolve().parent:
        raise PlanningError(
            f"--out {options.out} lies in another folder than {path}, whose tensors the new spec names; "
            f"give a file in {Path(path).parent}"
        )
    if spec.gates.draft is None or spec.gates.slim is None:
        raise PlanningError(f"{path} has no draft gate or no calibrated slim gate; plan for a spec that viasd fit made")
    candidates = listed_candidates(path, spec, options.dtype) if options.certified else []
    folders = split_names(options.traces)
    check_traces("--traces", folders)
    settings = profile_settings(WIDTHS, contexts, sorted({1, *batches}), COST_REPEATS)
    known = None if options.profile is None else load_profile(options.profile)
    if known is not None:
        check_profile(known, spec)
    every = of_split(load_prompts(options.prompts), "calibrate", options.shares or SplitShares())
    drawn = draw_prompts(every, options.limit)
    if len(drawn) < batches[-1]:
        raise PlanningError(
            f"--batches {batches[-1]} takes as many prompts at least to be decoded, and there are {len(drawn)}; "
            "raise --limit, give more prompts, or plan for smaller batches"
        )

    from viasd_calib.pipeline.plan_decoded import PlacedPrompts, decode_groups, group_prompts, together
    from viasd_calib.pipeline.replayed import predictions_at, say_noise
    from viasd_calib.planning.search import PolicyGrid
    from viasd_calib.planning.words import plan_words
    from viasd_calib.profiling.measure import measure_profile

    grid = PolicyGrid()
    engine = open_engine(path, spec, options, load, options.backend)
    if candidates:
        refuse_other_than_certified(engine, spec, Path(path).parent, candidates)
    prompts = drawn if candidates else every  # of the latter so many are drawn at each context
    check_prompts(engine.verifier, prompts, options.max_new_tokens)
    placed = PlacedPrompts.of(engine.verifier, prompts, contexts, options.max_new_tokens)
    groups = {
        batch: together(placed, options.limit) if candidates else group_prompts(placed, options.limit, batch)
        for batch in batches
    }
    profile = known or measure_profile(engine, settings, with_rounds=False)
    say_noise(profile)
    texts = _texts(folders, engine, options.trace_tokens)
    predictions = predictions_at(
        engine, profile, contexts, texts, drawn[:HOST_PROMPTS], options.max_new_tokens, grid,
        host_draft_length=HOST_DRAFT_LENGTH, batches=batches,
    )  # fmt: skip
    certified = candidate_decoders(engine, candidates)
    decoded = {
        batch: decode_groups(engine, found, certified, groups[batch].by_context, options.max_new_tokens, batch)
        for batch, found in predictions.items()
    }
    rows, words = _rows(contexts, predictions, decoded)
    words = [
        *(line for found in predictions.values() for one in found for line in plan_words(one)),
        *(line for one in groups.values() for line in one.words),
        *words,
    ]
    number = None
    if candidates and spec.certificate is not None:
        (shown,) = decoded[1].values()
        words += certified_words(spec.certificate.max_new_tokens, candidates, shown.decision)
        number = shown.decision.fastest_candidate
    offload = offload_of(options, spec.offload)
    entry = None if offload is None else offload.entry()
    result = _with_plan(spec, rows, entry) if number is None else with_certified(spec, candidates[number], entry)
    save_spec(result, Path(options.out))
    return PlanResult(result, predictions, decoded, words)


def _texts(folders: list[str], engine: lazy_types.Engine, most_tokens: int) -> list[tuple[lazy_types.TraceText, int]]:
    """Greedy texts of the engine's verifier, each with the most tokens that it might have had."""
    from viasd_calib.planning.reading import some_texts
    from viasd_calib.traces.folder import read_manifest, refuse_other_verifier
    from viasd_calib.traces.texts import read_texts

    found: list[tuple[lazy_types.TraceText, int]] = []
    for folder in folders:
        manifest = read_manifest(Path(folder))
        refuse_other_verifier(manifest.verifier, engine.verifier.ref)
        if manifest.settings.temperature > 0 or manifest.policy is not None:
            raise TraceError(
                f"{folder} holds texts that were sampled, or not written by the verifier alone; a replay is of greedy "
                "ones: capture with --temperature 0"
            )
        found += [(text, manifest.settings.max_new_tokens) for text in read_texts(Path(folder))]
    chosen = some_texts(found, most_tokens)
    if not chosen:
        raise TraceError(f"{', '.join(folders)} hold no text with a generated token; capture more prompts")
    return chosen


def _rows(
    contexts: list[int],
    predictions: dict[int, list[lazy_types.Predictions]],
    decoded: dict[int, dict[int, lazy_types.Decoded]],
) -> tuple[list[PlanEntry], list[str]]:
    """The rows of the plan, and what decoding has ruled out at each batch size."""
    from viasd_calib.pipeline.plan_decoded import allowed_kinds
    from viasd_calib.planning.break_even import watched
    from viasd_calib.planning.table import best_group, plan_rows, rows_by_batch

    words: list[str] = []
    allowed: list[set[lazy_types.PolicyKind]] = []
    for batch, found in predictions.items():
        kinds, own = allowed_kinds(found, decoded[batch], batch)
        allowed += kinds
        words += own
    every = [one for found in predictions.values() for one in found]
    best = iter(best_group(every, allowed))
    groups: list[list[PlanEntry]] = []
    shares: set[float] = set()
    for found in predictions.values():
        policies = watched([next(best).policy for _ in found], [one.costs for one in found])
        shares |= {one.drafting_pays_at for one in policies} - {0.0}
        groups.append(plan_rows(contexts, policies))
    words += [
        f"In a text whose drafted tokens are kept in less than {100 * share:.0f} of 100 cases, drafting is reduced."
        for share in sorted(shares)
    ]
    return rows_by_batch([*predictions], groups), words


def _with_plan(spec: RoutingSpec, rows: list[PlanEntry], offload: OffloadRef | None) -> RoutingSpec:
    """The spec with a plan; what is certified or measured of another policy is left out.

    Args:
        offload: how layers were read when passes were timed.
    """
    from viasd_calib.planning.table import base_of

    gates, decoding = base_of(rows, spec.gates, spec.decoding.model_copy(update={"audit": "strict"}))
    certificate = spec.certificate
    if certificate is not None and certificate.bound is not None:
        certificate = certificate.without_bound("exact: never diverges, as it decodes by a plan")
    document = dict(spec)
    document |= {"gates": gates, "decoding": decoding, "plan": rows, "certificate": certificate, "evidence": None}
    document |= {"offload": offload}
    return RoutingSpec(**document)
