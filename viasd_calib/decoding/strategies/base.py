"""What a strategy is, and how a strategy is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import ClassVar, Self, TypeVar

import torch

from viasd_calib.choices import StrategyName, refuse_taken
from viasd_calib.decoding.session import Session
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Audit, Decoding, Gates


class Strategy(ABC):
    """A way to decode: what one round does to a session.

    A round is written for one text, as a generator that yields the passes it needs; the texts of a batch run theirs
    together. A subclass with :func:`register` in a module of this package can be chosen by the module's name; any
    other may be given to :class:`~viasd_calib.decoding.decoder.Decoder` as it is.

    Attributes:
        name: the module's, once registered.
        needs_drafter: whether rounds draft with the spec's draft model.
        lossless: whether greedy texts are q's own, and sampled ones have its distribution, by design.
        takes_audit: whether the spec's audit applies, or the caller's: then it is lossless under ``strict``, and the
            spec's certificate is about it.
        audit: which audit pending tokens go through.
    """

    name: ClassVar[str] = "unregistered"
    needs_drafter: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    takes_audit: ClassVar[bool] = False
    audit: Audit = "strict"

    @classmethod
    @abstractmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        """The strategy with a spec's gates and settings.

        Raises:
            SpecError: it needs a gate that the spec lacks.
        """

    @property
    def asks_slim(self) -> bool:
        """Whether rounds may run q'."""
        return True

    @abstractmethod
    def round(self, session: Session) -> Passes[None]:
        """Add at least one token to an open session, or settle a closed one."""

    def finished(self, session: Session) -> bool:
        """Whether the text is closed and every token of it final."""
        return session.closed and (self.audit == "off" or session.pending == 0)

    def final_length(self, session: Session) -> int:
        """Leading tokens that no later round can change."""
        return session.length if self.audit == "off" else session.decided

    @classmethod
    def is_lossless(cls, audit: Audit) -> bool:
        """Whether texts are q's own where this audit is asked for."""
        return cls.lossless or (cls.takes_audit and audit == "strict")


AnyStrategy = TypeVar("AnyStrategy", bound=Strategy)
_REGISTERED: dict[str, type[Strategy]] = {}


def register(*, lossless: bool, takes_audit: bool = False) -> Callable[[type[AnyStrategy]], type[AnyStrategy]]:
    """Make a strategy known under the name of its module; arguments as the attributes of :class:`Strategy`.

    They are stated for every strategy and not inherited: what varies a lossless strategy may be lossy.

    Raises:
        ValueError: another strategy has that name.
    """

    def add(strategy: type[AnyStrategy]) -> type[AnyStrategy]:
        name = strategy.__module__.rpartition(".")[2]
        refuse_taken("strategy", name, strategy, _REGISTERED.get(name))
        strategy.name = name
        strategy.lossless, strategy.takes_audit = lossless, takes_audit
        _REGISTERED[strategy.name] = strategy
        return strategy

    return add


def load_strategy(name: StrategyName) -> type[Strategy]:
    """The strategy of one of the names in :data:`~viasd_calib.choices.STRATEGIES`.

    Example:
        >>> load_strategy("speculative").is_lossless("off"), load_strategy("three_tier").is_lossless("off")
        (True, False)
    """
    import_module(f"{__package__}.{name}")
    return _REGISTERED[name]
