"""Whether the slim tier earns its passes: decoding with it and without it, on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.rounds import NEVER
from viasd_calib.models import Verifier
from viasd_calib.progress import progress_bar
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Gates


class SlimWorth(BaseModel):
    """What the same prompts took with the slim tier and without it, by the same audit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds_per_token: float = Field(gt=0)
    seconds_per_token_without: float = Field(gt=0)
    n_prompts: int = Field(ge=1)

    @property
    def pays(self) -> bool:
        """Whether the slim tier makes decoding faster.

        Example:
            >>> SlimWorth(seconds_per_token=0.05, seconds_per_token_without=0.03, n_prompts=8).pays
            False
        """
        return self.seconds_per_token < self.seconds_per_token_without


def without_slim(gates: Gates) -> Gates:
    """Calibrated gates with a slim tier that is never asked."""
    return gates.model_copy(update={"accept_at": NEVER, "regenerate_at": NEVER})


def measure_slim_worth(
    decoder_for: Callable[[Gates], Decoder],
    gates: Gates,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> SlimWorth:
    """Decode ``prompts`` with both, in turns, so that drift strikes both alike.

    Args:
        decoder_for: a decoder with these gates, and an audit that keeps the text the verifier's.
        prompts: of the fit split, one at least; the first one is also the warm-up.
    """
    decoders = [decoder_for(gates), decoder_for(without_slim(gates))]
    seconds, tokens = [0.0, 0.0], [0, 0]
    for decoder in decoders:
        list(converse(decoder, verifier, prompts[0], max_new_tokens))
    with progress_bar("prompts") as progress:
        task = progress.add_task("is the slim tier worth its passes?", total=len(prompts))
        for number, prompt in enumerate(prompts):
            for which in (number % 2, 1 - number % 2):
                begin = time.perf_counter()
                turns = list(converse(decoders[which], verifier, prompt, max_new_tokens))
                seconds[which] += time.perf_counter() - begin
                tokens[which] += sum(len(turn.generation.tokens) for turn in turns)
            progress.update(task, advance=1)
    return SlimWorth(
        seconds_per_token=seconds[0] / tokens[0],
        seconds_per_token_without=seconds[1] / tokens[1],
        n_prompts=len(prompts),
    )
