"""What the gates are fitted on is what they will see: q' as it runs, with its own output head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import VOCAB, make_drafter, tiny_prompts
from viasd_calib.calibration.scoring import score_texts
from viasd_calib.models import Verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.head_vocab import share_outside
from viasd_calib.spec import Route
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
