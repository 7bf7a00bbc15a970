"""Counting how often proposals are the verifier's choice."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from tests.tiny import make_drafter, tiny_prompts
from viasd_calib.cli.capture import agreement_table
from viasd_calib.models import Verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.agreement import DraftAgreement, draft_agreement
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.folder import CaptureSettings
from viasd_calib.traces.texts import read_texts


def test_shares_are_those_of_the_texts(tiny_verifier: Verifier, tmp_path: Path) -> None:
    """Against the texts as training reads them, one place after the other, over several shards."""
    drafter = make_drafter("near", RoutedModel(tiny_verifier.model))
    settings = CaptureSettings(max_new_tokens=24, batch_size=4, top_k=3)
    capture_traces(tiny_verifier, drafter, "near", tiny_prompts(10), tmp_path, settings)
    found = draft_agreement(tmp_path)
    counted: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for text in read_texts(tmp_path):
        for token, depth, choice in zip(text.p_token, text.p_depth, text.q_ids[:, 0], strict=True):
            counted[text.task, int(depth)].append(bool(token == choice))
    assert len(counted) > 1
    for (task, depth), right in counted.items():
        assert found.share(task, depth) == pytest.approx(sum(right) / len(right))
    everything = [one for (_, depth), right in counted.items() if depth == 0 for one in right]
    assert found.share(None, 0) == pytest.approx(sum(everything) / len(everything))
    assert 0 < sum(everything) < len(everything)


def test_a_table_has_a_row_for_each_task_and_one_for_all() -> None:
    found = DraftAgreement()
    found.add("qa", [1, 2], [0, 1], [1, 3])
    found.add("coding", [1], [0], [2])
    table = agreement_table(found)
    columns = [list(column.cells) for column in table.columns]
    assert columns == [["coding", "qa", "all"], ["0.000", "1.000", "0.500"], ["-", "0.000", "0.000"]]
