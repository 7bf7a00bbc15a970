"""Numbers of a benchmark: per prompt first, then pooled, with paired bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.paired import Interval, Spent, speed_ratio
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.session import Generation
from viasd_calib.evaluation.exactness import Difference


@dataclass(frozen=True)
class PromptResult:
    """One method on one prompt, all its turns together.

    Attributes:
        diverged: emitted tokens that q would not have chosen.
        differences: where the first turn that does so leaves the autoregressive text; at most one.
        peak_bytes: most memory that the process took; None where it was not asked for, or the system cannot say.
    """

    prompt_id: str
    task: str
    generations: list[Generation]
    seconds: float
    diverged: int
    differences: list[Difference]
    peak_bytes: int | None = None

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return sum(len(generation.tokens) for generation in self.generations)

    @property
    def identical(self) -> bool:
        """Whether every turn equals the autoregressive text."""
        return not self.differences

    @property
    def decode_seconds(self) -> float | None:
        """Seconds without those of the prompts' own passes; None where these are not known."""
        spent = [generation.prompt_seconds for generation in self.generations]
        return None if None in spent else self.seconds - sum(filter(None, spent))

    def spent(self, name: str) -> int:
        """A counter of the generations, summed: ``full_passes``, ``slim_passes``, ``draft_steps`` or ``rejected``."""
        return sum(int(getattr(generation.counts, name)) for generation in self.generations)


class MethodResult(BaseModel):
    """One method over a set of prompts; the fields of the benchmark's JSON.

    Attributes:
        decode_tokens_per_second: without the time of the prompts' own passes, which all methods share; None where that
            is not known, as of transformers, and in what earlier releases wrote. The two after it likewise.
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int
    seconds: float
    tokens_per_second: float
    speedup_vs_autoregressive: Interval | None
    speedup_vs_speculative: Interval | None
    identical_to_autoregressive: float
    divergence: float
    rejection_rate: float | None
    full_passes_per_token: float
    slim_passes_per_token: float
    draft_steps_per_token: float
    acceptance_length: float
    tier_shares: dict[str, float]
    differences: list[Difference]
    decode_tokens_per_second: float | None = None
    decode_speedup_vs_autoregressive: Interval | None = None
    decode_speedup_vs_speculative: Interval | None = None


def pool(
    results: Sequence[PromptResult], against: Mapping[str, Sequence[PromptResult] | None], seed: int
) -> MethodResult:
    """Pool one method's prompts.

    Args:
        results: one a prompt.
        against: the same prompts under ``autoregressive`` and ``speculative``; None where a method was not run.
        seed: of the bootstrap.
    """
    tokens = sum(result.tokens for result in results)
    seconds = sum(result.seconds for result in results)
    decoding = [result.decode_seconds for result in results]
    full = sum(result.spent("full_passes") for result in results)
    kept = sum(sum(generation.drafted) for result in results for generation in result.generations)
    rejected = sum(result.spent("rejected") for result in results)
    tiers = [tier for result in results for generation in result.generations for tier in generation.tiers]
    return MethodResult(
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        speedup_vs_autoregressive=speedup(results, against["autoregressive"], seed),
        speedup_vs_speculative=speedup(results, against["speculative"], seed),
        identical_to_autoregressive=sum(result.identical for result in results) / len(results),
        divergence=sum(result.diverged for result in results) / tokens,
        rejection_rate=rejected / (kept + rejected) if kept + rejected else None,
        full_passes_per_token=full / tokens,
        slim_passes_per_token=sum(result.spent("slim_passes") for result in results) / tokens,
        draft_steps_per_token=sum(result.spent("draft_steps") for result in results) / tokens,
        acceptance_length=tokens / full if full else float(tokens),
        tier_shares={tier.name.lower(): tiers.count(tier) / tokens for tier in Tier},
        differences=[difference for result in results for difference in result.differences],
        decode_tokens_per_second=None if None in decoding else tokens / sum(filter(None, decoding)),
        decode_speedup_vs_autoregressive=speedup(results, against["autoregressive"], seed, decode_only=True),
        decode_speedup_vs_speculative=speedup(results, against["speculative"], seed, decode_only=True),
    )


def speedup(
    results: Sequence[PromptResult], base: Sequence[PromptResult] | None, seed: int, decode_only: bool = False
) -> Interval | None:
    """Ratio of tokens per second to ``base``: its bootstrap median and interval, prompts drawn in pairs.

    Of fewer than ``FEWEST_PROMPTS`` it is the ratio itself, without an interval.

    Args:
        decode_only: whether the prompts' own passes are left out; None where their time is not known.

    Example:
        >>> speedup([], None, seed=0) is None
        True
    """
    if base is None:
        return None
    own, other = (_spent(one, decode_only) for one in (results, base))
    return None if own is None or other is None else speed_ratio(own, other, seed)


def _spent(results: Sequence[PromptResult], decode_only: bool) -> Spent | None:
    """Tokens and seconds of each prompt; None where these are not known."""
    seconds = [result.decode_seconds if decode_only else result.seconds for result in results]
    known = [one for one in seconds if one is not None]
    return Spent([result.tokens for result in results], known) if len(known) == len(seconds) else None
