"""Where the linear layers of a model are, for those who put others in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from viasd_calib.slim.in_process import Unsaved


class PackedLinear(Unsaved, nn.Module):
    """A linear layer whose weight lies in the order of a kernel."""

    def plain(self) -> Tensor:
        """The weight in plain order, [out, in], put together anew."""
        raise NotImplementedError


class IntegerLinear(Unsaved, nn.Module):
    """A linear layer whose weight is integers, made from a plain one."""

    def memory(self) -> int:
        """Bytes of the weight with its steps."""
        return sum(one.nbytes for one in vars(self).values() if isinstance(one, Tensor))


class StreamedLinear(Unsaved, nn.Linear):
    """A linear layer whose weight lies in a buffer that is filled for each pass: backends leave it as it is."""


Layer = TypeVar("Layer", bound=nn.Module)


class LinearPlace(NamedTuple, Generic[Layer]):
    """A linear layer, and what holds it.

    Attributes:
        path: its name from the module that was looked through.
        holder: the module whose attribute ``name`` it is.
    """

    path: str
    holder: nn.Module
    name: str
    linear: Layer

    def put(self, module: nn.Module) -> None:
        """Put ``module`` there."""
        setattr(self.holder, self.name, module)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer that reads these very tensors; what is no parameter yet becomes one that is not trained.

    Args:
        weight: [out, in].
        bias: [out].

    Example:
        >>> weight = nn.Linear(3, 3).weight.detach()
        >>> linear_of(weight[:2]).weight.data_ptr() == weight.data_ptr()
        True
    """
    out, inputs = weight.shape
    layer = nn.Linear(inputs, out, bias=False, device="meta")
    layer.weight = _parameter(weight)
    layer.register_parameter("bias", None if bias is None else _parameter(bias))
    return layer


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def places_of(modules: Iterable[nn.Module], kind: type[Layer]) -> list[LinearPlace[Layer]]:
    """Every place inside ``modules`` that holds a layer of this very class: what derives from it may differ."""
    return [
        LinearPlace(f"{path}.{name}".lstrip("."), holder, name, child)
        for module in modules
        for path, holder in module.named_modules()
        for name, child in holder.named_children()
        if type(child) is kind
    ]


def plain_linears(modules: Iterable[nn.Module]) -> list[LinearPlace[nn.Linear]]:
    """Every place inside ``modules`` that holds a linear layer; what derives from one may compute something else.

    Example:
        >>> [place.path for place in plain_linears([nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))])]
        ['1.0']
    """
    return places_of(modules, nn.Linear)
