"""Training losses by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from viasd_calib.choices import refuse_taken

TrainingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q's top ids ([places, k], long), their log-probabilities ([places, k]) and the logits of q'
([places, vocabulary]) to the loss at each place, [places], which gradients flow through."""

LOSSES: dict[str, TrainingLoss] = {}
"""What can be minimised, by name."""


def training_loss(name: str) -> Callable[[TrainingLoss], TrainingLoss]:
    """Register a loss under a name that no other has.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from viasd_calib.training.losses import LOSSES
        >>> LOSSES["kl"].__name__
        'kl_divergence'
    """

    def register(loss: TrainingLoss) -> TrainingLoss:
        refuse_taken("training loss", name, loss, LOSSES.get(name))
        LOSSES[name] = loss
        return loss

    return register
