"""Linear layers of draft models with weights of eight or four bits, rounded to nearest; all else stays as it is.

A draft step takes as long as its weights take to read, and the full verifier mends what rounding spoils: with audit
``strict`` the text stays q's own. Products run in PyTorch's packed kernels. On a CPU these are written for
bfloat16 and walk through float32 one number at a time, so inputs are rounded to bfloat16 whatever the verifier's
number format is, and outputs come back in it. So what is drafted may differ at near ties between a text that is
decoded alone and in a batch, as it does for a draft model in bfloat16.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from viasd_calib.errors import MachineWarning, ModelError
from viasd_calib.slim.linears import IntegerLinear, linear_of, plain_linears
from viasd_calib.spec import WeightFormat

GROUP = 32
"""Neighbouring weights of a row that share a step in int4: the fewest, so the finest, that the kernels take."""
INT8_INPUTS = 16
"""The kernels of int8 read a row of weights in pieces of so many, and look neither at its end nor beyond."""
INT4_OUTPUTS = 16
"""The kernels of int4 keep rows of weights in blocks of so many."""
CUDA_TILES = (8, 4, 2)
"""Tiles of 16 inputs that CUDA's kernel may keep side by side, most first."""

_SMALLEST_STEP = torch.finfo(torch.bfloat16).tiny
_ops = torch.ops.aten


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] in eight bits, with one step a row: each entry is off by half a step at most.

    Returns:
        Codes [out, in], int8, and steps [out], bfloat16; ``codes * steps`` is near the weight.

    Example:
        >>> codes, steps = round_rows(torch.tensor([[127.0, -3.2]]))
        >>> codes.tolist(), steps.tolist()
        ([[127, -3]], [1.0])
    """
    weight = weight.detach().float()
    steps = _steps(weight.abs().amax(1) / 127)  # [out]
    codes = (weight / steps.float()[:, None]).round().clamp(-128, 127)
    return codes.to(torch.int8), steps


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [out, in] in four bits, with a step and a centre for each ``GROUP`` entries of a row.

    Each entry is off by half a step at most, and by what bfloat16 rounds off the centre, at most 2⁻⁸ of it.

    Returns:
        Codes [out, in], int32, from 0 to 15; steps [out, groups] and centres [out, groups], bfloat16;
        ``(codes - 8) * steps + centres`` is near the weight.

    Example:
        >>> codes, steps, centres = round_groups(torch.arange(32.0)[None] / 2)
        >>> codes[0, :5].tolist(), steps.tolist(), centres.tolist()
        ([0, 0, 1, 1, 2], [[1.03125]], [[8.25]])
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))  # [out, groups, GROUP]
    low, high = groups.aminmax(dim=-1)  # [out, groups] each
    steps = _steps((high - low) / 15)
    centres = ((low + high + steps) / 2).to(torch.bfloat16)  # of code 8, half a step above the middle
    codes = ((groups - centres.float()[..., None]) / steps.float()[..., None]).round().add(8).clamp(0, 15)
    return codes.to(torch.int32).flatten(1), steps, centres


def _steps(wanted: Tensor) -> Tensor:
    """Steps as the kernels hold them; weights that are all alike have a step too."""
    return wanted.clamp_min(_SMALLEST_STEP).to(torch.bfloat16)


class QuantisedLinear(IntegerLinear, ABC):
    """A linear layer with integer weights, which can be neither trained nor saved.

    Args:
        linear: what it is made from; its weight is not held on to.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.bias = linear.bias

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """Inputs [rows, in], bfloat16, times the weight: [rows, out]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the number format of the inputs."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        # A copy always: the kernels read whole vectors from where rows begin, and memory of its own begins aligned.
        rows = rows.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
        out = self.product(rows).to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Int8Linear(QuantisedLinear):
    """Weights of eight bits, one step a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._codes, self._steps = round_rows(linear.weight)

    def product(self, rows: Tensor) -> Tensor:
        return _ops._weight_int8pack_mm(rows, self._codes, self._steps)  # type: ignore[no-any-return]


class Int4Linear(QuantisedLinear):
    """Weights of four bits, two a byte, with a step and a centre for each ``GROUP``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        codes, steps, centres = round_groups(linear.weight)
        self._scaling = torch.stack([steps.T, centres.T], -1).contiguous()  # [groups, out, 2]
        if linear.weight.device.type == "cpu":
            self._packed = _ops._convert_weight_to_int4pack_for_cpu(codes, 1)  # the kernel has no tiles to choose
            self._kernel = _ops._weight_int4pack_mm_for_cpu
        else:
            tiles = next(tiles for tiles in CUDA_TILES if linear.in_features % (16 * tiles) == 0)
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # [out, in / 2]
            self._packed = _ops._convert_weight_to_int4pack(pairs, tiles)
            self._kernel = _ops._weight_int4pack_mm

    def product(self, rows: Tensor) -> Tensor:
        return self._kernel(rows, self._packed, GROUP, self._scaling)  # type: ignore[no-any-return]


class RoundedLinear(QuantisedLinear):
    """What one of the others computes, without a kernel for integers: the rounded weight, multiplied in bfloat16."""

    def __init__(self, linear: nn.Linear, weight_format: WeightFormat) -> None:
        super().__init__(linear)
        if weight_format == "int8":
            codes, steps = round_rows(linear.weight)
            weight = codes * steps[:, None]
        else:
            grouped, steps, centres = round_groups(linear.weight)
            weight = ((grouped.unflatten(1, (-1, GROUP)) - 8) * steps[..., None] + centres[..., None]).flatten(1)
        self._weight = weight.to(torch.bfloat16)  # [out, in]

    def product(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self._weight)


_LAYERS: dict[WeightFormat, type[QuantisedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


@cache
def why_no_kernel(weight_format: WeightFormat) -> str | None:
    """What the CPU's kernel for such weights lacks on this machine, in words; None where it runs.

    The operators are PyTorch's private ones, and differ between its builds: a small product is tried.
    """
    layer = linear_of(torch.full((INT4_OUTPUTS, GROUP), 0.5))
    rows = torch.ones(1, GROUP, dtype=torch.bfloat16)
    try:
        found = _LAYERS[weight_format](layer).product(rows)
    except (AttributeError, RuntimeError) as error:  # no such operator, or none for this CPU
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    right = torch.allclose(found.float(), RoundedLinear(layer, weight_format).product(rows).float(), rtol=0.02)
    return None if right else "it calculates wrongly"


def quantise_linears(modules: Iterable[nn.Module], weight_format: WeightFormat) -> None:
    """Exchange, in place, every linear layer inside ``modules`` for one with integer weights.

    Give it what is the draft model's alone. An embedding that shares its weight with the output head keeps it. On a CPU
    without the kernels the rounded weights are multiplied in bfloat16, with a warning: what is drafted is nearly
    the same, and takes longer.

    Raises:
        ModelError: the kernels do not run on the device, or a layer's sizes are none they take; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 16))
        >>> quantise_linears([model], "int4")
        >>> type(model[0]).__name__, model(torch.ones(3, 32)).shape
        ('Int4Linear', torch.Size([3, 16]))
    """
    places = plain_linears(modules)
    for place in places:
        check_device(place.linear.weight.device, weight_format)
        _check_sizes(place.path, place.linear, weight_format)
    lacking = why_no_kernel(weight_format) if places and places[0].linear.weight.device.type == "cpu" else None
    if lacking is not None:
        warnings.warn(
            f"PyTorch {torch.__version__} has no kernel for {weight_format} weights on this CPU ({lacking}): the draft "
            "model's weights are rounded, and multiplied in bfloat16, which is no faster than leaving quantize out",
            MachineWarning,
            stacklevel=2,
        )
    while places:  # one after the other, so that a plain weight is freed before the next is rounded
        place = places.pop()
        linear = place.linear
        place.put(_LAYERS[weight_format](linear) if lacking is None else RoundedLinear(linear, weight_format))


def check_device(device: torch.device, weight_format: WeightFormat) -> None:
    """Refuse a device that has no kernel for the weights, or none that is worth running.

    Raises:
        ModelError: naming the device and what to do.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ModelError(f"no kernel for {weight_format} weights runs on device {device}; leave quantize out")
    if weight_format == "int8":  # CUDA's has one thread for each output, which reads its row number by number
        raise ModelError(f"no fast kernel for int8 weights runs on device {device}; quantize to int4, or leave it out")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(
            f"int4 weights need a GPU of compute capability 8.0, device {device} has less; leave quantize out"
        )


def _check_sizes(path: str, linear: nn.Linear, weight_format: WeightFormat) -> None:
    inputs, outputs = linear.in_features, linear.out_features
    layer = f"the draft model's layer {path} ({inputs} inputs, {outputs} outputs)"
    if weight_format == "int8" and inputs % INT8_INPUTS:
        raise ModelError(
            f"{layer} cannot have int8 weights, which need a multiple of {INT8_INPUTS} inputs; leave quantize out"
        )
    if weight_format == "int4" and (inputs % GROUP or outputs % INT4_OUTPUTS):
        raise ModelError(
            f"{layer} cannot have int4 weights, which need a multiple of {GROUP} inputs and of {INT4_OUTPUTS} "
            "outputs; quantize to int8, or leave it out"
        )
