"""``viasd capture``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from viasd_calib.choices import SMOLLM2
from viasd_calib.cli.notices import say_written
from viasd_calib.devices import check_device
from viasd_calib.errors import SpecError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_draft, check_model, check_out_folder, check_spec, read_sampling_options
from viasd_calib.pipeline.numbers import Count, Nonnegative, Seed
from viasd_calib.pipeline.prompt_choice import check_limit, check_prompts, load_prompts, of_split
from viasd_calib.prompts import EMBEDDED, Split, SplitShares, draw_prompts
from viasd_calib.spec import Audit, DType, RoutingSpec
from viasd_calib.tables import new_table


def capture(
    out: str,
    verifier: str | None = None,
    draft: str = "prompt_lookup",
    prompts: str = EMBEDDED,
    split: Split | None = "fit",
    shares: SplitShares | None = None,
    limit: Count | None = None,
    max_new_tokens: Count = 128,
    batch_size: Count = 32,
    top_k: Count = 16,
    temperature: Nonnegative = 0.0,
    seed: Seed = 0,
    spec: str | None = None,
    audit: Audit | None = None,
    draft_model: str | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    _load: lazy_types.LoadVerifier | None = None,
) -> lazy_types.CaptureReport:
    """Log what draft model and verifier say on prompts; a run that was stopped goes on where it was.

    Where prompts have changed, the texts of those that have not are kept.

    Says at the end how often the draft model's proposals are the verifier's choice.

    Args:
        out: folder for the trace shards.
        verifier: hub id, folder, .gguf file or "smollm2-135m"; where it is left out the spec's, or smollm2-135m.
        draft: "prompt_lookup", a folder with a shallow drafter, a model with the verifier's vocabulary,
            "prompt_lookup+" and one of the latter two for both together, or "none"; "int8:" or "int4:" before
            folder or model gives it integer weights.
        prompts: prompt file (JSONL or another: see README), NAME:SPLIT of a data set of the hub, or "embedded" for the
            package's own.
        split: take this split's prompts alone, by hash; null takes all.
        shares: shares of the splits.
        limit: take this many prompts, drawn by hash.
        max_new_tokens: longest answer.
        batch_size: texts generated together; also the texts of a shard.
        top_k: tokens of each distribution that are logged.
        temperature: 0 for greedy texts.
        seed: of sampling.
        spec: let the three-tier decoder of this routing spec write the texts, in place of the verifier, which says all
            along what it would have chosen; proposals are those of ``draft``, whatever the spec decodes with.
        audit: of that decoder, in place of the spec's; with "strict" the texts are the verifier's own.
        draft_model: of that decoder: where to find it, in place of the name in the spec.
        dtype: number format of the verifier.
        device: where models run.
    """
    check_out_folder("--out", out)
    check_device(device)
    check_limit(limit)
    sampling = read_sampling_options(temperature=temperature, seed=seed)
    chosen = draw_prompts(of_split(load_prompts(prompts), split, shares), limit)
    named = SMOLLM2 if verifier is None else verifier
    read: RoutingSpec | None = None
    if spec is not None:
        spec, read = check_spec(spec, verifier, draft_model)
    elif audit is not None:
        raise SpecError("audit is that of a spec's decoder; give --spec too, or leave out --audit")
    elif draft_model is not None:
        raise SpecError("draft_model is that of a spec's decoder; give --spec too, or name the model with --draft")
    else:
        check_model(named)
    check_draft(draft)

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.draft.build import build_drafter, name_draft
    from viasd_calib.draft.places import draft_from
    from viasd_calib.models import load_verifier
    from viasd_calib.slim.forward import RoutedModel
    from viasd_calib.traces import capture as capturing
    from viasd_calib.traces.agreement import draft_agreement
    from viasd_calib.traces.folder import CaptureSettings

    load = _load or load_verifier
    if spec is None:
        loaded, policy = load(named, dtype=dtype, device=device), None
    else:
        # eager: another backend would change in place the weights that the drafter is built on
        engine = load_engine(
            spec,
            spec=read,
            verifier=verifier,
            draft_model=draft_model,
            dtype=dtype,
            device=device,
            backend="eager",
            load=load,
        )
        sampling = replace(sampling, top_k=CaptureSettings().sampling_top_k)
        loaded, policy = engine.verifier, policy_of(engine, audit, sampling)
    check_prompts(loaded, chosen, max_new_tokens)
    drafter = (
        None if draft == "none" else build_drafter(*name_draft(draft), RoutedModel(loaded.model), loaded.tokenizer)
    )
    settings = CaptureSettings(
        max_new_tokens=max_new_tokens, batch_size=batch_size, top_k=top_k, temperature=temperature, seed=seed
    )
    drafts = draft_from(draft, Path(out))
    report = capturing.capture(loaded, drafter, drafts, chosen, Path(out), settings, policy)
    if report.kept:
        print(
            f"notice: {report.kept} of {report.asked} prompts had been captured before; what is not asked is left out",
            file=sys.stderr,
        )
    held = f"{report.texts} texts, {report.tokens} tokens, {report.bytes_per_token:.0f} bytes per token"
    if drafter is not None:
        Console().print(agreement_table(draft_agreement(report.folder)))
    say_written(report.folder, held)
    return report


def policy_of(engine: lazy_types.Engine, audit: Audit | None, sampling: lazy_types.Sampling) -> lazy_types.Policy:
    """The three-tier decoder of a spec as what writes texts.

    Raises:
        SamplingError: the spec's certificate does not hold for such sampling.
    """
    from viasd_calib.traces.on_policy import Policy, policy_name

    decoder = engine.decoder("three_tier", audit, sampling)
    spec = engine.spec
    decoding = spec.decoding if audit is None else spec.decoding.model_copy(update={"audit": audit})
    return Policy(policy_name("three_tier", spec.draft.model_dump_json(), spec.route, spec.gates, decoding), decoder)


def agreement_table(found: lazy_types.DraftAgreement) -> Table:
    """Share of proposals that are the verifier's choice: one row a task, one column a number of unverified tokens."""
    headings = ["unverified tokens before", *map(str, found.depths)]
    table = new_table("proposals that are the verifier's choice", headings)
    rows: list[tuple[str, str | None]] = [(task, task) for task in found.tasks]
    for name, task in [*rows, ("all", None)]:
        shares = [found.share(task, depth) for depth in found.depths]
        table.add_row(name, *("-" if share is None else f"{share:.3f}" for share in shares))
    return table
