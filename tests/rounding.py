"""How far two computations of the same numbers may lie apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.tiny import LAYERS

WIDTH, INNER, LONGEST = 16, 32, 40
"""Of the tiny models: hidden size, width of an MLP, and positions that the tests' texts have at most."""
SUMS_OF_A_LAYER = 2 * WIDTH + 3 * WIDTH + LONGEST + INNER
"""Numbers that are added up on the way through a layer: two norms; projections into attention, out of it and into the
MLP; the values that attention weighs; the projection out of the MLP."""
SUMS_OF_A_FORWARD = LAYERS * SUMS_OF_A_LAYER + 2 * WIDTH
"""The same from the embeddings to the logits, final norm and output head included."""


def rounding(*numbers: Tensor, sums: int = SUMS_OF_A_FORWARD, size: float = 0.0) -> float:
    """The difference that rounding explains between two computations of the same numbers: eps x sums x size.

    A sum of n numbers has n roundings, each by at most half an eps of the largest number in it, and two computations
    (other batch shapes, another processor) may add in different orders: so they differ by at most n eps of that
    size. A fault is larger by orders of magnitude.

    Args:
        numbers: what is compared; the coarsest type and the largest finite magnitude count.
        sums: how many numbers are added up on the way to each.
        size: the largest number on the way, where it is larger than those.
    """
    eps = max(torch.finfo(one.dtype).eps for one in numbers)
    sizes = [float(one.detach().abs().masked_fill(~one.isfinite(), 0).max()) for one in numbers if one.numel()]
    return eps * sums * max([size, *sizes])


def assert_near(found: Tensor, wanted: Tensor, sums: int = SUMS_OF_A_FORWARD, size: float = 0.0) -> None:
    """Hold two tensors of one shape and type to be equal but for :func:`rounding`."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=rounding(found, wanted, sums=sums, size=size))


SHARE_OF_STEPS = 0.1
"""How far two trainings may part: a tenth of the way that they went. Another order of batches, a step more, or moments
of Adam that were lost make it half and more."""


def assert_trained_alike(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], began: Mapping[str, Tensor]
) -> None:
    """Hold the states of two trainings of the same steps to be equal, as far as rounding lets them be.

    Adam divides a gradient by its own size: a weight whose gradient is little but rounding takes a whole step in
    whichever direction that rounding points. So single weights say nothing, and each tensor is held by the distance
    that it went.

    Args:
        began: the state before the steps; what is not in it began at 0.
    """
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        start = began.get(name, torch.zeros_like(tensor))
        moved, apart = float((tensor - start).norm()), float((found[name] - tensor).norm())
        assert apart <= SHARE_OF_STEPS * moved + rounding(tensor, sums=tensor.numel()), (name, apart, moved)
