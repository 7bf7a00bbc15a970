"""What a new user's fit does: low bits, where something here has kernels for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TinyFolder, tiny_traces
from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.cli import main
from viasd_calib.errors import JobWarning
from viasd_calib.file_names import FIT_FILE
from viasd_calib.files import read_json
from viasd_calib.models import Verifier
from viasd_calib.pipeline.recipes import LOW_BIT, TRAINED, default_recipe, low_bits_run, recipe_for


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose CPU has kernels for low bits."""
    monkeypatch.setattr("viasd_calib.slim.native.library.why_no_kernels", lambda *_: None)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("viasd_calib.slim.native.library.why_no_kernels", lambda *_: "this CPU has no avx512_vnni")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "given", [{}, {"model.verifier": "a", "out": "b", "data.folders": ["none"], "model.memory": 1}]
)
def test_options_that_name_no_recipe_take_low_bits(given: dict[str, Any]) -> None:
    with pytest.warns(JobWarning, match="no --config: takes configs/fit/low-bit.yaml.*--config configs/fit/quick.yaml"):
        recipe = default_recipe(given)
    assert Path(str(recipe)).read_text(encoding="utf-8").startswith("# A slim verifier of all layers")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "given", [{"model.target_cost": 0.5}, {"trainer.max_steps": 3}, {"rounds": 2}, {"ckpt_path": "last"}]
)
def test_options_of_a_recipe_are_left_alone(given: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_recipe(given) is None


@pytest.mark.usefixtures("no_kernels")
def test_without_kernels_a_slim_verifier_is_trained(tiny_verifier: Verifier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_recipe({}) is None
    assert recipe_for(tiny_verifier) == TRAINED


@pytest.mark.usefixtures("kernels")
def test_kernels_are_asked_for_the_verifier(monkeypatch: pytest.MonkeyPatch, tiny_verifier: Verifier) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert recipe_for(tiny_verifier) == LOW_BIT
    assert [low_bits_run(name) for name in ("Qwen3ForCausalLM", "Gemma2ForCausalLM", None)] == [True, False, True]


@pytest.mark.usefixtures("kernels")
def test_a_fit_without_a_recipe_is_in_8_bits_and_writes_into_its_folder_alone(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = tiny_traces(tiny_folder, tmp_path / "traces", 24, max_new_tokens=12, batch_size=12)
    words = ["--model.verifier", str(tiny_folder), "--data.folders", f"[{traces}]", "--out", str(tmp_path / "fit")]
    shares = ["--data.shares", '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}', "--data.validation_share", "0.3"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["fit", *words, *shares, "--debug"]) == 0
    assert not [*Path().iterdir()]
    assert (tmp_path / "fit" / "config.yaml").is_file()
    fitted = read_json(FitArtifact, tmp_path / "fit" / FIT_FILE, "viasd fit")
    assert [*fitted.route.entries()] == ["low_bit"]
    said = capsys.readouterr()
    assert "no --config: takes configs/fit/low-bit.yaml" in " ".join(said.err.split())
    assert "cost of a slim pass: " in said.out
