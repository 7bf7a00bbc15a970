"""Whether the slim tier earns its passes, and a certified loss its time: policies side by side, on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.models import Verifier
from viasd_calib.progress import steps
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Audit, Gates

STRICT_THRESHOLDS = (0.3, 0.5, 0.7, 0.85)
"""Thresholds that are tried beside the candidate's: with audit ``strict`` a wrong pending token costs time alone, so
that less careful ones than a stated loss asks for may be faster."""
STRICT_DRAFT_THRESHOLD = 0.9
"""The least of the draft gate's then: a wrong token there spoils all that q' makes of it, and asking q' is cheap."""


FEWEST_PROMPTS = 6
"""Prompts that must have been timed for one policy to be called faster: of fewer, even all on one side show nothing at
95 % (a sign test: 2 / 2^n)."""


class PolicyTiming(BaseModel):
    """What the same prompts took with the slim tier and without it.

    Attributes:
        by_bound: seconds a token of exact decoding with the slim tier, by the score at which a tier trusts a token.
        seconds_per_token_without: of exact decoding with draft gate and full verifier alone.
        seconds_per_token_certified: of the certified policy, whose text may diverge; None where there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by_bound: dict[float, float] = Field(min_length=1)
    seconds_per_token_without: float = Field(gt=0)
    seconds_per_token_certified: float | None = Field(None, gt=0)
    n_prompts: int = Field(ge=1)

    @property
    def threshold(self) -> float:
        """The fastest threshold."""
        return min(self.by_bound, key=self.by_bound.__getitem__)

    @property
    def seconds_per_token(self) -> float:
        """With the slim tier, at that threshold."""
        return self.by_bound[self.threshold]

    @property
    def seconds_per_token_exact(self) -> float:
        """Of the fastest policy whose text is the verifier's."""
        return min(self.seconds_per_token, self.seconds_per_token_without)

    @property
    def pays(self) -> bool:
        """Whether the slim tier makes exact decoding faster, timed on ``FEWEST_PROMPTS`` at least.

        Example:
            >>> PolicyTiming(by_bound={0.7: 0.05, 0.9: 0.06}, seconds_per_token_without=0.03, n_prompts=8).pays
            False
        """
        return self.enough and self.seconds_per_token < self.seconds_per_token_without

    @property
    def enough(self) -> bool:
        """Whether enough prompts were timed to say."""
        return self.n_prompts >= FEWEST_PROMPTS

    @property
    def lossy_pays(self) -> bool:
        """Whether there is a certified policy that is faster than all exact ones, timed on enough prompts."""
        certified = self.seconds_per_token_certified
        return self.enough and certified is not None and certified < self.seconds_per_token_exact


def without_slim(gates: Gates) -> Gates:
    """Calibrated gates with a slim tier that is never asked."""
    return gates.model_copy(update={"accept_at": NEVER, "regenerate_at": NEVER})


def with_threshold(gates: Gates, threshold: float) -> Gates:
    """Calibrated gates that trust q' from the score ``threshold`` on, and the draft model from there or from
    ``STRICT_DRAFT_THRESHOLD`` on, whichever is more; for exact decoding.
    """
    drafted = max(threshold, STRICT_DRAFT_THRESHOLD)
    return gates.model_copy(update={"draft_accept_at": drafted, "accept_at": threshold, "regenerate_at": threshold})


def time_policies(
    decoder_for: Callable[[Gates, Audit], Decoder],
    gates: Gates,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    certified: bool,
) -> PolicyTiming:
    """Decode ``prompts`` by several policies in turns: drift strikes all alike.

    They are exact decoding with the slim tier at several thresholds, exact decoding without it and, where ``gates`` are
    certified, they themselves with audit ``off``.

    Args:
        decoder_for: a decoder with these gates and this audit.
        gates: with a threshold for all tiers; it is tried beside ``STRICT_THRESHOLDS``.
        prompts: one at least; the first one is also the warm-up.
    """
    thresholds = sorted({*STRICT_THRESHOLDS, gates.accept_at})
    decoders = [*(decoder_for(with_threshold(gates, threshold), "strict") for threshold in thresholds)]
    decoders.append(decoder_for(without_slim(gates), "strict"))
    if certified:
        decoders.append(decoder_for(gates, "off"))
    seconds = _seconds_per_token(decoders, verifier, prompts, max_new_tokens)
    return PolicyTiming(
        by_bound=dict(zip(thresholds, seconds[: len(thresholds)], strict=True)),
        seconds_per_token_without=seconds[len(thresholds)],
        seconds_per_token_certified=seconds[-1] if certified else None,
        n_prompts=len(prompts),
    )


def _seconds_per_token(
    decoders: Sequence[Decoder], verifier: Verifier, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[float]:
    """Seconds a token that each decoder takes on the same prompts, after one of them as a warm-up."""
    seconds, tokens = [0.0] * len(decoders), [0] * len(decoders)
    for decoder in decoders:
        list(converse(decoder, verifier, prompts[0], max_new_tokens))
    with steps("timing the policies", len(prompts), "prompts") as running:
        for number, prompt in enumerate(prompts):
            for which in ((number + step) % len(decoders) for step in range(len(decoders))):
                begin = time.perf_counter()
                turns = list(converse(decoders[which], verifier, prompt, max_new_tokens))
                seconds[which] += time.perf_counter() - begin
                tokens[which] += sum(len(turn.generation.tokens) for turn in turns)
            running.advance()
    return [spent / count for spent, count in zip(seconds, tokens, strict=True)]
