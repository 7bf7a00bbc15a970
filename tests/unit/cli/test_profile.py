from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyFolder, tiny_spec
from viasd_calib.cli import main
from viasd_calib.profiling.profile import load_profile

SMALL = ["--widths", "[4,1]", "--contexts", "[8,16]", "--batches", "[1,2]", "--repeats", "2"]


@pytest.fixture(scope="module")
def spec(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A spec for the tiny verifier, that needs no tensors."""
    return str(tiny_spec(tiny_folder, tmp_path_factory.mktemp("spec")))


def test_a_profile_is_measured_written_printed_and_drawn(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "profile.json", tmp_path / "profile.png"
    assert main(["profile", "--spec", spec, "--json", str(out), *SMALL, "--plot", str(plot), "--debug"]) == 0
    profile = load_profile(out)
    assert profile.settings.widths == (1, 4)
    assert profile.seconds("slim", 2, 12, 1) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "milliseconds by width" in printed
    assert [(one.method, one.context) for one in profile.rounds if one.context == 16] == [
        ("autoregressive", 16), ("speculative", 16), ("three_tier", 16),
    ]  # fmt: skip
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[:2] == ["three_tier", "16"] for row in rows) == 1
    assert f"wrote {out}" in printed.replace("\n", "")
    for tier in ("draft", "slim", "full", "head"):
        assert any(line.split()[:1] == [tier] for line in printed.splitlines())


def test_a_number_format_in_place_of_the_specs(spec: str, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--spec", spec, "--json", str(out), *SMALL, "--dtype", "bfloat16", "--debug"]) == 0
    profile = load_profile(out)
    assert (profile.dtype, profile.verifier.dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "[128,2048]"], "2064 positions, the verifier's context holds 256; give --contexts up to 240"),
        (["--widths", "[]"], "--widths is []; give a list"),
        (["--batches", "[0,1]"], "--batches is [0, 1]; give a list, '[..., ...]', each a whole number, at least 1"),
        (["--repeats", "1"], "--repeats is 1; give a whole number, at least 2"),
        (["--plot", "profile.bmp"], "cannot draw profile.bmp: its ending names no kind of picture; choose one of .png"),
        (["--verifier", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said(
    spec: str, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--spec", spec, "--json", str(out), *options]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_said(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["profile", "--spec", spec, "--json", str(tmp_path / "file" / "profile.json"), *SMALL]) == 1
    assert "cannot write" in capsys.readouterr().err
