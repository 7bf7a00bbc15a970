"""Commands of docs/results.md, each as the parsers read it, and the table of packages in the reference."""

from __future__ import annotations

import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import auto_cli

from tests.unit.test_imports import PACKAGES
from viasd_calib.cli import COMMANDS
from viasd_calib.cli.fit_cli import FitCLI
from viasd_calib.cli.frontier import parse_options
from viasd_calib.cli.parser import OptionsParser, options_class

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines() if line.startswith("| 20")]
COMMANDS_WRITTEN = [command for row in ROWS for command in re.findall("`([^`]+)`", row.split(" | ")[-1])]


def test_every_row_has_a_command() -> None:
    assert len(COMMANDS_WRITTEN) >= len(ROWS) > 5


@pytest.mark.parametrize("command", COMMANDS_WRITTEN)
def test_a_command_is_read_as_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, name, *words = shlex.split(command)
    if program == "bash":
        assert Path(name).is_file()
    elif program == "python":
        assert runpy.run_path(name)["command_parser"]().parse_args(words).out
    elif name in ("fit", "frontier"):
        assert FitCLI(words if name == "fit" else parse_options(words)[1]).options.data.folders
    else:
        assert program == "viasd"
        kind = options_class(
            getattr(import_module(f"viasd_calib.cli.{COMMANDS[name].module}"), COMMANDS[name].function)
        )
        options = auto_cli(kind, args=words, as_positional=False, parser_class=OptionsParser)
        assert options.fit_config if name == "run" else options.spec


def test_the_reference_lists_every_package_in_order() -> None:
    folders = [name for name in PACKAGES if (ROOT / "viasd_calib" / name).is_dir()]
    index = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    assert re.findall(r"python/(\w+)\.md", index) == [*folders, "viasd_calib"]
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"reference/python/(\w+)\.md", navigation) == [*folders, "viasd_calib"]
