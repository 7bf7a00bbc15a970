"""What TorchInductor makes of a pass, on this machine's CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.rounding import assert_near
from tests.tiny import random_bridges, tiny_model
from viasd_calib.errors import ModelError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.onednn_linear import pack_linears
from viasd_calib.spec import Route


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_inductor_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """One kind of pass at two places, with taps and a token shift; what was compiled lies where it should."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, route, taps = tiny_model(layers=2), Route(mlp_skip=[1]), (1,)
    parts = {"bridges": random_bridges(route, carry=True)}
    eager = RoutedModel(copy.deepcopy(model), route, parts)
    if packed:
        pack_linears([model])
    compiled = CompiledModel(model, route, parts)
    compiled.expect_taps(taps)
    caches = compiled.new_cache(7), eager.new_cache(7)
    ids = torch.tensor([[5, 1, 17]])
    for start in (0, 3):
        try:
            said = compiled.slim(ids, CacheWindow(caches[0], start, 3, start + 3), taps)
        except ModelError as error:
            if "compiler" in str(error.__cause__):
                pytest.skip("no C++ compiler here")
            raise
        expected = eager.slim(ids, CacheWindow(caches[1], start, 3, start + 3), taps)
        assert_near(said.last, expected.last)
        assert_near(said.tapped, expected.tapped)
    assert_near(caches[0].keys[..., :7, :], caches[1].keys)
    assert_near(caches[0].shift_states[..., :7, :], caches[1].shift_states)
    assert len(compiled._graphs) == 1
    assert any(tmp_path.iterdir())
