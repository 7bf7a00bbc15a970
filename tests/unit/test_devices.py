from __future__ import annotations

import pytest
import torch

from tests.tiny import TinyFolder, tiny_spec
from viasd_calib.cli import main
from viasd_calib.devices import check_device
from viasd_calib.errors import ModelError
from viasd_calib.models import load_verifier


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "cuda", "cuda:1", "mps"])
def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check_device(device)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device cuda needs a GPU and a PyTorch built for it, .*; leave --device out to run on the CPU"),
        ("cuda:3", "device cuda:3 needs a GPU"),
        ("mps", "device mps needs a Mac with Apple's own chip; leave --device out"),
        ("gpu", "there is no device 'gpu'; for a GPU of NVIDIA or AMD write cuda"),
        ("GPU:0", "write cuda"),
        ("CUDA", "there is no device 'CUDA'; choose cpu, cuda, cuda:NUMBER or mps"),
        ("cuda:x", "there is no device 'cuda:x'; choose"),
        ("cpu:1", "there is no device 'cpu:1'; choose"),
        ("meta", "there is no device 'meta'; choose"),
        ("", "there is no device ''; choose"),
        ("nonsense", "there is no device 'nonsense' here .*; choose"),
        ("xpu", "there is no device 'xpu' here .*; choose"),
    ],
)
def test_devices_that_are_not(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match=message) as caught:
        check_device(device)
    assert "\n" not in str(caught.value)


def test_a_gpu_beyond_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="there is no device cuda:2: this machine has cuda:0 to cuda:1"):
        check_device("cuda:2")


def test_nothing_is_loaded_first() -> None:
    with pytest.raises(ModelError, match="no device 'gpu'"):
        load_verifier("/nowhere/at/all", device="gpu")


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "x"],
        ["bench", "--json", "OUT"],
        ["report", "--bench", "OUT", "--out", "OUT"],
        ["profile", "--json", "OUT"],
        ["plan", "--traces", "T", "--out", "OUT"],
        ["route-quality", "--json", "OUT"],
        ["capture", "--out", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_says_it_in_one_line(
    tiny_folder: TinyFolder,
    tmp_path_factory: pytest.TempPathFactory,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("device")
    spec = tiny_spec(tiny_folder, folder)
    words = [str(folder / "out") if word == "OUT" else word for word in command]
    capsys.readouterr()
    assert main([*words, "--spec", str(spec), "--device", "gpu"]) == 1
    said = capsys.readouterr().err.strip()
    assert said == "error: there is no device 'gpu'; for a GPU of NVIDIA or AMD write cuda"


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "--fit", "F", "--out", "O"],
        ["export", "--calibrate", "C", "--out", "O"],
        ["search", "--traces", "T", "--json", "O"],
        ["frontier", "--target_costs", "[0.5]", "--out", "O"],
    ],
    ids=lambda command: command[0],
)
def test_before_anything_else_is_looked_at(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    assert main([*command, "--device", "gpu"]) == 1
    assert "there is no device 'gpu'" in capsys.readouterr().err
