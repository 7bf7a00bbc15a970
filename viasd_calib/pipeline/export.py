"""From a calibrated fit to a routing spec with its tensors beside it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from viasd_calib.devices import check_device
from viasd_calib.errors import SpecError
from viasd_calib.file_names import CALIBRATE_FILE, LOSSES_FOLDER
from viasd_calib.files import copy_file, json_text, read_json, write_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_bench, check_calibrate_folder, check_model, check_out_file
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.options import ExportOptions
from viasd_calib.schema.certified_losses import CertifiedLosses
from viasd_calib.spec import (
    CausalLMDraft,
    CertifiedCandidate,
    CombinedDraft,
    Decoding,
    DraftSpec,
    Evidence,
    HashedFile,
    PromptHashes,
    RelativeCost,
    RoutingSpec,
    ShallowDraft,
    check_verifier,
    load_spec,
    save_spec,
    tensor_file,
)


def export(options: ExportOptions, load: lazy_types.LoadVerifier | None = None) -> RoutingSpec:
    """Write the routing spec, with its tensors beside it.

    Raises:
        ModelError: a model is a path at which there is none.
        SpecError: an ``audit`` that nothing certifies, or that was certified for another policy.
        BenchError: evidence of another policy.
    """
    check_out_file("--out", options.out)
    check_device(options.device)
    check_model(options.verifier)
    check_model(options.draft_model)
    check_calibrate_folder("--calibrate", options.calibrate)
    if options.evidence is not None:
        check_bench("--evidence", options.evidence)

    from viasd_calib.calibration.artifacts import CalibrateArtifact, load_fit_of
    from viasd_calib.draft.places import draft_at
    from viasd_calib.evaluation.bench import load_bench
    from viasd_calib.evaluation.provenance import check_evidence
    from viasd_calib.models import DTYPE_NAMES, load_verifier
    from viasd_calib.pipeline.fitted import verifier_of
    from viasd_calib.slim.cost import relative_cost
    from viasd_calib.slim.loading import load_ready
    from viasd_calib.slim.offload.settings import Offload
    from viasd_calib.slim.parts.base import copy_parts

    calibrated = read_json(CalibrateArtifact, Path(options.calibrate) / CALIBRATE_FILE, "viasd calibrate")
    fitted, fit_folder = load_fit_of(calibrated, Path(options.calibrate), options.fit)
    measured = None if options.evidence is None else load_bench(options.evidence)
    path = Path(options.out)
    policy = calibrated.policy(options.audit)
    draft, draft_folder = _draft_of(draft_at(fitted.draft, fit_folder), path.parent, options.draft_model)
    name = options.verifier or fitted.verifier.name_or_path
    dtype = options.dtype or calibrated.dtype or "float32"
    offload = Offload.of_spec(calibrated.offload)
    loaded = (load or load_verifier)(name, dtype=dtype, device=options.device, layers=offload is None)
    certified_on = calibrated.verifier
    if certified_on is not None and not certified_on.says_the_same(loaded.ref):
        raise SpecError(
            f"{options.calibrate} was calibrated on {certified_on.name_or_path}, and {loaded.ref.name_or_path} has "
            "other weights; give that verifier with --verifier, or calibrate on this one"
        )
    own = verifier_of(fitted.verifier, loaded.ref)
    spec = RoutingSpec(
        verifier=own.model_copy(update={"dtype": dtype, "name_or_path": seen_from(own.name_or_path, path.parent)}),
        draft=draft,
        route=fitted.route,
        gates=policy.gates,
        decoding=Decoding(
            audit=policy.audit,
            draft_length=calibrated.draft_length,
            max_pending=policy.max_pending,
            drafter=policy.drafter,
        ),
        offload=calibrated.offload,
        certificate=policy.certificate,
        prompts=PromptHashes(fit=fitted.prompts, calibrate=calibrated.prompts),
    )
    check_verifier(spec, loaded.ref)
    if measured is not None and options.evidence is not None:
        check_evidence(measured, spec, options.evidence)  # before the tensors of a spec that is there are written over
        spec = spec.model_copy(update={"evidence": evidence_of(measured)})
    spec = spec.model_copy(
        update={
            "draft": copy_draft(draft, draft_folder, path.parent),
            "route": copy_parts(fitted.route, fit_folder, path.parent),
        }
    )
    routed = load_ready(loaded.model, spec.route, path.parent, offload)
    cost = RelativeCost(
        measured={width: round(share, 4) for width, share in relative_cost(routed).items()},
        device=options.device,
        dtype=DTYPE_NAMES[loaded.model.dtype],
    )
    spec = spec.model_copy(
        update={"route": spec.route.model_copy(update={"relative_cost": cost, "memory": routed.memory})}
    )
    if policy.certificate.bound is not None:
        _refuse_another_policy(spec, calibrated.losses, options.calibrate)
    spec = with_losses(spec, calibrated, path)
    save_spec(spec, path)
    return spec


def _refuse_another_policy(spec: RoutingSpec, losses: CertifiedLosses | None, calibrate: str) -> None:
    """Refuse to write a certificate beside a policy that it does not hold for.

    Raises:
        SpecError: the spec would not decode as was certified.
    """
    if losses is None:
        raise SpecError(
            f"{calibrate} was calibrated by an earlier release, whose certificates are bound to no policy; "
            "calibrate again, or export with --audit strict"
        )
    differing = _differing(spec, losses)
    if differing:
        raise SpecError(
            f"the certificate of {calibrate} is of another policy, these differ: {', '.join(differing)}; "
            "export as it was calibrated, calibrate again, or export with --audit strict"
        )


def _differing(spec: RoutingSpec, losses: CertifiedLosses) -> list[str]:
    """How a spec would decode otherwise than was certified."""
    from viasd_calib.binding import misfits

    found = misfits(spec, losses)
    if spec.verifier.dtype != losses.dtype:
        found.append(f"the number format ({spec.verifier.dtype}, certified {losses.dtype})")
    return found


def with_losses(spec: RoutingSpec, calibrated: lazy_types.CalibrateArtifact, path: Path) -> RoutingSpec:
    """The spec with its certified candidates listed, and with the losses that show them in files beside it.

    Candidates that the spec does not fit, as one in another number format, are left out, with a notice.

    Args:
        path: of the spec.
    """
    from viasd_calib.binding import with_candidate

    certificate = spec.certificate
    assert certificate is not None, "calibrate makes one"
    listed: list[CertifiedCandidate] = []
    for one in calibrated.candidates or ():
        candidate = one.listed(_reference(f"{path.stem}-{one.digest[:12]}.json", one.losses))
        differing = _differing(with_candidate(spec, candidate), one.losses)
        if differing:
            notice(f"certified {one.name} is not listed, these differ from what was certified: {', '.join(differing)}")
            continue
        write_json(path.parent / candidate.losses.path, one.losses)
        listed.append(candidate)
    own = next((one.losses for one in listed if one.digest == certificate.digest), None)
    if certificate.bound is not None and own is None and calibrated.losses is not None:  # an earlier release lists none
        own = _reference(path.name, calibrated.losses)
        write_json(path.parent / own.path, calibrated.losses)
    changed = certificate.model_copy(update={"losses": own, "candidates": listed or None})
    return spec.model_copy(update={"certificate": changed})


def _reference(name: str, losses: CertifiedLosses) -> HashedFile:
    """How a spec names the file of these losses beside it."""
    content = json_text(losses).encode()
    return HashedFile(path=f"{LOSSES_FOLDER}/{name}", sha256=hashlib.sha256(content).hexdigest())


def _draft_of(name: str, folder: Path, draft_model: str | None = None) -> tuple[DraftSpec, Path]:
    """The drafter of this name as a spec in ``folder`` names it, and the folder its tensors are relative to now."""
    from viasd_calib.draft.build import name_draft, with_weights
    from viasd_calib.draft.places import relocated

    draft, source = name_draft(name)
    if draft_model is not None:
        draft = relocated(draft, draft_model)
    draft = with_weights(draft, source)
    match draft:
        case CausalLMDraft(name_or_path=place):
            return draft.model_copy(update={"name_or_path": seen_from(place, folder)}), source
        case CombinedDraft(model=CausalLMDraft(name_or_path=place) as model):
            moved = model.model_copy(update={"name_or_path": seen_from(place, folder)})
            return draft.model_copy(update={"model": moved}), source
    return draft, source


def copy_draft(draft: DraftSpec, source: Path, folder: Path) -> DraftSpec:
    """The drafter with what belongs to the spec copied into its folder."""
    match draft:
        case ShallowDraft():
            return _copy_shallow(draft, source, folder)
        case CombinedDraft(model=ShallowDraft() as model):
            return draft.model_copy(update={"model": _copy_shallow(model, source, folder)})
    return draft


def seen_from(name_or_path: str, folder: Path) -> str:
    """A model's name as a spec in ``folder`` writes it: a relative path leads there from the spec.

    Example:
        >>> seen_from("smollm2-135m", Path("specs"))
        'smollm2-135m'
    """
    if os.path.isabs(name_or_path) or not os.path.exists(name_or_path):
        return name_or_path
    return Path(os.path.relpath(name_or_path, folder)).as_posix()


def _copy_shallow(draft: ShallowDraft, source: Path, folder: Path) -> ShallowDraft:
    target = folder / "draft" / Path(draft.tensors.path).name
    copy_file(source / draft.tensors.path, target)
    return draft.model_copy(update={"tensors": tensor_file(target, folder)})


def record_evidence(spec: str, evidence: str) -> RoutingSpec:
    """Write the evidence of a benchmark into a spec that is there already; nothing is measured again.

    Args:
        spec: path of the spec.
        evidence: JSON of ``viasd bench``, which must have measured the spec's policy.

    Raises:
        BenchError: it measured another one.
    """
    from viasd_calib.evaluation.bench import load_bench
    from viasd_calib.evaluation.provenance import check_evidence

    checked, measured = load_spec(spec), load_bench(evidence)
    check_evidence(measured, checked, evidence)
    updated = checked.model_copy(update={"evidence": evidence_of(measured)})
    save_spec(updated, spec)
    return updated


def evidence_of(bench: lazy_types.BenchResult) -> Evidence:
    """What a benchmark says of ``three_tier``, as a spec records it; a speedup takes enough prompts for an interval."""
    row = bench.methods["three_tier"]
    speedups = {"autoregressive": row.speedup_vs_autoregressive, "speculative": row.speedup_vs_speculative}
    shown = {name: interval for name, interval in speedups.items() if interval is not None and interval.bounds}
    noted = bench.provenance
    return Evidence.model_validate(
        {
            "acceptance_length": row.acceptance_length,
            "rejection_rate": row.rejection_rate or 0.0,
            "full_passes_per_token": row.full_passes_per_token,
            "tier_shares": row.tier_shares,
            "speedup_vs": {name: interval.median for name, interval in shown.items()},
            "intervals": {name: interval.bounds for name, interval in shown.items()},
            "hardware": bench.hardware,
            "prompts_sha256": None if noted is None else noted.prompts.sha256,
            "n_prompts": bench.n_prompts,
            "tokens": row.tokens,
            "commit": None if noted is None else noted.commit,
        }
    )
