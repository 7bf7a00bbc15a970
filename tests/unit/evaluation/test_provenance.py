"""A benchmark is evidence of the policy that it measured, and of no other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.tiny import verifier_ref
from viasd_calib.calibration.paired import Interval
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.bench import BenchResult, load_bench
from viasd_calib.evaluation.provenance import (
    PromptsMeasured,
    check_evidence,
    check_policy,
    note_provenance,
    source_commit,
)
from viasd_calib.pipeline.export import evidence_of
from viasd_calib.spec import Decoding, Gates, PromptLookupDraft, Route, RoutingSpec

AUTHOR = ["-c", "user.name=a", "-c", "user.email=a@b"]
MEASURED = PromptsMeasured(
    file="mine.jsonl", sha256="5" * 64, split="test", limit=None, left_out=0, fitted_included=False
)


def spec(**changes: Any) -> RoutingSpec:
    entries: dict[str, Any] = {
        "verifier": verifier_ref(weights_sha256="6" * 64),
        "draft": PromptLookupDraft(),
        "route": Route(attention_skip=[1]),
        "gates": Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    }
    return RoutingSpec(**{**entries, **changes})


def bench(of: RoutingSpec, **settings: Any) -> BenchResult:
    row = {
        "tokens": 9, "seconds": 1.0, "tokens_per_second": 9.0, "speedup_vs_autoregressive": None,
        "speedup_vs_speculative": None, "identical_to_autoregressive": 1.0, "divergence": 0.0, "rejection_rate": None,
        "full_passes_per_token": 1.0, "slim_passes_per_token": 0.0, "draft_steps_per_token": 0.0,
        "acceptance_length": 1.0, "tier_shares": {}, "differences": [],
    }  # fmt: skip
    asked = {"methods": ["three_tier"], "max_new_tokens": 9, "dtype": "float32", "audit": "strict", "seed": 0}
    return BenchResult.model_validate(
        {
            "provenance": note_provenance(of, of.verifier, MEASURED, "viasd bench"),
            "hardware": {},
            "settings": {**asked, **settings},
            "n_prompts": 9,
            "methods": {"three_tier": row},
            "by_task": {},
        }
    )


def committed(folder: Path) -> str:
    """A repository in ``folder`` with a file; its commit."""
    (folder / "tracked.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], [*AUTHOR, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return head.stdout.strip()


def test_the_commit_is_that_of_the_program(tmp_path: Path) -> None:
    commit = committed(tmp_path)
    assert source_commit(tmp_path) == commit
    (tmp_path / "untracked.py").write_text("2")
    assert source_commit(tmp_path) == commit
    (tmp_path / "tracked.py").write_text("2")
    assert source_commit(tmp_path) == f"{commit}-dirty"


def test_a_repository_around_an_environment_is_not_the_programs(tmp_path: Path) -> None:
    committed(tmp_path)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "installed.py").write_text("1")
    assert source_commit(tmp_path / "site-packages") is None


def test_without_a_repository_or_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_commit(tmp_path) is None
    committed(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(tmp_path) is None


def test_evidence_names_prompts_tokens_intervals_and_commit() -> None:
    own = spec()
    measured = bench(own)
    assert measured.provenance is not None
    shown, few = Interval(median=1.5, low=1.2, high=1.9, n=9), Interval(median=1.1, low=None, high=None, n=3)
    row = measured.methods["three_tier"].model_copy(
        update={"speedup_vs_autoregressive": shown, "speedup_vs_speculative": few}
    )
    noted = measured.provenance.model_copy(update={"commit": "a" * 40})
    evidence = evidence_of(measured.model_copy(update={"methods": {"three_tier": row}, "provenance": noted}))
    assert evidence.speedup_vs == {"autoregressive": 1.5}
    assert evidence.intervals == {"autoregressive": (1.2, 1.9)}
    assert (evidence.prompts_sha256, evidence.n_prompts, evidence.tokens) == (MEASURED.sha256, 9, 9)
    assert evidence.commit == "a" * 40
    with pytest.raises(ValidationError, match="does not lie in its interval"):
        type(evidence).model_validate({**evidence.model_dump(), "intervals": {"autoregressive": (1.6, 1.9)}})


def test_a_benchmark_of_the_same_policy_is_taken() -> None:
    own = spec()
    moved = own.model_copy(update={"verifier": own.verifier.model_copy(update={"name_or_path": "/elsewhere"})})
    check_policy(bench(own).provenance, moved, "bench.json")
    check_evidence(bench(own), moved, "bench.json")


@pytest.mark.parametrize(
    "other",
    [
        spec(route=Route(attention_skip=[2])),
        spec(gates=Gates(convention="ratio", accept_at=0.8, escalate_below=0.5)),
        spec(decoding=Decoding(draft_length=3)),
        spec(verifier=verifier_ref(weights_sha256="7" * 64)),
    ],
    ids=["route", "gates", "decoding", "weights"],
)
def test_a_benchmark_of_another_policy_is_refused(other: RoutingSpec) -> None:
    words = r"bench\.json measured another policy .* run viasd bench with this spec"
    with pytest.raises(BenchError, match=words):
        check_policy(bench(other).provenance, spec(), "bench.json")
    with pytest.raises(BenchError, match=words):
        check_evidence(bench(other), spec(), "bench.json")


def test_a_benchmark_on_other_weights_is_refused() -> None:
    """The spec was its own, but another verifier was loaded for it."""
    measured = bench(spec())
    assert measured.provenance is not None
    fake = measured.provenance.model_copy(update={"verifier": verifier_ref(weights_sha256="7" * 64)})
    with pytest.raises(BenchError, match="measured other weights"):
        check_policy(fake, spec(), "bench.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"audit": "off"}, "audit off, this spec has strict"),
        ({"dtype": "bfloat16"}, "bfloat16, this .* float32"),
    ],
)
def test_evidence_is_of_the_spec_as_it_decodes_by_itself(settings: dict[str, str], words: str) -> None:
    measured = bench(spec(), **settings)
    check_policy(measured.provenance, spec(), "bench.json")
    with pytest.raises(BenchError, match=words):
        check_evidence(measured, spec(), "bench.json")


def test_batches_alone_are_no_evidence() -> None:
    measured = bench(spec()).model_copy(update={"methods": {}})
    with pytest.raises(BenchError, match=r"bench\.json measured batches alone; run viasd bench with --batch 1 among"):
        check_evidence(measured, spec(), "bench.json")


def test_a_benchmark_of_an_earlier_release_is_refused(tmp_path: Path) -> None:
    document = bench(spec()).model_dump(mode="json")
    (tmp_path / "new.json").write_text(json.dumps(document))
    assert load_bench(tmp_path / "new.json").provenance is not None
    del document["provenance"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    with pytest.raises(BenchError, match=r"old\.json was made by an older version .* run viasd bench again"):
        load_bench(tmp_path / "old.json")


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"provenance": null}', "\\x00"])
def test_what_is_no_benchmark_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BenchError, match="not a benchmark's JSON; run viasd bench first"):
        load_bench(tmp_path / "x.json")


def test_provenance_names_what_numbers_depend_on() -> None:
    found = note_provenance(spec(), spec().verifier, MEASURED, "viasd bench --spec x")
    assert set(found.versions) == {"viasd_calib", "torch", "transformers", "python"}
    assert found.date.utcoffset() is not None
    assert found.prompts == MEASURED
