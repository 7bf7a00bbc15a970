"""What route-quality says, against q and q' run place by place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rounding import assert_near
from tests.tiny import (
    TinyFolder,
    make_model,
    random_bridges,
    random_gate,
    tiny_config,
    tiny_model,
    tiny_prompts,
    tiny_spec,
    tiny_texts,
    tiny_tokenizer,
)
from viasd_calib.choices import Backend
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.route_quality import RouteQuality, compare_at_distances, measure_quality
from viasd_calib.models import load_verifier
from viasd_calib.pipeline.options import RouteQualityOptions
from viasd_calib.pipeline.route_quality import route_quality
from viasd_calib.progress import Reporter, Steps, reporting
from viasd_calib.replay.agreement import ComparedPlaces, compare_logits
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.spec import (
    DRAFT_FEATURES,
    SLIM_FEATURES,
    DType,
    Gates,
    PromptHashes,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    load_spec,
    save_spec,
)
from viasd_calib.traces.texts import TraceText

ROUTE = Route(attention_skip=[1], mlp_skip=[2])
RATIO = Gates(convention="ratio", accept_at=0.9, escalate_below=0.5)
LACKING = why_no_kernels(torch.device("cpu"), torch.bfloat16)


def test_every_place_is_compared_once_at_every_near_distance_it_can_have() -> None:
    model, text = RoutedModel(tiny_model(), ROUTE), tiny_texts(1)[0]
    n = len(text.q_ids)
    compared = compare_at_distances(model, text, near=4, far=(), every=4)
    assert {distance: len(places.agrees) for distance, places in compared.items()} == {d: n - d for d in range(4)}


def test_some_places_are_compared_at_far_distances() -> None:
    model, text = RoutedModel(tiny_model(), ROUTE), tiny_texts(1)[0]
    n = len(text.q_ids)
    counted: list[None] = []
    compared = compare_at_distances(model, text, far=(15, 31, 99), advance=lambda: counted.append(None))
    assert [*compared] == [*range(9), 15, 31]
    assert [len(compared[far].agrees) for far in (15, 31)] == [math.ceil((n - far) / 4) for far in (15, 31)]
    assert len(counted) == n


@torch.inference_mode()
def place_by_place(model: RoutedModel, text: TraceText, distance: int, every: int) -> ComparedPlaces:
    """q over what it has seen into a cache of its own for each place, then q' over one token after the other."""
    first, found = text.prompt_length - 1, []
    for exact in range(first, len(text.ids) - 1 - distance, every):
        cache = model.new_cache(len(text.ids))
        model.full(text.ids[None, :exact], CacheWindow(cache, 0, exact, exact))
        for place in range(exact, exact + distance + 1):
            last = model.slim(text.ids[None, place : place + 1], CacheWindow(cache, place, 1, place + 1)).last
        n = exact + distance - first
        found.append(compare_logits(text.q_ids[n, None], text.q_log_probs[n, None], model.slim_logits(last[0])))
    return ComparedPlaces.joined(found)


@pytest.mark.parametrize("parts", ["skips", "bridges", "carry", "static"])
def test_a_distance_is_how_many_tokens_the_full_verifier_has_not_seen(parts: str) -> None:
    """With what routes write into the cache, and with passes that are padded and read all of it (``static``)."""
    held = {} if parts == "skips" else {"bridges": random_bridges(ROUTE, carry=parts != "bridges")}
    eager = RoutedModel(tiny_model(), ROUTE, held)
    model = CompiledModel(tiny_model(), ROUTE, held, compiler=lambda run: run) if parts == "static" else eager
    text = tiny_texts(1, length=48)[0]
    found = compare_at_distances(model, text)
    assert [*found] == [*range(9), 15, 23, 31]
    for distance in (0, 1, 8, 15, 23, 31):
        places = found[distance]
        wanted = place_by_place(eager, text, distance, every=1 if distance < 9 else 4)
        assert_near(places.confidence, wanted.confidence)
        assert_near(places.kl, wanted.kl)
        assert torch.equal(places.agrees, wanted.agrees)
    assert 0 < ComparedPlaces.joined([*found.values()]).agreement() < 1


def test_the_full_verifier_agrees_with_itself() -> None:
    quality = measure_quality(RoutedModel(tiny_model()), tiny_texts(3), {4: 1.0})
    assert quality.agreement == 1
    assert quality.kl < 1e-4
    assert [*quality.by_distance] == [*quality.places_by_distance] == [*range(9), 15, 23, 31]
    assert set(quality.by_distance.values()) == set(quality.agreement_confident.values()) == {1.0}
    assert quality.by_task == {"qa": 1.0}


def test_a_route_agrees_most_where_it_is_surest() -> None:
    quality = measure_quality(RoutedModel(tiny_model(), ROUTE), tiny_texts(30), {4: 0.5}, near=2, far=())
    assert 0 < quality.agreement < 1
    assert quality.agreement_confident["0.5"] > quality.agreement
    assert quality.kl > 0


def test_a_reduced_head_leaves_the_divergence_finite() -> None:
    model = RoutedModel(tiny_model(), Route(), {"head_vocab": torch.arange(0, 24, 2)})
    quality = measure_quality(model, tiny_texts(3), {4: 0.5}, near=1, far=())
    assert 0 < quality.agreement < 1
    assert 0 < quality.kl < 20


def test_it_tells_how_many_places_are_compared() -> None:
    told: list[int] = []

    class Counted(Reporter):
        def start(self, description: str, total: int, unit: str, *, done: int = 0, timed: bool = False) -> Steps:
            told.append(total)
            return Told()

    class Told(Steps):
        def advance(self, count: int = 1) -> None:
            told.append(count)

    texts = tiny_texts(2, length=12)
    with reporting(Counted()):
        quality = measure_quality(RoutedModel(tiny_model(), ROUTE), texts, {4: 0.5})
    assert told == [14, *[1] * 14]
    assert quality.places_by_distance == {distance: 14 - 2 * distance for distance in range(7)}


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(BenchError, match="wrote nothing"):
        measure_quality(RoutedModel(tiny_model(), ROUTE), [], {})


def test_the_command_writes_what_it_measured(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    spec, out = tiny_spec(tiny_folder, tmp_path), tmp_path / "quality.json"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(6)), encoding="utf-8")
    quality = route_quality(
        RouteQualityOptions(spec=str(spec), json=str(out), prompts=str(prompts), limit=4, max_new_tokens=12)
    )
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["agreement"] == quality.agreement
    assert [*written["agreement_confident"]] == ["0.5", "0.6", "0.7", "0.9"]
    assert [*written["relative_cost"]] == ["1", "4", "8"]
    assert written["by_distance"]["0"] == quality.agreement
    assert written["gates"] == {}  # the ratio convention has none


def test_fitted_gates_are_assessed_on_the_same_answers(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """At each generated place there is a candidate of the slim gate at least, and of the draft gate where lookup has
    a proposal that decoding comes to."""
    path = tiny_spec(tiny_folder, tmp_path)
    gates = Gates(
        draft=random_gate(DRAFT_FEATURES, 0), slim=random_gate(SLIM_FEATURES, 1), accept_at=0.9, regenerate_at=0.9
    )
    save_spec(load_spec(path).model_copy(update={"gates": gates}), path)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "quality.json"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(8)), encoding="utf-8")
    quality = route_quality(RouteQualityOptions(spec=str(path), json=str(out), prompts=str(prompts), max_new_tokens=24))
    draft, slim = quality.gates["draft"].overall, quality.gates["slim"].overall
    assert draft is not None
    assert slim is not None
    assert slim.candidates >= quality.places_by_distance[0] > draft.candidates > 0
    assert set(quality.gates["slim"].by_task) == set(quality.by_task)
    assert RouteQuality.model_validate_json(out.read_text(encoding="utf-8")) == quality


FLOOR_CASES = [
    pytest.param("eager", "float32", id="eager"),
    pytest.param(
        "native",
        "bfloat16",
        id="native",
        marks=pytest.mark.skipif(LACKING is not None, reason=f"the kernels do not run here: {LACKING}"),
    ),
]


@pytest.mark.parametrize(("backend", "dtype"), FLOOR_CASES)
def test_a_slim_verifier_that_is_the_full_one_agrees_at_every_distance(
    tmp_path: Path, backend: Backend, dtype: DType
) -> None:
    """Also in bfloat16, where an answer by other kernels than those of the engine differs at near ties."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.08}
    make_model(tiny_config(vocab=512, **sizes)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(512).save_pretrained(tmp_path / "model")
    ref = load_verifier(str(tmp_path / "model"), dtype=dtype).ref
    spec = RoutingSpec(
        verifier=ref, draft=PromptLookupDraft(), route=Route(), gates=RATIO, prompts=PromptHashes(fit=[])
    )
    save_spec(spec, tmp_path / "routing.json")
    lines = [prompt.model_dump_json() + "\n" for prompt in tiny_prompts(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    quality = route_quality(
        RouteQualityOptions(
            spec=str(tmp_path / "routing.json"), json=str(tmp_path / "quality.json"), backend=backend,
            prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=64,
        )
    )  # fmt: skip
    assert quality.by_distance == dict.fromkeys([*range(9), 15, 23, 31], 1.0)
    assert quality.places_by_distance[31] >= 50
