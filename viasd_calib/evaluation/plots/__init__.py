"""Pictures, one function each: pure, on figures of their own, no pyplot; a module for each family."""

from viasd_calib.evaluation.plots.break_even import break_even_picture
from viasd_calib.evaluation.plots.latency import latency_profile
from viasd_calib.evaluation.plots.offload import CostPoint, read_off, speedup_against_cost
from viasd_calib.evaluation.plots.predicted import predicted_against_decoded
from viasd_calib.evaluation.plots.reliability import reliability_diagram
from viasd_calib.evaluation.plots.rounds import ROUND_NAMES, round_timelines
from viasd_calib.evaluation.plots.route import route_map
from viasd_calib.evaluation.plots.style import TIER_NAMES, inline_svg, method_label, write_figure
from viasd_calib.evaluation.plots.tiers import PLACES_PER_BIN, shares_by_place, tier_shares
from viasd_calib.evaluation.plots.trade_offs import candidates_tested, frontier_picture, speed_against_loss

__all__ = [
    "PLACES_PER_BIN",
    "ROUND_NAMES",
    "TIER_NAMES",
    "CostPoint",
    "break_even_picture",
    "candidates_tested",
    "frontier_picture",
    "inline_svg",
    "latency_profile",
    "method_label",
    "predicted_against_decoded",
    "read_off",
    "reliability_diagram",
    "round_timelines",
    "route_map",
    "shares_by_place",
    "speed_against_loss",
    "speedup_against_cost",
    "tier_shares",
    "write_figure",
]
