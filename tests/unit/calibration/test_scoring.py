"""What the gates are fitted on is what they will see: q' as it runs, with its own output head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rounding import assert_near
from tests.tiny import LAYERS, VOCAB, make_drafter, random_bridges, random_gate, tiny_prompts, tiny_texts
from viasd_calib.calibration.candidates import tier_scores
from viasd_calib.calibration.gate_fitting import fit_gates
from viasd_calib.calibration.scoring import ScoredText, at_once, join, run_by_run, score_texts
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.slim_rules.calibrated import CalibratedRule
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.decoding.top_k import top_k_of
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.errors import TraceError
from viasd_calib.models import Verifier
from viasd_calib.replay.blocks import block_runs, replay_blocks
from viasd_calib.replay.student import run_starts
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import RoundedWeight, widened_weights
from viasd_calib.slim.parts.head_vocab import share_outside
from viasd_calib.spec import LogisticGate, LowBitWeights, Route
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.folder import CaptureSettings
from viasd_calib.traces.texts import TraceText, read_texts


@pytest.fixture
def texts(tiny_verifier: Verifier, tmp_path: Path) -> list[TraceText]:
    drafter = make_drafter("near", RoutedModel(tiny_verifier.model))
    capture_traces(tiny_verifier, drafter, "near", tiny_prompts(6), tmp_path, CaptureSettings(max_new_tokens=16))
    return read_texts(tmp_path)


def test_a_reduced_head_loses_what_lies_outside_it(tiny_verifier: Verifier, texts: list[TraceText]) -> None:
    """A q' that is q agrees wherever it can say q's token, and nowhere else; every feature is finite."""
    ids = torch.arange(0, VOCAB, 2)
    lost = share_outside(ids, texts)
    assert 0 < lost < 1
    for head_ids, agreement in ((None, 1.0), (ids, 1 - lost)):
        model = RoutedModel(tiny_verifier.model, Route(), held={"head_vocab": head_ids})
        scored = list(score_texts(model, texts, max_run=4))
        agrees = torch.cat([one.own.agrees for one in scored])
        assert float(agrees.float().mean()) == pytest.approx(agreement)
        for one in scored:
            for tokens in (one.accept, one.own, one.own_alone):
                assert all(column.isfinite().all() for column in tokens.features.values())


def scored_with(verifier: Verifier, drafter: Drafter, folder: Path, count: int = 12) -> list[ScoredText]:
    """Traces with a drafter, as the gates see them; q' is q."""
    capture_traces(verifier, drafter, "it", tiny_prompts(count), folder, CaptureSettings(max_new_tokens=24))
    return list(score_texts(RoutedModel(verifier.model, Route()), read_texts(folder), max_run=16))


def test_the_draft_gate_is_asked_only_where_there_is_a_proposal(tiny_verifier: Verifier, tmp_path: Path) -> None:
    """Lookup without a match proposes nothing, and is no proposal that disagrees."""
    drafter = PromptLookup(max_ngram=3, min_ngram=2)
    texts = scored_with(tiny_verifier, drafter, tmp_path)
    traced = read_texts(tmp_path)
    missing = sum(int((text.p_token < 0).sum()) for text in traced)
    asked = sum(len(one.draft_candidates().agrees) for one in texts)
    assert missing > 0
    assert 0 < asked <= sum(int((text.p_token >= 0).sum()) for text in traced)
    for one, text in zip(texts, traced, strict=True):
        assert not (one.blocks.drafted & (text.p_token < 0)).any()
        assert one.slim_candidates().features["has_draft"].sum() >= one.blocks.drafted.sum()


@pytest.mark.parametrize("kind", ["lookup", "itself", "lookup+itself"])
def test_candidates_stand_where_decoding_asks_for_them(tiny_verifier: Verifier, tmp_path: Path, kind: str) -> None:
    """At least as many tokens are pending as stand before a candidate in its block, and q's slim choice is there for
    the place after a block, whose place is the block's length."""
    texts = scored_with(tiny_verifier, make_drafter(kind, RoutedModel(tiny_verifier.model)), tmp_path)
    candidates = [one.slim_candidates() for one in texts]
    features = join(candidates).features
    assert (features["pending"] >= features["block_place"]).all()
    alone = features["has_draft"] == 0
    assert features["block_place"][alone].max() > 0
    assert (features["same_choice"][alone] == 0).all()
    agreed = (features["has_draft"] == 1) & (features["same_choice"] == 1)
    drafted = sum(int(one.blocks.drafted.sum()) for one in texts)
    others = sum(int((one.own.features["same_choice"][one.blocks.drafted] == 0).sum()) for one in texts)
    assert int((~alone).sum()) == drafted + others  # one candidate where p and q' agree
    assert int(agreed.sum()) == drafted - others


def test_no_tier_takes_a_token_that_was_not_proposed(tiny_verifier: Verifier, tmp_path: Path) -> None:
    """Candidate thresholds are proposed over all places: where lookup has no match q' is asked alone, as it decodes."""
    texts = scored_with(tiny_verifier, PromptLookup(max_ngram=3, min_ngram=2), tmp_path)
    draft, slim = random_gate(DRAFT_FEATURES, 0), random_gate(SLIM_FEATURES, 1)
    scores = tier_scores(draft, slim, texts)
    proposed = torch.cat([one.proposed for one in texts])
    alone = Gate(slim)(join([one.own_alone for one in texts]).features)
    assert 0 < int(proposed.sum()) < len(proposed) == len(scores.own)
    assert scores.draft[~proposed].max() == scores.accept[~proposed].max() == 0
    assert (scores.draft[proposed] > 0).all()
    assert not scores.draft_agrees[~proposed].any()
    assert torch.equal(scores.own[~proposed], alone[~proposed])


class AskedGate(Gate):
    """A gate that notes what it is asked."""

    def __init__(self, spec: LogisticGate) -> None:
        super().__init__(spec)
        self.asked: list[Tensor] = []

    def of_stacked(self, stacked: Tensor) -> Tensor:
        self.asked.append(stacked)
        return super().of_stacked(stacked)


def test_the_decoder_asks_at_such_places(tiny_verifier: Verifier) -> None:
    """What the replay's candidates have in common holds for what the decoder asks: else gates are fitted elsewhere."""
    model = RoutedModel(tiny_verifier.model, Route())
    gate = AskedGate(random_gate(SLIM_FEATURES, 3, bias=4.0))
    rule = CalibratedRule(gate, accept_at=0.5, regenerate_at=0.5)
    strategy = ThreeTier(rule, draft_length=4, max_pending=12)
    decoder = Decoder(model, make_drafter("lookup+near", model), strategy, eos_ids=frozenset())
    for prompt in ([3, 4, 5], [6, 7, 6, 7]):
        decoder.generate(prompt, 40)
    place, pending, drafted = (
        torch.cat([rows[:, gate.names.index(name)] for rows in gate.asked])
        for name in ("block_place", "pending", "has_draft")
    )
    assert (pending >= place).all()
    assert (place[drafted == 0] > 0).any()
    assert pending.max() > place.max()


@torch.inference_mode()
def decoded(model: RoutedModel, text: TraceText, starts: list[int]) -> Tensor:
    """Logits of q' at the places where q wrote, as a decoder makes them: q up to a run, then a pass of q' over it."""
    begin, length = text.prompt_length - 1, len(text.ids) - 1
    ids, found = text.ids[None, :-1], []
    bounds = [*sorted({begin + start for start in starts}), length]
    for first, after in itertools.pairwise(bounds):
        cache = model.new_cache(length)
        if first:
            model.full(ids[:, :first], CacheWindow(cache, 0, first, first))
        states = model.slim(ids[:, first:after], CacheWindow(cache, first, after - first, after))
        found.append(model.slim_logits(states.last)[0])
    return torch.cat(found)


def seen(text: TraceText, logits: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """Features of q's slim choices where nothing was drafted, of such logits and runs ([n])."""
    top = top_k_of(logit_statistics(logits, torch.zeros(len(logits), dtype=torch.long)), logits, 1)
    place = replay_blocks(text.p_token, text.generated, text.p_depth, starts).block_place
    pending = torch.arange(len(starts)) - starts
    return slim_features(torch.zeros_like(top.entropy), logits, top, None, place, pending)


@pytest.mark.parametrize("bits", [8, 4])
def test_gates_are_fitted_on_the_numbers_of_the_decoder(
    tiny_verifier: Verifier, texts: list[TraceText], bits: int
) -> None:
    """Of low bits too, whose weights are held while texts are scored. The decoder's passes are narrower, and an input
    near a tie is then rounded otherwise: by less than what one pending token makes of the logits, by far."""
    layers = [*range(LAYERS)]
    low = LowBitWeights.model_validate({"attention": {str(bits): layers}, "mlp": {str(bits): layers}, "head": bits})
    model = RoutedModel(tiny_verifier.model, Route(), held={"low_bit": low})
    with widened_weights(model.slim_networks):
        scored = list(score_texts(model, texts, max_run=4))
    generator = torch.Generator().manual_seed(0)
    off, at_other_runs = [0.0], [0.0]
    for text, one in zip(texts, scored, strict=True):
        starts = block_runs(text.p_depth, 4, generator)
        wanted = seen(text, decoded(model, text, starts.tolist()), starts)
        others = seen(text, decoded(model, text, [*range(len(starts))]), starts)
        assert torch.equal(one.own_alone.features["pending"], wanted["pending"])
        off += [float((column - wanted[name]).abs().max()) for name, column in one.own_alone.features.items()]
        at_other_runs += [float((others[name] - column).abs().max()) for name, column in wanted.items()]
    assert max(off) < max(at_other_runs) / 20


def test_gates_are_assessed_on_prompts_they_were_not_fitted_on(
    tiny_verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a data module gives its last text for both, and where two prompts ask the same."""
    drafter = make_drafter("near", RoutedModel(tiny_verifier.model))
    capture_traces(tiny_verifier, drafter, "near", tiny_prompts(8), tmp_path, CaptureSettings(max_new_tokens=16))
    texts = read_texts(tmp_path)
    seen: list[list[str]] = []

    def noted(model: RoutedModel, some: list[TraceText], max_run: int, **how: Any) -> Iterator[ScoredText]:
        seen.append([text.prompt_sha256 for text in some])
        return score_texts(model, some, max_run, **how)

    monkeypatch.setattr("viasd_calib.calibration.gate_fitting.score_texts", noted)
    model = RoutedModel(tiny_verifier.model, Route())
    found = fit_gates(model, texts, texts[-2:], 8)
    fitted_on, assessed_on = seen
    assert assessed_on == [text.prompt_sha256 for text in texts[-2:]]
    assert set(fitted_on).isdisjoint(assessed_on)
    assert len(fitted_on) == len(texts) - 2
    for gate in (found.draft, found.slim):
        assert gate.reliability.overall is not None
        assert gate.reliability.overall.prompts <= 2
        assert sum(one.candidates for one in gate.reliability.by_task.values()) == gate.reliability.overall.candidates
        assert sum(one.candidates for one in gate.reliability.by_place.values()) == gate.reliability.overall.candidates
    with pytest.raises(TraceError, match="all 2 texts are of prompts that are held back"):
        fit_gates(model, texts[-2:], texts[-2:], 8)


@pytest.mark.parametrize("parts", ["skips", "carry"])
def test_a_pass_a_run_gives_what_one_forward_over_all_runs_gives(tiny_verifier: Verifier, parts: str) -> None:
    """The widths of the passes differ, so that numbers agree within rounding; other runs differ by far more."""
    route = Route(attention_skip=[1], mlp_skip=[1, 2])
    model = RoutedModel(tiny_verifier.model, route, {"bridges": random_bridges(route)} if parts == "carry" else {})
    for text in tiny_texts(3, model=RoutedModel(tiny_verifier.model)):
        starts = run_starts(len(text.ids) - 1, 6, torch.Generator().manual_seed(0))
        assert_near(run_by_run(model, text, starts), at_once(model, text, starts))
        others = at_once(model, text, torch.arange(len(starts)))
        assert float((others - at_once(model, text, starts)).abs().max()) > 0.01


def test_weights_are_widened_once_for_all_texts(
    tiny_verifier: Verifier, texts: list[TraceText], monkeypatch: pytest.MonkeyPatch
) -> None:
    widened: list[torch.Size] = []
    plain = RoundedWeight.plain

    def counted(weight: RoundedWeight) -> Tensor:
        widened.append(weight.codes.shape)
        return plain(weight)

    monkeypatch.setattr(RoundedWeight, "plain", counted)
    low = LowBitWeights.model_validate({"mlp": {"8": [1, 2]}})
    model = RoutedModel(tiny_verifier.model, Route(), held={"low_bit": low})
    fit_gates(model, texts[:3], texts[3:], 4)
    assert len(widened) == 6
