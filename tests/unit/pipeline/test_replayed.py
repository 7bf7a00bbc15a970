"""What calibrate replays, at which costs, and what it says of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyFolder, drafted_spec, tiny_profile, tiny_prompts
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.pipeline import replayed
from viasd_calib.pipeline.replayed import (
    DECODED,
    calibrate_grid,
    measure_host,
    predict_policies,
    predictions_at,
    recorded_policies,
    tokens_of,
)
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.held_back import text_of
from viasd_calib.profiling.profile import LatencyProfile, ProfileSettings
from viasd_calib.traces.texts import TraceText

SECONDS = {"draft": 0.5, "slim": 1.0, "full": 10.0, "head": 1.0}


@pytest.fixture
def engine(tiny_folder: TinyFolder, tmp_path: Path) -> Engine:
    """With a draft model, and gates whose scores are 0.5."""
    return load_engine(drafted_spec(tiny_folder, tmp_path))


def texts(engine: Engine) -> list[tuple[TraceText, int]]:
    """The verifier's own, of 8 tokens each."""
    found = []
    for number in range(3):
        prompt = [5 + number, 6, 7]
        ids = engine.decoder("autoregressive").generate(prompt, 8).tokens
        found.append((text_of(number, torch.tensor([*prompt, *ids]), torch.tensor(ids), len(prompt)), 8))
    return found


def test_few_policies_of_each_kind_are_proposed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the costs of a profile, and of what is beside passes: eleven policies at most."""
    asked: list[ProfileSettings] = []

    def priced(engine: Engine, settings: ProfileSettings, *, with_rounds: bool) -> LatencyProfile:
        assert not with_rounds, "real prompts are decoded in their place"
        asked.append(settings)
        return tiny_profile(settings, lambda shape: SECONDS[shape.tier] * (1 + shape.width / 10))

    monkeypatch.setattr(replayed, "measure_profile", priced)
    grid = calibrate_grid(2, 8)
    found = predict_policies(engine, texts(engine), tiny_prompts(2), 8, grid)
    (settings,) = asked
    assert settings.widths == (1, 2, 4, 8, grid.widest)
    assert found.costs.full == pytest.approx([10 + width for width in range(1, grid.widest + 1)])
    assert found.costs.prompt > 0
    policies = [one.policy for one in found.every]
    kinds = Counter((one.kind, one.drafter) for one in policies)
    assert kinds.keys() == {
        ("no drafting", "none"), ("speculative", None), ("lookup alone", "lookup"), ("three tiers", None),
        ("three tiers without a draft model", "slim"), ("three tiers without a draft model", "lookup"),
    }  # fmt: skip
    assert all(count <= DECODED.get(kind, 1) for (kind, _), count in kinds.items())
    assert all(one.draft_length in (0, 2) for one in policies), "the length is the spec's"
    assert all(one.draft_accept_at > 1 for one in policies if not one.slim_tier), "plain speculative decoding"


def test_predictions_are_of_each_batch_at_each_context(engine: Engine) -> None:
    grid = calibrate_grid(2, 8)
    settings = ProfileSettings(widths=(1, grid.widest), contexts=(16, 32), batches=(1, 2), repeats=2)
    profile = tiny_profile(settings, lambda shape: SECONDS[shape.tier])
    found = predictions_at(
        engine, profile, (16, 32), texts(engine), tiny_prompts(2), 8, grid, host_draft_length=2, batches=(1, 2)
    )
    at = {batch: [(one.costs.batch, one.costs.context) for one in own] for batch, own in found.items()}
    assert at == {1: [(1, 16), (1, 32)], 2: [(2, 16), (2, 32)]}


def test_host_time_is_measured_on_real_prompts(engine: Engine) -> None:
    """At prices of a nanosecond a pass, which say nothing of how much slower the machine has become."""
    found = measure_host(engine, tiny_prompts(2), 8, 8.0, ReplayCosts(16, 1e-9, [1e-9] * 20, [1e-9] * 20), 2)
    assert found.round + found.draft_step + found.slim_pass > 0
    assert found.prompt > 0


def test_rounds_of_all_makes_are_recorded() -> None:
    """Nothing drafted, drafted, and drafted with a slim tier that has room for a block."""
    assert [one.kind for one in recorded_policies(8)] == ["no drafting", "speculative", "three tiers"]
    assert all(one.max_pending > one.draft_length for one in recorded_policies(8))


def test_answers_are_as_long_as_they_may_be(engine: Engine) -> None:
    found = texts(engine)
    written = [len(text.generated) for text, _ in found]
    assert tokens_of(found, 100) == pytest.approx(sum(written) / len(written))
    assert tokens_of(found, 2) == 2


def test_the_pending_bounds_have_room_for_a_block() -> None:
    assert calibrate_grid(12, 24).pending == (17, 24)
    assert calibrate_grid(23, 24).pending == (24,)
