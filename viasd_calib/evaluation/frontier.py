"""A frontier: slim verifiers fitted at several target costs, agreement against what a slim pass costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from viasd_calib.calibration.artifacts import FitArtifact, load_scores
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import FIT_FILE, FRONTIER_FILE
from viasd_calib.files import read_json
from viasd_calib.replay.agreement import most_confident_agreement
from viasd_calib.slim.cost import relative_cost
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.base import part_named
from viasd_calib.spec import DType

CONFIDENT_SHARES = ("0.5", "0.7", "0.9")
"""Shares of the places, those where the slim gate is most confident of q', that agreement is given for."""
COST_WIDTH = 4
"""Width of the passes whose relative cost a member is picked by: a q' pass of the decoder is about as wide."""


class FrontierMember(BaseModel):
    """One fit of a frontier.

    Attributes:
        folder: of the fit, beside the frontier's file.
        target_cost: of the fit; None for low bits that look at none.
        relative_cost: time of a slim pass over that of a full pass of the same width, head included, interleaved.
        agreement: of q' with q at the held-back places that the fit tested its gates on, argmax against argmax.
        agreement_confident: the same on the share of places where the slim gate, which decides at run time whether
            q' is trusted, gives its choice the highest scores.
        attention_skip: layers whose attention q' skips.
        mlp_skip: layers whose MLP q' skips.
        low_bits: which sublayers have low bits, in words; "" for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    target_cost: float | None
    relative_cost: dict[int, float]
    agreement: float
    agreement_confident: dict[str, float]
    attention_skip: list[int]
    mlp_skip: list[int]
    low_bits: str = ""

    @property
    def cost(self) -> float:
        """What it is picked by."""
        return self.relative_cost[COST_WIDTH]


class Frontier(BaseModel):
    """What ``viasd frontier`` measured: members of the same prompts, in the order of their target costs, those in low
    bits after the others.

    Attributes:
        dtype: number format that costs were measured in.
        device: where they were measured.
        hardware: of the machine they were measured on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: DType
    device: str
    hardware: dict[str, Any]
    members: list[FrontierMember] = Field(min_length=1)

    def best(self, cost: float) -> FrontierMember:
        """The member with the best agreement among those that cost at most ``cost`` (of two such, the cheaper one).

        Raises:
            CalibrationError: every member costs more.
        """
        within = [member for member in self.members if member.cost <= cost]
        if not within:
            cheapest = min(self.members, key=lambda member: member.cost)
            raise CalibrationError(
                f"no member of the frontier has a measured cost of at most {cost:g} at width {COST_WIDTH}; the "
                f"cheapest is {cheapest.folder} at {cheapest.cost:.4f}: raise --cost, or fit one more with a lower "
                "target cost"
            )
        return max(within, key=lambda member: (member.agreement, -member.cost))


def measure_member(folder: Path, target_cost: float | None, routed: RoutedModel) -> FrontierMember:
    """Time the passes of a fit that lies in ``folder``, and read its agreement off its held-back scores.

    Args:
        routed: the verifier with the fit's route, ready to decode.

    Raises:
        CalibrationError: the fit is missing or damaged.
    """
    fitted = read_json(FitArtifact, folder / FIT_FILE, "viasd fit")
    scores, low = load_scores(folder), fitted.route.low_bit
    most_confident = {
        share: most_confident_agreement(scores.own_agrees, scores.own, float(share)) for share in CONFIDENT_SHARES
    }
    return FrontierMember(
        folder=folder.name,
        target_cost=target_cost,
        relative_cost={width: round(cost, 4) for width, cost in relative_cost(routed).items()},
        agreement=round(fitted.agreement, 4),
        agreement_confident={share: round(agreement, 4) for share, agreement in most_confident.items()},
        attention_skip=fitted.route.attention_skip,
        mlp_skip=fitted.route.mlp_skip,
        low_bits="" if low is None else part_named("low_bit").line(fitted.route, fitted.verifier.num_layers),
    )


def check_comparable(fits: Sequence[FitArtifact]) -> None:
    """Refuse fits of other prompts, verifiers or draft models than the first one's.

    Raises:
        CalibrationError: naming what differs.
    """
    for what, keys in {
        "prompts": {fit.fit_sha256 for fit in fits},
        "verifiers": {fit.verifier.config_sha256 for fit in fits},
        "draft models": {fit.draft for fit in fits},
    }.items():
        if len(keys) > 1:
            raise CalibrationError(
                f"the members of the frontier were fitted with different {what}, so they cannot be compared; "
                "remove the old members' folders, or give another --out"
            )


def load_frontier(folder: Path) -> Frontier:
    """The frontier that ``viasd frontier`` wrote into ``folder``.

    Raises:
        CalibrationError: missing or damaged.
    """
    return read_json(Frontier, folder / FRONTIER_FILE, "viasd frontier")
