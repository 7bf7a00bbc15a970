from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.offload_cases import LOW_BITS, engine, save_verifier, write_spec
from tests.tiny import DRAFTERS, make_drafter, propose, tiny_config, tiny_model
from viasd_calib.decoding.engine import Engine
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.errors import PlanningError
from viasd_calib.models import Verifier
from viasd_calib.profiling.measure import Pass, decoder_passes, measure_profile, time_draft_steps, time_rounds
from viasd_calib.profiling.profile import LayersRead, PassShape, ProfileSettings
from viasd_calib.slim.cost import WARM_UP
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.spec import Gates, PromptLookupDraft, RelativeCost, Route, RoutingSpec

SETTINGS = ProfileSettings(widths=(1, 3), contexts=(5, 12), batches=(1, 2), repeats=2)
ROUTE = Route(attention_skip=[1], mlp_skip=[1, 2])
CPU = torch.device("cpu")


def engine_of(verifier: Verifier, kind: str = "lookup", drafter: Drafter | None = None) -> Engine:
    """An engine whose drafter need not be the one its spec names."""
    spec = RoutingSpec(
        verifier=verifier.ref,
        draft=PromptLookupDraft(),
        route=ROUTE.model_copy(
            update={"relative_cost": RelativeCost(measured={1: 0.5}, device="cpu", dtype="float32")}
        ),
        gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    )
    routed = RoutedModel(verifier.model, ROUTE)
    return Engine(spec, verifier, routed, drafter or make_drafter(kind, routed))


@pytest.mark.parametrize("kind", DRAFTERS)
def test_everything_is_measured_with_every_drafter(tiny_verifier: Verifier, kind: str) -> None:
    profile = measure_profile(engine_of(tiny_verifier, kind), SETTINGS)
    assert [entry.shape for entry in profile.measured] == list(SETTINGS.shapes())
    assert all(0 < entry.low <= entry.seconds <= entry.high for entry in profile.measured)
    assert profile.seconds("full", 2, 7, 1.5) > 0


@pytest.mark.parametrize("kind", DRAFTERS)
def test_draft_steps_of_several_texts(tiny_verifier: Verifier, kind: str) -> None:
    found = time_draft_steps(engine_of(tiny_verifier, kind), (5, 12), (2, 3), repeats=2)
    assert found.keys() == {(5, 2), (12, 2), (5, 3), (12, 3)}
    assert min(found.values()) > 0
    assert time_draft_steps(engine_of(tiny_verifier, kind), (5, 12), (), repeats=2) == {}


def test_a_draft_step_of_several_texts_is_one_pass(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated it is the same: each text has one token that the draft model has not seen."""
    rows: list[tuple[int, ...]] = []
    full = RoutedModel.full
    monkeypatch.setattr(
        RoutedModel, "full", lambda model, ids, *more: (rows.append(tuple(ids.shape)), full(model, ids, *more))[1]
    )
    time_draft_steps(engine_of(tiny_verifier, "causal"), (6,), (3,), repeats=2)
    first, *steps = rows
    assert first == (3, 7)
    assert {*steps} == {(3, 1)}


def test_a_profile_says_what_was_measured(tiny_verifier: Verifier) -> None:
    profile = measure_profile(engine_of(tiny_verifier), SETTINGS)
    assert profile.verifier == tiny_verifier.ref
    assert profile.route == ROUTE
    assert (profile.backend, profile.dtype, profile.device) == ("eager", "float32", "cpu")
    assert profile.hardware["torch"] == torch.__version__
    assert profile.settings == SETTINGS


def test_another_backend_is_timed_by_the_same_code(tiny_verifier: Verifier) -> None:
    calls: Counter[PassShape] = Counter()

    def make_passes(_engine: Engine, settings: ProfileSettings) -> dict[PassShape, Pass]:
        return {shape: lambda shape=shape: calls.update([shape]) for shape in settings.shapes()}

    profile = measure_profile(engine_of(tiny_verifier), SETTINGS, make_passes, backend="counted")
    assert profile.backend == "counted"
    assert calls == dict.fromkeys(SETTINGS.shapes(), SETTINGS.repeats + WARM_UP)


def test_passes_run_without_gradients() -> None:
    seen: list[bool] = []
    shape = PassShape("head", 1, None, 1)
    time_rounds({shape: lambda: seen.append(torch.is_inference_mode_enabled())}, 2, CPU)
    assert all(seen)
    assert len(seen) == 2 + WARM_UP


@pytest.mark.parametrize("tier", ["slim", "full"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pass_gives_the_logits_of_its_tier(tiny_verifier: Verifier, tier: str, batch: int) -> None:
    """Made again, it gives the same; q and q' differ."""
    passes = decoder_passes(engine_of(tiny_verifier), SETTINGS)
    shape = PassShape(tier, 3, 12, batch)  # type: ignore[arg-type]
    with torch.inference_mode():
        logits = passes[shape]()
        again = passes[shape]()
        other = passes[shape._replace(tier="full" if tier == "slim" else "slim")]()
    assert isinstance(logits, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert logits.shape == (batch, 3, tiny_verifier.model.config.vocab_size)
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, other)


def test_a_slim_pass_is_timed_with_its_own_head(tiny_verifier: Verifier) -> None:
    routed = RoutedModel(tiny_verifier.model, ROUTE, held={"head_vocab": torch.tensor([2, 5, 7])})
    engine = dataclasses.replace(engine_of(tiny_verifier), routed=routed)
    passes = decoder_passes(engine, SETTINGS)
    with torch.inference_mode():
        slim, full = (passes[PassShape(tier, 3, 12, 1)]() for tier in ("slim", "full"))
    assert isinstance(slim, torch.Tensor)
    assert isinstance(full, torch.Tensor)
    assert slim.isfinite().sum(-1).tolist() == [[3, 3, 3]]
    assert full.isfinite().all()


def test_the_head_is_run_on_every_place(tiny_verifier: Verifier) -> None:
    with torch.inference_mode():
        logits = decoder_passes(engine_of(tiny_verifier), SETTINGS)[PassShape("head", 3, None, 2)]()
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 3, tiny_verifier.model.config.vocab_size)


@pytest.mark.parametrize("kind", ["causal", "shallow"])
def test_a_draft_step_is_one_forward_of_one_token(
    tiny_verifier: Verifier, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where contexts take turns: each has a text of its own."""
    engine = engine_of(tiny_verifier, kind)
    widths: list[int] = []
    advance = type(engine.drafter.start(1))._advance  # type: ignore[attr-defined]

    def noted(drafter: Drafter, ids: torch.Tensor) -> torch.Tensor:
        widths.append(len(ids))
        return advance(drafter, ids)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(engine.drafter.start(1)), "_advance", noted)
    passes = decoder_passes(engine, SETTINGS)
    assert widths == [6, 13]  # what each context's text takes once
    widths.clear()
    with torch.inference_mode():
        for context in (5, 12, 5, 12):
            passes[PassShape("draft", 1, context, 1)]()
    assert widths == [1, 1, 1, 1]


def test_a_text_that_was_begun_before_goes_on(tiny_verifier: Verifier) -> None:
    engine = engine_of(tiny_verifier, "causal")
    text = torch.tensor([3, 1, 4, 1, 5])
    drafter = engine.drafter.start(16)
    before = propose(drafter, text, 4).tokens
    measure_profile(engine, SETTINGS)
    assert torch.equal(propose(drafter, text, 4).tokens, before)


def test_a_context_beyond_the_verifiers_is_refused(tiny_verifier: Verifier) -> None:
    settings = SETTINGS.model_copy(update={"contexts": (5, 254)})
    message = r"context 254 and width 3 are 257 positions, the verifier's context holds 256; give --contexts up to 253"
    with pytest.raises(PlanningError, match=message):
        decoder_passes(engine_of(tiny_verifier), settings)
    fitting = SETTINGS.model_copy(update={"contexts": (253,)})
    assert len(decoder_passes(engine_of(tiny_verifier), fitting)) == 13


def test_a_width_beyond_the_context_is_refused(tiny_verifier: Verifier) -> None:
    settings = SETTINGS.model_copy(update={"widths": (1, 256)})
    with pytest.raises(PlanningError, match="give --widths below 256"):
        decoder_passes(engine_of(tiny_verifier), settings)


def test_a_context_beyond_the_draft_models_is_refused(tiny_verifier: Verifier) -> None:
    config = tiny_config(layers=2, max_position_embeddings=8)
    model = type(tiny_model(0))(config).eval().requires_grad_(False)
    drafter = CausalDrafter(RoutedModel(model), config.vocab_size)
    with pytest.raises(
        PlanningError,
        match="context 12 is longer than the draft model's, which holds 8 tokens; give --contexts up to 7",
    ):
        decoder_passes(engine_of(tiny_verifier, drafter=drafter), SETTINGS)


def test_a_profile_says_how_layers_were_read(tmp_path: Path) -> None:
    spec = write_spec(save_verifier(tmp_path), LOW_BITS)
    settings = ProfileSettings(widths=(1,), contexts=(5,), batches=(1,), repeats=2)
    read = measure_profile(engine(spec, Offload("disk", bytes_per_second=1e9)), settings, with_rounds=False)
    assert read.offload == LayersRead(kind="disk", memory=None, bandwidth=1e9)
    whole = measure_profile(engine(spec, Offload("disk", memory=10**9)), settings, with_rounds=False)
    assert whole.offload is None  # all layers fit, and none is read
