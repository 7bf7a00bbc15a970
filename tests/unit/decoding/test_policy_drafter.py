"""What three tiers draft with in the draft model's place: the text stays q's, and no draft model is loaded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import viasd_calib
from tests.tiny import TinyFolder, constant_gate, save_tiny
from viasd_calib.decoding.engine import Engine, load_engine, watched_spec
from viasd_calib.decoding.planned import Planned
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.build import policy_drafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.errors import MethodError, ModelError
from viasd_calib.models import load_verifier
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    Decoding,
    DraftSpec,
    Gates,
    PlanEntry,
    PlannedPolicy,
    PolicyDrafter,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    load_spec,
    save_spec,
)

PROMPTS = [[5, 9, 5, 9, 5], [7, 8, 9, 10, 7, 8], [1, 20, 3]]
GATES = Gates(
    draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0), accept_at=0.4, regenerate_at=0.4
)


def write(tiny_folder: TinyFolder, folder: Path, drafter: PolicyDrafter | None, **entries: Any) -> Path:
    """A spec whose draft model is nowhere, with gates that let q' decide all."""
    document: dict[str, Any] = {
        "verifier": load_verifier(str(tiny_folder)).ref,
        "draft": CausalLMDraft(name_or_path=str(folder / "draft")),
        "route": Route(attention_skip=[1], mlp_skip=[2]),
        "gates": GATES,
        "decoding": Decoding(draft_length=3, max_pending=9, drafter=drafter),
    }
    folder.mkdir(exist_ok=True)
    save_spec(RoutingSpec(**{**document, **entries}), folder / "routing.json")
    return folder / "routing.json"


def texts(engine: Engine, method: str, **options: Any) -> list[list[int]]:
    return [engine.decoder(method, **options).generate(one, max_new_tokens=30).tokens for one in PROMPTS]


def test_when_drafting_pays_may_be_said_in_place_of_the_spec(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """In the place of each row of its plan, too."""
    decoding = Decoding(draft_length=3, max_pending=9, drafter="lookup", drafting_pays_at=0.5)
    rows = [PlanEntry(max_context=None, policy=PlannedPolicy(drafter="lookup", draft_length=3, max_pending=9))]
    engine = load_engine(write(tiny_folder, tmp_path / "own", "lookup", decoding=decoding), methods=["three_tier"])
    planned = load_engine(
        write(tiny_folder, tmp_path / "planned", "lookup", decoding=decoding, plan=rows), methods=["three_tier"]
    )

    def bound(made_by: Engine, pays_at: float | None = None) -> float | None:
        strategy = made_by.decoder(drafting_pays_at=pays_at).strategy
        found = strategy.at(20) if isinstance(strategy, Planned) else strategy
        assert isinstance(found, ThreeTier)
        return found.drafting_pays_at

    assert [bound(engine), bound(engine, 0.3), bound(engine, 0)] == [0.5, 0.3, None]
    assert [bound(planned), bound(planned, 0.3)] == [None, 0.3]
    with pytest.raises(MethodError, match="give a share"):
        engine.decoder(drafting_pays_at=1.5)


def test_a_certificate_is_not_of_another_share(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    spec = load_spec(write(tiny_folder, tmp_path / "spec", "lookup"))
    with pytest.raises(MethodError, match="certificate"):
        watched_spec(spec, 0.5, certified=True)
    assert watched_spec(spec, 0, certified=True).decoding == spec.decoding


@pytest.mark.parametrize("drafter", ["slim", "lookup"])
def test_a_strict_text_is_the_autoregressive_one(
    tiny_folder: TinyFolder, tmp_path: Path, drafter: PolicyDrafter
) -> None:
    """Alone and in a batch; the draft model, which is nowhere, is not asked for."""
    path = write(tiny_folder, tmp_path / "spec", drafter)
    engine = load_engine(path, methods=["three_tier", "autoregressive"])
    wanted = texts(engine, "autoregressive")
    assert texts(engine, "three_tier") == wanted
    batch = engine.decoder("three_tier").generate_batch(PROMPTS, 30)
    assert [one.tokens for one in batch] == wanted
    assert sum(one.counts.slim_passes for one in batch) > 0
    assert sum(one.counts.full_passes for one in batch) < sum(map(len, wanted))
    drafted = sum(sum(one.drafted) for one in batch)
    assert (drafted > 0, sum(one.counts.draft_steps for one in batch) > 0) == (drafter == "lookup",) * 2


def test_no_draft_model_writes_as_the_slim_verifier_does(tmp_path: Path) -> None:
    """With q for q' nothing is refused: as many tokens wait as may, and one pass of q settles them."""
    endless = save_tiny(tmp_path / "endless", eos=None)
    path = write(endless, tmp_path / "spec", "slim", route=Route())
    generation = load_engine(path, methods=["three_tier"]).decoder().generate(PROMPTS[0], max_new_tokens=30)
    assert generation.counts.full_passes == 3, "each settles nine tokens and gives one"
    assert generation.counts.slim_passes == 27


def test_without_methods_the_draft_model_is_there_for_other_strategies(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    save_tiny(tmp_path / "draft", seed=4)
    path = write(tiny_folder, tmp_path, "slim")
    engine = load_engine(path)
    assert texts(engine, "speculative") == texts(engine, "three_tier") == texts(engine, "autoregressive")
    assert engine.decoder("speculative").drafter is engine.drafter
    assert engine.decoder("three_tier").drafter is None
    assert not isinstance(engine.drafter, PromptLookup)


def test_methods_that_need_the_draft_model_load_it(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    with_model, without = (write(tiny_folder, tmp_path / name, own) for name, own in (("a", None), ("b", "slim")))
    for path, methods in ((with_model, ["three_tier"]), (without, ["speculative"]), (without, None)):
        with pytest.raises(ModelError, match="draft"):
            load_engine(path, methods=methods)  # type: ignore[arg-type]
    load_engine(with_model, methods=["autoregressive", "self_speculative"])


def test_an_engine_refuses_what_it_was_not_loaded_for(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Else `speculative` would draft with something else than the spec says."""
    engine = load_engine(write(tiny_folder, tmp_path, "slim"), methods=["three_tier"])
    with pytest.raises(MethodError, match="loaded for three_tier; load one for speculative too"):
        engine.decoder("speculative")
    with pytest.raises(MethodError, match="there is no method 'guess'"):
        load_engine(tmp_path / "routing.json", methods=["guess"])


@pytest.mark.parametrize(
    ("draft", "ngrams"),
    [
        (CausalLMDraft(name_or_path="a"), (5, 3)),
        (
            CombinedDraft(lookup=PromptLookupDraft(max_ngram=6, min_ngram=2), model=CausalLMDraft(name_or_path="a")),
            (6, 2),
        ),
        (PromptLookupDraft(), (3, 1)),
    ],
)
def test_lookup_is_that_of_the_spec(draft: DraftSpec, ngrams: tuple[int, int]) -> None:
    own = PromptLookup()
    found = policy_drafter(draft, Decoding(drafter="lookup"), own)
    assert isinstance(found, PromptLookup)
    assert (found.max_ngram, found.min_ngram) == ngrams
    assert policy_drafter(draft, Decoding(), own) is own


def test_the_draft_gate_is_not_asked_of_another_drafter(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """It was fitted on the draft model's features; here it would trust all."""
    trusting = GATES.model_copy(update={"draft_accept_at": 0.1, "accept_at": 2.0, "regenerate_at": 2.0})
    path = write(tiny_folder, tmp_path, "lookup", gates=trusting)
    engine = load_engine(path, methods=["three_tier"])
    batch = engine.decoder().generate_batch(PROMPTS, 30)
    assert all(tier.name == "ESCALATE" for one in batch for tier in one.tiers)


NEVER = GATES.model_copy(update={"accept_at": 1.01, "regenerate_at": 1.01})


def test_nothing_is_drafted_at_no_cost(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """As many passes as autoregressive decoding takes, of q alone; the draft model, which is nowhere, is not asked."""
    engine = load_engine(write(tiny_folder, tmp_path, "none", gates=NEVER), methods=["three_tier", "autoregressive"])
    found, wanted = (engine.decoder(name).generate(PROMPTS[0], 30) for name in ("three_tier", "autoregressive"))
    assert found == wanted
    assert found.counts.full_passes == len(found.tokens)
    assert engine.decoder("three_tier").drafter is None


def test_nothing_is_drafted_where_the_slim_tier_decides_nothing_either(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'none' needs a slim verifier that never decides"):
        write(tiny_folder, tmp_path, "none")


def test_a_slim_tier_that_never_decides_drafts_nothing(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'slim' needs a slim verifier that may decide"):
        write(tiny_folder, tmp_path, "slim", gates=NEVER)
    write(tiny_folder, tmp_path, "lookup", gates=NEVER)


def test_earlier_specs_draft_with_their_draft_model(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    path = write(tiny_folder, tmp_path, None)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"drafter": null,', "").replace('"1.5"', '"1.3"'), encoding="utf-8")
    assert "drafter" not in path.read_text(encoding="utf-8")
    assert load_spec(path).decoding.drafter is None


def test_transformers_generate_needs_no_draft_model_either(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    path = write(tiny_folder, tmp_path, "slim")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = torch.tensor([PROMPTS[1]])
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 16}
    plain = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, custom_generate=viasd_calib.generate, viasd_spec=path), plain)
    engine = load_engine(path, methods=["three_tier"], load=lambda *_, **__: load_with(model, tiny_folder))
    assert torch.equal(model.generate(ids, **settings, custom_generate=viasd_calib.generate, viasd_spec=engine), plain)


def load_with(model: Any, folder: TinyFolder) -> Any:
    loaded = load_verifier(str(folder))
    object.__setattr__(loaded, "model", model)
    return loaded
