"""``viasd capture --spec``: texts of a spec's decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyFolder, tiny_prompts, tiny_spec, trusting_gates
from viasd_calib.cli import main
from viasd_calib.spec import load_spec, save_spec
from viasd_calib.traces.folder import read_manifest
from viasd_calib.traces.texts import read_texts


@pytest.fixture
def words(tiny_folder: TinyFolder, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(8)))
    shares = json.dumps({"fit": 1.0, "calibrate": 0.0, "test": 0.0})
    return ["capture", "--prompts", str(prompts), "--shares", shares, "--max-new-tokens", "10", "--debug"]


def test_a_spec_s_decoder_answers_with_its_own_audit_or_another(
    words: list[str], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    spec = str(tiny_spec(tiny_folder, tmp_path))
    save_spec(load_spec(spec).model_copy(update={"gates": trusting_gates()}), spec)
    q, strict, off = (tmp_path / name for name in ("q", "strict", "off"))
    # As the spec does: in another number format a near tie may fall otherwise.
    assert main([*words, "--verifier", str(tiny_folder), "--out", str(q), "--dtype", "float32"]) == 0
    assert main([*words, "--spec", spec, "--out", str(strict)]) == 0
    assert main([*words, "--spec", spec, "--out", str(off), "--audit", "off"]) == 0
    own, same, other = ([text.ids for text in read_texts(folder)] for folder in (q, strict, off))
    assert all(torch.equal(a, b) for a, b in zip(own, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    names = [read_manifest(folder).policy for folder in (q, strict, off)]
    assert names[0] is None
    assert len(set(names)) == 3
    assert read_manifest(off).verifier == load_spec(spec).verifier


def test_an_audit_without_a_spec_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "out"), "--audit", "off"]) == 1
    assert "give --spec too" in capsys.readouterr().err


def test_drafts_are_logged_in_blocks_as_long_as_one_decodes_with(
    words: list[str], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    for length in (1, 3):
        out = tmp_path / f"{length}"
        assert main([*words, "--verifier", str(tiny_folder), "--out", str(out), "--draft-length", f"{length}"]) == 0
        assert {int(depth) for text in read_texts(out) for depth in text.p_depth} == {*range(length)}
