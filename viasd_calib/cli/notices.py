"""What a user should know of a run before it begins, and where its result is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from viasd_calib.ledger import Ledger
from viasd_calib.spec import Audit, RoutingSpec


def notice_uncertified(spec: RoutingSpec, audit: Audit | None) -> None:
    """Say on stderr that nothing certifies the text, where a user's own ``audit`` asks for such a text.

    Args:
        spec: of the run.
        audit: what the user asked for in place of the spec's own; None for nothing.
    """
    if spec.certified_bound is None and audit not in (None, "strict"):
        print(
            f"notice: the spec certifies no loss bound, so nothing certifies a text with audit {audit}",
            file=sys.stderr,
        )


def notice_resumed(ledger: Ledger, unit: str, steps: Iterable[str] | None = None) -> None:
    """Say on stderr that a job goes on where it was stopped, if it does.

    Args:
        unit: what its steps are.
        steps: those to come; None for as many as the ledger holds.
    """
    done = ledger.steps_done if steps is None else sum(map(ledger.holds, steps))
    if done:
        print(
            f"notice: goes on after {done} {unit} that are done; remove {ledger.path} to begin anew",
            file=sys.stderr,
        )


def say_written(path: str | Path, what: str = "") -> None:
    """Say where a result is, in one line that is not broken, and in a few words what it holds."""
    Console(highlight=False, soft_wrap=True).print(f"wrote {path}{': ' if what else ''}{what}", markup=False)


def announce(title: str) -> None:
    """Say which step of a longer job begins."""
    Console().print(Rule(title, align="left"))
