"""A slim verifier whose low bits were rounded by GPTQ, from traces to a text, alone and beside what is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import viasd_calib
from tests.tiny import LAYERS, TinyFolder, tiny_fit_options, tiny_prompts, tiny_traces
from tests.tiny.bits import priced
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import FIT_FILE
from viasd_calib.prompts import SplitShares
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.parts import low_bit
from viasd_calib.spec import load_spec

EVERY = [*range(LAYERS)]
GPTQ: dict[str, Any] = {"bits": 8, "mlp": 4, "rounding": "gptq"}
ALONE: dict[str, Any] = {"route_choice": "whole", "adapter_rank": 0, "parts": {"low_bit": GPTQ}, "max_run": 4}


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 24, max_new_tokens=12, batch_size=12, top_k=4)


def exported(fit: Path, folder: Path) -> Path:
    """The spec of a fit, which decodes exactly."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(28)[24:]), encoding="utf-8")
    shares = SplitShares(fit=0.0, calibrate=1.0, test=0.0)
    asked = viasd_calib.CalibrateOptions(
        fit=str(fit), out=str(folder / "calibrate"), prompts=str(prompts), dtype="float32"
    )
    viasd_calib.calibrate(replace(asked, shares=shares, max_new_tokens=4, allow_uncertified=True, fractions=[0.5]))
    path = folder / "spec" / "routing.json"
    viasd_calib.export(viasd_calib.ExportOptions(calibrate=str(folder / "calibrate"), out=str(path), audit="strict"))
    return path


@pytest.mark.filterwarnings("ignore::viasd_calib.errors.MachineWarning")
def test_it_goes_from_traces_to_a_text(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for rounding in ("gptq", "nearest"):
        model = {**ALONE, "parts": {"low_bit": {**GPTQ, "rounding": rounding}}}
        found[rounding] = viasd_calib.fit(tiny_fit_options(tiny_folder, traces, tmp_path / rounding, 2, model))
    fitted, nearest = found["gptq"], found["nearest"]
    assert fitted is not None
    assert nearest is not None
    assert fitted.route.low_bit is not None
    assert nearest.route.low_bit is not None
    assert fitted.route.low_bit.model_copy(update={"rule": "nearest", "tensors": None}) == nearest.route.low_bit
    assert fitted.route.memory == nearest.route.memory
    spec = exported(tmp_path / "gptq", tmp_path)
    route = load_spec(spec).route
    (file,) = route.files
    assert file.path == "low_bit/low_bit.safetensors"
    assert main(["validate", str(spec)]) == 0
    assert "valid" in capsys.readouterr().out
    texts = []
    for method in ("three_tier", "self_speculative", "autoregressive"):
        words = ["generate", "--spec", str(spec), "--prompt", "w1 w2", "--max_new_tokens", "12", "--method", method]
        assert main(words) == 0
        texts.append(capsys.readouterr().out.splitlines()[0])
    assert texts[0] == texts[1] == texts[2]
    engines = [load_engine(spec, dtype="float32", backend="eager", offload=one) for one in (None, Offload("disk"))]
    ids = torch.arange(6, 18)[None]
    states = [one.routed.slim(ids, one.routed.new_cache(12).rows()[0].window(0, 12)).last for one in engines]
    assert torch.equal(states[0], states[1])
    with (spec.parent / file.path).open("ab") as damaged:
        damaged.write(b"x")
    assert main(["validate", str(spec)]) == 1
    assert "is not the tensor file the spec was written with" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "changes",
    [
        {"target_cost": 0.7, "adapter_rank": 2, "parts": {"low_bit": {"bits": 4, "rounding": "gptq"}}},
        {
            "target_cost": 0.7, "adapter_kind": "norms", "mlp_keep": 0.5, "head_vocab": 16,
            "parts": {"low_bit": {"bits": 8, "rounding": "gptq"}},
        },
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::viasd_calib.errors.MachineWarning")
def test_it_goes_with_what_is_trained(
    changes: dict[str, Any], tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    given = tiny_fit_options(tiny_folder, traces, tmp_path / "fit", 2, {**changes, "max_run": 4})
    fitted = viasd_calib.fit(given)
    assert fitted is not None
    route = fitted.route
    assert route.low_bit is not None
    assert route.low_bit.rule == "gptq"
    assert {"bridges", "adapter"} < {*route.entries()}
    assert route.mlp_skip
    spec = exported(tmp_path / "fit", tmp_path)
    assert main(["validate", str(spec)]) == 0
    again = viasd_calib.fit(replace(given, rounds=2, out=str(tmp_path / "rounds")))
    assert again is not None
    assert (tmp_path / "rounds" / "low_bit.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::viasd_calib.errors.MachineWarning")
def test_bits_may_be_chosen(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    model = {**ALONE, "parts": {"low_bit": {"bits": "auto", "rounding": "gptq"}}, "target_cost": 0.4}
    fitted = viasd_calib.fit(tiny_fit_options(tiny_folder, traces, tmp_path, 2, model))
    assert fitted is not None
    document = json.loads((tmp_path / FIT_FILE).read_text(encoding="utf-8"))
    assert document["route"]["low_bit"]["tensors"]["path"] == "low_bit.safetensors"
    choice = json.loads((tmp_path / low_bit.MEASURED_FILE).read_text(encoding="utf-8"))
    rows = {
        (row["kind"], row["layer"]): row["bits"] for row in choice["measured"] if row["chosen"] and row["bits"] < 16
    }
    assert fitted.route.low_bit is not None
    assert {layer: bits for (kind, layer), bits in rows.items() if kind == "mlp"} == fitted.route.low_bit.bits("mlp")


def test_what_it_cannot_go_with_is_refused(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="gptq cannot be fitted with fold_adapter, which changes the weights"):
        viasd_calib.SlimVerifierOptions(adapter_rank=2, fold_adapter=True, parts={"low_bit": GPTQ})
    for harmless in ({"adapter_rank": 0}, {"adapter_kind": "norms"}):
        assert viasd_calib.SlimVerifierOptions(fold_adapter=True, parts={"low_bit": GPTQ}, **harmless)  # type: ignore[arg-type]
    given = tiny_fit_options(tiny_folder, traces, tmp_path, 2, ALONE, offload="disk")
    with pytest.raises(CalibrationError, match="rounding gptq needs them in memory; take --config fit/low-bit"):
        viasd_calib.fit(given)
