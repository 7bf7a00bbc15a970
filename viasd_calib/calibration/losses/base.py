"""What a certificate loss is, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from viasd_calib.decoding.conversation import Turn
from viasd_calib.slim.forward import RoutedModel

PromptLoss = Callable[[RoutedModel, Sequence[Turn]], float]
"""The loss of one prompt, in [0, 1], from the full verifier and the decoded turns; prompts are exchangeable, tokens of
one text are not."""


@dataclass(frozen=True)
class CertificateLoss:
    """A loss that can be certified.

    Attributes:
        of_prompt: the loss of one prompt.
        meaning: what it measures, in a few words.
        claim: what a bound on it says of texts, after "at most so much ...".
    """

    of_prompt: PromptLoss
    meaning: str
    claim: str


_losses: dict[str, CertificateLoss] = {}


def register(*, meaning: str, claim: str) -> Callable[[PromptLoss], PromptLoss]:
    """Let a function be the certificate loss that its module is named after."""

    def registered(of_prompt: PromptLoss) -> PromptLoss:
        _losses[of_prompt.__module__.rpartition(".")[2]] = CertificateLoss(of_prompt, meaning, claim)
        return of_prompt

    return registered


def loss_named(name: str) -> CertificateLoss:
    """The loss of one of the names in :data:`~viasd_calib.choices.CERTIFICATE_LOSSES`.

    Example:
        >>> loss_named("divergence").meaning
        "share of a text's tokens the full verifier would not have chosen"
    """
    if name not in _losses:
        import_module(f"viasd_calib.calibration.losses.{name}")
    return _losses[name]
