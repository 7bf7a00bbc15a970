"""The shipped spec on the embedded verifier: what users run first."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.tiny import random_gate, transformers_text
from viasd_calib.cli import main
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.models import encode_prompt
from viasd_calib.pipeline.prompt_choice import load_prompts, of_split, take_turns
from viasd_calib.prompts import EMBEDDED
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, Route

Texts = list[tuple[list[int], list[int]]]

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "checkpoints/smollm2-135m/routing.json"
TOKENS = 24


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(2)
    return load_engine(SPEC, dtype="float32")


@pytest.fixture(scope="module")
def texts(engine: Engine) -> Texts:
    """Prompts of every task, and what transformers' own generate answers."""
    prompts = take_turns(of_split(load_prompts(EMBEDDED), "test", None), 5)
    ids = [encode_prompt(engine.verifier, prompt, [], TOKENS) for prompt in prompts]
    return [(row, transformers_text(engine.verifier.model, row, TOKENS, engine.verifier.eos_ids)) for row in ids]


def test_the_shipped_spec_is_valid_for_the_embedded_verifier(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(SPEC), "--verifier", "smollm2-135m"]) == 0
    assert "valid" in capsys.readouterr().out


def test_autoregressive_is_what_transformers_generates(engine: Engine, texts: Texts) -> None:
    for prompt, expected in texts:
        assert engine.decoder("autoregressive").generate(prompt, TOKENS).tokens == expected


@pytest.mark.parametrize("kind", ["shallow", "prompt_lookup", "causal_lm", "combined"])
def test_strict_is_exact_for_every_drafter(engine: Engine, texts: Texts, kind: str) -> None:
    """Random route, random gates, every drafter: q's text, in fp32, token by token."""
    rng = random.Random(kind)
    layers = engine.spec.verifier.num_layers
    route = Route(
        attention_skip=sorted(rng.sample(range(1, layers), layers // 3)),
        mlp_skip=sorted(rng.sample(range(1, layers), layers // 3)),
    )
    routed = RoutedModel(engine.verifier.model, route)
    drafter: Drafter = {
        "shallow": lambda: engine.drafter,
        "prompt_lookup": PromptLookup,
        "causal_lm": lambda: CausalDrafter(RoutedModel(engine.verifier.model), engine.spec.verifier.vocab_size),
        "combined": lambda: CombinedDrafter(engine.drafter, engine.spec.verifier.vocab_size, max_ngram=5, min_ngram=3),
    }[kind]()
    gates = Gates(
        draft=random_gate(DRAFT_FEATURES, seed=1),
        slim=random_gate(SLIM_FEATURES, seed=2),
        draft_stop_below=0.2,
        draft_accept_at=0.7,
        accept_at=0.5,
        regenerate_at=0.6,
    )
    method = ThreeTier.from_spec(gates, Decoding(max_pending=8))
    for prompt, expected in texts:
        assert Decoder(routed, drafter, method, engine.verifier.eos_ids).generate(prompt, TOKENS).tokens == expected
        speculative = Decoder(routed, drafter, Speculative(), engine.verifier.eos_ids)
        assert speculative.generate(prompt, TOKENS).tokens == expected


def test_the_shipped_drafter_saves_full_passes(engine: Engine, texts: Texts) -> None:
    """A drafter that is right about half of the time needs clearly fewer than one full pass a token."""
    passes = tokens = 0
    for prompt, _ in texts:
        generation = engine.decoder("speculative").generate(prompt, TOKENS)
        passes += generation.counts.full_passes
        tokens += len(generation.tokens)
    assert passes / tokens < 0.85
    plain = Decoder(engine.routed, None, Autoregressive(), engine.verifier.eos_ids).generate(texts[0][0], TOKENS)
    assert plain.counts.full_passes == len(plain.tokens)
