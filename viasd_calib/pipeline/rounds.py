"""A fit in rounds: between two of them, the three-tier decoder of the last one writes texts to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from viasd_calib.calibration.artifacts import FitArtifact, load_scores
from viasd_calib.calibration.candidates import propose
from viasd_calib.draft.places import draft_at, draft_from
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import FIT_FILE, HELD_BACK_FILE, SCORES_FILE
from viasd_calib.files import copy_file, read_json, write_json
from viasd_calib.models import LoadVerifier, Verifier
from viasd_calib.pipeline.fit_once import fit_once, gate_texts
from viasd_calib.pipeline.fit_options import FitOptions
from viasd_calib.pipeline.fitted import decoder_at, open_fit
from viasd_calib.progress import say
from viasd_calib.slim.parts.low_bit import MEASURED_FILE
from viasd_calib.spec import Decoding
from viasd_calib.traces.capture import CaptureReport, capture_again
from viasd_calib.traces.folder import CaptureSettings, read_manifest
from viasd_calib.traces.on_policy import Policy, policy_name
from viasd_calib.traces.texts import TraceText
from viasd_calib.training.fit import NewTrainer
from viasd_calib.training.warm_start import STATE_FILE

ROUND_LOSS = 0.05
"""Share of diverged tokens, as a replay of held-back texts has it, at which a round's texts are decoded: enough that
what follows a diverged token is seen, few enough that the texts stay sensible."""
DECODING = Decoding(audit="off")
"""How they are decoded: nothing that was emitted is taken back."""

TRACES, GATE_TRACES = "traces", "gate_traces"
"""Folders of a round with the decoder's answers to the prompts that are learned from, and to those for gates alone."""


def round_folder(out: Path, number: int) -> Path:
    """Where a round, counted from 1, leaves its fit, its state and the traces made with it.

    Example:
        >>> round_folder(Path("runs/fit"), 2).as_posix()
        'runs/fit/round-2'
    """
    return out / f"round-{number}"


def fit_rounds(options: FitOptions, load: LoadVerifier, new_trainer: NewTrainer) -> FitArtifact:
    """Train in rounds, and keep the last one's result; a round whose fit is there already is not trained again.

    Raises:
        CalibrationError: several processes train in rounds.
    """
    trainer = new_trainer()
    if trainer.world_size > 1:
        raise CalibrationError(
            f"rounds train in one process, not in {trainer.world_size}; set trainer.devices to 1, or leave "
            "out --rounds and capture between two fits with viasd capture --spec"
        )
    folders = [round_folder(Path(options.out), number) for number in range(1, options.rounds + 1)]
    sources = {TRACES: options.data}  # what is answered anew between rounds, by the name of the answers' folder
    options.data.setup()
    if options.gate_folders:
        sources[GATE_TRACES] = gate_texts(options.gate_folders, options.data.seed)
    for number, folder in enumerate(folders, start=1):
        if not (folder / FIT_FILE).is_file():
            say(f"round {number}/{options.rounds}")
            own = options_of_round(options, folder, folders[: number - 1])
            if number > 1:
                _keep_choice(folders[number - 2], folder)  # what was trained was trained on these bits
            fit_once(own, load, partial(new_trainer, default_root_dir=str(folder)), folder / STATE_FILE)
        if number < options.rounds:
            verifier = load(options.model.verifier, device=str(trainer.strategy.root_device))
            for name, source in sources.items():
                report = capture_round(folder, verifier, source.texts, settings_like(source.folders), folder / name)
                say(f"wrote {report.folder}: {report.texts} texts of the three-tier decoder, {report.tokens} tokens")
    return keep_as_result(folders[-1], Path(options.out))


def options_of_round(options: FitOptions, folder: Path, earlier: Sequence[Path]) -> FitOptions:
    """The options of one round, which learns from the given traces and from those of the rounds before it.

    Args:
        folder: of the round.
        earlier: folders of the rounds before it.
    """
    gate_folders = [*options.gate_folders]
    if gate_folders:
        gate_folders += [str(one / GATE_TRACES) for one in earlier]
    return replace(
        options,
        out=str(folder),
        data=options.data.with_folders([one / TRACES for one in earlier]),
        gate_folders=gate_folders,
        rounds=1,
        ckpt_path=str(earlier[-1] / STATE_FILE) if earlier else None,
    )


def capture_round(
    fit_folder: Path, verifier: Verifier, texts: Sequence[TraceText], settings: CaptureSettings, traces: Path
) -> CaptureReport:
    """Let the three-tier decoder of a fit answer what ``texts`` answered, each prompt once, into ``traces``.

    All tiers have one threshold, that whose replayed loss is ``ROUND_LOSS``.

    Raises:
        CalibrationError: the fit is missing or damaged.
        TraceError: the folder holds other traces.
    """
    fitted = read_json(FitArtifact, fit_folder / FIT_FILE, "viasd fit")
    engine = open_fit(fitted, fit_folder, verifier)
    scores = load_scores(fit_folder)
    (candidate,) = propose(fitted.draft_gate, fitted.slim_gate, scores, ROUND_LOSS, fractions=(1.0,))
    name = policy_name("three_tier", fitted.draft, fitted.route, candidate.gates, DECODING)
    policy = Policy(name, decoder_at(engine, candidate.gates, DECODING))
    asked = {tuple(text.asked.ids): text.asked for text in texts}
    draft = draft_from(draft_at(fitted.draft, fit_folder), traces)
    return capture_again(verifier, engine.drafter, draft, [*asked.values()], traces, settings, policy)


def settings_like(folders: Sequence[Path]) -> CaptureSettings:
    """Settings for greedy texts beside those of ``folders``; of several lengths the shortest."""
    settings = [read_manifest(folder).settings for folder in folders]
    shortest = min(one.max_new_tokens for one in settings)
    return settings[0].model_copy(update={"temperature": 0.0, "max_new_tokens": shortest})


def keep_as_result(fit_folder: Path, out: Path) -> FitArtifact:
    """Put the results of a round where those of the whole fit are looked for, the file that ends a fit last."""
    fitted = read_json(FitArtifact, fit_folder / FIT_FILE, "viasd fit")
    for name in (SCORES_FILE, HELD_BACK_FILE, *(file.path for file in fitted.route.files)):
        copy_file(fit_folder / name, out / name)
    _keep_choice(fit_folder, out)
    draft = draft_from(draft_at(fitted.draft, fit_folder), out)
    kept = fitted.model_copy(update={"draft": draft})
    write_json(out / FIT_FILE, kept)
    return kept


def _keep_choice(fit_folder: Path, out: Path) -> None:
    """Put the bits that a round chose, where it chose some, where another one looks for them."""
    if (fit_folder / MEASURED_FILE).is_file():
        copy_file(fit_folder / MEASURED_FILE, out / MEASURED_FILE)
