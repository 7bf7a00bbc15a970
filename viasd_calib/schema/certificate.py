"""The certificate of a spec, its prompts, and what was measured with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from viasd_calib.choices import CertifiedLossName
from viasd_calib.schema.base import DType, HashedFile, Sha256, Share, ShortHash, SpecModel, refuse
from viasd_calib.schema.certified_candidates import CertifiedCandidate

ROUNDING = 1e-6
"""Numbers that were computed otherwise, or written with fewer digits, may differ by this share."""
SHARES_ROUNDING = 0.01
"""Shares that somebody wrote with two digits still sum to 1."""
NO_PROMPTS_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""Hash of a split without a prompt."""


LARGEST_BET = 0.99
"""Share of the bet that a loss of 1 would ruin: the largest that the test by betting makes, so that it goes on."""


OF_ONE_POLICY = ("bound", "observed", "observed_by_token", "p_value", "digest", "dtype", "backend", "losses")
"""Entries of a certificate that hold for one policy; all others are of every candidate."""


def prompts_needed(bound: float, level: float) -> int:
    """Fewest prompts that can certify ``bound``: those that suffice where every loss is 0.

    The test by betting (:mod:`viasd_calib.calibration.betting`) then multiplies its capital by
    1 + LARGEST_BET bound / (1 - bound) with each prompt, until it comes to 1 / level.

    Args:
        bound: between 0 and 1, neither included.
        level: the same; of the test.

    Example:
        >>> prompts_needed(0.02, 0.05)
        150
    """
    return math.ceil(math.log(1 / level) / math.log1p(LARGEST_BET * bound / (1 - bound)))


def level_of(confidence: float, attempt: int | None) -> float:
    """What the p-value of an attempt on the same prompts must not exceed: (1 - confidence) / 2^attempt.

    Args:
        attempt: from 1; None for an earlier release's, which counted none.

    Example:
        >>> round(level_of(0.95, 1), 6), round(level_of(0.95, 2), 6)
        (0.025, 0.0125)
    """
    return math.ldexp(1 - confidence, -(attempt or 0))


class Certificate(SpecModel):
    """Which loss bound holds, how sure, and on what data it was shown.

    ``bound`` is null where nothing could be certified, or exact decoding was faster; the audit is then ``strict``.
    What cannot be is refused: a bound below the observed loss, or one that so many prompts cannot show.
    """

    loss: CertifiedLossName = Field(
        "divergence",
        description="what is bounded; divergence, of earlier releases: share of a text's tokens that the full verifier "
        "would not choose, near ties of different kernels among them",
    )
    bound: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="largest mean of the prompts' losses, each counting the same, that was certified; null where none "
        "was, or exact decoding was faster"
    )
    confidence: float = Field(
        gt=0, lt=1, description="probability, over calibration prompts, with which the bound holds"
    )
    procedure: str = Field(min_length=1, description="statistical test, and order in which candidates were tested")
    attempt: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="number of this attempt on these prompts, from 1: its level is (1 - confidence) / 2^attempt; null "
        "in earlier releases, whose level was 1 - confidence",
    )
    candidates_tested: int = Field(ge=0, description="sets of gates that were decoded with")
    n_prompts: int = Field(
        ge=0, description="calibration prompts; the test may have ended before the last of them was decoded"
    )
    max_new_tokens: int = Field(
        gt=0, description="longest answer, in tokens a turn; the bound holds for texts of this length"
    )
    split_sha256: dict[Literal["fit", "calibrate", "test"], Sha256] = Field(
        description="hash of the set of prompts of each split"
    )
    observed: Share | None = Field(
        description="mean over the decoded calibration prompts of the loss of each; null without a bound"
    )
    observed_by_token: Share | None = Field(
        None, description="the same, each prompt counting by its tokens; not bounded, and null in earlier releases"
    )
    rounding_gap: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="a token that lies below the full verifier's choice by so much, in nats, or less is that choice "
        "but for rounding; null where every other token counts",
    )
    floor: Share | None = Field(
        None, description="mean loss of exact decoding, which rounding alone makes; not tested, null where not measured"
    )
    p_value: Share | None = Field(
        description="of the hypothesis that the expected loss exceeds the bound; at most 1 - confidence"
    )
    digest: Sha256 | None = Field(
        None, description="of the policy that it holds for; null without a bound, and in earlier releases"
    )
    dtype: DType | None = Field(None, description="number format that was decoded in; null where digest is")
    backend: str | None = Field(
        None, description="device and family of kernels that decoded, as cpu torch; null where digest is"
    )
    losses: HashedFile | None = Field(
        None, description="the prompts' losses, a JSON file beside the spec; null where digest is"
    )
    candidates: list[CertifiedCandidate] | None = Field(
        None,
        min_length=1,
        description="every candidate that was certified, most careful first, the spec's own policy among them where it "
        "has a bound; viasd plan may choose one. Null for none, and in earlier releases",
    )
    note: str = Field("", description="why there is no bound, or what else was certified; in words")

    def without_bound(self, note: str) -> Certificate:
        """The certificate beside a policy for which it bounds nothing, and why; its candidates stay listed."""
        return self.model_copy(update={**dict.fromkeys(OF_ONE_POLICY), "note": note})

    def of_candidate(self, candidate: CertifiedCandidate) -> Certificate:
        """The certificate beside the policy of one of its candidates."""
        return self.model_copy(update={**{name: getattr(candidate, name) for name in OF_ONE_POLICY}, "note": ""})

    @property
    def level(self) -> float:
        """What a p-value must not exceed."""
        return level_of(self.confidence, self.attempt)

    @model_validator(mode="after")
    def _can_be(self) -> Certificate:
        refuse([*self._splits_overlap(), *self._unproven(), *self._listed_wrongly()])
        return self

    def _listed_wrongly(self) -> Iterator[str]:
        digests = [one.digest for one in self.candidates or ()]
        if len(set(digests)) < len(digests):
            yield "candidates: one policy is listed twice; export the spec again"
        if len(digests) > self.candidates_tested:
            yield f"{len(digests)} candidates are listed, and {self.candidates_tested} were tested; export again"

    def _splits_overlap(self) -> Iterator[str]:
        names = list(self.split_sha256)
        for place, name in enumerate(names):
            for other in names[place + 1 :]:
                digest = self.split_sha256[name]
                if digest == self.split_sha256[other] and digest != NO_PROMPTS_SHA256:
                    yield f"the splits {name} and {other} hold the same prompts; calibrate on prompts of their own"

    def _unproven(self) -> Iterator[str]:
        """Why the bound cannot have been shown; each with what calibration would have said."""
        if self.bound is None:
            if self.n_prompts == 0 and (self.observed is not None or self.p_value is not None):
                yield "an observed loss or a p-value of 0 prompts; calibrate again"
            return
        again = "calibrate again"
        if self.observed is None:
            yield f"a bound of {self.bound:g} without an observed loss; {again}"
        elif self.observed > self.bound:
            yield f"the observed loss {self.observed:g} lies above the bound {self.bound:g}; {again}"
        if self.candidates_tested == 0:
            yield f"a bound of {self.bound:g}, but no candidate was tested; {again}"
        needed = math.ceil(math.log(self.level) / math.log(1 - self.bound))  # by whatever test
        if self.n_prompts < needed:
            yield (
                f"{self.n_prompts} prompts cannot show a bound of {self.bound:g} with confidence {self.confidence:g}, "
                f"even without a loss it takes {needed}; {again} with more prompts or a larger bound"
            )
        if self.p_value is None:
            yield f"a bound of {self.bound:g} without a p-value; {again}"
        elif self.p_value > self.level * (1 + ROUNDING):
            yield (
                f"a p-value of {self.p_value:g} does not show the bound with confidence {self.confidence:g}, which "
                f"takes {self.level:g} at most; {again}"
            )
        elif self.p_value < (1 - self.bound) ** self.n_prompts * (1 - ROUNDING):
            yield f"no {self.n_prompts} prompts have a p-value as small as {self.p_value:g}; {again}"


class PromptHashes(SpecModel):
    """Hashes of the prompts of a spec, so that nobody measures it on them.

    The first 16 hexadecimal digits of the SHA-256 of each normalised text (:mod:`viasd_calib.prompt_copies`); the texts
    cannot be read off them, but whoever has a text can tell whether it is among them. Null is for not known.

    Attributes:
        fit: what route, gates and adapter were learned from, held-back texts among them.
        calibrate: what the certificate was made from.
    """

    fit: list[ShortHash] | None = Field(
        None,
        description="prompts that the fit learned from, held-back texts among them; null where not known",
    )
    calibrate: list[ShortHash] | None = Field(
        None, description="prompts that the certificate was made from; null where not known"
    )

    @model_validator(mode="after")
    def _can_be(self) -> PromptHashes:
        both = set(self.fit or ()) & set(self.calibrate or ())
        if both:
            raise ValueError(f"{len(both)} prompts are among those of fit and of calibrate; calibrate on others")
        return self

    @property
    def all(self) -> frozenset[str]:
        """Those that are known."""
        return frozenset([*(self.fit or ()), *(self.calibrate or ())])


class Evidence(SpecModel):
    """What was measured with this spec, and where.

    ``acceptance_length`` counts the tokens of a full pass, the inverse of ``full_passes_per_token`` unless that is 0.
    """

    acceptance_length: float = Field(gt=0, description="emitted tokens per full-verifier pass, bonus token included")
    rejection_rate: Share = Field(description="1 - kept drafted tokens / compared drafted tokens")
    full_passes_per_token: float = Field(ge=0, description="full-verifier passes per emitted token")
    tier_shares: dict[Literal["accept", "regenerate", "escalate"], Share] = Field(
        description="share of emitted tokens that each tier decided; they sum to 1"
    )
    speedup_vs: dict[Literal["autoregressive", "speculative"], Annotated[float, Field(gt=0)]] = Field(
        description="tokens per second over those of another method on the same prompts: median of a paired bootstrap"
    )
    hardware: dict[str, Any] = Field(description="what it was measured on")
    intervals: dict[Literal["autoregressive", "speculative"], tuple[float, float]] | None = Field(
        None, description="95 % intervals of speedup_vs; null in specs of earlier releases, as all that follows"
    )
    prompts_sha256: Sha256 | None = Field(None, description="of the set of prompts that were decoded")
    n_prompts: int | None = Field(None, ge=1, description="how many these are")
    tokens: int | None = Field(None, ge=1, description="that three tiers emitted for them")
    commit: str | None = Field(
        None, description="of the program that measured, with -dirty where files were changed; null where not known"
    )

    @model_validator(mode="after")
    def _can_be(self) -> Evidence:
        for name, (low, high) in (self.intervals or {}).items():
            if not low <= self.speedup_vs.get(name, low) <= high:
                raise ValueError(
                    f"a speed-up over {name} of {self.speedup_vs[name]:g} does not lie in its interval, {low:g} to "
                    f"{high:g}; record the evidence again"
                )
        total = sum(self.tier_shares.values())
        if self.tier_shares and abs(total - 1) > SHARES_ROUNDING:
            raise ValueError(f"the shares of the tiers sum to {total:g}, not to 1; record the evidence again")
        if (
            self.full_passes_per_token
            and abs(self.acceptance_length * self.full_passes_per_token - 1) > SHARES_ROUNDING
        ):
            raise ValueError(
                f"{self.acceptance_length:g} tokens a full pass are not {self.full_passes_per_token:g} full passes a "
                "token; record the evidence again"
            )
        return self
