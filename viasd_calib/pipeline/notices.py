"""What a user should know of a job before it begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from viasd_calib.errors import JobWarning
from viasd_calib.ledger import Ledger
from viasd_calib.spec import Audit, RoutingSpec


def notice(text: str) -> None:
    """Warn of something that the user should know; the command line prints it in one line."""
    warnings.warn(text, JobWarning, stacklevel=3)


def notice_uncertified(spec: RoutingSpec, audit: Audit | None) -> None:
    """Warn that nothing certifies the text, where a user's own ``audit`` asks for such a text.

    Args:
        spec: of the run.
        audit: what the user asked for in place of the spec's own; None for nothing.
    """
    if spec.certified_bound is None and audit not in (None, "strict"):
        notice(f"the spec certifies no loss bound, so nothing certifies a text with audit {audit}")


def notice_resumed(ledger: Ledger, unit: str, steps: Iterable[str] | None = None) -> None:
    """Warn that a job goes on where it was stopped, if it does.

    Args:
        unit: what its steps are.
        steps: those to come; None for as many as the ledger holds.
    """
    done = ledger.steps_done if steps is None else sum(map(ledger.holds, steps))
    if done:
        notice(f"goes on after {done} {unit} that are done; remove {ledger.path} to begin anew")
