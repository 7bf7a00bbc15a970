"""What rounding comes to: passes of other widths, and exact decoding judged."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.rounding import rounding
from tests.tiny import tiny_model, tiny_prompts, transformers_logits
from viasd_calib.calibration.floor import MOST_PASSES, gap_moves, measure_floor
from viasd_calib.decoding.conversation import Turn
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.errors import CalibrationError
from viasd_calib.models import Verifier
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel, States

PROMPT, ANSWER = [3, 7, 1], list(range(4, 24))


def text(prompt: list[int], answer: list[int]) -> Turn:
    return Turn(prompt, Generation(answer, [], [], Counts()))


@pytest.mark.parametrize("width", [1, 3, 20])
@pytest.mark.parametrize("prompt", [PROMPT, [5]])
def test_in_float32_passes_of_all_widths_agree(prompt: list[int], width: int) -> None:
    model = tiny_model()
    (moves,) = gap_moves(RoutedModel(model), [text(prompt, ANSWER)], [width])
    assert len(moves) == min(len(ANSWER), MOST_PASSES * width)
    assert float(moves.max()) <= 4 * rounding(transformers_logits(model, [*prompt, *ANSWER]))


def test_in_bfloat16_they_do_not() -> None:
    model = copy.deepcopy(tiny_model()).bfloat16()
    (moves,) = gap_moves(RoutedModel(model), [text(PROMPT, ANSWER)], [1])
    assert float(moves.max()) > 0


def test_passes_of_several_texts_are_those_of_each() -> None:
    """Of unlike lengths, one of a single token after a prompt of one: its answer takes no pass before."""
    model = Uneven(tiny_model())
    texts = [text(PROMPT, ANSWER), text([5], [9]), text([2, 4], ANSWER[:5])]
    for width in (1, 3):
        alone = [gap_moves(model, [one], [width])[0] for one in texts]
        for found, wanted in zip(gap_moves(model, texts, [width]), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert any(float(one.max()) > 0.2 for one in alone), "the case would show nothing"


class Uneven(RoutedModel):
    """A model whose passes of fewer than four tokens have other logits: the token ``LIFTED`` is 0.25 larger there."""

    def full(self, ids: Tensor, window: CacheWindow, taps: tuple[int, ...] = ()) -> States:  # type: ignore[override]
        self.lifts = ids.shape[1] < 4
        return super().full(ids, window, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        found = super().logits(hidden)
        order = torch.arange(found.shape[-1]) % 2
        return found + 0.25 * order * self.lifts


def test_a_move_is_that_of_the_two_largest_logits() -> None:
    model = Uneven(tiny_model())
    (moves,) = gap_moves(model, [text(PROMPT, ANSWER)], [1])
    first, second = transformers_logits(tiny_model(), [*PROMPT, *ANSWER])[2:-1].topk(2).indices.unbind(-1)
    wanted = 0.25 * ((first + second) % 2)[: len(moves)]
    torch.testing.assert_close(moves, wanted.float(), rtol=0, atol=1e-4)
    assert wanted.any(), "the case would show nothing"


@dataclass
class OddChoice:
    """Answers with q's own text, but for its last token."""

    exact: Decoder

    def generate(self, prompt: list[int], max_new_tokens: int):  # type: ignore[no-untyped-def]
        found = self.exact.generate(prompt, max_new_tokens)
        found.tokens[-1] = (found.tokens[-1] + 1) % 24
        return found


def test_exact_decoding_comes_to_nothing_in_float32(tiny_verifier: Verifier) -> None:
    routed = RoutedModel(tiny_verifier.model)
    decoder = Decoder(routed, PromptLookup(), Autoregressive(), tiny_verifier.eos_ids)
    settings = {"loss": "any_divergence", "max_new_tokens": 8, "widths": (1, 4)}
    floor = measure_floor(decoder, tiny_verifier, routed, tiny_prompts(5), **settings)  # type: ignore[arg-type]
    assert (floor.loss, floor.loss_without_gap, floor.n_prompts) == (0.0, 0.0, 5)
    assert floor.rounding_gap < 1e-4
    together = measure_floor(decoder, tiny_verifier, routed, tiny_prompts(5), **settings, batch=2)  # type: ignore[arg-type]
    assert (together.loss, together.n_places) == (floor.loss, floor.n_places)
    assert together.rounding_gap < 1e-4
    other = measure_floor(OddChoice(decoder), tiny_verifier, routed, tiny_prompts(5), **settings)  # type: ignore[arg-type]
    assert other.loss == other.loss_without_gap == 1.0, "a departure is no rounding"


def test_without_prompts_it_is_refused(tiny_verifier: Verifier) -> None:
    routed = RoutedModel(tiny_verifier.model)
    decoder = Decoder(routed, PromptLookup(), Autoregressive(), tiny_verifier.eos_ids)
    with pytest.raises(CalibrationError, match="without a prompt"):
        measure_floor(decoder, tiny_verifier, routed, [], loss="overshoot", max_new_tokens=4, widths=(1,))
