"""The latency profile: what a draft step, a slim pass, a full pass and the output head cost, in seconds."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from viasd_calib.errors import PlanningError
from viasd_calib.files import write_json
from viasd_calib.spec import (
    DraftSpec,
    DType,
    OffloadRef,
    Producer,
    Route,
    RoutingSpec,
    SpecModel,
    VerifierRef,
    check_verifier,
    first_problem,
    refuse_unknown_version,
)

SCHEMA_VERSION = "1.3"

TierName = Literal["draft", "slim", "full", "head"]
"""What is timed: one step of the drafter, one pass of q' or of q with output head, or the head alone."""

RoundPart = TierName | Literal["rest"]
"""What a round's time goes to: the tiers, and gates, policy and host."""

PLURALS = {"width": "widths", "context": "contexts", "batch": "batches"}


class PassShape(NamedTuple):
    """One thing that is timed.

    Attributes:
        tier: what runs.
        width: new tokens of each text; 1 for a draft step.
        context: cached tokens before them; None for the head, which reads none.
        batch: texts.
    """

    tier: TierName
    width: int
    context: int | None
    batch: int


class Axes(NamedTuple):
    """Where one tier is measured: at every combination of these, each in rising order."""

    width: tuple[int, ...]
    context: tuple[int, ...] | None
    batch: tuple[int, ...]


class ProfileSettings(SpecModel):
    """What was asked of the profile; widths, contexts and batches are put in rising order, each once."""

    widths: tuple[int, ...] = Field(min_length=1)
    contexts: tuple[int, ...] = Field(min_length=1)
    batches: tuple[int, ...] = Field(min_length=1)
    repeats: int = Field(ge=2)

    @field_validator("widths", "contexts", "batches")
    @classmethod
    def _rising(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if min(values) < 1:
            raise ValueError(f"{min(values)} is less than 1")
        return tuple(sorted(set(values)))

    def axes(self, tier: TierName) -> Axes:
        """Where ``tier`` is measured; a drafter takes one step of one text at a time."""
        if tier == "draft":
            return Axes((1,), self.contexts, (1,))
        return Axes(self.widths, None if tier == "head" else self.contexts, self.batches)

    def shapes(self) -> Iterator[PassShape]:
        """Everything that is timed."""
        tiers: tuple[TierName, ...] = ("draft", "slim", "full", "head")
        for tier in tiers:
            width, context, batch = self.axes(tier)
            for entry in itertools.product(batch, context or (None,), width):
                yield PassShape(tier, entry[2], entry[1], entry[0])


class Measured(SpecModel):
    """What one pass took, in seconds: median and quartiles of the repeats that no other work has slowed."""

    tier: TierName
    width: int
    context: int | None
    batch: int
    seconds: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Measured:
        if not self.low <= self.seconds <= self.high:
            raise ValueError("the median must lie between low and high")
        return self

    @property
    def shape(self) -> PassShape:
        """What was timed."""
        return PassShape(self.tier, self.width, self.context, self.batch)


class RoundTimes(SpecModel):
    """What a token took that one method decoded after a text of random tokens, in seconds.

    Attributes:
        method: by its name.
        context: tokens of the text.
        tokens: decoded after it.
        rounds: that they took.
        seconds: a token, by tier, and the ``rest``: gates, policy and host.
        attention: a token, of scaled dot-product attention alone, over as many passes of the same widths.

    Example:
        >>> seconds = {"full": 0.03, "head": 0.006, "rest": 0.004}
        >>> times = RoundTimes(
        ...     method="autoregressive", context=256, tokens=32, rounds=32, seconds=seconds, attention=0.001
        ... )
        >>> round(times.total, 6), round(times.rest_share, 6)
        (0.04, 0.1)
    """

    method: str
    context: int
    tokens: int
    rounds: int
    seconds: dict[RoundPart, float]
    attention: float = Field(ge=0)

    @property
    def total(self) -> float:
        """Seconds a token."""
        return sum(self.seconds.values())

    @property
    def rest_share(self) -> float:
        """Gates, policy and host, as a share of a token's time."""
        return self.seconds["rest"] / self.total


class LayersRead(OffloadRef):
    """How layers were read for each full pass.

    Attributes:
        bandwidth: what reading was slowed down to, in bytes a second, which *simulates* a slower disk; None for as fast
            as it is.
    """

    bandwidth: float | None = Field(None, gt=0)


class LatencyProfile(SpecModel):
    """What the passes of one spec cost on one machine.

    Attributes:
        kind: tells a profile from other JSON files.
        verifier: the spec's, as the spec records it; ``dtype`` is what was measured.
        route: the spec's, without its relative cost, which was measured elsewhere.
        backend: what ran the passes.
        hardware: what they ran on, with the version of torch.
        rounds: what decoded tokens took, by method and context; profiles of before 1.1 have none.
        disturbed: share of the timed rounds over all passes that other work has slowed, and that are left out; None in
            profiles of before 1.2, which leave out none.
        offload: how layers were read for each full pass; None where all were in memory, and in profiles of before 1.3,
            which do not say.
    """

    kind: Literal["latency_profile"] = "latency_profile"
    schema_version: str = SCHEMA_VERSION
    producer: Producer = Field(default_factory=Producer)
    verifier: VerifierRef
    draft: DraftSpec
    route: Route
    backend: str
    dtype: DType
    device: str
    hardware: dict[str, Any]
    settings: ProfileSettings
    measured: tuple[Measured, ...]
    rounds: tuple[RoundTimes, ...] = ()
    disturbed: float | None = Field(None, ge=0, le=1)
    offload: LayersRead | None = None

    @model_validator(mode="after")
    def _complete(self) -> LatencyProfile:
        if Counter(self.settings.shapes()) != Counter(entry.shape for entry in self.measured):
            raise ValueError("measured does not hold what settings name, each once")
        return self

    @cached_property
    def _seconds(self) -> dict[PassShape, float]:
        return {entry.shape: entry.seconds for entry in self.measured}

    def seconds(self, tier: TierName, width: float, context: float, batch: float = 1) -> float:
        """Median seconds of one pass, linear in each argument between measured points.

        Args:
            tier: what runs.
            width: new tokens of each text; a draft step has width 1.
            context: cached tokens before them; the head does not look at it.
            batch: texts; a draft step is of one text.

        Raises:
            PlanningError: outside the measured range; nothing is extrapolated.

        Example:
            >>> settings = ProfileSettings(widths=[1, 4], contexts=[128], batches=[1], repeats=5)
            >>> measured = [
            ...     Measured(**shape._asdict(), seconds=0.03 + 0.001 * shape.width, low=0.03, high=0.04)
            ...     for shape in settings.shapes()
            ... ]
            >>> profile = LatencyProfile.model_construct(settings=settings, measured=measured)
            >>> round(profile.seconds("full", width=2, context=128), 6)
            0.032
        """
        axes = self.settings.axes(tier)
        widths = _between(tier, "width", axes.width, width)
        contexts = [(None, 1.0)] if axes.context is None else _between(tier, "context", axes.context, context)
        batches = _between(tier, "batch", axes.batch, batch)
        return sum(
            in_width * in_context * in_batch * self._seconds[PassShape(tier, at_width, at_context, at_batch)]
            for (at_width, in_width), (at_context, in_context), (at_batch, in_batch) in itertools.product(
                widths, contexts, batches
            )
        )


def _between(tier: TierName, axis: str, points: Sequence[int], value: float) -> list[tuple[int, float]]:
    """The measured points around ``value`` with their weights: one point where it was measured itself."""
    if not points[0] <= value <= points[-1]:
        raise PlanningError(_outside(tier, axis, points, value))
    if value in points:
        return [(int(value), 1.0)]
    below, above = next(pair for pair in itertools.pairwise(points) if pair[0] < value < pair[1])
    share = (value - below) / (above - below)
    return [(below, 1 - share), (above, share)]


def _outside(tier: TierName, axis: str, points: Sequence[int], value: float) -> str:
    if tier == "draft" and axis != "context":
        return f"a draft step is one token of one text: it has no {axis} of {value:g}; ask for {axis} 1"
    where = f"at {axis} {points[0]} alone" if len(points) == 1 else f"from {axis} {points[0]} to {points[-1]}"
    return (
        f"{tier} was measured {where}, not at {axis} {value:g}; "
        f"run viasd profile again with --{PLURALS[axis]} that reach it"
    )


def save_profile(profile: LatencyProfile, path: str | Path) -> None:
    """Write a profile as JSON, atomically."""
    write_json(Path(path), profile)


def load_profile(path: str | Path) -> LatencyProfile:
    """Read a profile that :func:`save_profile` wrote.

    Raises:
        PlanningError: missing, truncated, of another kind or major version, or damaged.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanningError(
            f"cannot read the latency profile {path}: {error.strerror}; check the path, or run viasd profile"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanningError(
            f"{path} is not valid JSON ({error}); it may be truncated: run viasd profile again"
        ) from error
    if not isinstance(document, dict) or document.get("kind") != "latency_profile":
        raise PlanningError(f"{path} is not a latency profile; give a file that viasd profile wrote")
    version = document.get("schema_version")
    refuse_unknown_version(path, version, SCHEMA_VERSION, "run viasd profile again", PlanningError)
    try:
        return LatencyProfile.model_validate(document)
    except ValidationError as error:
        problem = first_problem(error, "profile")
        raise PlanningError(f"{path} is damaged: {problem}; run viasd profile again") from error


def check_profile(profile: LatencyProfile, spec: RoutingSpec) -> None:
    """Refuse a profile that was not measured with the models and the route of ``spec``.

    Raises:
        SpecError: it was measured on another verifier.
        PlanningError: with another drafter or another route.
    """
    check_verifier(spec, profile.verifier)
    for name, found, wanted in (
        ("draft model", profile.draft, spec.draft),
        ("route", profile.route, spec.route.unmeasured()),
    ):
        if found != wanted:
            raise PlanningError(
                f"the latency profile was measured with another {name} than the spec's; run viasd profile on this spec"
            )
