"""Routes whose sublayers run in low bits, beside those that leave some out."""

from __future__ import annotations

from dataclasses import replace

from viasd_calib.replay.agreement import compare_places, directly_after
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.base import FitInputs
from viasd_calib.slim.parts.low_bit import Bits, LowBit, LowBitOptions
from viasd_calib.spec import Route
from viasd_calib.training.search.baselines import best_span
from viasd_calib.training.search.evaluator import RouteEvaluator
from viasd_calib.training.search.space import SearchSpace


def all_in_8(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """Every sublayer and the output head in 8 bits; no pass, whatever the target."""
    return _rounded(Route(), space, evaluator, LowBitOptions(bits=8))


def span_out_rest_in_8(space: SearchSpace, evaluator: RouteEvaluator, seed: int) -> Route:
    """The best run of layers that saves half of what the target asks is left out, the rest has 8 bits."""
    half = replace(space, target_cost=(1 + space.target_cost) / 2)
    return _rounded(best_span(half, evaluator, seed), space, evaluator, LowBitOptions(bits=8))


def mlps_in_4(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """MLPs in 4 bits, attention and the output head in 8; no pass, whatever the target."""
    return _rounded(Route(), space, evaluator, LowBitOptions(bits=8, mlp=4))


def chosen_bits(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """The bits of each sublayer and the head that ``viasd fit`` would choose with ``bits: auto``, within the target.

    A pass for each of them in 8 bits and, where the budget holds as many again, in 4.

    Raises:
        CalibrationError: the budget does not hold so many.
        SpecError: no choice meets the target, as where nothing has kernels for low bits.
    """
    places = 2 * space.layers + 1
    evaluator.need(places)
    options: tuple[Bits, ...] = (16, 8, 4) if evaluator.left >= 2 * places else (16, 8)
    return _rounded(Route(), space, evaluator, LowBitOptions(bits="auto", options=options))


def _rounded(route: Route, space: SearchSpace, evaluator: RouteEvaluator, options: LowBitOptions) -> Route:
    """The route with bits as the options say, of the sublayers that it keeps."""
    spent_on: list[RoutedModel] = []

    def divergence(model: RoutedModel, number: int) -> float:
        if spent_on[-1:] != [model]:  # one text after the other with the same model is one pass
            evaluator.spend()
            spent_on.append(model)
        text, cache = evaluator.texts[number]
        return float(compare_places(model, model.slim_sublayers, text, cache, directly_after(text)).kl.mean())

    texts = [one.text for one in evaluator.texts]
    inputs = FitInputs(evaluator.model, route, texts, read_residuals, divergence, space.target_cost)
    return route.model_copy(update={"low_bit": LowBit().fit(inputs, options)})
