"""What rounding alone comes to: how far passes of different widths lie apart, and the loss of exact decoding.

A decoder writes in narrow passes, whose kernels round otherwise than those of the wide pass that judges. So even the
texts of audit ``strict`` differ now and then from q's choice in that pass, and a loss that counted it would be one of
kernels, not of the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from viasd_calib.calibration.judging import judge
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.decoding.conversation import Answering, Turn, converse
from viasd_calib.errors import CalibrationError
from viasd_calib.models import Verifier
from viasd_calib.progress import tracked
from viasd_calib.prompts import Prompt
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.on_policy import read_answer

GAP_QUANTILE = 0.999
"""Of the differences between passes: the gap that counts as rounding."""
MOST_PASSES = 16
"""Narrow passes of each width over one text: each costs as much as a step of decoding."""


class Floor(BaseModel):
    """What rounding came to on texts of exact decoding.

    Attributes:
        rounding_gap: the ``GAP_QUANTILE`` of by how much passes of other widths move the difference of q's two largest
            logits, in nats.
        loss: mean over prompts of the loss of exact decoding, judged with that gap. It is reported, and not tested.
        loss_without_gap: the same where every token counts that is not q's choice.
        n_prompts: whose texts these are.
        n_places: at which passes were compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounding_gap: float = Field(ge=0)
    loss: float = Field(ge=0, le=1)
    loss_without_gap: float = Field(ge=0, le=1)
    n_prompts: int = Field(ge=1)
    n_places: int = Field(ge=1)


@torch.inference_mode()
def gap_moves(verifier: RoutedModel, prompt: Sequence[int], tokens: Sequence[int], width: int) -> Tensor:
    """By how much passes of ``width`` tokens move the difference of q's two largest logits in one wide pass.

    Args:
        prompt: ids, at least one.
        tokens: of the answer; the first ``MOST_PASSES`` passes over them are made.
        width: tokens of a pass, 1 at least.

    Returns:
        [places], float32, at least 0, in nats.
    """
    begin, places = len(prompt) - 1, min(len(tokens), MOST_PASSES * width)
    wide = read_answer(verifier, prompt, tokens)[0][:places].float()  # [places, vocabulary]
    pair = wide.topk(2, dim=-1).indices  # [places, 2]
    text = torch.tensor([[*prompt, *tokens]], device=verifier.device)  # [1, length]
    cache = verifier.new_cache(begin + places)
    if begin:
        verifier.full(text[:, :begin], CacheWindow(cache, 0, begin, begin))
    rows: list[Tensor] = []
    for start in range(begin, begin + places, width):
        end = min(start + width, begin + places)
        states = verifier.full(text[:, start:end], CacheWindow(cache, start, end - start, end))
        rows.append(verifier.logits(states.last[0]).float())  # [width, vocabulary]
    one, other = (logits.gather(-1, pair).diff(dim=-1)[:, 0] for logits in (wide, torch.cat(rows)))  # [places] each
    return (one - other).abs()


def measure_floor(
    decoder: Answering,
    verifier: Verifier,
    routed: RoutedModel,
    prompts: Sequence[Prompt],
    *,
    loss: str,
    max_new_tokens: int,
    widths: Sequence[int],
) -> Floor:
    """Decode prompts exactly, compare q's passes on these texts, and judge them as a candidate's are.

    Args:
        decoder: with audit ``strict``.
        prompts: that are not tested, so that no loss hangs on a gap that it helped to set.
        loss: its name.
        widths: of the passes that are compared with the wide one, as the decoder makes them.

    Raises:
        CalibrationError: there are no prompts.
    """
    if not prompts:
        raise CalibrationError("rounding cannot be measured without a prompt; give one at least")
    answered: list[tuple[Prompt, list[Turn]]] = []
    moves: list[Tensor] = []
    for prompt in tracked(prompts, "exact decoding, for its floor", len(prompts), "prompts"):
        turns = list(converse(decoder, verifier, prompt, max_new_tokens))
        answered.append((prompt, turns))
        for turn in turns:
            moves += [gap_moves(routed, turn.prompt_ids, turn.generation.tokens, width).cpu() for width in widths]
    every = torch.cat(moves)
    gap = float(every.quantile(GAP_QUANTILE))
    measured = loss_named(loss).of_prompt
    plain = [judge(routed, prompt, turns) for prompt, turns in answered]
    judged = [replace(one, rounding_gap=gap) for one in plain]
    return Floor(
        rounding_gap=gap,
        loss=sum(map(measured, judged)) / len(judged),
        loss_without_gap=sum(map(measured, plain)) / len(plain),
        n_prompts=len(prompts),
        n_places=len(every),
    )
