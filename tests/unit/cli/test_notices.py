"""The one line that says nothing certifies a text: where a user's own flag asks for such a text, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.certificates import bind, make_certificate
from tests.tiny import TinyFolder, tiny_prompts, tiny_spec
from viasd_calib.cli import main
from viasd_calib.spec import load_spec

NOTICE = "notice: the spec certifies no loss bound, so nothing certifies a text with audit off"


@pytest.fixture(params=["none", "no bound", "bound"])
def spec(request: pytest.FixtureRequest, tiny_folder: TinyFolder, tmp_path: Path) -> str:
    """A spec for the tiny verifier: without a certificate, with one of no bound, or with one."""
    held = make_certificate(None, max_new_tokens=8) if request.param == "no bound" else None
    path = tiny_spec(tiny_folder, tmp_path / request.param.replace(" ", "-"), held)
    if request.param == "bound":
        bind(load_spec(path), path)
    return str(path)


@pytest.mark.parametrize(
    ("options", "lossy"),
    [
        ([], False),
        (["--audit", "strict"], False),
        (["--audit", "off"], True),
        (["--audit", "strict", "--method", "autoregressive"], False),
    ],
)
def test_generate(spec: str, options: list[str], lossy: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--spec", spec, "--prompt", "w1 w2", "--max_new_tokens", "4", *options]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "notice" in line]
    assert told == ([NOTICE] if lossy and not spec.endswith("/bound/routing.json") else [])


@pytest.mark.parametrize(
    ("options", "lossy"),
    [
        ([], False),
        (["--audit", "off"], True),
        (["--audit", "strict", "--methods", "autoregressive,speculative"], False),
    ],
)
def test_bench(spec: str, options: list[str], lossy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(2)) + "\n")
    command = ["bench", "--spec", spec, "--json", str(tmp_path / "bench.json"), "--prompts", str(prompts)]
    assert main([*command, "--max_new_tokens", "4", "--debug", *options]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "notice" in line]
    assert told == ([NOTICE] if lossy and not spec.endswith("/bound/routing.json") else [])
