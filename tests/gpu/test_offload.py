"""Texts with layers in the host's memory, read for each pass of q, are those with all of them on the device."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.targets import TINY, OpenTarget
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.models import encode_prompt
from viasd_calib.prompts import draw_prompts, read_prompts
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.spec import LowBitWeights, Route, load_spec

pytestmark = pytest.mark.gpu

COUNT = 32
"""Tokens of a text."""
PROMPTS = 4


def opened_with(target: OpenTarget, device: torch.device, offload: Offload | None) -> Engine:
    """The tiny model, whose slim verifier has all sublayers in 8 bits."""
    spec = load_spec(target.spec)
    every = {"8": [*range(spec.verifier.num_layers)]}
    low_bit = LowBitWeights.model_validate({"attention": every, "mlp": every, "head": 8})
    return load_engine(
        target.spec, spec=spec.model_copy(update={"route": Route(low_bit=low_bit)}), verifier=target.target.verifier,
        draft_model=target.target.draft_model, dtype="float32", device=str(device), backend="eager", offload=offload,
    )  # fmt: skip


def test_layers_that_are_read_for_each_pass_change_no_text(targets: list[OpenTarget], device: torch.device) -> None:
    target = next(one for one in targets if one.target.name == TINY)
    resident, streamed = (opened_with(target, device, offload) for offload in (None, Offload("cpu")))
    assert streamed.routed.cold is not None
    assert streamed.routed.cold.residency.cold_bytes > 0
    prompts = draw_prompts(read_prompts(target.prompts), PROMPTS)
    ids = [encode_prompt(resident.verifier, prompt, [], COUNT) for prompt in prompts]
    for strategy in ("autoregressive", "speculative", "self_speculative", "three_tier"):
        texts = [
            [generation.tokens for generation in engine.decoder(strategy, "strict").generate_batch(ids, COUNT)]
            for engine in (resident, streamed)
        ]
        assert texts[0] == texts[1], strategy
