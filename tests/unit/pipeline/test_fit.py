"""A fit from Python, and the texts that its gates are fitted on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import viasd_calib
from tests.tiny import TinyFolder, even_costs, tiny_fit_options, tiny_prompts, tiny_traces
from viasd_calib.calibration.artifacts import FitArtifact, load_scores
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import FIT_FILE
from viasd_calib.files import read_json
from viasd_calib.pipeline.fit_once import gate_texts
from viasd_calib.prompts import SplitShares
from viasd_calib.training import student


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 24, max_new_tokens=12, batch_size=12, top_k=4)


def options(verifier: TinyFolder, traces: Path, out: Path, **changes: Any) -> viasd_calib.FitOptions:
    model = {"target_cost": 0.7, "adapter_rank": 2, "max_run": 4, **changes.pop("model", {})}
    return tiny_fit_options(verifier, traces, out, 3, model, **changes)


def test_traces_are_fitted_and_calibrated(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    fitted = viasd_calib.fit(options(tiny_folder, traces, tmp_path / "fit"))
    assert fitted == read_json(FitArtifact, tmp_path / "fit" / FIT_FILE, "viasd fit")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(32)[24:]), encoding="utf-8")
    calibrated = viasd_calib.calibrate(
        viasd_calib.CalibrateOptions(
            fit=str(tmp_path / "fit"), out=str(tmp_path / "calibrate"), prompts=str(prompts), max_new_tokens=4,
            shares=SplitShares(fit=0.0, calibrate=1.0, test=0.0), max_loss=0.5, confidence=0.5,
        )
    )  # fmt: skip
    assert fitted is not None
    assert calibrated.certificate.n_prompts == 8
    assert calibrated.certificate.split_sha256["fit"] == fitted.fit_sha256


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"bridges": False}, [0]),
        ({"bridges": False, "route_choice": "gates", "route_steps": 2}, [2, 0]),
        ({"target_cost": 1.0}, [0]),  # a route that skips nothing has no bridges
        ({"target_cost": 1.0, "route_choice": "gates", "route_steps": 2}, [2, 0]),
        ({}, [3]),
    ],
)
def test_without_bridges_and_adapter_nothing_is_distilled(
    changes: dict[str, Any],
    steps: list[int],
    tiny_folder: TinyFolder,
    traces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(student, "sublayer_costs", even_costs)
    given = options(tiny_folder, traces, tmp_path, model={"adapter_rank": 0, **changes})
    made = []

    def new_trainer(**changes: Any) -> Any:
        made.append(given.new_trainer(**changes))
        return made[-1]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted = viasd_calib.fit(given, new_trainer=new_trainer)
    messages = [str(one.message) for one in told]
    assert [one for one in messages if "treespec" not in one] == []  # that one is of Lightning's own use of torch
    assert [trainer.global_step for trainer in made] == steps
    assert fitted is not None
    assert bool(fitted.route.mlp_skip) == ("target_cost" not in changes)
    assert not [*fitted.route.files] or changes.get("bridges", True)
    assert load_scores(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0; give a whole number, at least 1"),
        ({"seed": -1}, "--seed-everything is -1"),
        ({"ckpt_path": "none.ckpt"}, "there is no checkpoint none.ckpt"),
        ({"gate_folders": ["none"]}, "none/capture.json"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], message: str, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    with pytest.raises(viasd_calib.ViasdError, match=message):
        viasd_calib.fit(options(tiny_folder, traces, tmp_path / "fit", **changes))
    assert not (tmp_path / "fit").exists()


def test_what_lightning_refuses_is_a_calibration_error(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    given = options(tiny_folder, traces, tmp_path)
    with pytest.raises(CalibrationError, match="Lightning refuses these options"):
        viasd_calib.fit(given, new_trainer=lambda **changes: given.new_trainer(**{**changes, "max_epochs": -2}))


def test_texts_for_gates_are_of_every_split_and_a_third_is_held_back(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    tiny_traces(tiny_folder, tmp_path, 48, max_new_tokens=4, batch_size=24)
    data = gate_texts([str(tmp_path)], seed=0)
    fitted = {text.prompt_sha256 for text in data.training_texts()}
    held_back = {text.prompt_sha256 for text in data.validation_texts()}
    assert fitted | held_back == {prompt.sha256 for prompt in tiny_prompts(48)}
    assert not fitted & held_back
    assert 0.15 < len(held_back) / 48 < 0.5
