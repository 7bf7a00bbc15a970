"""Sampling: settings, and transformers' logits processors in transformers' order. No PyTorch for the former."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from viasd_calib.errors import SamplingError
from viasd_calib.token_ids import shown, whole_number

if TYPE_CHECKING:
    from transformers import LogitsProcessor, LogitsProcessorList

LEAST, MOST = 1e-30, 1e30
"""Scores that are divided by less or multiplied by more may leave float32, and so be no distribution."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the same for draft model, slim and full verifier.

    Attributes:
        temperature: 0 takes the most likely token; else at least 1e-30, below which scores in float32 overflow.
        top_k: draw from so many of the most likely tokens; 0 for all.
        top_p: draw from the smallest set of tokens with this share of the mass.
        min_p: draw from tokens with at least this share of the most likely one's probability.
        repetition_penalty: divides the scores of tokens that the text holds already; greedy texts heed it too.
        seed: of the draws.

    Raises:
        SamplingError: a value out of its range, or no number; the message begins with the setting's name.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self._read(name, real_number(getattr(self, name)), "a number")
        for name in ("top_k", "seed"):
            self._read(name, whole_number(getattr(self, name)), "a whole number")
        least, most = f"{LEAST:g}", f"{MOST:g}"
        settings = {
            "temperature": (
                self.temperature == 0 or LEAST <= self.temperature <= MOST,
                f"0, which takes the most probable token, or {least} to {most}",
            ),
            "top_k": (self.top_k >= 0, "0 or more; 0 draws from all tokens"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1; 1 draws from all tokens"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1; 0 draws from all tokens"),
            "repetition_penalty": (
                LEAST <= self.repetition_penalty <= MOST,
                f"more than 0, {least} to {most}; 1 leaves the scores as they are",
            ),
            "seed": (0 <= self.seed < 2**64, "0 or more, and less than 2 ** 64"),
        }
        for name, (is_right, mend) in settings.items():
            if not is_right:
                raise SamplingError(f"{name} is {getattr(self, name)}; give {mend}")

    def _read(self, name: str, value: float | None, kind: str) -> None:
        """Keep a setting as Python's own number, whatever library it came from."""
        if value is None:
            raise SamplingError(f"{name} is {shown(getattr(self, name))}; give {kind}")
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and nothing drawn."""
        return self.temperature == 0

    def processors(self, extra: Sequence[LogitsProcessor] = ()) -> LogitsProcessorList:
        """The processors of these settings, in the order of transformers' ``generate``.

        Args:
            extra: a user's own; they come after the repetition penalty and before the temperature.
        """
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        chain: list[LogitsProcessor] = []
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        chain += extra
        if not self.greedy:
            if self.temperature != 1:
                chain.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                chain.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                chain.append(TopPLogitsWarper(self.top_p))
            if self.min_p:
                chain.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(chain)


def read_sampling(sampling: Sampling | None) -> Sampling:
    """Sampling settings; the greedy ones for None.

    Raises:
        SamplingError: neither.
    """
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise SamplingError(f"sampling is {shown(sampling)}; give a Sampling, as Sampling(temperature=0.8)")
    return sampling


def real_number(value: object) -> float | None:
    """Any real number's value as a plain float; None for what is none, booleans among it.

    Example:
        >>> real_number(1), real_number("1"), real_number(True)
        (1.0, None, None)
    """
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def seed_of_text(seed: int, number: int) -> int:
    """The seed with which the text of this number in a batch is drawn; the first keeps the batch's own.

    Neighbouring seeds share no text's draws, as ``seed + number`` would.

    Example:
        >>> seed_of_text(7, 0)
        7
    """
    return seed if number == 0 else (seed + number * GOLDEN) % 2**63


GOLDEN = 0x9E3779B97F4A7C15
"""2 ** 64 over the golden ratio: multiples of it lie far apart (Steele et al. 2014, SplitMix)."""
