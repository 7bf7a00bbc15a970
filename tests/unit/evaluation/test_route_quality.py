"""What route-quality says, against q and q' run place by place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.rounding import assert_near
from tests.tiny import TinyFolder, tiny_model, tiny_prompts, tiny_spec, tiny_texts
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.route_quality import compare_at_distances, measure_quality
from viasd_calib.pipeline.options import RouteQualityOptions
from viasd_calib.pipeline.route_quality import route_quality
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Route

ROUTE = Route(attention_skip=[1], mlp_skip=[2])


def test_every_place_is_compared_once_at_every_distance_it_can_have() -> None:
    model, text = RoutedModel(tiny_model(), ROUTE), tiny_texts(1)[0]
    n = len(text.q_ids)
    compared = compare_at_distances(model, text, 4)
    assert [len(places.agrees) for places in compared] == [n - distance for distance in range(4)]


@torch.inference_mode()
@pytest.mark.parametrize("distance", [0, 1, 3])
def test_a_distance_is_how_many_tokens_the_full_verifier_has_not_seen(distance: int) -> None:
    model, text = RoutedModel(tiny_model(), ROUTE), tiny_texts(1, length=14)[0]
    expected = []
    for place in range(text.prompt_length - 1 + distance, len(text.ids) - 1):
        exact = place - distance
        cache = model.new_cache(len(text.ids))
        model.full(text.ids[None, :exact], CacheWindow(cache, 0, exact, exact))
        pending = text.ids[None, exact : place + 1]
        said = model.logits(model.slim(pending, CacheWindow(cache, exact, distance + 1, place + 1)).last[0, -1])
        expected.append(float(said.softmax(-1).max()))
    found = compare_at_distances(model, text, 4)[distance].confidence
    assert_near(found.sort().values, torch.tensor(expected).sort().values)


def test_the_full_verifier_agrees_with_itself() -> None:
    quality = measure_quality(RoutedModel(tiny_model()), tiny_texts(3), {4: 1.0}, distances=3)
    assert quality.agreement == 1
    assert quality.kl < 1e-4
    assert set(quality.by_distance.values()) == set(quality.agreement_confident.values()) == {1.0}
    assert quality.by_task == {"qa": 1.0}


def test_a_route_agrees_most_where_it_is_surest() -> None:
    quality = measure_quality(RoutedModel(tiny_model(), ROUTE), tiny_texts(30), {4: 0.5}, distances=2)
    assert 0 < quality.agreement < 1
    assert quality.agreement_confident["0.5"] > quality.agreement
    assert quality.kl > 0


def test_a_reduced_head_leaves_the_divergence_finite() -> None:
    model = RoutedModel(tiny_model(), Route(), {"head_vocab": torch.arange(0, 24, 2)})
    quality = measure_quality(model, tiny_texts(3), {4: 0.5}, distances=1)
    assert 0 < quality.agreement < 1
    assert 0 < quality.kl < 20


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
