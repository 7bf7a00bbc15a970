"""Drafters on backend ``native``: integer weights run in its own kernels, and q's text stays q's in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import make_model, tiny_config, tiny_shape
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.draft.build import build_drafter, describe_shallow
from viasd_calib.draft.native_shallow import StepTensors, native_steps
from viasd_calib.draft.shallow import ShallowDrafter, ShallowModel, save_shallow
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import round_linears
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.native.model import NativeModel
from viasd_calib.spec import WeightFormat

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
LACKING = why_no_kernels(CPU, DTYPE)
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"the kernels do not run here: {LACKING}")
SHAPE = tiny_shape(num_layers=3, head_vocab=24)
BITS = {None: 16, "int8": 8, "int4": 4}


def tiny_verifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return make_model(tiny_config(hidden_size=64, intermediate_size=96, head_dim=32)).to(DTYPE)


def native_pair(folder: Path, weight_format: WeightFormat | None) -> tuple[NativeModel, ShallowDrafter]:
    """A tiny verifier and a shallow drafter of it, whose linear layers are the kernels' own."""
    model = tiny_verifier()
    verifier = NativeModel(model)
    own = ShallowModel(verifier, SHAPE)
    with torch.no_grad():
        for linear in (own.from_token, own.from_taps, own.from_own):
            linear.weight.add_(0.1 * torch.randn_like(linear.weight))
        own.from_token.bias.add_(0.1 * torch.randn_like(own.from_token.bias))
    save_shallow(own, folder / "drafter.safetensors")
    spec = describe_shallow(folder, SHAPE).model_copy(update={"quantize": weight_format})
    drafter = build_drafter(spec, folder, verifier)
    assert isinstance(drafter, ShallowDrafter)
    prepare((model, *drafter.networks), "native", CPU, DTYPE)
    return verifier, drafter


def exact_drafter(folder: Path, weight_format: WeightFormat | None) -> ShallowDrafter:
    """The same drafter by modules in float32."""
    drafter = build_drafter(describe_shallow(folder, SHAPE), folder, RoutedModel(tiny_verifier().float()))
    assert isinstance(drafter, ShallowDrafter)
    if weight_format is not None:
        round_linears(drafter.networks, 8 if weight_format == "int8" else 4)
    return drafter


@pytest.mark.parametrize("weight_format", BITS)
@pytest.mark.parametrize(("width", "known"), [(1, 0), (1, 1), (4, 4), (5, 2)])
def test_a_step_is_what_modules_give(
    tmp_path: Path, weight_format: WeightFormat | None, width: int, known: int
) -> None:
    found_by, exact = native_pair(tmp_path, weight_format)[1], exact_drafter(tmp_path, weight_format)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 24, (4 + width,), generator=generator)
    conditions = torch.randn(4 + width, 64, generator=generator)
    results: list[tuple[StepTensors, Tensor]] = []
    for drafter in (found_by, exact):
        cache, given = drafter.new_cache(32), conditions.to(drafter.model.verifier.dtype)
        drafter.model.step(ids[:4], given[:4], 4, CacheWindow(cache, 0, 4, 4))  # keys and values that the step reads
        window = CacheWindow(cache, 4, width, 4 + width)
        results.append((drafter.model.step(ids[4:], given[4:], known, window), cache.keys))
    (found, keys), (wanted, exact_keys) = results
    assert found.logits.dtype == found.conditions.dtype == DTYPE
    for one, other in ((found.logits, wanted.logits), (found.conditions, wanted.conditions), (keys, exact_keys)):
        assert one.shape == other.shape
        # What enters one of the fourteen products in a row, and what is cached, is rounded by 2^-9 of it at most.
        assert (one.float() - other).norm() <= 16 * 2**-9 * other.norm()


def test_steps_run_by_modules_where_a_linear_layer_is_not_the_kernels_own(tmp_path: Path) -> None:
    _, drafter = native_pair(tmp_path, None)
    assert native_steps(drafter.model) is not None
    drafter.model.from_own = torch.nn.Linear(64, 64, bias=False)
    assert native_steps(drafter.model) is None


@pytest.mark.parametrize("weight_format", BITS)
def test_texts_are_autoregressive_with_any_bits_of_the_drafter(
    tmp_path: Path, weight_format: WeightFormat | None
) -> None:
    verifier, drafter = native_pair(tmp_path, weight_format)
    layers = [one for network in drafter.networks for one in network.modules() if isinstance(one, NativeLinear)]
    assert {layer.packed.bits for layer in layers} == {BITS[weight_format]}
    assert verifier.logits(torch.zeros(1, 64, dtype=DTYPE)).shape == (1, 24)
    prompt = [5, 6, 7, 8, 9]
    wanted = Decoder(verifier, None, Autoregressive(), []).generate(prompt, 40)
    found = Decoder(verifier, drafter, Speculative(draft_length=4), []).generate(prompt, 40)
    assert found.tokens == wanted.tokens
    assert found.counts.draft_steps > 0
