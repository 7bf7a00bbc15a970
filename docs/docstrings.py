"""Docstrings as the API pages need them: cross-references of Sphinx as links, doctests as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?P<short>~?)(?P<target>[\w.]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def for_pages(text: str) -> str:
    """A docstring with links in place of roles, and with the heading under which griffe expects doctests."""
    linked = ROLE.sub(lambda role: _link(role["target"], bool(role["short"])), text)
    return EXAMPLE.sub(r"\1Examples:", linked)


def _link(target: str, short: bool) -> str:
    if not target.startswith("viasd_calib."):
        return f"`{target}`"
    return f"[`{target.rpartition('.')[2] if short else target}`][{target}]"


class Docstrings(Extension):
    """Applies :func:`for_pages` to every docstring that griffe has read."""

    def on_instance(self, *, obj: Object, **_options: Any) -> None:
        if obj.is_alias or obj.docstring is None:
            return
        text = for_pages(obj.docstring.value)
        if any(str(decorator.value) == "options" for decorator in getattr(obj, "decorators", ())):
            text = text.replace("\n\nArgs:\n", "\n\nAttributes:\n")  # a dataclass that griffe does not know for one
        obj.docstring.value = text
