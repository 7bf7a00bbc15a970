"""Dropout: what a model in training mode leaves out at random, so that its output differs each time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from viasd_calib.errors import ModelError


def refuse_dropout(modules: Iterable[nn.Module]) -> None:
    """Refuse modules that are in training mode where that makes a difference.

    Raises:
        ModelError: naming the first that would drop something out.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
        >>> refuse_dropout([model])
        >>> refuse_dropout([model[:1].train()])
    """
    for module in modules:
        for path, part in module.named_modules():
            if part.training and _rate(part) > 0:
                raise ModelError(
                    f"{type(module).__name__} is in training mode, in which {path or 'it'} leaves out "
                    f"{_rate(part):.0%} at random; call eval() on it before decoding"
                )


def _rate(part: Any) -> float:
    """Share that a module drops out in training mode; attention modules of transformers drop out by themselves."""
    return float(part.p if isinstance(part, _DropoutNd) else getattr(part, "attention_dropout", None) or 0.0)
