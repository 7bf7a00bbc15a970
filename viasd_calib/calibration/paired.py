"""Decoders that take turns on the same prompts, and what their times show: ratios of speed with intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.stats import norm
from scipy.stats import t as student

from viasd_calib.decoding.conversation import Answering, answer_batch
from viasd_calib.models import Verifier
from viasd_calib.progress import steps
from viasd_calib.prompts import Prompt

FEWEST_PROMPTS = 6
"""Prompts that must have been timed for one policy to be called faster: of fewer, even all on one side show nothing at
95 % (a sign test: 2 / 2^n)."""
RESAMPLES = 10_000
ERROR = 0.05
"""Probability that an interval misses, on both sides together."""


class Interval(BaseModel):
    """A median with its bootstrap interval over ``n`` prompts, or batches of them, of 95 % where nothing else is said.

    Of fewer than ``FEWEST_PROMPTS`` there is no interval: ``median`` is then what was measured, and says nothing of
    other prompts.
    """

    model_config = ConfigDict(extra="forbid")

    median: float
    low: float | None
    high: float | None
    n: int = Field(ge=1)

    @model_validator(mode="after")
    def _of_enough(self) -> Interval:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high are given together, or neither")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval; None where there are too few prompts for one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def words(self) -> str:
        """The median, with the interval where there is one.

        Example:
            >>> (
            ...     Interval(median=1.1, low=1.02, high=1.2, n=8).words,
            ...     Interval(median=1.1, low=None, high=None, n=2).words,
            ... )
            ('1.10 [1.02, 1.20]', '1.10')
        """
        return f"{self.median:.2f}" if self.bounds is None else f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def above_one(self) -> bool:
        """Whether there is an interval and all of it lies above 1.

        Example:
            >>> Interval(median=1.1, low=1.02, high=1.2, n=8).above_one
            True
        """
        return self.low is not None and self.low > 1

    @property
    def leaves_out_one(self) -> bool:
        """Whether there is an interval and 1 lies outside of it."""
        return self.above_one or (self.high is not None and self.high < 1)


@dataclass(frozen=True)
class Spent:
    """What a decoder took, prompt by prompt.

    Attributes:
        tokens: emitted, of all turns of a prompt.
        seconds: wall clock.
    """

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """Of all prompts together."""
        return sum(self.seconds) / sum(self.tokens)

    def and_then(self, more: Spent) -> Spent:
        """With the prompts of ``more`` behind."""
        return Spent(self.tokens + more.tokens, self.seconds + more.seconds)


def lower_percentile(count: int, error: float = ERROR) -> float:
    """Which percentile of a bootstrap over ``count`` prompts, two at least, is an interval's lower bound; the upper one
    is 100 less it.

    Hesterberg 2015, The American Statistician 69(4), section 5.3.2: Phi(-sqrt(n / (n - 1)) t), with Student's t of
    ``error`` / 2 and n - 1 degrees of freedom. Plain percentiles are too narrow by as much as a normal interval is,
    which on eight prompts errs three times as often as stated.

    Args:
        error: probability that the interval misses, on both sides together.

    Example:
        >>> round(lower_percentile(6), 2), round(lower_percentile(10_000), 2)
        (0.24, 2.5)
    """
    return float(100 * norm.cdf(sqrt(count / (count - 1)) * student.ppf(error / 2, count - 1)))


def speed_ratio(own: Spent, base: Spent, seed: int = 0, error: float = ERROR) -> Interval:
    """Tokens per second of ``own`` over those of ``base`` on the same prompts: median and interval of a paired
    bootstrap over prompts.

    Its bounds are expanded percentiles (:func:`lower_percentile`). Of fewer than ``FEWEST_PROMPTS`` it is the ratio
    itself, without an interval.

    Args:
        own: prompt by prompt, in the order of ``base``.
        error: probability that the interval misses, on both sides together.

    Example:
        >>> slow, fast = Spent([8] * 6, [2.0] * 6), Spent([8] * 6, [1.0] * 6)
        >>> speed_ratio(fast, slow)
        Interval(median=2.0, low=2.0, high=2.0, n=6)
    """
    count = len(base.tokens)
    own_tokens, own_seconds, base_tokens, base_seconds = (
        np.array(one) for one in (own.tokens, own.seconds, base.tokens, base.seconds)
    )
    if count < FEWEST_PROMPTS:
        ratio = own_tokens.sum() / own_seconds.sum() / (base_tokens.sum() / base_seconds.sum())
        return Interval(median=float(ratio), low=None, high=None, n=count)
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    own_speed = own_tokens[draws].sum(1) / own_seconds[draws].sum(1)
    base_speed = base_tokens[draws].sum(1) / base_seconds[draws].sum(1)
    tail = lower_percentile(count, error)
    low, median, high = np.percentile(own_speed / base_speed, [tail, 50, 100 - tail]).tolist()
    return Interval(median=median, low=low, high=high, n=count)


def decode_in_turns(
    label: str,
    decoders: Sequence[Answering],
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    warm_up: bool = True,
    batch: int = 1,
) -> list[Spent]:
    """What each decoder takes on the same prompts, in an order that moves on from prompt to prompt: drift of the
    machine strikes all alike.

    Args:
        label: of the progress bar.
        prompts: one at least.
        warm_up: whether each decoder answers the first prompt once before.
        batch: prompts that are answered together, turn by turn; what is spent is then of each batch.
    """
    spent = [Spent() for _ in decoders]
    units = [prompts[begin : begin + batch] for begin in range(0, len(prompts), batch)]
    for decoder in decoders if warm_up else ():
        answer_batch(decoder, verifier, units[0], max_new_tokens, batch)
    with steps(label, len(units), "prompts" if batch == 1 else "batches") as running:
        for number, unit in enumerate(units):
            for which in ((number + step) % len(decoders) for step in range(len(decoders))):
                begin = time.perf_counter()
                answered = answer_batch(decoders[which], verifier, unit, max_new_tokens, batch)
                spent[which].seconds.append(time.perf_counter() - begin)
                spent[which].tokens.append(sum(len(turn.generation.tokens) for turns in answered for turn in turns))
            running.advance()
    return spent
