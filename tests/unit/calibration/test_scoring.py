"""What the gates are fitted on is what they will see: q' as it runs, with its own output head."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import LAYERS, VOCAB, make_drafter, tiny_prompts
from viasd_calib.calibration.gate_fitting import fit_gates
from viasd_calib.calibration.scoring import score_texts
from viasd_calib.decoding.features import slim_features
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.top_k import top_k_of
from viasd_calib.models import Verifier
from viasd_calib.replay.student import run_starts
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import RoundedWeight, widened_weights
from viasd_calib.slim.parts.head_vocab import share_outside
from viasd_calib.spec import LowBitWeights, Route
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.data import TraceText, read_texts
from viasd_calib.traces.folder import CaptureSettings


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


@torch.inference_mode()
def decoded(model: RoutedModel, text: TraceText, starts: list[int]) -> Tensor:
    """Logits of q' at the places where q wrote, as a decoder makes them: q up to a run, then a pass of q' over it."""
    begin, length = text.prompt_length - 1, len(text.ids) - 1
    ids, found = text.ids[None, :-1], []
    bounds = [*sorted({max(start, begin) for start in starts[begin:]}), length]
    for first, after in itertools.pairwise(bounds):
        cache = model.new_cache(length)
        if first:
            model.full(ids[:, :first], CacheWindow(cache, 0, first, first))
        states = model.slim(ids[:, first:after], CacheWindow(cache, first, after - first, after))
        found.append(model.slim_logits(states.last)[0])
    return torch.cat(found)


def seen(text: TraceText, logits: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """Features of q's slim choices where nothing was drafted, of such logits and runs."""
    begin, length = text.prompt_length - 1, len(text.ids) - 1
    top = top_k_of(logit_statistics(logits, torch.zeros(len(logits), dtype=torch.long)), logits, 1)
    pending = torch.arange(begin, length) - starts[begin:].clamp(min=begin)
    return slim_features(torch.zeros_like(top.entropy), logits, top, None, torch.zeros_like(pending), pending)


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
        starts = run_starts(len(text.ids) - 1, 4, generator)
        wanted = seen(text, decoded(model, text, starts.tolist()), starts)
        others = seen(text, decoded(model, text, [*range(len(starts))]), starts)
        assert torch.equal(one.own_alone.features["pending"], wanted["pending"])
        off += [float((column - wanted[name]).abs().max()) for name, column in one.own_alone.features.items()]
        at_other_runs += [float((others[name] - column).abs().max()) for name, column in wanted.items()]
    assert max(off) < max(at_other_runs) / 20


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
