"""The ways of choosing a route, by name."""

from __future__ import annotations

from collections.abc import Callable

from viasd_calib.choices import SearchMethod
from viasd_calib.spec import Route
from viasd_calib.training.search.ablation import ablation_order, greedy_removal, knapsack
from viasd_calib.training.search.baselines import best_random, best_span, evenly_spaced
from viasd_calib.training.search.dimr import dimr
from viasd_calib.training.search.evaluator import RouteEvaluator
from viasd_calib.training.search.low_bits import all_in_8, chosen_bits, mlps_in_4, span_out_rest_in_8
from viasd_calib.training.search.similarity import most_alike
from viasd_calib.training.search.space import SearchSpace

Choice = Callable[[SearchSpace, RouteEvaluator, int], Route]
"""From the routes there are, the evaluator with the budget, and a seed to the route that is chosen."""

CHOICES: dict[SearchMethod, Choice] = {
    "span": best_span,
    "random": best_random,
    "even": evenly_spaced,
    "ablation": ablation_order,
    "greedy": greedy_removal,
    "dimr": dimr,
    "similarity": most_alike,
    "knapsack": knapsack,
    "bits_8": all_in_8,
    "bits_8_span": span_out_rest_in_8,
    "bits_4_mlp": mlps_in_4,
    "bits_auto": chosen_bits,
}
