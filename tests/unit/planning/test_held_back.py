"""A replay reads the texts that a fit held back as it would read the traces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import TinyFolder, tiny_traces
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import HELD_BACK_FILE
from viasd_calib.planning import held_back
from viasd_calib.planning.held_back import load_held_back, save_held_back
from viasd_calib.traces.texts import TraceText, read_texts


@pytest.fixture(scope="module")
def texts(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> list[TraceText]:
    """Traced ones, in the order of their prompts' hashes."""
    folder = tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 5, max_new_tokens=6)
    return sorted(read_texts(folder), key=lambda text: (text.prompt_sha256, text.turn))


def test_texts_are_read_back(texts: list[TraceText], tmp_path: Path) -> None:
    save_held_back(texts[::-1], 6, tmp_path)
    found = load_held_back(tmp_path)
    assert [limit for _, limit in found] == [6] * len(texts)
    for (one, _), text in zip(found, texts, strict=True):
        assert torch.equal(one.ids, text.ids)
        assert one.prompt_length == text.prompt_length
        assert torch.equal(one.q_ids[:, 0], text.q_ids[:, 0])


def test_no_more_than_a_replay_needs_is_kept(
    texts: list[TraceText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_back, "MOST_TOKENS", len(texts[0].generated) + len(texts[1].generated))
    save_held_back(texts, 6, tmp_path)
    assert [one.prompt_length for one, _ in load_held_back(tmp_path)] == [one.prompt_length for one in texts[:2]]


def test_a_fit_of_an_earlier_release_is_to_be_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="fits of earlier releases have none: run viasd fit again"):
        load_held_back(tmp_path)


def test_a_damaged_file_is_refused(texts: list[TraceText], tmp_path: Path) -> None:
    save_held_back(texts, 6, tmp_path)
    whole = (tmp_path / HELD_BACK_FILE).read_bytes()
    (tmp_path / HELD_BACK_FILE).write_bytes(whole[:-9])
    with pytest.raises(CalibrationError, match="is damaged; run viasd fit again"):
        load_held_back(tmp_path)
