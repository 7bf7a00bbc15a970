"""Which tier decides tokens, by place in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.plots.style import MUTED, PAPER, TIER_COLOURS, TIER_NAMES, canvas, dress, legend

PLACES_PER_BIN = 8


@dataclass(frozen=True)
class PlacedShares:
    """Tier shares by place in the text.

    Attributes:
        shares: of each bin's tokens, those of each tier, in the order of ``Tier``; [bins, 3], rows add to 1.
        tokens: in each bin, [bins]; they fall where texts end.
    """

    shares: np.ndarray
    tokens: np.ndarray


def shares_by_place(tiers: Sequence[Sequence[Tier]], width: int = PLACES_PER_BIN) -> PlacedShares:
    """Count the tiers of texts in bins of ``width`` places.

    Example:
        >>> placed = shares_by_place([[Tier.ACCEPT] * 3, [Tier.ESCALATE]], width=2)
        >>> placed.shares.tolist(), placed.tokens.tolist()
        ([[0.6666666666666666, 0.0, 0.3333333333333333], [1.0, 0.0, 0.0]], [3, 1])
    """
    bins = -(-max((len(text) for text in tiers), default=0) // width)
    counts = np.zeros((bins, len(Tier)), dtype=np.int64)
    for text in tiers:
        for place, tier in enumerate(text):
            counts[place // width, tier - 1] += 1
    tokens = counts.sum(1)
    return PlacedShares(counts / tokens[:, None], tokens)


def tier_shares(tiers: Sequence[Sequence[Tier]]) -> Figure:
    """Tier shares by place in the text, above the number of tokens they are shares of.

    Args:
        tiers: per text; at least one token in all.
    """
    placed = shares_by_place(tiers)
    places = np.arange(len(placed.tokens)) * PLACES_PER_BIN
    figure = canvas(6.4, 3.9)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for panel in (axes, below):
        dress(panel)
    base = np.zeros(len(places))
    for tier in Tier:
        share = 100 * placed.shares[:, tier - 1]
        axes.bar(places, share, PLACES_PER_BIN, bottom=base, align="edge", color=TIER_COLOURS[tier],
                 edgecolor=PAPER, linewidth=0.8, label=TIER_NAMES[tier])  # fmt: skip
        base += share
    below.bar(places, placed.tokens, PLACES_PER_BIN, align="edge", color=MUTED, edgecolor=PAPER, linewidth=0.8)
    axes.set(ylim=(0, 100), xlim=(0, len(places) * PLACES_PER_BIN), ylabel="share of tokens")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0f} %"))
    below.set(ylabel="tokens", xlabel="place in the generated text")
    below.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    below.xaxis.set_major_locator(MultipleLocator(PLACES_PER_BIN * -(-len(places) // 12)))
    legend(axes, ncols=3)
    return figure
