"""A name that something is registered under is refused for another: else the first would be gone without a word."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any

import pytest

from viasd_calib.calibration.losses import base as certificate_losses
from viasd_calib.choices import CERTIFICATE_LOSSES
from viasd_calib.decoding.slim_rules import base as slim_rules
from viasd_calib.decoding.strategies import base as strategies
from viasd_calib.training.losses import LOSSES, training_loss


def elsewhere(module: str) -> Any:
    """A class of another package, in a module of this name."""
    found = new_class("Another")
    found.__module__ = f"other_package.{module}"
    return found


def a_strategy(again: bool) -> None:
    known = strategies.load_strategy("three_tier")
    strategies.register(lossless=False, takes_audit=True)(known if again else elsewhere("three_tier"))
    assert strategies.load_strategy("three_tier") is known


def a_rule(again: bool) -> None:
    from viasd_calib.decoding.slim_rules.ratio import RatioRule

    slim_rules.register(RatioRule if again else elsewhere("ratio"))


def a_certificate_loss(again: bool) -> None:
    known = certificate_losses.loss_named("token_divergence")
    found = known.of_prompt if again else elsewhere("token_divergence")
    certificate_losses.register(meaning=known.meaning, claim=known.claim)(found)


def a_certificate_loss_of_earlier_releases(again: bool) -> None:
    if not again:
        certificate_losses.loss_named("token_divergence")
        certificate_losses.register(meaning="", claim="")(elsewhere("divergence"))


def a_training_loss(again: bool) -> None:
    training_loss("kl")(LOSSES["kl"] if again else elsewhere("kl"))


CASES = [
    (a_strategy, "strategy 'three_tier'"),
    (a_rule, "slim rule 'ratio'"),
    (a_certificate_loss, "certificate loss 'token_divergence'"),
    (a_certificate_loss_of_earlier_releases, "certificate loss 'divergence'"),
    (a_training_loss, "training loss 'kl'"),
]


@pytest.mark.parametrize(("register", "words"), CASES)
def test_a_taken_name_is_refused(register: Callable[[bool], None], words: str) -> None:
    before = [certificate_losses.loss_named(name) for name in CERTIFICATE_LOSSES], dict(LOSSES)
    with pytest.raises(ValueError, match=rf"there is a {words} already \(.*\); give .*Another another name"):
        register(False)
    assert before == ([certificate_losses.loss_named(name) for name in CERTIFICATE_LOSSES], dict(LOSSES))


@pytest.mark.parametrize("register", [case[0] for case in CASES])
def test_the_same_may_be_registered_again(register: Callable[[bool], None]) -> None:
    """As where a module is loaded anew."""
    register(True)
