"""Whether drafting pays in a text, by what q has kept of its drafted tokens so far: a rule for one text or many.

A drafted token pays where it is kept more often than it costs: its draft step and the wider pass, as a share of the
pass that a kept token saves. That share is the bound. While fewer drafted tokens than it are kept, by exponentially
fading sums over catch-ups, at most one token is drafted a round, and where that does not pay either, none. A pause ends
with a round that drafts one token again; the next one lasts twice as long.

The rule looks only at drafted tokens that q had decided before the round began, so that sampled texts stay exact. It is
written once for a decoded text, in plain numbers of the host, and for the lanes of a replay, in tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

FADE = 0.85
"""What is left of the sums at the next catch-up that decides drafted tokens: about seven of them count."""

FADE_OF_ONE = 0.95
"""The same where a round drafts one token: it costs little, and tells little."""

FIRST_PAUSE = 8
"""Catch-ups without drafting before it is tried again."""

LONGEST_PAUSE = 64
"""The most of them, once pauses have doubled."""

WHOLE, ONE, NOTHING = 0, 1, 2
"""What a round drafts: a whole block, one token, or nothing."""


Number = TypeVar("Number", float, Tensor)
"""Of one text, or of many, float64 or long."""


def _pick(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the condition is true, else ``no``: of one text, or of many."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


@dataclass(frozen=True)
class RollingAcceptance(Generic[Number]):
    """What is known of the drafted tokens of a text, or of many: then tensors of one shape, on the host.

    Attributes:
        kept: fading sum of those that q kept.
        compared: of those that were kept or refused; a tail after a refused one is not among them.
        drafted: of all.
        level: ``WHOLE``, ``ONE`` or ``NOTHING``.
        waited: catch-ups since the pause began.
        pause: how many a pause lasts.
    """

    kept: Number
    compared: Number
    drafted: Number
    level: Number
    waited: Number
    pause: Number

    @classmethod
    def begin(cls, draft_length: Number) -> RollingAcceptance[Number]:
        """Before anything was drafted: as if a block of ``draft_length`` tokens had been kept."""
        block: Any = draft_length.double() if isinstance(draft_length, Tensor) else float(draft_length)
        zero = draft_length - draft_length
        return cls(block, block, block, zero, zero, zero + FIRST_PAUSE)

    def only(self, chosen: Any) -> RollingAcceptance[Number]:
        """Those of a mask over many texts."""
        return RollingAcceptance(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    @classmethod
    def choose(
        cls, mask: Any, yes: RollingAcceptance[Number], no: RollingAcceptance[Number]
    ) -> RollingAcceptance[Number]:
        """``yes`` where the mask is true, else ``no``."""
        columns = (field.name for field in fields(cls))
        return cls(**{name: _pick(mask, getattr(yes, name), getattr(no, name)) for name in columns})


def share_kept(acceptance: Number, draft_length: Number) -> Number:
    """Expected share of a block that is kept where each token is with chance a, if those before it are: (a+…+a^k) / k.

    Args:
        acceptance: a, in [0, 1].
        draft_length: k, at least 1.

    Example:
        >>> share_kept(1.0, 4), share_kept(0.5, 2)
        (1.0, 0.375)
        >>> share_kept(torch.tensor([1.0, 0.5]), torch.tensor([4, 2])).tolist()
        [1.0, 0.375]
    """
    rest = 1 - acceptance
    series = acceptance * (1 - acceptance**draft_length) / _pick(rest > 0, rest, 1.0)
    share: Number = _pick(rest > 0, series / draft_length, 1.0)
    return share


def length_now(state: RollingAcceptance[Number], draft_length: Number) -> Number:
    """Most tokens that a round drafts.

    Args:
        draft_length: of a whole block.

    Example:
        >>> state, lengths = RollingAcceptance.begin(4), []
        >>> for _ in range(30):
        ...     lengths.append(length_now(state, 4))
        ...     state = after_catch_up(state, lengths[-1], 0, min(lengths[-1], 1), 4, 0.2)  # all in vain
        >>> lengths
        [4, 4, 4, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    """
    one = (state.level == ONE) | (state.waited >= state.pause)
    length: Number = _pick(state.level == WHOLE, draft_length, _pick(one & (draft_length > 0), 1, 0))
    return length


def after_catch_up(
    state: RollingAcceptance[Number],
    drafted: Number,
    kept: Number,
    refused: Number,
    draft_length: Number,
    pays_at: Number,
) -> RollingAcceptance[Number]:
    """What is known once q has decided the tokens that were drafted since its last pass.

    Args:
        drafted: tokens that were drafted since then.
        kept: those that q has kept.
        refused: those that q, or q' before it, has refused.
        draft_length: most tokens of a whole block.
        pays_at: the least share of drafted tokens that must be kept for drafting to pay; at 0 it always does.
    """
    asked = drafted > 0

    def faded(before: Any, found: Any) -> Any:
        left = _pick(state.level == WHOLE, FADE * before, FADE_OF_ONE * before)
        return _pick(asked, left + found, before)

    kept_sum, compared = faded(state.kept, kept), faded(state.compared, kept + refused)
    drafted_sum = faded(state.drafted, drafted)
    acceptance = kept_sum / _pick(compared > 0, compared, 1.0)
    expected = share_kept(acceptance, _pick(draft_length > 0, draft_length, 1))
    in_whole = kept_sum >= pays_at * drafted_sum
    # Whether a whole block would pay is foreseen from single tokens; after a pause, one token is drafted first.
    whole_again = (expected >= pays_at) & (state.level == ONE)
    reduced = _pick(whole_again, WHOLE, _pick(acceptance >= pays_at, ONE, NOTHING))
    tried = _pick(state.level == WHOLE, _pick(in_whole, WHOLE, ONE), reduced)
    level = _pick(asked, tried, state.level)
    back, paused = (level == WHOLE) & (state.level == ONE), level == NOTHING
    in_vain = asked & paused & (state.level == NOTHING)
    longer = _pick(2 * state.pause < LONGEST_PAUSE, 2 * state.pause, LONGEST_PAUSE)
    return RollingAcceptance(
        kept_sum,
        compared,
        _pick(back, kept_sum / _pick(expected > 0, expected, 1.0), drafted_sum),
        level,
        _pick(asked | (level != NOTHING), 0, state.waited + 1),
        _pick(in_vain, longer, _pick(paused, state.pause, FIRST_PAUSE)),
    )
