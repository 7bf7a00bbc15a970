from __future__ import annotations

import warnings

import pytest

from tests.tiny import verifier_ref
from viasd_calib.errors import JobWarning, WeightsWarning
from viasd_calib.pipeline import fitted
from viasd_calib.pipeline.fitted import dtype_of_fit, verifier_of
from viasd_calib.spec import DType, LowBitWeights, RelativeCost, Route

ONE, OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize(("known", "loaded", "named"), [(ONE, ONE, ONE), (None, ONE, ONE), (ONE, None, ONE)])
def test_a_spec_names_the_weights_as_far_as_they_are_known(known: str | None, loaded: str | None, named: str) -> None:
    own = verifier_ref(weights_sha256=known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verifier_of(own, verifier_ref(name_or_path="elsewhere", weights_sha256=loaded))
    assert found == own.model_copy(update={"weights_sha256": named})


LOW = Route(low_bit=LowBitWeights(head=8))


def measured(cost: float, dtype: DType) -> Route:
    return LOW.model_copy(update={"relative_cost": RelativeCost(measured={1: 0.9, 4: cost}, device="cpu", dtype=dtype)})


@pytest.mark.parametrize(
    ("route", "kernels", "dtype"),
    [
        (measured(0.6, "bfloat16"), True, "bfloat16"),
        (measured(0.6, "bfloat16"), False, "float32"),
        (measured(0.6, "float32"), True, "float32"),
        (LOW, True, "float32"),
        (Route(relative_cost=measured(0.6, "bfloat16").relative_cost), True, "float32"),
    ],
)
def test_low_bits_are_calibrated_where_they_gain_something(
    monkeypatch: pytest.MonkeyPatch, route: Route, kernels: bool, dtype: DType
) -> None:
    monkeypatch.setattr(fitted, "low_bits_have_kernels", lambda *_: kernels)
    with warnings.catch_warnings(record=True) as said:
        assert dtype_of_fit(route, "cpu") == dtype
    assert len(said) == (dtype == "bfloat16")


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("fastest", ["bfloat16", "float32"])
def test_what_was_fitted_for_little_memory_is_calibrated_as_its_bytes_were_counted(
    monkeypatch: pytest.MonkeyPatch, fastest: DType, kernels: bool
) -> None:
    """Whatever low bits gain in memory: in float32 the same layers take twice what the bound allows."""
    monkeypatch.setattr(fitted, "low_bits_have_kernels", lambda *_: kernels)
    monkeypatch.setattr(fitted, "fastest_dtype", lambda _: fastest)
    with warnings.catch_warnings(record=True) as said:
        assert dtype_of_fit(measured(1.2, "float32"), "cpu", bounded=True) == fastest
    assert len(said) == (fastest == "bfloat16")


def test_the_choice_of_another_format_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "low_bits_have_kernels", lambda *_: True)
    with pytest.warns(JobWarning, match="calibrates in bfloat16.*give --dtype float32"):
        dtype_of_fit(measured(0.6, "bfloat16"), "cpu")


def test_other_weights_are_calibrated_as_what_they_are() -> None:
    tuned = verifier_ref(name_or_path="tuned", weights_sha256=OTHER)
    with pytest.warns(WeightsWarning, match="the fit learned from other weights than those of tuned"):
        assert verifier_of(verifier_ref(weights_sha256=ONE), tuned) == tuned
