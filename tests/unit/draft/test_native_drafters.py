"""Drafters on backend ``native``: integer weights run in its own kernels, and q's text stays q's in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_model, tiny_config, tiny_shape
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.draft.build import build_drafter, describe_shallow
from viasd_calib.draft.shallow import ShallowModel, save_shallow
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.native.model import NativeModel
from viasd_calib.spec import WeightFormat

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
LACKING = why_no_kernels(CPU, DTYPE)
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"the kernels do not run here: {LACKING}")
BITS = {None: 16, "int8": 8, "int4": 4}


@pytest.mark.parametrize("weight_format", BITS)
def test_texts_are_autoregressive_with_any_bits_of_the_drafter(
    tmp_path: Path, weight_format: WeightFormat | None
) -> None:
    torch.manual_seed(0)
    model = make_model(tiny_config(hidden_size=64, intermediate_size=96, head_dim=32)).to(DTYPE)
    verifier = NativeModel(model)
    shape = tiny_shape(num_layers=3, head_vocab=24)
    save_shallow(ShallowModel(verifier, shape), tmp_path / "drafter.safetensors")
    spec = describe_shallow(tmp_path, shape).model_copy(update={"quantize": weight_format})
    drafter = build_drafter(spec, tmp_path, verifier)
    prepare((model, *drafter.networks), "native", CPU, DTYPE)
    layers = [one for network in drafter.networks for one in network.modules() if isinstance(one, NativeLinear)]
    assert {layer.packed.bits for layer in layers} == {BITS[weight_format]}
    assert verifier.logits(torch.zeros(1, 64, dtype=DTYPE)).shape == (1, 24)
    prompt = [5, 6, 7, 8, 9]
    wanted = Decoder(verifier, None, Autoregressive(), []).generate(prompt, 40)
    found = Decoder(verifier, drafter, Speculative(draft_length=4), []).generate(prompt, 40)
    assert found.tokens == wanted.tokens
    assert found.counts.draft_steps > 0
