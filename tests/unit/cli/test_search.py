"""The table that ``viasd search`` prints."""

from __future__ import annotations

import io

from rich.console import Console

from tests.tiny import verifier_ref
from viasd_calib.cli.search import search_table
from viasd_calib.spec import Route
from viasd_calib.training.search.record import FoundRoute, SearchResult, SearchSettings


def found(agreement: float, cost: float | None) -> FoundRoute:
    """A route whose numbers all differ, so that none can stand in another's column."""
    return FoundRoute(
        route=Route(attention_skip=[1]), agreement=agreement, kl=0.2345, expected_cost=0.11, relative_cost=cost,
        agreement_confident={"0.5": 0.91, "0.7": 0.82, "0.9": 0.73}, passes=17, seconds=3.21, decoding_cost=0.57,
    )  # fmt: skip


def test_each_method_has_its_numbers_in_their_columns() -> None:
    earlier = found(0.65, 0.49).model_copy(update={"decoding_cost": None})  # as of an earlier release
    result = SearchResult(
        verifier=verifier_ref(),
        settings=SearchSettings(target_cost=0.6, methods=["even", "knapsack", "bits_8"], budget=40, bridges=False),
        bridge_texts=0, judging_texts=8, held_back_texts=5, prompts_sha256="0" * 64,
        found={"even": found(0.6, 0.51), "knapsack": earlier, "bits_8": found(0.9, None)},
    )  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=160).print(search_table(result))
    lines = [" ".join(line.split()) for line in screen.getvalue().splitlines()]
    assert lines[0].strip() == "routes at cost 0.6, without bridges, on 5 held-back texts"
    assert "agreement most confident 50% most confident 70% most confident 90% KL cost passes s" in lines
    assert "even 0.6000 0.9100 0.8200 0.7300 0.2345 0.57 17 3.2" in lines
    assert "knapsack 0.6500 0.9100 0.8200 0.7300 0.2345 0.49 17 3.2" in lines
    assert "bits_8 0.9000 0.9100 0.8200 0.7300 0.2345 0.57 17 3.2" in lines
    assert "passes over 8 texts of the search, at most 40" in " ".join(lines)
