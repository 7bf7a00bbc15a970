"""How often the drafter's proposals in a trace folder are the verifier's choice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from viasd_calib.traces.folder import read_rows

COLUMNS = ["task", "p_token", "p_depth", "q_ids"]


class DraftAgreement:
    """Counts of proposals, by task and by how many drafted, unverified tokens came before them.

    A place where nothing was proposed counts as one where the drafter was wrong; so does the rest of a looked-up block
    after a wrong token.

    Example:
        >>> found = DraftAgreement()
        >>> found.add("qa", proposed=[5, -1, 7], depths=[0, 0, 1], choices=[5, 6, 7])
        >>> found.share("qa", 0), found.share(None, 1), found.share("qa", 2)
        (0.5, 1.0, None)
    """

    def __init__(self) -> None:
        self._places: Counter[tuple[str, int]] = Counter()
        self._right: Counter[tuple[str, int]] = Counter()

    def add(self, task: str, proposed: list[int], depths: list[int], choices: list[int]) -> None:
        """Count the places of one text."""
        for token, depth, choice in zip(proposed, depths, choices, strict=True):
            self._places[task, depth] += 1
            self._right[task, depth] += token == choice

    @property
    def tasks(self) -> list[str]:
        """Those that were counted, sorted."""
        return sorted({task for task, _ in self._places})

    @property
    def depths(self) -> list[int]:
        """Those that were counted, sorted."""
        return sorted({depth for _, depth in self._places})

    def share(self, task: str | None, depth: int) -> float | None:
        """Share of proposals that are the verifier's choice, of one task or of all; None where nothing was counted."""
        keys = [key for key in self._places if key[1] == depth and task in (None, key[0])]
        places = sum(self._places[key] for key in keys)
        return sum(self._right[key] for key in keys) / places if places else None


def draft_agreement(folder: Path) -> DraftAgreement:
    """Count over every text of a trace folder that was captured with a drafter."""
    found = DraftAgreement()
    for row in read_rows(folder, COLUMNS):
        places = len(row["p_token"])
        choices = row["q_ids"][:: len(row["q_ids"]) // places]  # the most probable one of each place
        found.add(row["task"], row["p_token"], row["p_depth"], choices)
    return found
