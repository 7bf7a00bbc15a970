"""``viasd search``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import search as job
from viasd_calib.pipeline.options import SearchOptions
from viasd_calib.tables import new_table
from viasd_calib.training.search.record import CONFIDENT_SHARES, SearchResult


def search(options: SearchOptions) -> None:
    """Search, and print the table."""
    result = job.search(options)
    Console(highlight=False).print(search_table(result))
    say_written(options.json)


def search_table(result: SearchResult) -> Table:
    """What each method found, as a table: one row a method, in the order they were run."""
    settings = result.settings
    bridged = "each with its bridges" if settings.bridges else "without bridges"
    table = new_table(
        f"routes at cost {settings.target_cost:g}, {bridged}, on {result.held_back_texts} held-back texts",
        [
            "",
            "agreement",
            *(f"most confident {float(share):.0%}" for share in CONFIDENT_SHARES),
            "KL",
            "cost",
            "passes",
            "s",
        ],
        caption="cost: of a slim pass over a full one, measured as both decode here, bridges included; passes over "
        f"{result.judging_texts} texts of the search, at most {settings.budget}; s: seconds of search. Of low bits "
        "bits_auto alone looks at the target cost",
    )
    for method, found in result.found.items():
        most_confident = [f"{found.agreement_confident[share]:.4f}" for share in CONFIDENT_SHARES]
        known = found.relative_cost if found.decoding_cost is None else found.decoding_cost  # of earlier releases
        cost = "–" if known is None else f"{known:.2f}"
        measured = [f"{found.agreement:.4f}", *most_confident, f"{found.kl:.4f}", cost, str(found.passes)]
        table.add_row(method, *measured, f"{found.seconds:.1f}")
    return table
