"""What a certificate loss is, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from viasd_calib.calibration.judging import JudgedPrompt
from viasd_calib.choices import EARLIER_CERTIFICATE_LOSSES, refuse_taken

PromptLoss = Callable[[JudgedPrompt], float]
"""The loss of one prompt, in [0, 1], from its decoded turns and what q says of each of their tokens; prompts are
exchangeable, tokens of one text are not."""


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
    """Let a function be the certificate loss that its module is named after.

    Raises:
        ValueError: another loss has that name, or an earlier release's had.
    """

    def registered(of_prompt: PromptLoss) -> PromptLoss:
        name = of_prompt.__module__.rpartition(".")[2]
        known = _losses.get(EARLIER_CERTIFICATE_LOSSES.get(name, name))
        refuse_taken("certificate loss", name, of_prompt, None if known is None else known.of_prompt)
        _losses[name] = CertificateLoss(of_prompt, meaning, claim)
        return of_prompt

    return registered


def loss_named(name: str) -> CertificateLoss:
    """The loss of one of the names in :data:`~viasd_calib.choices.CERTIFICATE_LOSSES`, or of an earlier release's.

    Example:
        >>> loss_named("token_divergence").meaning
        "share of a text's tokens the full verifier would not have chosen"
    """
    name = EARLIER_CERTIFICATE_LOSSES.get(name, name)
    if name not in _losses:
        import_module(f"viasd_calib.calibration.losses.{name}")
    return _losses[name]
