"""Drafters on backend ``native``: integer weights run in its own kernels, and q's text stays q's in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.tiny import make_model, tiny_config, tiny_shape
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.draft.build import build_drafter, describe_shallow
from viasd_calib.draft.native_shallow import native_steps
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
    """They round to bfloat16 between products, the kernels do not: these are no further from float32 than they."""
    by_kernels, by_modules = (native_pair(tmp_path, weight_format)[1] for _ in range(2))
    by_modules.model.__dict__["_native"] = None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 24, (4 + width,), generator=generator)
    conditions = torch.randn(4 + width, 64, generator=generator)
    found, rounded, exact = (
        [*run_step(drafter, ids, conditions, known)]
        for drafter in (by_kernels, by_modules, exact_drafter(tmp_path, weight_format))
    )
    assert found[0].dtype == found[1].dtype == DTYPE
    for one, other, wanted in zip(found, rounded, exact, strict=True):
        assert one.shape == wanted.shape
        assert (one.float() - wanted).norm() <= 1.5 * (other.float() - wanted).norm()


def run_step(drafter: ShallowDrafter, ids: Tensor, conditions: Tensor, known: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, conditions and keys of a step over all but the first four tokens, whose keys and values it reads."""
    model, cache, width = drafter.model, drafter.new_cache(32), len(ids) - 4
    given = conditions.to(model.verifier.dtype)
    model.step(ids[:4], given[:4], 4, CacheWindow(cache, 0, 4, 4))
    step = model.step(ids[4:], given[4:], known, CacheWindow(cache, 4, width, 4 + width))
    return step.logits, step.conditions, cache.keys


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


HARMLESS = {"slice", "reshape", "view", "select", "unsqueeze", "detach", "alias", "to", "contiguous", "stack"}
"""Views, and the copy of a block's rows into one."""


class OperatorsOnLogits(TorchDispatchMode):
    """Notes the operators of PyTorch that are given logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(one.is_floating_point() and one.shape[-1:] == (self.vocabulary,) for one in given):
            self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_operator_of_pytorch_reads_logits(tmp_path: Path) -> None:
    """They would share a large vocabulary among threads, and wait for one that other work has put off its core."""
    verifier, drafter = native_pair(tmp_path, None)
    for strategy in (Autoregressive(), Speculative(draft_length=4)):
        with OperatorsOnLogits(24) as operators:
            Decoder(verifier, drafter, strategy, []).generate([5, 6, 7, 8, 9], 40)
        assert operators.found <= HARMLESS
        assert operators.found, "logits are seen"
