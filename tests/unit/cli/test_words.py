"""How a command reads its words: dashes, flags, configurations, and one line on what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from viasd_calib.cli import COMMANDS, main
from viasd_calib.cli.configurations import read_configuration
from viasd_calib.cli.parser import run_command
from viasd_calib.errors import UsageError
from viasd_calib.option_types import Count
from viasd_calib.prompts import SplitShares


class Called:
    """What a command was called with."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, *words: str) -> dict[str, Any]:
        def command(
            out: str = "a", show_tiers: bool = False, audit: bool | None = None, max_new_tokens: Count = 8,
            shares: SplitShares | None = None,
        ) -> None:  # fmt: skip
            self.options = {"out": out, "show_tiers": show_tiers, "audit": audit, "max_new_tokens": max_new_tokens}

        run_command(command, words, "viasd command")
        return self.options


@pytest.fixture
def called() -> Called:
    return Called()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--show-tiers"], True),
        (["--show-tiers", "--out", "b"], True),
        (["--show_tiers", "true"], True),
        (["--show-tiers=true"], True),
        (["--show-tiers", "false"], False),
        (["--no-show-tiers"], False),
        (["--show-tiers", "--no_show_tiers"], False),
        ([], False),
    ],
)
def test_a_flag_may_stand_alone(called: Called, words: list[str], wanted: bool) -> None:
    assert called(*words)["show_tiers"] is wanted


def test_a_flag_that_may_be_null_stands_alone_too(called: Called) -> None:
    assert called("--audit")["audit"] is True
    assert called("--no-audit")["audit"] is False
    assert called()["audit"] is None


def test_values_keep_their_dashes_and_underscores(called: Called) -> None:
    assert called("--out", "a-b_c")["out"] == "a-b_c"
    assert called("--out=--a-b")["out"] == "--a-b"
    assert called("--max-new-tokens", "3") == called("--max_new_tokens=3")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fit"])
def test_help_shows_dashes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = [word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[],").startswith("--")]
    assert shown
    assert not [word for word in shown if "_" in word]
    assert not [word for word in shown if "Annotated" in word]


def test_what_print_config_shows_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--out", "a_b", "--fit-config", "f.yaml", "--capture-step", '{"max_new_tokens": 7, "limit": null}']
    config = tmp_path / "config.yaml"
    shown = []
    for given in (words, ["run", "--config", str(config)]):
        with pytest.raises(SystemExit):
            main([*given, "--print-config"])
        shown.append(capsys.readouterr().out)
        config.write_text(shown[-1])
    assert shown[0] == shown[1]
    assert yaml.safe_load(shown[0])["capture_step"] == {"limit": None, "max_new_tokens": 7, "batch_size": 32}


def test_configurations_are_yaml_with_each_entry_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, message in (
        ("a: 1\nb: {c: 1}\na: 2\n", "line 3: a stands there twice; leave one of them out"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: b stands there twice"),
        ("a: [\n", "line 2: no valid YAML"),
        ("- a\n", "has no entries; write one a line"),
        ("", "has no entries"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError) as refused:
            read_configuration(str(path))
        assert message in str(refused.value)
    path.write_text('\ufeff{"a": {"b": 1}}', encoding="utf-8")
    assert read_configuration(str(path)) == {"a": {"b": 1}}
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(UsageError, match="is no text"):
        read_configuration(str(path))
    with pytest.raises(UsageError, match="Is a directory; give --fit-config the path of a YAML file"):
        read_configuration(str(tmp_path), "--fit-config")
