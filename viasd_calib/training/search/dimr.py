"""VIA-SD's own choice, DIMR: random search with a Bayesian step every few trials (arXiv 2606.12243)."""

from __future__ import annotations

import importlib.util

from viasd_calib.errors import CalibrationError
from viasd_calib.spec import Route
from viasd_calib.training.losses.margin import margin_cost
from viasd_calib.training.search.evaluator import RouteEvaluator
from viasd_calib.training.search.space import SearchSpace

BAYES_EVERY = 5
"""Trials from one Bayesian step to the next."""


def dimr(space: SearchSpace, evaluator: RouteEvaluator, seed: int) -> Route:
    """The route of least :func:`~viasd_calib.training.losses.margin.margin_cost` in as many trials as the budget holds.

    A trial gives each sublayer a number from 0 to 1; the highest ones go until the target is met, so that every trial
    is a route that may be chosen. Most trials draw the numbers at random. Every ``BAYES_EVERY``-th takes them from a
    model of the trials so far: a tree-structured Parzen estimator (Bergstra et al. 2011), through Optuna.

    Raises:
        CalibrationError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise CalibrationError("the method dimr needs Optuna; install viasd_calib[search] or leave the method out")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawing = optuna.samplers.RandomSampler(seed=seed)
    modelling = optuna.samplers.TPESampler(seed=seed, n_startup_trials=BAYES_EVERY - 1)
    study = optuna.create_study(direction="minimize", sampler=drawing)
    numbers: dict[str, optuna.distributions.BaseDistribution] = {
        str(number): optuna.distributions.FloatDistribution(0, 1) for number in space.free
    }
    for count in range(1, evaluator.left + 1):
        study.sampler = drawing if count % BAYES_EVERY else modelling
        trial = study.ask(numbers)
        study.tell(trial, evaluator.loss(_route(space, trial.params), of=margin_cost))
    return _route(space, study.best_params)


def _route(space: SearchSpace, params: dict[str, float]) -> Route:
    return space.route(space.until_met(sorted(space.free, key=lambda number: -params[str(number)])))
