from __future__ import annotations

import json

import torch

from viasd_calib.hardware import hardware


def test_hardware_is_named() -> None:
    named = hardware(torch.device("cpu"))
    assert named["device"]
    assert named["threads"] == torch.get_num_threads()
    assert named["torch"] == torch.__version__
    assert json.loads(json.dumps(named)) == named
