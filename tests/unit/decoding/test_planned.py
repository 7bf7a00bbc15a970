"""A plan changes the policy as the text grows, and never the text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import viasd_calib
from tests.tiny import TinyFolder, constant_gate, save_tiny
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.decoding.planned import Planned
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.digest import policy_digest
from viasd_calib.models import load_verifier
from viasd_calib.spec import (
    CausalLMDraft,
    Decoding,
    Gates,
    PlanEntry,
    PlannedPolicy,
    Route,
    RoutingSpec,
    load_spec,
    save_spec,
    spec_problems,
)

PROMPTS = [[5, 9, 5, 9, 5], [7, 8, 9, 10, 7, 8], [1, 20, 3]]
TIERS = PlannedPolicy(draft_length=3, max_pending=9, accept_at=0.4)
SPECULATIVE = PlannedPolicy(draft_length=2, max_pending=12, draft_stop_below=0.3)
GATED = PlannedPolicy(draft_length=4, max_pending=6, accept_at=0.4, draft_accept_at=0.45)
SLIM = PlannedPolicy(drafter="slim", draft_length=0, max_pending=5, accept_at=0.4)
NOTHING = PlannedPolicy(drafter="none", draft_length=0, max_pending=12)


def plan(*rows: tuple[int | None, PlannedPolicy]) -> list[PlanEntry]:
    return [PlanEntry(max_context=bound, policy=policy) for bound, policy in rows]


def by_batch(*rows: tuple[int | None, int | None, PlannedPolicy]) -> list[PlanEntry]:
    """Rows of most texts together, longest text and policy."""
    return [PlanEntry(max_batch=texts, max_context=bound, policy=policy) for texts, bound, policy in rows]


def document(folder: TinyFolder, draft: Path, rows: list[PlanEntry] | None, **changes: Any) -> dict[str, Any]:
    gates = Gates(
        draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0),
        accept_at=1.01, regenerate_at=1.01,
    )  # fmt: skip
    entries: dict[str, Any] = {
        "verifier": load_verifier(str(folder)).ref,
        "draft": CausalLMDraft(name_or_path=str(draft)),
        "route": Route(attention_skip=[1], mlp_skip=[2]),
        "gates": gates,
        "decoding": Decoding(draft_length=3, max_pending=9),
        "plan": rows,
    }
    return {**entries, **changes}


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes a spec with a plan, of a verifier whose texts do not end, and gives its path."""
    endless, draft = save_tiny(tmp_path / "endless", eos=None), tmp_path / "draft"
    save_tiny(draft, seed=4)

    def write(rows: list[PlanEntry] | None) -> Path:
        save_spec(RoutingSpec(**document(endless, draft, rows)), tmp_path / "routing.json")
        return tmp_path / "routing.json"

    return write


def texts(engine: Engine, method: str = "three_tier") -> list[list[int]]:
    return [engine.decoder(method).generate(one, max_new_tokens=30).tokens for one in PROMPTS]


def test_the_text_is_the_verifiers_whatever_policy_follows_another(written: Any) -> None:
    """Every policy after every other, in the middle of a text with tokens that wait for q; alone and in a batch."""
    wanted = None
    for number, (first, second) in enumerate(itertools.permutations([TIERS, SPECULATIVE, GATED, SLIM, NOTHING], 2)):
        engine = load_engine(written(plan((10 + number % 7, first), (20, second), (None, first))))
        wanted = wanted or texts(engine, "autoregressive")
        assert texts(engine) == wanted
        batch = engine.decoder().generate_batch(PROMPTS, 30)
        assert [one.tokens for one in batch] == wanted


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a spec with a plan, of a verifier most of whose texts end early, at different places."""
    folder = tmp_path_factory.mktemp("ending")
    verifier = save_tiny(folder / "verifier", eos=9)
    save_tiny(folder / "draft", seed=4)

    def write(rows: list[PlanEntry] | None) -> Path:
        save_spec(RoutingSpec(**document(verifier, folder / "draft", rows)), folder / "routing.json")
        return folder / "routing.json"

    return write


MANY = [[5, 9, 5, 9, 5], [7, 8, 9, 10, 7, 8], [1, 20, 3], [4], [11, 12], [6, 6, 6], [13, 3, 17, 8]]


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_the_text_is_the_verifiers_however_many_texts_there_are(ending: Any, size: int) -> None:
    """Policies change as texts end, with tokens that wait for q; in float32 not a token differs."""
    wanted = None
    lengths: set[int] = set()
    for first, second, third in itertools.permutations([TIERS, SPECULATIVE, GATED, SLIM, NOTHING], 3):
        rows = by_batch((1, None, first), (3, 9, second), (3, None, third), (None, 8, third), (None, None, second))
        engine = load_engine(ending(rows))
        if wanted is None:
            plain = engine.decoder("autoregressive")
            wanted = [plain.generate(one, max_new_tokens=16).tokens for one in MANY]
            lengths = {len(one) for one in wanted}
        assert [one.tokens for one in engine.decoder().generate_batch(MANY, 16, batch_size=size)] == wanted
    assert len(lengths) > 2, "else no batch grows smaller"


def test_a_round_follows_the_policy_of_its_batch(ending: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the texts that have not ended, and of its own length; alone it is the row of one."""
    rows = by_batch((1, None, SLIM), (3, 9, TIERS), (3, None, SPECULATIVE), (None, None, NOTHING))
    decoder = load_engine(ending(rows)).decoder()
    own = ThreeTier.round
    seen: set[tuple[int, bool, int]] = set()

    def noted(strategy: ThreeTier, session: Any) -> Any:
        rule = {5: SLIM, 9: TIERS, 12: SPECULATIVE}[strategy.max_pending]
        if strategy.draft_length == 0 and rule is SPECULATIVE:
            rule = NOTHING
        texts, short = session.together, session.length <= 9
        wanted = SLIM if texts == 1 else (TIERS if short else SPECULATIVE) if texts <= 3 else NOTHING
        assert rule is wanted
        seen.add((texts, short, strategy.max_pending))
        return own(strategy, session)

    monkeypatch.setattr(ThreeTier, "round", noted)
    decoder.generate_batch(MANY, 16, batch_size=7)
    assert {texts for texts, _, _ in seen} >= {2, 3, 7}
    seen.clear()
    decoder.generate_batch(MANY[2:4], 16)
    assert {(texts, short) for texts, short, _ in seen} >= {(2, True), (2, False)}
    seen.clear()
    decoder.generate(MANY[1], 16)
    assert {texts for texts, _, _ in seen} == {1}


def test_a_plan_without_batches_is_read_as_before(written: Any) -> None:
    """Schema 1.5 and 1.6 knew no max_batch: a row is of any."""
    path = written(plan((8, TIERS), (None, NOTHING)))
    stored = json.loads(path.read_text())
    for row in stored["plan"]:
        assert row.pop("max_batch") is None
    path.write_text(json.dumps({**stored, "schema_version": "1.6"}))
    spec = load_spec(path)
    assert spec.plan == plan((8, TIERS), (None, NOTHING))
    strategy = load_engine(path).decoder().strategy
    assert isinstance(strategy, Planned)
    assert strategy.at(9, 1) is strategy.at(9, 100)


def test_a_round_follows_the_policy_of_its_context(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(written(plan((8, NOTHING), (20, SPECULATIVE), (None, SLIM))))
    seen: list[tuple[int, int]] = []
    own = ThreeTier.round

    def noted(strategy: ThreeTier, session: Any) -> Any:
        seen.append((session.length, strategy.max_pending))
        return own(strategy, session)

    monkeypatch.setattr(ThreeTier, "round", noted)
    engine.decoder().generate(PROMPTS[0], 30)
    assert all(pending == 12 if length <= 20 else pending == 5 for length, pending in seen)
    assert {length for length, _ in seen} >= {5, 6, 7, 8, 9}, "one by one where nothing is drafted"
    assert max(length for length, _ in seen) > 20


def test_where_nothing_is_drafted_no_pass_but_the_verifiers_is_made(written: Any) -> None:
    counts = load_engine(written(plan((None, NOTHING)))).decoder().generate(PROMPTS[0], 20).counts
    assert (counts.full_passes, counts.slim_passes, counts.draft_steps) == (20, 0, 0)


def test_another_audit_does_not_follow_the_plan(written: Any) -> None:
    """A certificate is of gates and settings of the spec."""
    engine = load_engine(written(plan((None, TIERS))))
    assert isinstance(engine.decoder().strategy, Planned)
    assert isinstance(engine.decoder(audit="off").strategy, ThreeTier)
    assert not engine.decoder(audit="off").strategy.asks_slim
    assert engine.decoder().strategy.asks_slim
    assert isinstance(engine.decoder().strategy, Strategy)


def test_a_sampled_text_is_decoded_by_plan_too(written: Any) -> None:
    engine = load_engine(written(plan((10, TIERS), (None, SPECULATIVE))))
    found = engine.decoder(sampling=Sampling(temperature=1.0, seed=3)).generate(PROMPTS[0], 20)
    assert len(found.tokens) == 20
    assert found.counts.slim_passes > 0


def test_transformers_generate_follows_the_plan(written: Any, tmp_path: Path) -> None:
    path = written(plan((9, TIERS), (None, SLIM)))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "endless", dtype=torch.float32)
    ids = torch.tensor([PROMPTS[1]])
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 16}
    plain = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, custom_generate=viasd_calib.generate, viasd_spec=path), plain)


@pytest.mark.parametrize(
    ("rows", "changes", "problem"),
    [
        (plan((8, TIERS)), {}, "null in the last one alone"),
        (plan((None, TIERS), (8, TIERS)), {}, "must rise from row to row"),
        (plan((8, TIERS), (8, TIERS), (None, TIERS)), {}, "must rise from row to row"),
        (by_batch((4, None, TIERS)), {}, "max_batch must rise from rows to rows, and be null in the last ones alone"),
        (by_batch((None, None, TIERS), (4, None, TIERS)), {}, "max_batch must rise"),
        (by_batch((4, None, TIERS), (2, None, TIERS), (None, None, TIERS)), {}, "max_batch must rise"),
        (
            by_batch((4, 8, TIERS), (None, None, TIERS), (4, None, TIERS), (None, None, TIERS)),
            {},
            "max_batch must rise",
        ),
        (by_batch((4, 8, TIERS), (None, None, TIERS)), {}, "row of one max_batch, and be null in the last one alone"),
        (by_batch((4, None, TIERS), (None, 9, TIERS), (None, 8, TIERS)), {}, "must rise from row to row of one max_b"),
        (plan((None, TIERS.model_copy(update={"drafter": "lookup"}))), {}, "drafter 'lookup' is not that of decoding"),
        (plan((None, TIERS)), {"decoding": Decoding(drafter="lookup")}, "drafter None is not that of decoding.drafter"),
        (plan((None, SLIM.model_copy(update={"accept_at": 1.01}))), {}, "'slim' needs a slim verifier that may decide"),
        (plan((None, NOTHING.model_copy(update={"accept_at": 0.5}))), {}, "'none' needs a slim verifier that never"),
        (
            plan((None, SPECULATIVE)),
            {"gates": Gates(slim=constant_gate("slim_margin", 0.0), accept_at=0.4, regenerate_at=0.4)},
            "need a draft gate",
        ),
        (
            plan((None, NOTHING)),
            {"gates": Gates(convention="ratio", accept_at=0.9, escalate_below=0.5)},
            "its bounds are of calibrated gates",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    tiny_folder: TinyFolder, tmp_path: Path, rows: list[PlanEntry], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        RoutingSpec(**document(tiny_folder, tmp_path, rows, **changes))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_a_text(size: int) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        PlanEntry(max_context=None, max_batch=size, policy=TIERS)


def test_a_spec_keeps_its_plan(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    rows = by_batch((8, 64, TIERS), (8, None, NOTHING), (None, None, NOTHING))
    spec = RoutingSpec(**document(tiny_folder, tmp_path, rows))
    save_spec(spec, tmp_path / "routing.json")
    assert load_spec(tmp_path / "routing.json").plan == rows
    assert spec_problems(tmp_path / "routing.json") == []
    assert policy_digest(spec) == policy_digest(spec.model_copy(update={"plan": None}))
