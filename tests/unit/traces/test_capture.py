from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from tests.tiny import (
    VOCAB,
    RandomDrafter,
    TinyFolder,
    save_tiny,
    small_disk,
    spoil,
    tiny_model,
    tiny_prompts,
    tiny_shallow,
)
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.shallow import ShallowDrafter
from viasd_calib.errors import NumericsError, PromptError, StorageError, TraceError
from viasd_calib.file_names import MANIFEST
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.prompts import Prompt
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.capture import CaptureReport, capture_traces, random_depths
from viasd_calib.traces.folder import CaptureSettings, read_manifest, read_rows

SETTINGS = CaptureSettings(max_new_tokens=12, batch_size=3, top_k=4)
PROMPTS = tiny_prompts(10, turns=2)


def run(
    verifier: Verifier,
    folder: Path,
    prompts: Sequence[Prompt] = PROMPTS,
    drafter: Drafter | None = None,
    **changes: Any,
) -> CaptureReport:
    settings = SETTINGS.model_copy(update=changes)
    return capture_traces(verifier, drafter, "none" if drafter is None else "drafter", prompts, folder, settings)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


def turns_of(prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
    return sorted((prompt.id, turn) for prompt in prompts for turn in range(len(prompt.turns)))


def test_every_turn_of_every_prompt_is_traced_once(tiny_verifier: Verifier, tmp_path: Path) -> None:
    report = run(tiny_verifier, tmp_path)
    rows = read_rows(tmp_path)
    assert sorted((row["prompt_id"], row["turn"]) for row in rows) == turns_of(PROMPTS)
    assert report.texts == len(rows)
    assert report.tokens == sum(len(row["tokens"]) for row in rows)
    assert (report.asked, report.kept) == (len(PROMPTS), 0)
    by_id = {prompt.id: prompt for prompt in PROMPTS}
    assert all(row["prompt_sha256"] == by_id[row["prompt_id"]].sha256 for row in rows)
    assert all(row["task"] == by_id[row["prompt_id"]].task for row in rows)


def test_later_turns_follow_the_earlier_answers(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path)
    rows = {(row["prompt_id"], row["turn"]): row for row in read_rows(tmp_path)}
    two = [prompt for prompt in PROMPTS if len(prompt.turns) == 2]
    assert two
    for prompt in two:
        first, second = rows[prompt.id, 0], rows[prompt.id, 1]
        answer = str(tiny_verifier.tokenizer.decode(first["tokens"], skip_special_tokens=True))
        expected = tiny_verifier.encode_chat(
            [
                {"role": "user", "content": prompt.turns[0]},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": prompt.turns[1]},
            ]
        )
        assert second["prompt_tokens"] == expected


def test_greedy_traces_hold_the_choice_first(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path)
    for row in read_rows(tmp_path):
        count = len(row["tokens"])
        assert row["q_ids"][::4] == row["tokens"]
        assert len(row["q_ids"]) == len(row["q_log_probs"]) == 4 * count
        assert {len(row[f"q_{name}"]) for name in ("log_sum_exp", "entropy", "margin")} == {count}
        assert not any(row[name] for name in row if name.startswith("p_"))
        assert row["tokens"][-1] in tiny_verifier.eos_ids or count == SETTINGS.max_new_tokens


def test_numbers_are_stored_small(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path, drafter=RandomDrafter(VOCAB, 0))
    schema = pq.read_schema(shards_of(tmp_path)[0])
    for side in "qp":
        for name in ("log_probs", "entropy", "margin"):
            assert schema.field(f"{side}_{name}").type.value_type == pa.float16()
        assert schema.field(f"{side}_log_sum_exp").type.value_type == pa.float32()
        assert schema.field(f"{side}_ids").type.value_type == pa.int32()


def test_a_token_takes_at_most_400_bytes(tmp_path: Path) -> None:
    """The stated bound, with the stated top 16 of both sides, on texts of a usual length."""
    verifier = load_verifier(str(save_tiny(tmp_path / "model", vocab=64, eos=None)))
    drafter = CausalDrafter(RoutedModel(tiny_model(1, layers=2, vocab=64)), 64)
    settings = {"max_new_tokens": 192, "batch_size": 8, "top_k": 16}
    report = run(verifier, tmp_path / "traces", tiny_prompts(8), drafter, **settings)
    assert report.tokens == 8 * 192
    files = shards_of(tmp_path / "traces")
    assert report.bytes_per_token == pytest.approx(sum(path.stat().st_size for path in files) / report.tokens)
    assert report.bytes_per_token <= 400


@pytest.mark.parametrize("kind", ["lookup", "shallow", "causal", "lookup+shallow", "windows"])
def test_the_drafts_are_those_of_the_drafter(tiny_verifier: Verifier, tmp_path: Path, kind: str) -> None:
    routed = RoutedModel(tiny_verifier.model)
    drafters: dict[str, Drafter] = {
        "lookup": PromptLookup(),
        "shallow": ShallowDrafter(tiny_shallow(routed)),
        "causal": CausalDrafter(RoutedModel(tiny_model(1)), VOCAB),
        "lookup+shallow": CombinedDrafter(ShallowDrafter(tiny_shallow(routed)), VOCAB, max_ngram=3, min_ngram=1),
        "windows": CombinedDrafter(ShallowDrafter(tiny_shallow(routed), prompt_window=2), VOCAB, 3, 1),
    }
    drafter = drafters[kind]
    run(tiny_verifier, tmp_path, drafter=drafter)
    for row in read_rows(tmp_path):
        text = torch.tensor([*row["prompt_tokens"], *row["tokens"]])[:-1]
        begin, count = len(row["prompt_tokens"]) - 1, len(row["tokens"])
        with torch.inference_mode():
            window = CacheWindow(routed.new_cache(len(text)), 0, len(text), len(text))
            tapped = routed.full(text[None], window, drafter.taps).tapped[0]
            depth = torch.tensor([0] * begin + row["p_depth"])
            tokens, logits = drafter.score(text, tapped, depth, begin + 1)
        assert row["p_token"] == tokens[begin:].tolist()
        assert len(row["p_token"]) == len(row["p_depth"]) == count
        assert row["p_depth"][0] == 0  # q reads the prompt, so no block begins in it
        assert set(row["p_depth"]) <= set(range(CaptureSettings().draft_length))
        if logits is None:
            assert row["p_ids"] == row["p_entropy"] == []
        else:
            assert row["p_ids"][::4] == row["p_token"]
            assert len(row["p_entropy"]) == count


def test_depths_rise_from_nought_and_begin_anew() -> None:
    depths = random_depths(500, 4, seed=3).tolist()
    assert depths[0] == 0
    assert set(depths) == {0, 1, 2, 3}
    assert all(later in (0, earlier + 1) for earlier, later in itertools.pairwise(depths))
    assert random_depths(500, 4, seed=3).tolist() == depths != random_depths(500, 4, seed=4).tolist()


def test_shards_follow_from_the_prompts_alone(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path / "one")
    run(tiny_verifier, tmp_path / "other", PROMPTS[::-1])
    one, other = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "other"))
    assert one == other
    assert len(one) == 1 + 4  # of three prompts at most
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "other")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_hangs_on_no_other(tiny_verifier: Verifier, tmp_path: Path, temperature: float) -> None:
    """Not on its batch, not on what else is asked, not on what was captured before."""

    def drawn(folder: str) -> dict[tuple[str, int], Any]:
        rows = read_rows(tmp_path / folder)
        return {(row["prompt_id"], row["turn"]): (row["tokens"], row["p_depth"]) for row in rows}

    common: dict[str, Any] = {"drafter": PromptLookup(), "temperature": temperature, "seed": 3}
    run(tiny_verifier, tmp_path / "whole", **common)
    run(tiny_verifier, tmp_path / "together", **common, batch_size=10)
    run(tiny_verifier, tmp_path / "some", PROMPTS[::2], **common)
    assert drawn("together") == drawn("whole")
    assert drawn("some").items() < drawn("whole").items()


def test_sampled_traces_repeat_with_their_seed(tiny_verifier: Verifier, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(tiny_verifier, tmp_path / name, temperature=1.0, seed=seed)
    one, again, other = (read_rows(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert [row["tokens"] for row in one] != [row["tokens"] for row in other]


class FailingDrafter(RandomDrafter):
    """Is interrupted when it scores its ``allowed``-th text."""

    def __init__(self, allowed: int) -> None:
        super().__init__(VOCAB, 0)
        self.allowed = allowed

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, Tensor]:
        if self.allowed == 0:
            raise KeyboardInterrupt
        self.allowed -= 1
        return super().score(text, tapped, depth, prompt_length)


@pytest.mark.parametrize("texts", [0, 1, 5, 9, 14])
def test_an_interrupted_run_goes_on_where_it_stopped(tiny_verifier: Verifier, tmp_path: Path, texts: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny_verifier, whole, drafter=RandomDrafter(VOCAB, 0))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_verifier, broken, drafter=FailingDrafter(texts))
    left = len(shards_of(broken))
    report = run(tiny_verifier, broken, drafter=RandomDrafter(VOCAB, 0))
    assert report.kept == 3 * left
    assert [path.name for path in shards_of(broken)] == [path.name for path in shards_of(whole)]
    assert read_rows(broken) == read_rows(whole)


KILLED = """
import os
import signal
import sys
from pathlib import Path
import torch
from viasd_calib.models import load_verifier
from viasd_calib.prompts import read_prompts
from viasd_calib.traces import capture as capturing
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.folder import CaptureSettings
torch.set_num_threads(1)
model, prompts, folder, settings = sys.argv[1:]
settings = CaptureSettings.model_validate_json(settings)
write, left = capturing.write_shard, iter(range(3))
def dying(*arguments):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
capturing.write_shard = dying
capture_traces(load_verifier(model), None, "none", read_prompts(prompts), Path(folder), settings)
"""


@pytest.mark.slow
def test_a_killed_process_loses_and_doubles_no_text(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """kill -9 once three shards stand; a second run completes what an undisturbed one writes."""
    verifier = load_verifier(str(tiny_folder))
    prompts = tiny_prompts(12)
    settings = SETTINGS.model_copy(update={"batch_size": 1, "max_new_tokens": 24})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    capture_traces(verifier, None, "none", prompts, whole, settings)

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(prompt.model_dump_json() + "\n" for prompt in prompts))
    arguments = [str(tiny_folder), str(file), str(killed), settings.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(shards_of(killed)) == 3

    report = capture_traces(verifier, None, "none", prompts, killed, settings)
    assert report.kept == 3
    assert report.texts == len(prompts)
    assert read_rows(killed) == read_rows(whole)


def test_a_finished_folder_is_left_alone(tiny_verifier: Verifier, tmp_path: Path) -> None:
    first = run(tiny_verifier, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = run(tiny_verifier, tmp_path, PROMPTS[::-1])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert again.kept == len(PROMPTS)
    assert (again.texts, again.tokens) == (first.texts, first.tokens)


def test_a_shard_that_is_removed_is_made_again(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path)
    rows = read_rows(tmp_path)
    shards_of(tmp_path)[1].unlink()
    assert run(tiny_verifier, tmp_path).kept in (len(PROMPTS) - 3, len(PROMPTS) - 1)
    assert read_rows(tmp_path) == rows


def test_stray_partial_files_are_ignored(tiny_verifier: Verifier, tmp_path: Path) -> None:
    expected = run(tiny_verifier, tmp_path / "clean")
    folder = tmp_path / "diverge"
    folder.mkdir()
    (folder / ".shard-00000.parquet.abc.partial").write_bytes(b"PAR1 half a shard")
    (folder / f".{MANIFEST}.abc.partial").write_text("{")
    report = run(tiny_verifier, folder)
    assert (report.texts, report.tokens, report.kept) == (expected.texts, expected.tokens, 0)
    assert read_rows(folder) == read_rows(tmp_path / "clean")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("settings", {"max_new_tokens": 13}),
        ("settings", {"temperature": 0.5}),
        ("settings", {"seed": 1}),
        ("settings", {"top_k": 5}),
        ("draft", {"drafter": PromptLookup()}),
    ],
)
def test_traces_made_otherwise_are_refused(
    tiny_verifier: Verifier, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    run(tiny_verifier, tmp_path)
    with pytest.raises(TraceError, match=rf"made with another {name}; choose another folder"):
        run(tiny_verifier, tmp_path, **changes)


def test_traces_of_another_verifier_are_refused(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path / "traces")
    other = load_verifier(str(save_tiny(tmp_path / "model", vocab=VOCAB + 1)))
    with pytest.raises(TraceError, match="made with another verifier"):
        run(other, tmp_path / "traces")


def test_traces_of_other_weights_are_refused(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path)
    others = tiny_verifier.ref.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(TraceError, match="made with another verifier"):
        run(replace(tiny_verifier, ref=others), tmp_path)


def test_traces_that_name_no_weights_go_on(tiny_verifier: Verifier, tmp_path: Path) -> None:
    """As earlier releases wrote them."""
    nameless = tiny_verifier.ref.model_copy(update={"weights_sha256": None})
    run(replace(tiny_verifier, ref=nameless), tmp_path)
    found = run(tiny_verifier, tmp_path)
    assert found.kept == found.asked > 0


def test_shards_without_a_manifest_are_refused(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(TraceError, match=rf"holds shards but no {MANIFEST}"):
        run(tiny_verifier, tmp_path)
    with pytest.raises(TraceError, match="is not a trace folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"draft": "none"}'])
def test_a_damaged_manifest_is_refused(tiny_verifier: Verifier, tmp_path: Path, content: bytes) -> None:
    run(tiny_verifier, tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    for attempt in (lambda: read_manifest(tmp_path), lambda: run(tiny_verifier, tmp_path)):
        with pytest.raises(TraceError, match=rf"{MANIFEST} is damaged"):
            attempt()


def test_the_manifest_says_what_was_run(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path, drafter=PromptLookup())
    manifest = read_manifest(tmp_path)
    assert manifest.verifier == tiny_verifier.ref
    assert manifest.settings == SETTINGS
    assert (manifest.draft, manifest.n_prompts) == ("drafter", len(PROMPTS))
    assert json.loads((tmp_path / MANIFEST).read_text())["settings"]["seed"] == 0


def test_a_damaged_shard_is_named(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path)
    shard = shards_of(tmp_path)[2]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(TraceError, match=shard.name):
        run(tiny_verifier, tmp_path)


def test_a_prompt_beyond_the_context_is_refused(tiny_verifier: Verifier, tmp_path: Path) -> None:
    long = Prompt(id="long", task="qa", turns=["w1 " * 250])
    with pytest.raises(PromptError, match=r"prompt 'long' has 253 tokens; .*context of 256"):
        run(tiny_verifier, tmp_path, [*PROMPTS, long])


def test_logits_that_are_not_finite_are_refused(tiny_verifier: Verifier, tmp_path: Path) -> None:
    broken = Verifier(spoil(tiny_verifier.model), tiny_verifier.tokenizer, tiny_verifier.ref)
    with pytest.raises(NumericsError):
        run(broken, tmp_path)
    assert not shards_of(tmp_path)


def test_a_full_disk_leaves_whole_shards(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, tmp_path / "whole")
    sizes = [path.stat().st_size for path in shards_of(tmp_path / "whole")]
    run(tiny_verifier, tmp_path / "full", [])  # the manifest may be larger than a shard of tiny texts
    with pytest.raises(StorageError, match=r"shard-.*File too large"), small_disk(min(sizes) - 1):
        run(tiny_verifier, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == [MANIFEST]
    run(tiny_verifier, tmp_path / "full")
    assert read_rows(tmp_path / "full") == read_rows(tmp_path / "whole")
