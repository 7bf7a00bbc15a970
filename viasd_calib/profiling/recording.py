"""Rounds of the decoder on the clock, watched from outside: decoding itself knows nothing of it.

What is watched are copies of the engine's verifier and drafter whose passes note when they begin and end; the
engine's own stay as they are, and so does their speed.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from viasd_calib.choices import StrategyName
from viasd_calib.decoding.engine import Engine
from viasd_calib.draft.base import Drafter, MemorylessDrafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.shallow import ShallowDrafter
from viasd_calib.profiling.profile import TierName
from viasd_calib.spec import Audit

Watched = TypeVar("Watched")

VERIFIER_CALLS: dict[str, TierName] = {"full": "full", "slim": "slim", "logits": "head", "slim_logits": "head"}
CAUSAL_CALLS: dict[str, TierName] = {"full": "draft", "logits": "draft"}
SHALLOW_CALLS: dict[str, TierName] = dict.fromkeys(("step", "condition"), "draft")
PASSES = ("full", "slim", "step")
"""Calls over token ids; the others are products alone."""


@dataclass(frozen=True)
class Span:
    """One call on the clock.

    Attributes:
        tier: what ran; the draft model's own output head is part of its step.
        call: the method that was called.
        begin: seconds since the round began.
        end: the same.
        width: tokens that a pass ran over; 0 where the call is no pass.
    """

    tier: TierName
    call: str
    begin: float
    end: float
    width: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass(frozen=True)
class RecordedRound:
    """One round of a decoder, in seconds.

    Attributes:
        spans: in the order they ran; they do not overlap.
        seconds: of the whole round.

    Example:
        >>> one = RecordedRound((Span("full", "full", 0.0, 0.03, 1), Span("head", "logits", 0.03, 0.035, 0)), 0.04)
        >>> one.shape, round(one.rest, 6)
        (('full', 'head'), 0.005)
    """

    spans: tuple[Span, ...]
    seconds: float

    @property
    def shape(self) -> tuple[TierName, ...]:
        """The tiers in the order of their calls."""
        return tuple(span.tier for span in self.spans)

    @property
    def rest(self) -> float:
        """Seconds that were no draft step, slim pass, full pass or head product: gates, policy and host."""
        return self.seconds - sum(span.seconds for span in self.spans)

    def spent(self) -> dict[str, float]:
        """Seconds by tier, of those that ran, and of the ``rest``."""
        found: dict[str, float] = dict.fromkeys(self.shape, 0.0)
        for span in self.spans:
            found[span.tier] += span.seconds
        found["rest"] = self.rest
        return found

    def gaps(self) -> list[tuple[float, float]]:
        """The times between the spans, begin and end each."""
        edges = [0.0, *(edge for span in self.spans for edge in (span.begin, span.end)), self.seconds]
        return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if end > begin]


@dataclass(frozen=True)
class TypicalRound:
    """One recorded round that stands for many.

    Attributes:
        recorded: of the rounds of the commonest shape, the one of median length.
        alike: rounds of that shape.
        rounds: all that were recorded.
        rest_share: gates, policy and host as a share of the time of all rounds.
    """

    recorded: RecordedRound
    alike: int
    rounds: int
    rest_share: float


def typical_round(rounds: Sequence[RecordedRound]) -> TypicalRound:
    """A real round to show for all of ``rounds``, of which there is at least one."""
    shape, alike = Counter(one.shape for one in rounds).most_common(1)[0]
    same = sorted((one for one in rounds if one.shape == shape), key=lambda one: one.seconds)
    seconds = sum(one.seconds for one in rounds)
    return TypicalRound(same[alike // 2], alike, len(rounds), sum(one.rest for one in rounds) / seconds)


class Recorder:
    """Notes what ran when, round by round, while one text is decoded.

    Args:
        device: waited for before the clock is read; in ordinary decoding nothing waits for it there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[RecordedRound] = []
        self._begin: float | None = None
        self._spans: list[Span] = []

    def engine(self, engine: Engine) -> Engine:
        """The engine with its passes watched; weights are shared, and the engine given stays as it is."""
        routed = self._watched(engine.routed, VERIFIER_CALLS)
        return dataclasses.replace(engine, routed=routed, drafter=self._drafter(engine.drafter))

    def next_round(self) -> bool:
        """End the round before and begin the next; never cancels: what to give a decoder as ``cancelled``."""
        self.end_round()
        self._begin = self._now()
        return False

    def end_round(self) -> None:
        """End the round that was begun, if there is one; what ran before the first round is not noted."""
        now = self._now()
        if self._begin is not None:
            begin = self._begin
            spans = (dataclasses.replace(one, begin=one.begin - begin, end=one.end - begin) for one in self._spans)
            self.rounds.append(RecordedRound(tuple(spans), now - begin))
        self._begin = None
        self._spans.clear()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _drafter(self, drafter: Drafter) -> Drafter:
        match drafter:
            case CausalDrafter():
                calls = CAUSAL_CALLS
            case ShallowDrafter():
                calls = SHALLOW_CALLS
            case CombinedDrafter():
                both = self._watched(drafter, {"look_up": "draft"})
                both.model = self._drafter(drafter.model)
                return both
            case MemorylessDrafter():  # the search is its step
                return self._watched(drafter, {"propose": "draft"})
            case _:
                unknown: Any = copy.copy(drafter)
                unknown.start = lambda capacity: self._watched(drafter.start(capacity), {"propose": "draft"})
                return unknown  # type: ignore[no-any-return]
        own: Any = copy.copy(drafter)
        own.model = self._watched(drafter.model, calls)
        return own  # type: ignore[no-any-return]

    def _watched(self, thing: Watched, calls: Mapping[str, TierName]) -> Watched:
        own = copy.copy(thing)
        for name, tier in calls.items():
            setattr(own, name, self._timed(tier, name, getattr(own, name)))
        return own

    def _timed(self, tier: TierName, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin = self._now()
            result = call(*arguments, **options)
            width = arguments[0].shape[-1] if name in PASSES else 0
            self._spans.append(Span(tier, name, begin, self._now(), width))
            return result

        return run


class RecordedText:
    """A text that is decoded token by token while its rounds are recorded; the prompt's own pass is in none.

    Several can be decoded in turns: what happens between two calls of :meth:`advance` is in no round.

    Args:
        engine: what decodes; it stays as it is.
        name: the method.
        prompt: token ids, at least one.
        max_new_tokens: most tokens to add.
        audit: in place of the spec's own.
        may_end: whether the verifier's end-of-text tokens end the text.
    """

    def __init__(
        self,
        engine: Engine,
        name: StrategyName,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        audit: Audit | None = None,
        may_end: bool = True,
    ) -> None:
        self.tokens = 0
        self._recorder = Recorder(engine.routed.device)
        decoder = self._recorder.engine(engine).decoder(name, audit)
        if not may_end:
            decoder.eos_ids = frozenset()
        self._stream = decoder.stream(prompt, max_new_tokens, cancelled=self._recorder.next_round)

    @property
    def rounds(self) -> list[RecordedRound]:
        """Those that have ended."""
        return self._recorder.rounds

    def advance(self) -> bool:
        """Decode up to the next token that is final, for a round or for none where it is there already.

        Returns:
            Whether there was one.

        Raises:
            PromptError: the prompt is empty or does not fit the context.
        """
        more = next(self._stream, None) is not None
        self._recorder.end_round()
        self.tokens += more
        return more

    def finish(self) -> RecordedText:
        """Decode all that is left; errors as for :meth:`advance`."""
        while self.advance():
            pass
        return self
