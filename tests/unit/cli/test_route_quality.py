"""What ``viasd route-quality`` prints."""

from __future__ import annotations

import io

from rich.console import Console

from viasd_calib.cli.route_quality import quality_table
from viasd_calib.evaluation.route_quality import RouteQuality


def test_the_table_has_every_distance_with_its_places() -> None:
    quality = RouteQuality(
        agreement=0.9,
        kl=0.2,
        agreement_confident={"0.5": 0.99},
        relative_cost={4: 0.5},
        by_distance={0: 0.9, 1: 0.85, 31: 0.7},
        places_by_distance={0: 1152, 1: 1128, 31: 120},
        by_task={"qa": 0.8},
    )
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(quality_table(quality))
    words = [line.split() for line in console.export_text().splitlines()]
    assert ["0", "tokens", "after", "it", "0.9000", "1152"] in words
    assert ["1", "token", "after", "it", "0.8500", "1128"] in words
    assert ["31", "tokens", "after", "it", "0.7000", "120"] in words
