"""Joint products: each layer says what it would say alone, in whatever order layers are called."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from viasd_calib.slim.fused_linear import FusedLinear, FusedLinearPart, siblings_in
from viasd_calib.slim.lora_linear import LoRALinear

WIDTHS = (3, 1, 2)
"""Output features of three layers."""


class Counted(nn.Linear):
    """A linear layer that counts its products."""

    def __init__(self) -> None:
        super().__init__(4, sum(WIDTHS))
        self.products = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.products += 1
        return super().forward(inputs)


def parts_of(linear: nn.Module) -> list[FusedLinearPart]:
    product = FusedLinear(linear, WIDTHS)
    return [FusedLinearPart(product, number) for number in range(len(WIDTHS))]


@given(calls=st.lists(st.tuples(st.sampled_from(range(3)), st.sampled_from(range(3))), max_size=20))
@torch.inference_mode()
def test_any_order_of_calls_gives_each_layer_its_own(calls: list[tuple[int, int]]) -> None:
    """Layers called in any order, on any of several inputs of equal and of unequal values, once or again."""
    linear = Counted()
    parts = parts_of(linear)
    inputs = [torch.randn(1, 2, 4)]
    inputs += [inputs[0].clone(), torch.randn(2, 1, 4)]
    for number, chosen in calls:
        expected = linear(inputs[chosen]).split(WIDTHS, -1)[number]
        assert torch.equal(parts[number](inputs[chosen]), expected)


@given(order=st.permutations(range(3)), rounds=st.integers(1, 4))
@torch.inference_mode()
def test_siblings_share_one_product_which_is_then_let_go(order: list[int], rounds: int) -> None:
    linear = Counted()
    parts = parts_of(linear)
    for _ in range(rounds):
        inputs = torch.randn(1, 2, 4)
        for number in order:
            parts[number](inputs)
        gone = weakref.ref(inputs)
        del inputs
        assert gone() is None
    assert linear.products == rounds


@torch.inference_mode()
def test_a_tensor_that_waits_for_siblings_cannot_be_mistaken_for_another() -> None:
    """It is held: a new tensor in its place would else be taken for it."""
    parts = parts_of(nn.Linear(4, sum(WIDTHS)))
    inputs = torch.zeros(1, 4)
    kept = weakref.ref(inputs)
    parts[0](inputs)
    del inputs
    assert kept() is not None
    parts[0](torch.ones(1, 4))
    assert kept() is None


def named(**layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(layers)


@pytest.mark.parametrize(
    "parent",
    [
        named(q_proj=nn.Linear(4, 4), k_proj=nn.Linear(4, 2)),
        named(gate_proj=nn.Linear(4, 4), up_proj=nn.Linear(3, 4)),
        named(gate_proj=nn.Linear(4, 4), up_proj=nn.Linear(4, 4).bfloat16()),
        named(gate_proj=nn.Linear(4, 4), up_proj=Counted()),
        named(gate_proj=nn.Linear(4, 4), up_proj=nn.Identity()),
        named(gate_up_proj=nn.Linear(4, 8)),
    ],
)
def test_groups_that_are_not_whole_and_alike_are_none(parent: nn.Module) -> None:
    assert siblings_in(parent) == []


def test_groups_are_in_the_order_of_their_names() -> None:
    parent = named(v_proj=nn.Linear(4, 1), o_proj=nn.Linear(4, 4), k_proj=nn.Linear(4, 2), q_proj=nn.Linear(4, 3))
    assert [[layer.out_features for layer in group] for group in siblings_in(parent)] == [[3, 2, 1]]


def adapted(out: int, rank: int) -> LoRALinear:
    return LoRALinear(nn.Linear(4, out), nn.Linear(4, rank, bias=False), nn.Linear(rank, out, bias=False))


def test_adapters_of_siblings_read_the_same_input_too() -> None:
    """Of two or more, whether or not every sibling has one."""
    parent = named(q_proj=adapted(3, 5), k_proj=nn.Linear(4, 2), v_proj=adapted(2, 6))
    assert [[layer.out_features for layer in group] for group in siblings_in(parent)] == [[5, 6]]
    assert siblings_in(named(gate_proj=adapted(3, 5), up_proj=nn.Linear(4, 3))) == []
