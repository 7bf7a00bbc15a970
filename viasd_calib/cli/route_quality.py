"""``viasd route-quality``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.gate_table import gate_table
from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline import route_quality as job
from viasd_calib.pipeline.options import RouteQualityOptions
from viasd_calib.tables import new_table


def route_quality(options: RouteQualityOptions) -> None:
    """Measure, and print the table."""
    quality = job.route_quality(options)
    console = Console(highlight=False)
    console.print(quality_table(quality))
    if quality.gates:
        console.print(gate_table(quality.gates))
    say_written(options.json)


def quality_table(quality: lazy_types.RouteQuality) -> Table:
    """What was measured, as a table."""
    table = new_table("slim verifier against full verifier", ["", "agreement", "places"])
    table.add_row("all places, directly after the full verifier", f"{quality.agreement:.4f}")
    for share, agreement in quality.agreement_confident.items():
        table.add_row(f"  the most confident {float(share):.0%}", f"{agreement:.4f}")
    for distance, agreement in quality.by_distance.items():
        places = str(quality.places_by_distance[distance])
        table.add_row(f"{distance} token{'' if distance == 1 else 's'} after it", f"{agreement:.4f}", places)
    for task, agreement in quality.by_task.items():
        table.add_row(task, f"{agreement:.4f}")
    costs = ", ".join(f"{cost:.2f} at width {width}" for width, cost in quality.relative_cost.items())
    table.caption = f"KL {quality.kl:.4f} nats; relative cost of a slim pass {costs}"
    return table
