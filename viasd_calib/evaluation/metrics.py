"""Numbers of a benchmark: per batch first, mostly of one prompt, then pooled, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.paired import Interval, Spent, speed_ratio
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.session import Generation
from viasd_calib.evaluation.exactness import Difference

BASELINES = ("autoregressive", "speculative", "prompt_lookup")
"""What decodes without a slim verifier; a method is also held against the fastest of them on the prompts at hand."""


@dataclass(frozen=True)
class TextResult:
    """What one method answered to one prompt, all its turns together.

    Attributes:
        diverged: emitted tokens that q would not have chosen.
        differences: where the first turn that does so leaves the autoregressive text; at most one.
    """

    prompt_id: str
    task: str
    generations: list[Generation]
    diverged: int
    differences: list[Difference]

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return sum(len(generation.tokens) for generation in self.generations)

    @property
    def identical(self) -> bool:
        """Whether every turn equals the autoregressive text."""
        return not self.differences

    def spent(self, name: str) -> int:
        """A counter of the generations, summed: ``full_passes``, ``slim_passes``, ``draft_steps`` or ``rejected``."""
        return sum(int(getattr(generation.counts, name)) for generation in self.generations)


@dataclass(frozen=True)
class MeasuredBatch:
    """One method on the prompts of a batch; of one prompt, where texts are decoded one at a time.

    Attributes:
        seconds: of all texts and their turns together.
        peak_bytes: most memory that the process took; None where it was not asked for, or the system cannot say.
    """

    texts: list[TextResult]
    seconds: float
    peak_bytes: int | None = None

    @property
    def tokens(self) -> int:
        """Emitted tokens, of all texts."""
        return sum(text.tokens for text in self.texts)

    @property
    def decode_seconds(self) -> float | None:
        """Seconds without those of the prompts' own passes; None where these are not known.

        The texts of a batch read the prompts of a turn together, so that the longest time of a turn is that of all.
        """
        spent = self.seconds
        for turn in zip_longest(*(text.generations for text in self.texts)):
            reading = [generation.prompt_seconds for generation in turn if generation is not None]
            if None in reading:
                return None
            spent -= max(one for one in reading if one is not None)
        return spent


class MethodResult(BaseModel):
    """One method over a set of prompts; the fields of the benchmark's JSON.

    Passes and steps are a text's own, also where texts of a batch share them.

    Attributes:
        decode_tokens_per_second: without the time of the prompts' own passes, which all methods share; None where that
            is not known, as of transformers, and in what earlier releases wrote. The two after it likewise.
        fastest_baseline: the fastest of ``BASELINES`` on these prompts, of those that were run; None where there was
            none, and in what earlier releases wrote.
        speedup_vs_fastest_baseline: over that one, which is in part the luckiest: no flattering comparison.
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
    fastest_baseline: str | None = None
    speedup_vs_fastest_baseline: Interval | None = None


def pool(results: Sequence[MeasuredBatch], against: Mapping[str, Sequence[MeasuredBatch]], seed: int) -> MethodResult:
    """Pool one method's batches.

    Args:
        results: one a batch; one a prompt where texts are decoded one at a time.
        against: the same batches under each of ``BASELINES`` that was run.
        seed: of the bootstrap.
    """
    autoregressive, speculative = against.get("autoregressive"), against.get("speculative")
    fastest = max(against, key=lambda name: _tokens_per_second(against[name]), default=None)
    texts = [text for result in results for text in result.texts]
    tokens = sum(text.tokens for text in texts)
    decoding = [result.decode_seconds for result in results]
    full = sum(text.spent("full_passes") for text in texts)
    kept = sum(sum(generation.drafted) for text in texts for generation in text.generations)
    rejected = sum(text.spent("rejected") for text in texts)
    tiers = [tier for text in texts for generation in text.generations for tier in generation.tiers]
    return MethodResult(
        tokens=tokens,
        seconds=sum(result.seconds for result in results),
        tokens_per_second=_tokens_per_second(results),
        speedup_vs_autoregressive=speedup(results, autoregressive, seed),
        speedup_vs_speculative=speedup(results, speculative, seed),
        identical_to_autoregressive=sum(text.identical for text in texts) / len(texts),
        divergence=sum(text.diverged for text in texts) / tokens,
        rejection_rate=rejected / (kept + rejected) if kept + rejected else None,
        full_passes_per_token=full / tokens,
        slim_passes_per_token=sum(text.spent("slim_passes") for text in texts) / tokens,
        draft_steps_per_token=sum(text.spent("draft_steps") for text in texts) / tokens,
        acceptance_length=tokens / full if full else float(tokens),
        tier_shares={tier.name.lower(): tiers.count(tier) / tokens for tier in Tier},
        differences=[difference for text in texts for difference in text.differences],
        decode_tokens_per_second=None if None in decoding else tokens / sum(filter(None, decoding)),
        decode_speedup_vs_autoregressive=speedup(results, autoregressive, seed, decode_only=True),
        decode_speedup_vs_speculative=speedup(results, speculative, seed, decode_only=True),
        fastest_baseline=fastest,
        speedup_vs_fastest_baseline=None if fastest is None else speedup(results, against[fastest], seed),
    )


def _tokens_per_second(results: Sequence[MeasuredBatch]) -> float:
    return sum(result.tokens for result in results) / sum(result.seconds for result in results)


def speedup(
    results: Sequence[MeasuredBatch], base: Sequence[MeasuredBatch] | None, seed: int, decode_only: bool = False
) -> Interval | None:
    """Ratio of tokens per second to ``base``: its bootstrap median and interval, batches drawn in pairs.

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


def _spent(results: Sequence[MeasuredBatch], decode_only: bool) -> Spent | None:
    """Tokens and seconds of each batch; None where these are not known."""
    seconds = [result.decode_seconds if decode_only else result.seconds for result in results]
    known = [one for one in seconds if one is not None]
    return Spent([result.tokens for result in results], known) if len(known) == len(seconds) else None
