"""A fit of gates alone with the verifier's layers read for each of its passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import viasd_calib
from tests.tiny import TinyFolder, tiny_fit_options, tiny_prompts, tiny_traces
from viasd_calib.calibration.artifacts import load_scores
from viasd_calib.cli import main
from viasd_calib.errors import CalibrationError, ModelError, TraceError
from viasd_calib.file_names import FIT_FILE, HELD_BACK_FILE
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.pipeline import fit_gates
from viasd_calib.prompts import SplitShares
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.offload import settings
from viasd_calib.spec import OffloadRef

LOW: dict[str, Any] = {
    "route_choice": "whole", "adapter_rank": 0, "parts": {"low_bit": {"bits": 8, "mlp": 4}}, "max_run": 4,
}  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("empty_cache"),
    pytest.mark.skipif(settings.why_no_reading() is not None, reason=f"no reads: {settings.why_no_reading()}"),
]


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 24, max_new_tokens=12, batch_size=12, top_k=4)


def options(verifier: TinyFolder, traces: Path, out: Path, **model: Any) -> viasd_calib.FitOptions:
    return tiny_fit_options(verifier, traces, out, 2, {**LOW, **model})


def words_of(verifier: TinyFolder, traces: Path, out: Path, *more: str) -> list[str]:
    """The same as a command with layers read from disk."""
    return [
        "fit", "--out", str(out), "--model.verifier", str(verifier), "--model.route_choice", "whole",
        "--model.adapter_rank", "0", "--model.parts", "{low_bit: {bits: 8}}", "--model.max_run", "4",
        "--data.folders", json.dumps([str(traces)]), "--data.shares", '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}',
        "--data.validation_share", "0.3", "--offload", "disk", *more,
    ]  # fmt: skip


def test_gates_are_those_of_a_fit_in_memory(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    """Bit for bit, on the gates' own traces too; and it says how it is to decode."""
    loaded: list[bool] = []

    def load(*names: str, **given: Any) -> Verifier:
        loaded.append(given.get("layers", True))
        return load_verifier(*names, **given)

    for gate_folders in ((), (str(traces),)):
        asked = replace(options(tiny_folder, traces, tmp_path / "memory"), gate_folders=gate_folders)
        wanted = viasd_calib.fit(asked)
        read = replace(asked, out=str(tmp_path / "read"), offload="disk")
        found = viasd_calib.fit(read, load)
        assert wanted is not None
        assert found is not None
        assert found.route.relative_cost is not None
        changes = {"route": wanted.route, "offload": None}
        assert found.model_copy(update=changes) == wanted
        assert found.offload == OffloadRef(kind="disk", memory=None)
        assert found.route.unmeasured() == wanted.route.unmeasured()
        for name, column in vars(load_scores(tmp_path / "read")).items():
            other = getattr(load_scores(tmp_path / "memory"), name)
            assert torch.equal(column, other) if isinstance(column, torch.Tensor) else column == other
        held = [(tmp_path / name / HELD_BACK_FILE).read_bytes() for name in ("read", "memory")]
        assert held[0] == held[1]
    assert loaded == [False] * 2


def test_no_layer_is_held_while_texts_are_scored(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fit = fit_gates.fit_gates

    def looked_at(model: RoutedModel, *rest: Any, **given: Any) -> Any:
        assert model.cold is not None
        storages = [one.untyped_storage() for one in model.model.get_decoder().layers.parameters()]
        held = {one.data_ptr(): one.nbytes() for one in storages}
        seen.append(sum(held.values()))
        assert model.cold.residency.cold_bytes > 0
        return fit(model, *rest, **given)

    monkeypatch.setattr(fit_gates, "fit_gates", looked_at)
    viasd_calib.fit(replace(options(tiny_folder, traces, tmp_path), offload="disk"))
    model = load_verifier(str(tiny_folder)).model
    every = sum(one.nbytes for one in model.get_decoder().layers.parameters())
    assert seen[0] < every, "norms, biases and two buffers are all that may be there"


def test_calibrate_reads_layers_as_the_fit_did(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    assert main(words_of(tiny_folder, traces, tmp_path / "fit", "--memory", "1GB")) == 0
    assert "adapter_rank: 0" in (tmp_path / "fit" / "config.yaml").read_text(encoding="utf-8")
    document = json.loads((tmp_path / "fit" / FIT_FILE).read_text(encoding="utf-8"))
    assert document["offload"] == {"kind": "disk", "memory": 10**9}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(26)[24:]), encoding="utf-8")
    found = viasd_calib.calibrate(
        viasd_calib.CalibrateOptions(
            fit=str(tmp_path / "fit"), out=str(tmp_path / "calibrate"), prompts=str(prompts), max_new_tokens=4,
            shares=SplitShares(fit=0.0, calibrate=1.0, test=0.0), allow_uncertified=True, fractions=[0.5],
        )
    )  # fmt: skip
    assert found.offload == OffloadRef(kind="disk", memory=10**9)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ({"route_choice": "span"}, {}, "--model.route_choice span needs them in memory"),
        ({"adapter_rank": 2}, {}, "an adapter .* needs them in memory"),
        ({"mlp_keep": 0.5}, {}, "--model.mlp_keep 0.5 needs"),
        ({"head_vocab": 12}, {}, "--model.head_vocab 12 needs"),
        ({"parts": {}}, {}, "--model.parts other than low_bit needs"),
        ({"parts": {"low_bit": {"bits": "auto"}}}, {}, "bits auto needs"),
        ({}, {"rounds": 2}, "--rounds needs"),
        ({}, {"offload": "cpu"}, "--offload cpu keeps all layers in memory; give --offload disk, or leave it out"),
    ],
)
def test_what_is_trained_is_refused_before_loading(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, model: Any, changes: Any, words: str
) -> None:
    def load(*_: Any, **__: Any) -> Verifier:
        raise AssertionError("the verifier is loaded")

    asked = replace(options(tiny_folder, traces, tmp_path / "fit", **model), **{"offload": "disk", **changes})
    with pytest.raises(CalibrationError, match=words):
        viasd_calib.fit(asked, load)
    assert not (tmp_path / "fit").exists()


def test_a_fit_that_is_refused_leaves_nothing_behind(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder with a configuration that nothing was fitted with."""
    assert main(words_of(tiny_folder, traces, tmp_path / "fit", "--model.adapter_rank", "2")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "an adapter (--model.adapter_rank 0 leaves it out) needs them in memory" in said
    assert not (tmp_path / "fit").exists()


def test_a_system_without_such_reads_is_told(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "why_no_reading", lambda: "it has none")
    with pytest.raises(ModelError, match="--offload does not run here: it has none"):
        viasd_calib.fit(replace(options(tiny_folder, traces, tmp_path), offload="disk"))


def test_traces_of_another_verifier_are_refused(traces: Path, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    other = load_verifier(str(tiny_folder)).model
    with torch.no_grad():
        other.get_decoder().layers[0].mlp.down_proj.weight.mul_(2)
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other.save_pretrained(tmp_path)
    with pytest.raises(TraceError):
        viasd_calib.fit(replace(options(tmp_path, traces, tmp_path / "fit"), offload="disk"))
