"""Bits are chosen by what will be in memory where the slim verifier decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.offload_cases import ALL, EXACT, cold, engine, save_verifier, write_spec
from viasd_calib.choices import Backend
from viasd_calib.errors import ModelError
from viasd_calib.models import load_verifier
from viasd_calib.slim.offload.bits_for_memory import CHOICES, LowBitChoice, bits_for_memory
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.parts.low_bit import LowBitOptions
from viasd_calib.spec import DType, LowBitWeights, Route

pytestmark = pytest.mark.usefixtures("empty_cache")


def route_of(choice: LowBitChoice) -> Route:
    bits = {"attention": {str(choice.attention): ALL}, "mlp": {str(choice.mlp): ALL}, "head": choice.head}
    return Route(low_bit=LowBitWeights.model_validate(bits))


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_what_is_foretold_is_what_is_resident(tmp_path: Path, backend: Backend, dtype: DType) -> None:
    """The most bits that fit, to the byte; below the least no choice does."""
    verifier = save_verifier(tmp_path / "q")
    model = load_verifier(str(verifier), dtype=dtype, layers=False).model
    least = []
    for choice in CHOICES:
        found = cold(engine(write_spec(verifier, route_of(choice)), Offload(), dtype, backend)).residency
        assert bits_for_memory(model, found.resident_bytes, backend) == (choice, found)
        least.append(found.resident_bytes)
    assert least == sorted(least, reverse=True)
    assert bits_for_memory(model, 10**9, backend)[0] == CHOICES[0]
    for number, choice in enumerate(CHOICES[1:]):
        assert bits_for_memory(model, least[number] - 1, backend)[0] == choice
    with pytest.raises(ModelError, match=f"takes {least[-1]:,} bytes, and --memory allows {least[-1] - 1:,}"):
        bits_for_memory(model, least[-1] - 1, backend)


@pytest.mark.parametrize("choice", CHOICES)
def test_its_options_give_these_bits(choice: LowBitChoice) -> None:
    options = LowBitOptions.model_validate(choice.options)
    for kind, bits in (("attention", choice.attention), ("mlp", choice.mlp)):
        assert options.by_bits(kind, {*ALL}, len(ALL)) == {str(bits): ALL}  # type: ignore[arg-type]
    assert (options.bits if options.head is None else options.head) == choice.head


def test_a_verifier_with_its_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="load it with layers=False"):
        bits_for_memory(load_verifier(str(save_verifier(tmp_path / "q"))).model, 10**9, "eager")
