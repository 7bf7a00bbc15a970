from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from tests.tiny import LAYERS, VOCAB, tiny_model, tiny_shape
from viasd_calib.draft.shallow import ShallowModel, unit_size, unrolled_states
from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.training.closed_form import RIDGE, fit_stand_in

SHAPE = tiny_shape(num_layers=1, head_vocab=VOCAB, taps=(1, LAYERS))


def texts(count: int = 12, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def fitted() -> tuple[RoutedModel, ShallowModel]:
    verifier = RoutedModel(tiny_model())
    model = ShallowModel(verifier, SHAPE)
    model.use_vocabulary(torch.arange(VOCAB))
    assert fit_stand_in(model, verifier, texts()) == 12 * 39
    return verifier, model


@torch.no_grad()
def test_the_maps_are_the_ridge_solution(fitted: tuple[RoutedModel, ShallowModel]) -> None:
    verifier, model = fitted
    inputs, own, wanted = [], [], []
    for text in texts():
        tapped = read_text(verifier, text[None], (1, LAYERS - 1, LAYERS))[0].tapped[0]
        ones = torch.ones(39, 1)
        inputs.append(torch.cat([model.embed(text[None])[0, 1:], ones, unit_size(tapped[:-1, [0, 2]]).flatten(1)], 1))
        own.append(unit_size(tapped[:-1, 2]))
        wanted.append(tapped[1:, 1])
    x, z, y = torch.cat(inputs).double(), torch.cat(own).double(), torch.cat(wanted).double()
    ridge = Ridge(alpha=RIDGE * len(x), fit_intercept=False)
    hidden = y.shape[1]
    found = torch.cat(
        [model.from_token.weight, model.from_token.bias[:, None], model.from_taps.weight], 1
    )  # [hidden, inputs]
    torch.testing.assert_close(found.double(), torch.tensor(ridge.fit(x, y).coef_), atol=1e-3, rtol=1e-3)
    rest = y - x[:, : hidden + 1] @ found[:, : hidden + 1].double().T
    torch.testing.assert_close(
        model.from_own.weight.double(), torch.tensor(ridge.fit(z, rest).coef_), atol=1e-3, rtol=1e-3
    )


@torch.no_grad()
def test_it_predicts_better_than_an_untrained_drafter(fitted: tuple[RoutedModel, ShallowModel]) -> None:
    verifier, model = fitted
    plain = ShallowModel(verifier, SHAPE)
    text = texts(13)[-1][None]  # not among those it was fitted on
    read, _ = read_text(verifier, text, SHAPE.taps)
    wanted = read.tapped[0, 1:, -1]

    def error(drafter: ShallowModel, depth: int) -> float:
        states = unrolled_states(drafter, text, read.tapped, depth + 1)[depth][0, 1:]
        return float((unit_size(states) - unit_size(wanted)).square().mean())

    assert error(model, 0) < 0.8 * error(plain, 0)
    assert error(model, 1) < 0.8 * error(plain, 1)
