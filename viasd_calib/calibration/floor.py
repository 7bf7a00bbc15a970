"""What rounding alone comes to: how far passes of different widths lie apart, and the loss of exact decoding.

A decoder writes in narrow passes, whose kernels round otherwise than those of the wide pass that judges. So even the
texts of audit ``strict`` differ now and then from q's choice in that pass, and a loss that counted it would be one of
kernels, not of the policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from viasd_calib.calibration.judging import judge
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.decoding.conversation import Answering, Turn, answer_batch
from viasd_calib.errors import CalibrationError
from viasd_calib.models import Verifier
from viasd_calib.passes.model_passes import FullPass, PassResult
from viasd_calib.passes.requests import Passes
from viasd_calib.passes.scheduling import run_together
from viasd_calib.progress import steps
from viasd_calib.prompts import Prompt
from viasd_calib.slim.cache import CacheRow
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
def gap_moves(verifier: RoutedModel, texts: Sequence[Turn], widths: Sequence[int]) -> list[Tensor]:
    """By how much passes of each width move the difference of q's two largest logits in one wide pass.

    Args:
        texts: with a prompt and an answer of one token at least; the first ``MOST_PASSES`` passes of each width over
            each answer are made, those of all texts together.
        widths: tokens of a pass, 1 at least.

    Returns:
        Of each text the places of each width after another [places], float32, at least 0, in nats.
    """
    capacity = max(len(text.prompt_ids) + len(text.generation.tokens) for text in texts)
    found: dict[int, Tensor] = {}

    def moves(number: int, text: Turn, row: CacheRow) -> Passes[None]:
        prompt, tokens = text.prompt_ids, text.generation.tokens
        begin = len(prompt) - 1
        wide = read_answer(verifier, prompt, tokens)[0].float()  # [tokens, vocabulary]
        pair = wide.topk(2, dim=-1).indices  # [tokens, 2]
        wide_gap = _gap(wide, pair)  # [tokens]
        ids = torch.tensor([*prompt, *tokens], device=verifier.device)  # [length]
        if begin:
            yield FullPass(verifier, row, 0, ids[:begin], wanted=0)
        moved: list[Tensor] = []
        for width in widths:
            # Each width writes the answer's places of the cache again, from the first on.
            for first in range(0, min(len(tokens), MOST_PASSES * width), width):
                some = slice(first, min(first + width, len(tokens)))
                passed = ids[begin + some.start : begin + some.stop]  # [<= width]
                result: PassResult = yield FullPass(verifier, row, begin + first, passed, wanted=len(passed))
                moved.append((wide_gap[some] - _gap(result.logits.float(), pair[some])).abs())
        found[number] = torch.cat(moved)

    rows = verifier.new_cache(capacity, len(texts)).rows()
    running = [moves(number, text, row) for number, (text, row) in enumerate(zip(texts, rows, strict=True))]
    deque(run_together(running), maxlen=0)
    return [found[number] for number in range(len(texts))]


def _gap(logits: Tensor, pair: Tensor) -> Tensor:
    """The difference of two logits of each row: [rows, vocabulary] and [rows, 2] to [rows]."""
    return logits.gather(-1, pair).diff(dim=-1)[:, 0]


def measure_floor(
    decoder: Answering,
    verifier: Verifier,
    routed: RoutedModel,
    prompts: Sequence[Prompt],
    *,
    loss: str,
    max_new_tokens: int,
    widths: Sequence[int],
    batch: int = 1,
) -> Floor:
    """Decode prompts exactly, compare q's passes on these texts, and judge them as a candidate's are.

    Args:
        decoder: with audit ``strict``.
        prompts: that are not tested, so that no loss hangs on a gap that it helped to set.
        loss: its name.
        widths: of the passes that are compared with the wide one, as the decoder makes them.
        batch: prompts that are decoded together, and texts whose passes are; more than one only where each text, and
            each pass, is then what it is alone.

    Raises:
        CalibrationError: there are no prompts.
    """
    if not prompts:
        raise CalibrationError("rounding cannot be measured without a prompt; give one at least")
    answered: list[tuple[Prompt, list[Turn]]] = []
    moves: list[Tensor] = []
    with steps("exact decoding, for its floor", len(prompts), "prompts") as running:
        for begin in range(0, len(prompts), batch):
            some = prompts[begin : begin + batch]
            turns_of = answer_batch(decoder, verifier, some, max_new_tokens, batch)
            answered += zip(some, turns_of, strict=True)
            texts = [turn for turns in turns_of for turn in turns]
            for first in range(0, len(texts), batch):
                moves += [found.cpu() for found in gap_moves(routed, texts[first : first + batch], widths)]
            running.advance(len(some))
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
