"""One training of a slim verifier, and what it leaves: the route with its tensors, and the first gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning import seed_everything

from viasd_calib.calibration.artifacts import FitArtifact, save_scores
from viasd_calib.calibration.gate_fitting import FittedGates, fit_gates
from viasd_calib.draft.places import draft_at, draft_from
from viasd_calib.file_names import FIT_FILE
from viasd_calib.files import write_json
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models import LoadVerifier
from viasd_calib.pipeline.fit_memory import offload_entry
from viasd_calib.pipeline.fit_options import FitOptions
from viasd_calib.planning.held_back import save_held_back
from viasd_calib.prompt_copies import short_hashes
from viasd_calib.prompts import SplitShares, combined_sha256
from viasd_calib.slim.decoding_copy import decoding_cost
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.base import Sizes, load_parts, save_parts
from viasd_calib.slim.parts.head_vocab import share_outside
from viasd_calib.spec import OffloadRef, Route
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.folder import read_manifest
from viasd_calib.training.distillation import DistillationModule, check_memory
from viasd_calib.training.fit import NewTrainer, fit_slim_verifier
from viasd_calib.training.warm_start import save_warm_start


def fit_once(
    options: FitOptions, load: LoadVerifier, new_trainer: NewTrainer, state: Path | None = None
) -> FitArtifact | None:
    """Train all stages, and write what was learned.

    Args:
        state: where the trained state is written for a next round to go on from; None for nowhere.

    Returns:
        What was written; None in a process that only helps to train.
    """
    if options.seed is not None:
        seed_everything(options.seed, workers=True)
    module = fit_slim_verifier(
        options.model,
        options.data,
        new_trainer,
        max_steps=options.trainer.get("max_steps", -1),
        ckpt_path=options.ckpt_path,
        load=load,
        folder=Path(options.out),
    )
    if state is not None:
        save_warm_start(module.trainer, state)
    if not module.trainer.is_global_zero:
        return None
    return write_fit(module, options.data, Path(options.out), options.gate_folders, offload_entry(options))


def write_fit(
    module: DistillationModule,
    data: TraceDataModule,
    out: Path,
    gate_folders: Sequence[str] = (),
    offload: OffloadRef | None = None,
) -> FitArtifact:
    """Write the route with the tensors of its parts, fit the first gates on them, and write those.

    A slim pass with low bits is timed beside a full one, as both will decode here.

    Args:
        gate_folders: traces for the gates; none for the texts that the route learned from, and those held back.
        offload: how it is to decode.
    """
    options, student, verifier = module.options, module.student, module.student.verifier.model
    head_ids = student.head_ids(data.token_counts())
    held = module.slim_parts(head_ids)
    route = save_parts(module.route, held, options.part_options, out)
    outside = 0.0 if head_ids is None else share_outside(head_ids, data.validation_texts())
    student.release()
    routed = RoutedModel(verifier, route, held)
    check_memory(routed.memory, options.memory)
    route = route.model_copy(update={"memory": routed.memory})
    give_freed_memory_back()
    compared = gate_texts(gate_folders, data.seed) if gate_folders else data
    gates = fit_gates(routed, compared.training_texts(), compared.validation_texts(), options.max_run)
    del routed  # before another copy in low bits is made beside it
    if route.low_bit is not None:  # target_cost says nothing of what they gain, and another machine may gain nothing
        cost = decoding_cost(verifier, route, load_parts(route, out, Sizes.of_config(verifier.config)))
        route = route.model_copy(update={"relative_cost": cost})
    return write_result(route, data, compared, gates, outside, out, offload)


def write_result(
    route: Route,
    data: TraceDataModule,
    compared: TraceDataModule,
    gates: FittedGates,
    outside: float,
    out: Path,
    offload: OffloadRef | None,
) -> FitArtifact:
    """Write what was learned, but for the tensors of the route, which lie in the folder already.

    Args:
        data: texts of the route.
        compared: those of the gates.
        outside: share of q's choices that q' cannot emit.
        offload: how it is to decode.
    """
    artifact = _artifact(route, [data, compared], gates, outside, out).model_copy(update={"offload": offload})
    save_scores(gates.scores, out)
    save_held_back(compared.validation_texts(), longest_answer(compared), out)
    write_json(out / FIT_FILE, artifact)
    return artifact


def gate_texts(folders: Sequence[str], seed: int) -> TraceDataModule:
    """Traces for gates alone: every text of them, a third of them held back to compare the gates with."""
    everything = SplitShares(fit=1.0, calibrate=0.0, test=0.0)
    data = TraceDataModule([*folders], shares=everything, validation_share=1 / 3, seed=seed)
    data.setup()
    return data


def longest_answer(data: TraceDataModule) -> int:
    """Most tokens that a text of these traces might have had."""
    return max(read_manifest(folder).settings.max_new_tokens for folder in data.folders)


def _artifact(
    route: Route, sources: Sequence[TraceDataModule], gates: FittedGates, outside: float, out: Path
) -> FitArtifact:
    """What was learned from ``sources``: the texts of the route, and those of the gates; it will lie in ``out``."""
    data, compared = sources
    traces = compared.folders[0]
    return FitArtifact(
        verifier=data.verifier_ref(),
        draft=draft_from(draft_at(read_manifest(traces).draft, traces), out),
        route=route,
        draft_gate=gates.draft.gate,
        slim_gate=gates.slim.gate,
        reliability={"draft": gates.draft.reliability, "slim": gates.slim.reliability},
        agreement=gates.agreement,
        outside_head_vocab=outside,
        fit_sha256=combined_sha256([text.prompt_sha256 for source in sources for text in source.texts]),
        prompts=short_hashes(text.prompt_hash for source in sources for text in source.texts),
    )
