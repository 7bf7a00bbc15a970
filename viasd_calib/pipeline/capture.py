"""What draft model and verifier predict on texts of a user's prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from viasd_calib.choices import SMOLLM2
from viasd_calib.devices import check_device
from viasd_calib.errors import SpecError, UsageError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_draft, check_model, check_out_folder, check_spec, read_sampling_options
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.opening import offload_of
from viasd_calib.pipeline.options import CaptureOptions
from viasd_calib.pipeline.prompt_choice import check_limit, check_prompts, load_prompts, of_split
from viasd_calib.prompts import draw_prompts
from viasd_calib.spec import Audit, Route, RoutingSpec


def capture(options: CaptureOptions, load: lazy_types.LoadVerifier | None = None) -> lazy_types.CaptureReport:
    """Log what draft model and verifier predict on prompts; a run that was stopped goes on where it was.

    Where prompts have changed, the texts of those that have not are kept.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    check_out_folder("--out", options.out)
    check_device(options.device)
    check_limit(options.limit)
    sampling = read_sampling_options(temperature=options.temperature, seed=options.seed)
    chosen = draw_prompts(of_split(load_prompts(options.prompts), options.split, options.shares), options.limit)
    named = SMOLLM2 if options.verifier is None else options.verifier
    found: tuple[str, RoutingSpec] | None = None
    if options.spec is not None:
        found = check_spec(options.spec, options.verifier, options.draft_model)
    elif options.audit is not None:
        raise SpecError("audit is that of a spec's decoder; give --spec too, or leave out --audit")
    elif options.draft_model is not None:
        raise SpecError("draft_model is that of a spec's decoder; give --spec too, or name the model with --draft")
    else:
        check_model(named)
    check_draft(options.draft)
    offload = offload_of(options)
    if offload is not None and found is not None:
        raise UsageError("--offload reads layers for the verifier alone; leave out --spec, or --offload")

    import torch

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.draft.build import build_drafter, name_draft
    from viasd_calib.draft.places import draft_from
    from viasd_calib.models import load_verifier
    from viasd_calib.slim.backends import choose_backend, fastest_dtype, open_model
    from viasd_calib.slim.loading import make_ready
    from viasd_calib.traces import capture as capturing
    from viasd_calib.traces.folder import CaptureSettings

    load = load or load_verifier
    if found is None:
        dtype = options.dtype or fastest_dtype(torch.device(options.device))
        loaded, policy = load(named, dtype=dtype, device=options.device, layers=offload is None), None
    else:
        # eager: another backend would change in place the weights that the drafter is built on
        engine = load_engine(
            found[0],
            spec=found[1],
            verifier=options.verifier,
            draft_model=options.draft_model,
            dtype=options.dtype,
            device=options.device,
            backend="eager",
            load=load,
            offload="none",
        )
        sampling = replace(sampling, top_k=CaptureSettings().sampling_top_k)
        loaded, policy = engine.verifier, policy_of(engine, options.audit, sampling)
    check_prompts(loaded, chosen, options.max_new_tokens)
    # A policy's decoder runs the same modules, which stay as they are.
    backend = choose_backend(loaded.model) if policy is None else "eager"
    routed = open_model(loaded.model, Route(), {}, backend)
    drafter = None
    if options.draft != "none":
        drafter = build_drafter(*name_draft(options.draft), routed, loaded.tokenizer)
    make_ready(routed, None, backend, offload, () if drafter is None else drafter.networks)
    settings = CaptureSettings(
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        top_k=options.top_k,
        temperature=options.temperature,
        draft_length=options.draft_length,
        seed=options.seed,
    )
    out = Path(options.out)
    report = capturing.capture_traces(
        loaded, drafter, draft_from(options.draft, out), chosen, out, settings, policy, routed
    )
    if report.kept:
        notice(f"{report.kept} of {report.asked} prompts had been captured before; what is not asked is left out")
    return report


def policy_of(
    engine: lazy_types.Engine, audit: Audit | None, sampling: lazy_types.Sampling
) -> lazy_types.on_policy.Policy:
    """The three-tier decoder of a spec as what writes texts.

    Raises:
        SamplingError: the spec's certificate does not hold for such sampling.
    """
    from viasd_calib.traces.on_policy import Policy, policy_name

    decoder = engine.decoder("three_tier", audit, sampling)
    spec = engine.spec
    decoding = spec.decoding if audit is None else spec.decoding.model_copy(update={"audit": audit})
    return Policy(policy_name("three_tier", spec.draft.model_dump_json(), spec.route, spec.gates, decoding), decoder)
