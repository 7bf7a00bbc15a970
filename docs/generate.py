"""Write the reference pages that follow from the code: Python API, command line and routing spec.

Run by ``make docs``; what it writes, under ``docs/reference``, is not kept in the repository.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import viasd_calib

ROOT = Path(__file__).parent.parent
PACKAGE = Path(viasd_calib.__file__).parent
REFERENCE = ROOT / "docs" / "reference"
OPTIONS = "      heading_level: 2\n      show_root_full_path: true\n"


def modules() -> Iterator[tuple[str, Path]]:
    """Every public module of the package, dotted, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if not any(part.startswith("_") for part in name.split(".")):
            yield name, path


def package_pages() -> Iterator[tuple[str, str]]:
    """File name and text of one page for each package of ``viasd_calib``, and one for its single modules."""
    by_package: dict[str, list[str]] = {}
    for name, path in modules():
        inside = path.relative_to(PACKAGE).parts
        by_package.setdefault(inside[0] if len(inside) > 1 else "viasd_calib", []).append(name)
    for package, names in sorted(by_package.items()):
        entries = [f"::: {name}\n    options:\n{OPTIONS}" for name in names]
        yield f"python/{package}.md", f"# {package}\n\n" + "\n".join(entries)


def help_text(words: list[str]) -> str:
    """What ``viasd`` prints for these words, 100 columns wide."""
    from viasd_calib.cli import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main(words)
    return output.getvalue().rstrip()


def command_page() -> str:
    """The page of the command line: the help of every command."""
    from viasd_calib.cli import COMMANDS

    os.environ["COLUMNS"] = "100"
    parts = ["# Command line", f"```text\n{help_text(['--help'])}\n```"]
    parts += [f"## viasd {name}\n\n```text\n{help_text([name, '--help'])}\n```" for name in COMMANDS]
    return "\n\n".join(parts) + "\n"


def spec_page() -> str:
    """The page of the routing spec: each object of its JSON Schema as a table of fields."""
    from viasd_calib.spec import json_schema

    schema = json_schema()
    objects = {"RoutingSpec": schema, **schema["$defs"]}
    parts = [
        "# Routing spec\n\nOne JSON file with the tensor files that it names beside it. `viasd schema` prints the JSON "
        "Schema that this page is made of, `viasd validate` checks a file against it."
    ]
    for name, entry in objects.items():
        if "properties" not in entry:
            continue
        rows = ["| field | type | meaning |", "|---|---|---|"]
        required = entry.get("required", [])
        for field, of in entry["properties"].items():
            mark = "" if field in required else " (optional)"
            rows.append(f"| `{field}`{mark} | {_type_of(of)} | {_cell(of.get('description', ''))} |")
        parts.append(f"## {name}\n\n{_prose(entry.get('description', ''))}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _type_of(entry: Mapping[str, Any]) -> str:
    """A JSON Schema type in words, with links to the objects of the page."""
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for either in ("anyOf", "oneOf"):
        if either in entry:
            return " or ".join(dict.fromkeys(_type_of(one) for one in entry[either]))
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    kind = entry.get("type", "any")
    return f"array of {_type_of(entry['items'])}" if kind == "array" and "items" in entry else str(kind)


def _prose(text: str) -> str:
    """A docstring up to its sections, which repeat what the table has."""
    return text.split("\n\nAttributes:")[0].replace("``", "`")


def _cell(text: str) -> str:
    return _prose(text).replace("\n", " ").replace("|", "\\|")


def main() -> None:
    """Write all pages."""
    pages = {**dict(package_pages()), "cli.md": command_page(), "spec.md": spec_page()}
    for name, text in pages.items():
        path = REFERENCE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(pages)} pages to {REFERENCE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
