"""What a rule of the slim tier is: where q' may decide, from statistics of p and q' on a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from viasd_calib.choices import refuse_taken
from viasd_calib.decoding.acceptance import SlimMasks
from viasd_calib.decoding.features import DraftStatistics
from viasd_calib.spec import Gates


class SlimRule(ABC):
    """Where the slim tier may decide.

    A subclass with :func:`register` in a module of this package is what a spec means whose ``gates.convention`` is
    the module's name; any other may be given to :class:`~viasd_calib.decoding.strategies.three_tier.ThreeTier`.

    Attributes:
        sees_draw: whether ``SlimMasks.regenerate`` depends on the drafted token itself. Such a rule cannot keep a
            sampled text's distribution, and is refused where it would have to.
    """

    sees_draw: ClassVar[bool] = False

    @classmethod
    def from_spec(cls, gates: Gates, device: torch.device | str = "cpu") -> Self:
        """The rule with a spec's gates and thresholds; for those that a spec can name."""
        raise NotImplementedError(f"no spec can name {cls.__name__}")

    @property
    def draft_top(self) -> int:
        """How many of the draft model's most likely tokens the rule reads; 0 where it needs none of its logits."""
        return 1

    @abstractmethod
    def masks(self, logits: Tensor, draft: DraftStatistics, pending: int) -> SlimMasks:
        """What q' may decide of a block of k drafted tokens.

        ``regenerate`` at a place must follow from the rows up to that place alone: later rows have seen the token that
        is drawn there, and a sampled text would no longer be q's.

        Args:
            logits: q' at the k places of the block and after it, [k + 1, vocabulary].
            draft: the draft model's statistics of the block.
            pending: tokens that wait for q before the block.
        """


AnyRule = TypeVar("AnyRule", bound=SlimRule)
_REGISTERED: dict[str, type[SlimRule]] = {}


def register(rule: type[AnyRule]) -> type[AnyRule]:
    """Make a rule known under the name of its module.

    Raises:
        ValueError: another rule has that name.
    """
    name = rule.__module__.rpartition(".")[2]
    refuse_taken("slim rule", name, rule, _REGISTERED.get(name))
    _REGISTERED[name] = rule
    return rule


def slim_rule(gates: Gates, device: torch.device | str = "cpu") -> SlimRule | None:
    """The rule that a spec's gates describe; None where they leave q' nothing to decide.

    Example:
        >>> slim_rule(Gates(convention="ratio", accept_at=0.7, escalate_below=0.5))
        RatioRule(accept_at=0.7, escalate_below=0.5)
    """
    if not gates.slim_tier:
        return None
    import_module(f"{__package__}.{gates.convention}")
    return _REGISTERED[gates.convention].from_spec(gates, device)
