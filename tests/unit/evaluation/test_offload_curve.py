"""The script after the curve of speed-ups over speeds of reading, on a tiny verifier."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.offload_cases import LOW_BITS, save_verifier, write_spec
from tests.tiny import constant_gate, tiny_prompts
from viasd_calib.pipeline.options import ProfileOptions
from viasd_calib.pipeline.profile import profile
from viasd_calib.profiling.profile import load_profile, save_profile
from viasd_calib.slim.offload.settings import why_no_reading
from viasd_calib.spec import Gates, PromptHashes

SCRIPT = Path(__file__).parents[3] / "train" / "offload_curve.py"
Run = Callable[..., None]

pytestmark = pytest.mark.skipif(why_no_reading() is not None, reason=f"no reads: {why_no_reading()}")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    gates = Gates(
        draft=constant_gate("draft_margin", 0.0),
        slim=constant_gate("slim_margin", 0.0),
        accept_at=0.4,
        regenerate_at=0.4,
    )
    prompts = PromptHashes(fit=[])
    return write_spec(save_verifier(tmp_path / "verifier"), LOW_BITS, gates=gates, prompts=prompts)


@pytest.fixture
def run(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script on the spec, with more words of its command line."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [one.model_dump_json(include={"id", "task", "turns"}) for one in tiny_prompts(60)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    common = ["--spec", str(spec), "--prompts", str(prompts), "--tuning-prompts", str(prompts), "--tuning", "2"]

    def run(*words: str, limit: int = 2) -> None:
        out = ["--limit", str(limit), "--max-new-tokens", "8", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *common, *out, *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_points_are_measured_once_and_drawn_with_a_profiles_machine(
    run: Run, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--rates", "20MB", "--memory")
    said = capsys.readouterr().out
    assert re.search(r"^0.02 GB/s( \(read at [\d.]+\))?, simulated: a full pass costs", said)
    assert "memory: a full pass costs" in said
    out = tmp_path / "out"
    written = {path.name: path.read_bytes() for path in out.glob("*.json")}
    assert sorted(written) == ["20MB.json", "memory.json"]
    point = json.loads(written["20MB.json"])
    assert point["bytes_per_second"] == point["bench"]["offload"]["bandwidth"] == 20e6
    assert set(point["bench"]["methods"]) == {"autoregressive", "speculative", "three_tier", "self_speculative"}
    picture = (out / "offload_curve.png").read_bytes()

    own = tmp_path / "profile.json"
    profile(
        ProfileOptions(
            spec=str(spec), json=str(own), widths=(1, 2), contexts=(8,), batches=(1,), repeats=2, offload="disk",
            bandwidth="10MB",
        )
    )  # fmt: skip
    run("--rates", "20MB", "--memory", "--disk", "--profile", str(own))
    assert {path.name: path.read_bytes() for path in out.glob("*.json") if path.name != "disk.json"} == written
    assert (out / "offload_curve.png").read_bytes() != picture
    words = capsys.readouterr().out
    assert f"{own} (layers read from disk, slowed down to 0.01 GB/s (simulated)): a full pass costs" in words
    assert "read off the lines, not measured" in words


def test_points_of_something_else_are_refused_and_stay(run: Run, tmp_path: Path) -> None:
    run("--rates", "", "--memory")
    path = tmp_path / "out" / "memory.json"
    written = path.read_bytes()
    with pytest.raises(SystemExit, match=r"memory.json was measured with another prompts_sha256; give another --out"):
        run("--rates", "", "--memory", limit=3)
    assert path.read_bytes() == written
    path.write_bytes(written[:100])
    with pytest.raises(SystemExit, match=r"memory.json is damaged .*; give another --out, or remove the file"):
        run("--rates", "", "--memory")
    assert path.read_bytes() == written[:100]


def test_what_cannot_be_is_refused_before_anything_is_measured(run: Run, spec: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no speed is asked for; give --rates, --disk or --memory"):
        run("--rates", "")
    with pytest.raises(SystemExit, match="--rates is 'fast'"):
        run("--rates", "fast")
    own = tmp_path / "profile.json"
    options = ProfileOptions(spec=str(spec), json=str(own), widths=(1,), contexts=(8,), batches=(1,), repeats=2)
    found = profile(options)
    save_profile(found.model_copy(update={"route": found.route.model_copy(update={"low_bit": None})}), own)
    assert load_profile(own).offload is None
    with pytest.raises(SystemExit, match="measured with another route than the spec's"):
        run("--rates", "", "--memory", "--profile", str(own))
    assert not (tmp_path / "out").exists()
