"""A folder keeps what is right of it when the prompts change; readers see exactly what is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_prompts
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.errors import PromptError, TraceError
from viasd_calib.file_names import MANIFEST
from viasd_calib.models import Verifier
from viasd_calib.prompts import Prompt
from viasd_calib.traces.agreement import draft_agreement
from viasd_calib.traces.capture import CaptureReport, capture_traces
from viasd_calib.traces.folder import CaptureSettings, read_manifest, read_rows
from viasd_calib.traces.texts import read_texts

PROMPTS = tiny_prompts(10, turns=2)
CHANGED = PROMPTS[4].model_copy(update={"turns": ["w9 w8 w7"]})


def run(verifier: Verifier, folder: Path, prompts: Sequence[Prompt], **changes: Any) -> CaptureReport:
    settings = CaptureSettings(max_new_tokens=8, batch_size=3, top_k=4).model_copy(update=changes)
    return capture_traces(verifier, PromptLookup(), "prompt_lookup", prompts, folder, settings)


def shards_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.parquet")}


@pytest.mark.parametrize("seed", [None, 3])
def test_after_one_prompt_has_changed_the_others_are_kept(
    tiny_verifier: Verifier, tmp_path: Path, seed: int | None
) -> None:
    drawn: dict[str, Any] = {} if seed is None else {"temperature": 1.0, "seed": seed}
    first = run(tiny_verifier, tmp_path / "traces", PROMPTS, **drawn)
    assert (first.asked, first.kept) == (10, 0)
    before = shards_of(tmp_path / "traces")
    changed = [*PROMPTS[:4], CHANGED, *PROMPTS[5:]]
    report = run(tiny_verifier, tmp_path / "traces", changed, **drawn)
    assert (report.asked, report.kept) == (10, 9)
    after = shards_of(tmp_path / "traces")
    assert before.items() < after.items()
    assert len(after) == len(before) + 1
    fresh = run(tiny_verifier, tmp_path / "fresh", changed, **drawn)
    columns = ["prompt_id", "prompt_sha256", "turn", "prompt_tokens", "tokens", "q_ids", "p_token", "p_depth"]
    own, expected = (read_rows(tmp_path / name, columns) for name in ("traces", "fresh"))
    assert own == expected  # the rest is rounded as the batch has it
    assert (report.texts, report.tokens) == (fresh.texts, fresh.tokens)
    found, fresh_found = draft_agreement(tmp_path / "traces"), draft_agreement(tmp_path / "fresh")
    for depth in range(6):
        assert found.share(None, depth) == fresh_found.share(None, depth)


def test_prompts_that_are_left_out_are_read_no_more_and_are_there_when_they_come_back(
    tiny_verifier: Verifier, tmp_path: Path
) -> None:
    run(tiny_verifier, tmp_path, PROMPTS)
    whole, before = read_rows(tmp_path), shards_of(tmp_path)
    report = run(tiny_verifier, tmp_path, PROMPTS[3:])
    assert (report.asked, report.kept) == (7, 7)
    ids = {prompt.id for prompt in PROMPTS[3:]}
    assert read_rows(tmp_path) == [row for row in whole if row["prompt_id"] in ids]
    assert {text.prompt_id for text in read_texts(tmp_path)} == ids
    assert run(tiny_verifier, tmp_path, PROMPTS).kept == 10
    assert read_rows(tmp_path) == whole
    assert shards_of(tmp_path) == before


def test_a_prompt_of_another_id_and_task_is_the_same_text(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path, PROMPTS)
    named = [prompt.model_copy(update={"id": f"new/{prompt.id}", "task": "new"}) for prompt in PROMPTS]
    assert run(tiny_verifier, tmp_path, named).kept == 10
    assert {(row["prompt_id"], row["task"]) for row in read_rows(tmp_path)} == {(one.id, "new") for one in named}
    assert draft_agreement(tmp_path).tasks == ["new"]


def test_the_same_text_under_two_ids_is_answered_once_and_read_twice(tiny_verifier: Verifier, tmp_path: Path) -> None:
    twin = PROMPTS[0].model_copy(update={"id": "twin"})
    report = run(tiny_verifier, tmp_path, [PROMPTS[0], twin, PROMPTS[1]])
    assert (report.asked, report.kept) == (2, 0)
    texts = {text.prompt_id: text for text in read_texts(tmp_path) if text.turn == 0}
    assert texts.keys() == {PROMPTS[0].id, "twin", PROMPTS[1].id}
    assert texts["twin"].ids.tolist() == texts[PROMPTS[0].id].ids.tolist()


def test_a_smaller_batch_goes_on_where_a_larger_one_began(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path, PROMPTS[:5])
    assert run(tiny_verifier, tmp_path, PROMPTS, batch_size=1).kept == 5
    assert read_manifest(tmp_path).settings.batch_size == 1
    with pytest.raises(TraceError, match="made with another settings"):
        run(tiny_verifier, tmp_path, PROMPTS, max_new_tokens=9)


def test_a_prompt_that_does_not_fit_is_met_before_any_other_is_answered(
    tiny_verifier: Verifier, tmp_path: Path
) -> None:
    long = [Prompt(id=name, turns=["w1 " * 250]) for name in ("long", "too")]
    with pytest.raises(PromptError, match="2 of 12 prompts cannot be answered"):
        run(tiny_verifier, tmp_path, [*PROMPTS, *long])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def old_folder(tiny_verifier: Verifier, tmp_path: Path) -> Path:
    """A folder as earlier releases left it: numbered shards, and a manifest that does not name what is asked."""
    run(tiny_verifier, tmp_path, PROMPTS)
    for number, path in enumerate(sorted(shards_of(tmp_path))):
        path.rename(tmp_path / f"shard-{number:05d}.parquet")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["asked"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


def test_folders_of_earlier_releases_are_read(old_folder: Path) -> None:
    texts = read_texts(old_folder)
    assert sorted((text.prompt_id, text.turn) for text in texts) == sorted(
        (prompt.id, turn) for prompt in PROMPTS for turn in range(len(prompt.turns))
    )
    assert draft_agreement(old_folder).tasks == sorted({prompt.task for prompt in PROMPTS})


def test_folders_of_earlier_releases_go_on(tiny_verifier: Verifier, old_folder: Path) -> None:
    assert run(tiny_verifier, old_folder, [*PROMPTS[:4], CHANGED, *PROMPTS[5:]]).kept == 9
    assert len(shards_of(old_folder)) == 5
