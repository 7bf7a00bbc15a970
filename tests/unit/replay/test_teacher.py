"""q's keys and values are those of the text, remembered or read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rounding import assert_near
from tests.tiny import TinyFolder, tiny_model
from viasd_calib.errors import TraceError
from viasd_calib.models import load_verifier
from viasd_calib.replay import teacher
from viasd_calib.replay.teacher import KnownCaches, read_text
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.data import TraceDataModule


def test_traces_of_other_weights_teach_nothing(tiny_folder: TinyFolder, traces: Path) -> None:
    trainer: Any = SimpleNamespace(datamodule=TraceDataModule([str(traces)]))
    own = load_verifier(str(tiny_folder)).ref
    teacher.refuse_foreign_traces(trainer, own)
    teacher.refuse_foreign_traces(trainer, own.model_copy(update={"weights_sha256": None, "dtype": "bfloat16"}))
    tuned = own.model_copy(update={"name_or_path": "tuned", "weights_sha256": "0" * 64})
    with pytest.raises(TraceError, match=rf"of {tiny_folder}, and tuned has other weights; give the verifier"):
        teacher.refuse_foreign_traces(trainer, tuned)
    with pytest.raises(TraceError, match="has a model of another shape"):
        teacher.refuse_foreign_traces(trainer, tuned.model_copy(update={"config_sha256": "0" * 64}))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes that q reads from here on."""
    read: list[int] = []

    def counted(verifier: RoutedModel, ids: Tensor) -> object:
        read.append(len(ids))
        return read_text(verifier, ids)

    monkeypatch.setattr(teacher, "read_text", counted)
    return read


def test_texts_are_read_once_and_remembered_for_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RoutedModel(tiny_model())
    model.token_shift_ends = [3]
    ids = torch.randint(24, (3, 9))
    read = count_reads(monkeypatch)
    caches = KnownCaches(model, limit=1e9)
    caches.of([0, 1], ids[:2])
    caches.of([2], ids[2:, :7])  # a shorter text
    for indices, length in (([1, 0], 9), ([2, 0], 9), ([1, 2], 7)):  # padded, and cut to another batch's length
        found, (_, wanted) = caches.of(indices, ids[indices, :length]), read_text(model, ids[indices, :length])
        assert_near(found.keys[:, :, :, :7], wanted.keys[:, :, :, :7])
        assert_near(found.values[:, :, :, :7], wanted.values[:, :, :, :7])
        assert_near(found.shift_states[:, :, :7], wanted.shift_states[:, :, :7])
        assert found.capacity == length
    assert read == [2, 1]


def test_what_finds_no_room_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RoutedModel(tiny_model())
    ids = torch.randint(24, (2, 9))
    _, one = read_text(model, ids[:1])
    read = count_reads(monkeypatch)
    caches = KnownCaches(model, limit=one.keys.nbytes + one.values.nbytes)
    for _ in range(2):
        caches.of([0], ids[:1])
        caches.of([1], ids[1:])
    assert read == [1, 1, 1]  # the second text each time
