from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from viasd_calib.slim.least_squares import LeastSquares


@given(seed=st.integers(0, 99), cut=st.integers(1, 39), ridge=st.sampled_from([1e-4, 0.1]))
def test_pieces_and_whole_are_one_problem_and_ridge_regression(seed: int, cut: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, 5, generator=generator)
    outputs = torch.randn(40, 2, generator=generator)
    problem = LeastSquares(5, 2)
    problem.add(inputs[:cut], outputs[:cut])
    problem.add(inputs[cut:], outputs[cut:])
    expected = Ridge(alpha=40 * ridge, fit_intercept=False).fit(inputs.double(), outputs.double())
    torch.testing.assert_close(problem.solve(slice(None), ridge), torch.tensor(expected.coef_.T), atol=1e-4, rtol=1e-4)


def test_what_is_known_is_left_to_the_other_inputs() -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    true = torch.arange(8.0).view(4, 2)
    problem = LeastSquares(4, 2)
    problem.add(inputs, inputs @ true)
    known = torch.zeros(4, 2, dtype=torch.float64)
    known[:2] = true[:2]
    torch.testing.assert_close(problem.solve([2, 3], 0.0, known), true[2:].double(), atol=1e-4, rtol=1e-4)
