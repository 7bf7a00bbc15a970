"""Machines without what the fast backends need: everything runs, and says what is slower and why."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.tiny import TinyFolder, make_model, tiny_config, tiny_model, tiny_spec
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import MachineWarning, ModelError
from viasd_calib.slim import backends, onednn_linear
from viasd_calib.slim.backends import choose_backend, fastest_dtype, prepare
from viasd_calib.slim.low_bit import LowBitLinear
from viasd_calib.slim.onednn_linear import can_pack, trial_product, why_not_packed

CPU = torch.device("cpu")


def _no_onednn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def _no_instructions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def _no_probe(patch: pytest.MonkeyPatch) -> None:
    def absent() -> bool:
        raise AttributeError("no such operator")

    patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", absent)


def _no_operator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    patch.setattr(onednn_linear, "trial_product", lambda dtype: "PyTorch cannot do it here (no kernel)")


@pytest.fixture(autouse=True)
def without_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose CPU lacks what the kernels of backend native are written in."""
    monkeypatch.setattr(backends, "why_no_kernels", lambda device, dtype: "this CPU has no avx512_bf16")


ABSENCES = [
    (_no_onednn, "is built without oneDNN here"),
    (_no_instructions, "this CPU has no instructions for bfloat16"),
    (_no_probe, "cannot say whether this CPU has instructions"),
    (_no_operator, "PyTorch cannot do it here"),
]


@pytest.mark.parametrize(("without", "why"), ABSENCES)
def test_bfloat16_runs_eager_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: TinyFolder, tmp_path: Path, without: object, why: str
) -> None:
    path = tiny_spec(tiny_folder, tmp_path)
    assert callable(without)
    without(monkeypatch)
    with pytest.warns(MachineWarning, match=rf"backend eager runs .*{why}.*torch\.bfloat16 is slow here: --dtype"):
        engine = load_engine(path, dtype="bfloat16")
    assert engine.backend == "eager"
    assert len(engine.decoder().generate([7, 8, 9], 8).tokens) > 0
    with pytest.raises(ModelError, match=f"backend packed needs .*: .*{why}.*; choose backend eager"):
        load_engine(path, dtype="bfloat16", backend="packed")


def test_a_command_says_it_in_one_notice(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_spec(tiny_folder, tmp_path)
    _no_onednn(monkeypatch)
    words = ["generate", "--spec", str(path), "--prompt", "w1", "--max-new-tokens", "2"]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().err.count("notice: backend eager runs the models") == 1
    assert main([*words, "--dtype", "float32"]) == 0
    assert "notice" not in capsys.readouterr().err, "float32 is eager everywhere"


def test_nothing_is_said_where_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(tiny_model()) == "eager"
        monkeypatch.setattr(onednn_linear, "trial_product", lambda dtype: None)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert choose_backend(_half(tiny_model())) == "packed"


def test_the_trial_finds_an_operator_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_arguments: object) -> None:
        raise RuntimeError("could not create a primitive\nmore of it")

    trial_product.cache_clear()
    monkeypatch.setattr(onednn_linear, "pack_weight", absent)
    assert str(why_not_packed(CPU, torch.float32)).endswith("cannot do it here (could not create a primitive)")
    assert not can_pack(CPU, torch.float32)
    with pytest.raises(ModelError, match="could not create a primitive"):
        prepare([], "packed", CPU, torch.float32)
    trial_product.cache_clear()


def test_other_formats_and_devices_are_named() -> None:
    assert why_not_packed(torch.device("mps"), torch.float32) == "device mps is no CPU"
    assert why_not_packed(CPU, torch.float64) == "torch.float64 is none of its number formats"


@pytest.mark.parametrize(("packs", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_is_chosen_where_the_cpu_calculates_in_it(
    monkeypatch: pytest.MonkeyPatch, packs: bool, expected: str
) -> None:
    monkeypatch.setattr(backends, "can_pack", lambda device, dtype: packs)
    assert fastest_dtype(CPU) == expected


def test_the_own_kernels_are_the_default_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="backend native cannot run here: this CPU has no avx512_bf16; choose another"):
        prepare([], "native", CPU, torch.bfloat16)
    monkeypatch.setattr(backends, "why_no_kernels", lambda device, dtype: None)
    monkeypatch.setattr(backends, "kernels", lambda: None)
    known = make_model(tiny_config(head_dim=32)).to(torch.bfloat16)
    assert choose_backend(known) == "native"
    assert choose_backend(_half(tiny_model(family="gemma2"))) in ("packed", "eager"), "a type that they do not know"
    assert fastest_dtype(CPU) == "bfloat16"


def test_kernels_that_cannot_be_compiled_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ModelError("/bin/false cannot compile the kernels (exit code 1); choose another backend")

    monkeypatch.setattr(backends, "why_no_kernels", lambda device, dtype: None)
    monkeypatch.setattr(backends, "kernels", refuse)
    with pytest.warns(MachineWarning, match=r"backend native cannot be used \(/bin/false cannot compile the kernels"):
        assert choose_backend(make_model(tiny_config(head_dim=32)).to(torch.bfloat16)) in ("packed", "eager")
    with pytest.raises(ModelError, match="cannot compile the kernels"):
        prepare([], "native", CPU, torch.bfloat16)


def _half(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).to(torch.bfloat16)


def test_low_bits_in_a_format_without_kernels_name_the_one_that_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LowBitLinear(nn.Linear(64, 16), 8)
    with pytest.warns(
        MachineWarning, match=r"gains nothing here: backend native has kernels for them, but this CPU has"
    ):
        prepare([layer], "eager", CPU, torch.float32)
    lacking = {torch.bfloat16: None, torch.float32: "they calculate in bfloat16"}
    monkeypatch.setattr(backends, "why_no_kernels", lambda device, dtype: lacking[dtype])
    with pytest.warns(MachineWarning, match=r"kernels for them calculate in bfloat16; give --dtype bfloat16"):
        prepare([layer], "eager", CPU, torch.float32)
    with pytest.warns(MachineWarning, match="gains nothing here: choose backend native"):
        prepare([layer], "eager", CPU, torch.bfloat16)
