"""A verifier as it will decode: the same model in another format, and what its passes cost."""

from __future__ import annotations

import copy

import torch

from tests.tiny import LAYERS, tiny_model
from viasd_calib.slim import decoding_copy as module
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.decoding_copy import decoding_copy, decoding_cost
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import LowBitWeights, Route

LAYERS_IN_8 = {"8": [*range(LAYERS)]}
LOW = LowBitWeights(attention=LAYERS_IN_8, mlp=LAYERS_IN_8, head=8)


@torch.no_grad()
def test_a_copy_is_the_same_model_and_leaves_the_first_as_it_is() -> None:
    model = copy.deepcopy(tiny_model())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    copied = decoding_copy(model, Route(low_bit=LOW), {"low_bit": LOW})
    assert copied.dtype == getattr(torch, fastest_dtype(torch.device("cpu")))
    ids = torch.arange(1, 9)[None]

    def probabilities(routed: RoutedModel) -> torch.Tensor:
        states = routed.full(ids, CacheWindow(routed.new_cache(8), 0, 8, 8))
        return routed.logits(states.last).float().softmax(-1)

    assert {name: torch.equal(weight, before[name]) for name, weight in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    torch.testing.assert_close(probabilities(copied), probabilities(RoutedModel(model)), rtol=0, atol=0.06)


def test_weights_that_are_tied_stay_tied() -> None:
    model = copy.deepcopy(tiny_model(family="gemma3_text"))
    copied = module.copied_in(model, torch.bfloat16)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert {weight.dtype for weight in copied.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_cost_is_measured_at_each_width() -> None:
    cost = decoding_cost(tiny_model(), Route(low_bit=LOW), {"low_bit": LOW}, widths=[1, 3])
    assert [*cost.measured] == [1, 3]
    assert (cost.device, cost.dtype) == ("cpu", fastest_dtype(torch.device("cpu")))
