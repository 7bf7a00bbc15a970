"""What ``viasd search`` found, as it is written."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from viasd_calib.choices import SearchMethod
from viasd_calib.errors import CalibrationError
from viasd_calib.files import read_json, write_json
from viasd_calib.spec import Route, VerifierRef

CONFIDENT_SHARES = ("0.5", "0.7", "0.9")
"""Shares of the places, those where q' is most confident, that agreement is given for."""


class SearchSettings(BaseModel):
    """How routes are searched.

    Attributes:
        target_cost: measured cost of a slim pass over that of a full one, bridges left out.
        methods: the ways of choosing, in the order they are run.
        budget: passes over the evaluation texts that each method may take.
        keep_layers: layers whose sublayers stay; negative ones count from the end.
        bridges: whether routes are evaluated, compared and timed with bridges in place of skipped runs.
        bridge_rank: of the bridges; None for full ones.
        seed: of the methods that draw.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_cost: float = Field(0.5, gt=0, le=1)
    methods: tuple[SearchMethod, ...] = Field(min_length=1)
    budget: int = Field(200, ge=1)
    keep_layers: tuple[int, ...] = (0, -1)
    bridges: bool = True
    bridge_rank: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)


class FoundRoute(BaseModel):
    """The route that a method chose, and how well q' agrees with q on texts that were held back.

    Attributes:
        agreement: share of places where q' and q choose the same token, q' directly after q.
        agreement_confident: the same on the share of places where q' is most confident of its choice.
        kl: KL(q || q') over q's traced top k and the rest, in nats.
        expected_cost: sum of the measured shares of what the route keeps; neither bridges nor low bits are counted.
        relative_cost: time of a slim pass, bridges included, over that of a full pass, interleaved; None for low bits,
            which gain nothing in the search's number format.
        decoding_cost: the same in the number format and on the backend that decode here; None in what earlier releases
            wrote.
        passes: passes over the evaluation texts that the method took.
        seconds: wall clock of the choice; what all methods share, reading q, is not in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    route: Route
    agreement: float
    agreement_confident: dict[str, float]
    kl: float
    expected_cost: float
    relative_cost: float | None
    decoding_cost: float | None = None
    passes: int
    seconds: float


class SearchResult(BaseModel):
    """Every method's route on the same texts.

    Attributes:
        bridge_texts: texts that bridges were fitted on.
        judging_texts: texts that methods evaluated routes on.
        held_back_texts: texts that the routes were compared on.
        prompts_sha256: hash of the set of prompts after the texts, held back or not.
        found: by method, those that are done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verifier: VerifierRef
    settings: SearchSettings
    bridge_texts: int
    judging_texts: int
    held_back_texts: int
    prompts_sha256: str
    found: dict[SearchMethod, FoundRoute]

    def route_of(self, method: SearchMethod, verifier: VerifierRef) -> Route:
        """The route that a method chose, for the verifier it was chosen on.

        Raises:
            CalibrationError: the method was not run, or the verifier is another one.
        """
        if verifier.config_sha256 != self.verifier.config_sha256:
            raise CalibrationError(
                f"the routes were searched on {self.verifier.name_or_path}, this verifier is {verifier.name_or_path}; "
                "give the file of a search on it"
            )
        if method not in self.found:
            raise CalibrationError(f"the search did not run {method}; choose from {', '.join(self.found)}")
        return self.found[method].route


def save_search(result: SearchResult, path: Path) -> None:
    """Write what was found as JSON, atomically."""
    write_json(path, result)


def load_search(path: Path) -> SearchResult:
    """Read what ``viasd search`` wrote.

    Raises:
        CalibrationError: missing or damaged.
    """
    return read_json(SearchResult, path, "viasd search")
