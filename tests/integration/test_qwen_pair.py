"""The decoder on a real pair of other families' size, where one is present.

``VIASD_QWEN_PAIR`` names a folder with the official Qwen2.5-Coder-Instruct GGUF files of 1.5B and 0.5B.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.tiny import random_gate, transformers_text
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, Route

PAIR = Path(os.environ.get("VIASD_QWEN_PAIR", ""))
VERIFIER, DRAFT = (PAIR / f"qwen2.5-coder-{size}-instruct-q4_k_m.gguf" for size in ("1.5b", "0.5b"))
TOKENS = 16

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not (VERIFIER.is_file() and DRAFT.is_file()), reason="VIASD_QWEN_PAIR names no such folder"),
]


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    torch.set_num_threads(2)
    return load_verifier(str(VERIFIER))


@pytest.fixture(scope="module")
def drafter(verifier: Verifier) -> CausalDrafter:
    return CausalDrafter(RoutedModel(load_verifier(str(DRAFT)).model), verifier.model.config.vocab_size)


def test_the_text_is_that_of_transformers_for_every_method(verifier: Verifier, drafter: CausalDrafter) -> None:
    prompt = verifier.encode_chat([{"role": "user", "content": "Write a Python function that adds two numbers."}])
    expected = transformers_text(verifier.model, prompt, TOKENS, verifier.eos_ids)
    skipped = list(range(8, 16))
    routed = RoutedModel(verifier.model, Route(attention_skip=skipped, mlp_skip=skipped))
    gates = Gates(
        draft=random_gate(DRAFT_FEATURES, seed=1),
        slim=random_gate(SLIM_FEATURES, seed=2),
        accept_at=0.5,
        regenerate_at=0.5,
    )
    for method in (Speculative(4), ThreeTier.from_spec(gates, Decoding(draft_length=4))):
        generation = Decoder(routed, drafter, method, verifier.eos_ids).generate(prompt, TOKENS)
        assert generation.tokens == expected
        assert generation.counts.full_passes < TOKENS
