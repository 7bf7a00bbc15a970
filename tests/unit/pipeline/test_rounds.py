"""``viasd fit --rounds``: what a round hands to the next, and where a job that was killed goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rounding import assert_near, assert_trained_alike
from tests.tiny import TinyFolder, even_costs, tiny_fit, tiny_prompts, tiny_traces
from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.calibration.judging import token_deficits
from viasd_calib.cli import main
from viasd_calib.cli.fit import fit
from viasd_calib.file_names import FIT_FILE, HELD_BACK_FILE, SCORES_FILE
from viasd_calib.files import read_json
from viasd_calib.models import load_verifier
from viasd_calib.pipeline import fit_once, rounds
from viasd_calib.pipeline.fit_options import FitOptions
from viasd_calib.pipeline.fitted import open_fit
from viasd_calib.pipeline.rounds import settings_like
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces import capture as capturing
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.folder import CaptureSettings, read_manifest
from viasd_calib.traces.texts import read_texts
from viasd_calib.training import student
from viasd_calib.training.warm_start import STATE_FILE, WARM_START_KEYS

STEPS = 3
LEARNED_FROM: dict[Path, list[list[Path]]] = {}
"""Trace folders of each round, by the folder of the job."""


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 24, max_new_tokens=12, batch_size=9, top_k=4)


@pytest.fixture(autouse=True)
def _costs_that_do_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "sublayer_costs", even_costs)


def run(verifier: TinyFolder, traces: Path, out: Path, *more: str) -> Path:
    assert main(["fit", *tiny_fit(verifier, [traces], out, STEPS), *more, "--debug"]) == 0
    return out


@pytest.fixture(scope="module")
def two_rounds(tiny_folder: TinyFolder, traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def noted(options: FitOptions, *arguments: Any) -> FitArtifact | None:
        LEARNED_FROM.setdefault(Path(options.out).parent, []).append(options.data.folders)
        return fit_once.fit_once(options, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "sublayer_costs", even_costs)
        patch.setattr(rounds, "fit_once", noted)
        return run(tiny_folder, traces, tmp_path_factory.mktemp("rounds") / "out", "--rounds", "2")


def test_between_rounds_the_decoder_answers_every_prompt(
    tiny_folder: TinyFolder, traces: Path, two_rounds: Path
) -> None:
    own, written = two_rounds / "round-1" / "traces", {text.prompt_id: text for text in read_texts(traces)}
    texts = read_texts(own)
    assert sorted(text.prompt_id for text in texts) == sorted(written)
    policy = read_manifest(own).policy
    assert policy is not None
    assert policy.startswith("three_tier ")
    assert read_manifest(traces).policy is None
    for text in texts:
        assert text.asked == written[text.prompt_id].asked
        assert len(text.generated) == len(text.q_ids) == len(text.p_token)
    assert not (two_rounds / "round-2" / "traces").exists(), "nobody would learn from them"


def test_q_reads_every_place_of_the_decoders_texts(tiny_folder: TinyFolder, traces: Path, two_rounds: Path) -> None:
    texts = read_texts(two_rounds / "round-1" / "traces")
    routed = RoutedModel(load_verifier(str(tiny_folder)).model)
    diverged = [text.generated != text.q_ids[:, 0] for text in texts]
    for text, found in zip(texts, diverged, strict=True):
        prompt, answer = text.asked.ids, text.generated.tolist()
        assert torch.equal(found, token_deficits(routed, prompt, answer) > 0)
    assert any(found.any() for found in diverged), "texts of q alone would show nothing that follows a diverged token"


def test_training_goes_on_and_learns_from_old_and_new_texts(traces: Path, two_rounds: Path) -> None:
    first, second = (torch.load(two_rounds / f"round-{n}" / STATE_FILE, weights_only=True) for n in (1, 2))
    assert set(first) <= set(WARM_START_KEYS)
    assert [int(state["state_dict"]["earlier_steps"]) for state in (first, second)] == [STEPS, 2 * STEPS]
    assert torch.equal(first["state_dict"]["kept"], second["state_dict"]["kept"])
    taken = [next(iter(state["optimizer_states"][0]["state"].values()))["step"] for state in (first, second)]
    assert [int(step) for step in taken] == [STEPS, 2 * STEPS], "Adam's moments go on too"
    folders = [[traces], [traces, two_rounds / "round-1" / "traces"]]
    assert LEARNED_FROM[two_rounds] == folders


def test_the_last_round_is_the_result(tiny_folder: TinyFolder, two_rounds: Path) -> None:
    route = read_json(FitArtifact, two_rounds / "round-2" / FIT_FILE, "viasd fit").route
    kept = [SCORES_FILE, HELD_BACK_FILE, *(file.path for file in route.files), FIT_FILE]
    assert len(kept) == 5  # bridges and adapter beside scores, texts and fit
    for name in kept:
        assert (two_rounds / name).read_bytes() == (two_rounds / "round-2" / name).read_bytes()
    fitted = read_json(FitArtifact, two_rounds / FIT_FILE, "viasd fit")
    open_fit(fitted, two_rounds, load_verifier(str(tiny_folder)))  # its tensors are found
    assert read_json(FitArtifact, two_rounds / "round-1" / FIT_FILE, "viasd fit") != fitted


@pytest.mark.parametrize("where", ["in the second round", "while capturing"])
def test_a_killed_job_goes_on_with_the_round_it_was_in(
    where: str, tiny_folder: TinyFolder, traces: Path, two_rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        """Stands for the end of the process."""

    def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
        left = iter(range(at))

        def call(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return function(*args, **options)

        return call

    out = tmp_path / "out"
    without_traces = shutil.ignore_patterns("traces") if where == "while capturing" else None
    shutil.copytree(two_rounds / "round-1", out / "round-1", ignore=without_traces)  # the round there is in either job
    words = [*tiny_fit(tiny_folder, [traces], out, STEPS), "--rounds", "2"]
    with monkeypatch.context() as patch:
        if where == "while capturing":
            patch.setattr(capturing, "write_shard", dying(capturing.write_shard, 1))
        else:
            patch.setattr(fit_once, "write_fit", dying(fit_once.write_fit, 0))
        with pytest.raises(Killed):
            fit(words)
    before = {path: path.stat().st_mtime_ns for path in (out / "round-1").rglob("*") if path.is_file()}
    assert len(list((out / "round-1/traces").glob("*.parquet"))) == (1 if where == "while capturing" else 3)
    assert not (out / "round-2" / FIT_FILE).exists()
    fit(words)
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written, f"{path} was there already"
    whole, rest = (
        torch.load(folder / "round-2" / STATE_FILE, weights_only=True)["state_dict"] for folder in (two_rounds, out)
    )
    assert_trained_alike(rest, whole, torch.load(out / "round-1" / STATE_FILE, weights_only=True)["state_dict"])
    answered, expected = (read_texts(folder / "round-1/traces") for folder in (out, two_rounds))
    assert [text.prompt_sha256 for text in answered] == [text.prompt_sha256 for text in expected]
    for found, text in zip(answered, expected, strict=True):
        assert torch.equal(found.ids, text.ids)
        assert torch.equal(found.p_token, text.p_token)
        assert_near(found.q_log_probs.float(), text.q_log_probs.float(), size=10.0)  # logits are larger


def test_one_round_more_goes_on_from_those_there_are(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    out = run(tiny_folder, traces, tmp_path / "out", "--rounds", "2")
    first = (out / "round-2" / FIT_FILE).stat().st_mtime_ns
    run(tiny_folder, traces, out, "--rounds", "3", "--gate_folders", f"[{traces}]")
    assert (out / "round-2" / FIT_FILE).stat().st_mtime_ns == first
    state = torch.load(out / "round-3" / STATE_FILE, weights_only=True)["state_dict"]
    assert int(state["earlier_steps"]) == 3 * STEPS
    assert read_manifest(out / "round-2/traces").policy != read_manifest(out / "round-1/traces").policy
    assert (out / FIT_FILE).read_bytes() == (out / "round-3" / FIT_FILE).read_bytes()
    assert (out / "round-2/gate_traces").is_dir(), (
        "gates that have prompts of their own see the decoder's answers to them"
    )


def test_settings_are_greedy_and_as_short_as_the_shortest(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    loaded = load_verifier(str(tiny_folder))
    for name, length, temperature in (("a", 6, 0.7), ("b", 4, 0.0)):
        settings = CaptureSettings(max_new_tokens=length, temperature=temperature, top_k=3)
        capture_traces(loaded, None, "none", tiny_prompts(2), tmp_path / name, settings)
    found = settings_like([tmp_path / "a", tmp_path / "b"])
    assert found == CaptureSettings(max_new_tokens=4, temperature=0.0, top_k=3)


def test_a_checkpoint_beside_rounds_is_refused(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_fit(tiny_folder, [traces], tmp_path / "out")
    assert main(["fit", *words, "--rounds", "2", "--ckpt_path", str(tmp_path / "last.ckpt")]) == 1
    assert "leave out --ckpt-path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
