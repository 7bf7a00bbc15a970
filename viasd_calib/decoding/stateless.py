"""Logits processors and stopping criteria under speculation: which may run, and how one with a state follows a text.

Speculation asks about tokens that are taken back, about the same place several times, and about places that no
drafter or verifier asked of before. A processor that answers by what it remembers of earlier calls, as grammar
processors do that advance by one token a call, would silently break what it is there to keep. So these run:

- transformers' own classes that are functions of the text and the scores they are given (``STATELESS``);
- an object that declares it with an attribute ``stateless = True``;
- an object with a method ``rollback(length)``, see :class:`RollsBack`;
- any other callable, where the user vouches for it (``assume_stateless``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from transformers import LogitsProcessor, StoppingCriteria

from viasd_calib.errors import SamplingError
from viasd_calib.token_ids import shown

STATELESS = frozenset(
    {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EosTokenCriteria",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "StopStringCriteria",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
    }
)
"""transformers' own classes whose answer follows from text and scores alone (from the time too, for the time limit).

A class that is in neither list is refused until it has been examined; a test finds such classes."""

STATEFUL = {
    "ConfidenceCriteria": "needs scores, which are not kept",
    "DiaEOSDelayPatternLogitsProcessor": "counts its calls",
    "SynthIDTextWatermarkLogitsProcessor": "remembers earlier calls",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "remembers earlier calls",
    "WhisperNoSpeechDetection": "keeps what it was shown",
}
"""transformers' own classes that cannot run, and why; ``assume_stateless`` does not change it."""

CALLS_BACK = {"PrefixConstrainedLogitsProcessor": "calls a function of yours"}
"""transformers' own classes that are what somebody's function makes of them."""

HOMES = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")


@runtime_checkable
class RollsBack(Protocol):
    """A processor or criterion that advances by one token a call, and can go back.

    It is called as transformers' ``generate`` would call it: first with the prompt (a criterion: with the prompt and
    one token), then each time with one token more. Before a call that does not go on from the last one, it is given
    the length that still holds; tokens after that which it has not seen are shown to it one by one, and what it
    answers to those is thrown away.

    Example:
        A grammar of xgrammar's, whose matchers take back so many tokens::

            class Grammar(xgrammar.contrib.hf.LogitsProcessor):
                def rollback(
                    self, length: int
                ) -> None: ...  # self.matchers[0].rollback(tokens accepted after length), or a new matcher for length 0
    """

    def rollback(self, length: int) -> None:
        """Be as after the call with the first ``length`` tokens of the text; 0: as before the first call."""
        ...


AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


def read_processors(processors: Iterable[LogitsProcessor], assume_stateless: bool = False) -> list[LogitsProcessor]:
    """Logits processors that may run under speculation, as they are; :func:`follow_text` is for those that roll back.

    Args:
        assume_stateless: accept a user's own without proof that they are functions of text and scores.

    Raises:
        SamplingError: no list of processors, or one that may remember earlier calls.
    """
    return _read(processors, "processors", "logits processors", assume_stateless)


def read_criteria(criteria: Iterable[StoppingCriteria], assume_stateless: bool = False) -> list[StoppingCriteria]:
    """The same for stopping criteria.

    Raises:
        SamplingError: no list of criteria, or one that may remember earlier calls.
    """
    return _read(criteria, "criteria", "stopping criteria", assume_stateless)


def _read(given: Iterable[AnyCallable], name: str, what: str, assume_stateless: bool) -> list[AnyCallable]:
    if not isinstance(given, Iterable):
        raise SamplingError(f"{name} is {shown(given)}; give a list of {what}")
    listed = list(given)
    for place, one in enumerate(listed):
        _check(one, f"{name}[{place}]", assume_stateless)
    return listed


def _check(one: object, name: str, assume_stateless: bool) -> None:
    kind = type(one)
    if not callable(one):
        raise SamplingError(f"{name} is {shown(one)}, which cannot be called; give an object of transformers' kind")
    own = kind.__name__ if kind.__module__ in HOMES else None  # a subclass may remember what its parent does not
    if own in STATEFUL:
        raise SamplingError(
            f"{name}, a {own}, {STATEFUL[own]}; speculation takes tokens back and asks again, so it is not "
            "supported: leave it out"
        )
    declared = getattr(one, "stateless", False) is True or isinstance(one, RollsBack)
    if own in STATELESS or declared or assume_stateless:
        return
    reason = CALLS_BACK.get(own or "", "may remember earlier calls")
    raise SamplingError(
        f"{name}, a {kind.__name__}, {reason}, and speculation takes tokens back and asks again; where its answer "
        "follows from text and scores alone, say so with its attribute stateless = True or with "
        "assume_stateless=True, else give it a method rollback(length)"
    )


def follow_text(one: AnyCallable, first: int) -> AnyCallable:
    """What rolls back, made to follow one text; anything else as it is.

    Args:
        first: length of the text at the first call: the prompt's for a processor, one more for a criterion.
    """
    if not isinstance(one, RollsBack) or getattr(one, "stateless", False) is True:
        return one
    following: Any = TextFollower(one, first)
    return following


@dataclass
class _LastCall:
    """Which text an object that rolls back has been called with last.

    Attributes:
        owner: of the text; None where it is unknown.
        text: that text.
    """

    owner: object = None
    text: list[int] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)


_LAST_CALLS: dict[int, _LastCall] = {}
"""By object (its ``id``) and not by text: texts that share one must know what the others have called it with."""


def _last_call_of(one: object) -> _LastCall:
    """The state of an object, kept for as long as it lives."""
    if id(one) not in _LAST_CALLS and _LAST_CALLS.setdefault(id(one), made := _LastCall()) is made:
        weakref.finalize(one, _LAST_CALLS.pop, id(one), None)
    return _LAST_CALLS[id(one)]


class TextFollower:
    """Makes a processor or criterion that rolls back follow one text, whatever other calls it gets in between.

    Args:
        one: the processor or criterion.
        first: length of the text at its first call.
    """

    def __init__(self, one: Any, first: int) -> None:
        self.one = one
        self.first = first
        self._owner = object()
        self._last_call = _last_call_of(one)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Its answer for a text ([1, length]) and scores ([1, vocabulary], None for a criterion)."""
        text: list[int] = input_ids[0].tolist()
        with self._last_call.lock:
            held = _common(self._last_call.text, text[:-1]) if self._last_call.owner is self._owner else 0
            self._last_call.owner = None  # until it is known again
            if held < self.first:
                self.one.rollback(0)
                held = self.first - 1
            elif held < len(self._last_call.text):
                self.one.rollback(held)
            for length in range(held + 1, len(text)):
                self.one(input_ids[:, :length], None if scores is None else scores.clone())
            answer = self.one(input_ids, scores)
            self._last_call.owner, self._last_call.text = self._owner, text
            return answer


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that two texts share.

    Example:
        >>> _common([1, 2, 3], [1, 2, 4, 5]), _common([1], [1, 2])
        (2, 1)
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))
