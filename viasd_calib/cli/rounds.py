"""Rounds of ``viasd fit``: between two of them, the three-tier decoder of the last one writes texts to learn from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace

from viasd_calib.calibration.artifacts import FitArtifact, load_scores
from viasd_calib.calibration.candidates import propose
from viasd_calib.cli.notices import announce, say_written
from viasd_calib.cli.router_cli import RouterCLI, data_of
from viasd_calib.draft.places import draft_at, draft_from
from viasd_calib.file_names import FIT_FILE, SCORES_FILE
from viasd_calib.files import copy_file, read_json, write_json
from viasd_calib.models import LoadVerifier, Verifier
from viasd_calib.pipeline.fit import gate_texts
from viasd_calib.pipeline.fitted import decoder_at, open_fit
from viasd_calib.spec import Decoding
from viasd_calib.traces.capture import CaptureReport, capture_again
from viasd_calib.traces.data import TraceDataModule, TraceText
from viasd_calib.traces.folder import CaptureSettings, read_manifest
from viasd_calib.traces.on_policy import Policy, policy_name
from viasd_calib.training.warm_start import STATE_FILE

ROUND_LOSS = 0.05
"""Share of diverged tokens, as a replay of held-back texts has it, at which a round's texts are decoded: enough that
what follows a diverged token is seen, few enough that the texts stay sensible."""
DECODING = Decoding(audit="off")
"""How they are decoded: nothing that was emitted is taken back."""

TRACES, GATE_TRACES = "traces", "gate_traces"
"""Folders of a round with the decoder's answers to the prompts that are learned from, and to those for gates alone."""
FOLDER_OPTIONS = {TRACES: "--data.folders", GATE_TRACES: "--gate_folders"}


def round_folder(out: Path, number: int) -> Path:
    """Where a round, counted from 1, leaves its fit, its state and the traces made with it.

    Example:
        >>> round_folder(Path("runs/fit"), 2).as_posix()
        'runs/fit/round-2'
    """
    return out / f"round-{number}"


def fit_rounds(words: Sequence[str], options: Namespace, load: LoadVerifier) -> None:
    """Train in rounds, and keep the last one's result; a round whose fit is there already is not trained again.

    Args:
        words: of ``viasd fit``.
        options: what they say.
    """
    out, gate_folders = Path(options.out), options.gate_folders or []
    sources = {TRACES: data_of(options)}  # what is answered anew between rounds, by the name of the answers' folder
    if gate_folders:
        sources[GATE_TRACES] = gate_texts(gate_folders, options.data.seed)
    for number in range(1, options.rounds + 1):
        folder = round_folder(out, number)
        earlier = [round_folder(out, one) for one in range(1, number)]
        if not (folder / FIT_FILE).is_file():
            announce(f"round {number}/{options.rounds}")
            own = words_of_round(folder, sources, earlier)
            RouterCLI(load=load, state=folder / STATE_FILE, args=["fit", *words, *own])
        if number < options.rounds:
            verifier = load(options.model.verifier, device=device_of(options.trainer.accelerator))
            for name, source in sources.items():
                report = capture_round(folder, verifier, source.texts, settings_like(source.folders), folder / name)
                say_written(report.folder, f"{report.texts} texts of the three-tier decoder, {report.tokens} tokens")
    keep_as_result(folder, out)
    say_written(out / FIT_FILE, f"that of round {options.rounds}")


def words_of_round(folder: Path, sources: Mapping[str, TraceDataModule], earlier: Sequence[Path]) -> list[str]:
    """What a round says to ``viasd fit`` beside the user's words.

    Args:
        sources: the user's traces, by the name of the folder that a round's answers to their prompts lie in.
        earlier: folders of the rounds before it.
    """
    words = ["--rounds", "1", "--out", str(folder), "--trainer.default_root_dir", str(folder)]
    for name, source in sources.items():
        folders = [*source.folders, *(one / name for one in earlier)]
        words += [FOLDER_OPTIONS[name], json.dumps([str(one) for one in folders])]
    return [*words, "--ckpt_path", str(earlier[-1] / STATE_FILE)] if earlier else words


def capture_round(
    fit_folder: Path, verifier: Verifier, texts: Sequence[TraceText], settings: CaptureSettings, traces: Path
) -> CaptureReport:
    """Let the three-tier decoder of a fit answer what ``texts`` answered, each prompt once, into ``traces``.

    One bound, that whose replayed loss is ``ROUND_LOSS``, holds for all tiers.

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
    """Settings for greedy texts beside those of ``folders``; of several lengths the shortest, which has room always."""
    settings = [read_manifest(folder).settings for folder in folders]
    shortest = min(one.max_new_tokens for one in settings)
    return settings[0].model_copy(update={"temperature": 0.0, "max_new_tokens": shortest})


def device_of(accelerator: object) -> str:
    """Where a trainer with this accelerator trains.

    Example:
        >>> device_of("cpu")
        'cpu'
    """
    return "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def keep_as_result(fit_folder: Path, out: Path) -> None:
    """Put the results of a round where those of the whole fit are looked for, the file that ends a fit last."""
    fitted = read_json(FitArtifact, fit_folder / FIT_FILE, "viasd fit")
    for name in (SCORES_FILE, *(file.path for file in fitted.route.files)):
        copy_file(fit_folder / name, out / name)
    draft = draft_from(draft_at(fitted.draft, fit_folder), out)
    write_json(out / FIT_FILE, fitted.model_copy(update={"draft": draft}))
