from __future__ import annotations

import warnings

import pytest

from tests.tiny import verifier_ref
from viasd_calib.errors import WeightsWarning
from viasd_calib.pipeline.fitted import verifier_of

ONE, OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize(("fitted", "loaded", "named"), [(ONE, ONE, ONE), (None, ONE, ONE), (ONE, None, ONE)])
def test_a_spec_names_the_weights_as_far_as_they_are_known(fitted: str | None, loaded: str | None, named: str) -> None:
    own = verifier_ref(weights_sha256=fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verifier_of(own, verifier_ref(name_or_path="elsewhere", weights_sha256=loaded))
    assert found == own.model_copy(update={"weights_sha256": named})


def test_other_weights_are_calibrated_as_what_they_are() -> None:
    tuned = verifier_ref(name_or_path="tuned", weights_sha256=OTHER)
    with pytest.warns(WeightsWarning, match="the fit learned from other weights than those of tuned"):
        assert verifier_of(verifier_ref(weights_sha256=ONE), tuned) == tuned
