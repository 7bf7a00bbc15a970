"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): a weight is rounded column by column, by what enters its layer.

Each column's error is carried to the columns that are rounded after it, so that what the layer gives changes least. The
integers are those of rounding to nearest, with the same steps: other codes, and nothing else for a kernel to know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from viasd_calib.errors import NumericsError
from viasd_calib.slim.low_bit import GROUP, ROUNDED_AT_ONCE, Bits, RoundedWeight, round_weight

DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal that are added to a Hessian: the first, unless it leaves one that is not positive."""
BLOCK = 128
"""Columns whose errors are carried to all later ones together, in one product."""
CODES: dict[Bits, tuple[int, int]] = {8: (-127, 127), 4: (0, 15)}
"""The least code of so many bits, and the largest."""


class InverseFactor(NamedTuple):
    """What rounding needs of a Hessian; weights that read the same inputs share it.

    Attributes:
        order: in which columns are rounded, [in].
        upper: U with U^T U = H^-1, of H with its rows and columns in this order; upper triangular, float32, [in, in].
    """

    order: Tensor
    upper: Tensor


def inverse_factor(hessian: Tensor) -> InverseFactor:
    """The Cholesky factor of a damped Hessian's inverse (step 3 of section 3.3 of the paper).

    Columns that are read most come first, while most others are there to take up their errors (``act-order`` of the
    authors' code). What never entered the layer has a diagonal of 0; it gets the mean one, and is rounded to nearest.

    It takes three times the Hessian's memory beside it meanwhile. H is V V^T with V upper triangular, by a Cholesky
    factor of H with its order reversed; U is the inverse of V, so that H itself is not inverted.

    Args:
        hessian: X^T X of inputs X ([places, in]), or any multiple of it, as 2 X^T X; float32, [in, in].

    Raises:
        NumericsError: it is not positive definite, however much is added to its diagonal (:data:`DAMPING`).

    Example:
        >>> order, upper = inverse_factor(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> order.tolist(), [round(one, 2) for one in (upper.T @ upper).inverse().diagonal().tolist()]
        ([1, 0], [3.02, 1.02])
    """
    diagonal = hessian.diagonal()
    read = diagonal > 0
    mean = diagonal[read].mean() if bool(read.any()) else torch.ones_like(diagonal[0])
    order = diagonal.argsort(descending=True, stable=True)
    reverse = order.flip(0)
    ordered = hessian[reverse][:, reverse]
    ordered.diagonal().add_(torch.where(read, 0.0, mean)[reverse])
    added = 0.0
    for damping in DAMPING:
        ordered.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not bool(failed) and bool(lower.isfinite().all()):
            break
    else:
        raise NumericsError("the Hessian of its inputs is not positive definite, not even with its mean diagonal added")
    del ordered
    factor = lower.flip(0, 1)  # V
    del lower
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return InverseFactor(order, torch.linalg.solve_triangular(factor, identity, upper=True))


def round_by_factor(weight: Tensor, bits: Bits, factor: InverseFactor) -> RoundedWeight:
    """A weight [out, in] in so many bits, rounded column by column; steps and lowest values are those of its own.

    A column's codes are the nearest ones, and its error e, over the diagonal of U, times the rest of U's row is taken
    from the columns after it (equations 2 and 3 of the paper, by algorithm 1, in blocks of columns).

    Args:
        weight: of any number format; its rows do not know of each other, and are taken some at a time.
        factor: of what enters the layer, on the same device.
    """
    weight = weight.detach()
    nearest = round_weight(weight, bits)
    rows = max(1, ROUNDED_AT_ONCE // weight.shape[1])
    pieces = range(0, weight.shape[0], rows)
    some = [
        _codes(weight[begin : begin + rows], nearest.outputs(slice(begin, begin + rows)), factor) for begin in pieces
    ]
    return nearest._replace(codes=torch.cat(some))


def _codes(weight: Tensor, nearest: RoundedWeight, factor: InverseFactor) -> Tensor:
    """Codes of some rows: [rows, in], int8."""
    order, upper = factor
    least, largest = CODES[nearest.bits]
    columns = order.tolist()
    left = weight.float().T[order].contiguous()  # [in, rows]: a column of the weight lies together
    steps, lowest = nearest.steps.T.contiguous(), nearest.lowest.T.contiguous()  # [1 or groups, rows]
    codes = torch.empty_like(left, dtype=torch.int8)
    for begin in range(0, len(columns), BLOCK):
        end = min(begin + BLOCK, len(columns))
        block, within = left[begin:end], upper[begin:end, begin:end]
        errors = torch.empty_like(block)
        for number, column in enumerate(columns[begin:end]):
            group = column // GROUP if nearest.bits == 4 else 0
            values = block[number]  # [rows]
            code = ((values - lowest[group]) / steps[group]).round().clamp(least, largest)
            codes[column] = code.to(torch.int8)
            errors[number] = (values - (code * steps[group] + lowest[group])) / within[number, number]
            block[number + 1 :].addr_(within[number, number + 1 :], errors[number], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()


def gptq(weight: Tensor, hessian: Tensor, bits: Bits) -> RoundedWeight:
    """A weight in so many bits whose outputs differ little: of small tr(E H E^T), E being what rounding changes.

    Frantar et al. 2022 (arXiv 2210.17323), algorithm 1 with the order and the damping of :func:`inverse_factor`.

    Args:
        weight: [out, in].
        hessian: 2 X^T X of what enters the layer, or any multiple of it; float32, [in, in].

    Raises:
        NumericsError: the Hessian has no Cholesky factor.

    Example:
        The second input always is the first one, so that the error of the one makes up for that of the other.

        >>> weight, hessian = torch.tensor([[127.0, 0.4, 0.4]]), torch.eye(3)
        >>> hessian[1:, 1:] = 1.0
        >>> gptq(weight, hessian, 8).codes.tolist(), gptq(weight, torch.eye(3), 8).codes.tolist()
        ([[127, 0, 1]], [[127, 0, 0]])
    """
    return round_by_factor(weight, bits, inverse_factor(hessian))
