"""``viasd frontier``: one fit for each of several target costs, measured side by side."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from viasd_calib.cli.configurations import given_options, with_shipped_configurations
from viasd_calib.cli.fit import fit
from viasd_calib.cli.notices import say_written
from viasd_calib.cli.parser import CommandParserMixin, with_underscores
from viasd_calib.devices import check_device
from viasd_calib.errors import CalibrationError, SpecError
from viasd_calib.file_names import FIT_FILE, FRONTIER_FILE
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_model, check_out_folder
from viasd_calib.pipeline.fit_checks import check_fit
from viasd_calib.pipeline.frontier import PICTURE, PlannedMember, measure_frontier, planned_members
from viasd_calib.pipeline.lists import parse_methods, runs
from viasd_calib.pipeline.loading import SharedVerifiers
from viasd_calib.pipeline.low_bit_fits import LOW_BIT_FITS
from viasd_calib.pipeline.notices import notice
from viasd_calib.spec import DType
from viasd_calib.tables import new_table

OWN_OPTIONS = ("--model.target_cost", "--ckpt_path")
"""Options of ``viasd fit`` that differ from member to member."""

Costs = TypeAdapter(Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)])


class FrontierParser(CommandParserMixin, ArgumentParser):  # type: ignore[misc]  # argparse's has overloads
    """The command's own options."""


def frontier(words: Sequence[str]) -> lazy_types.Frontier | None:
    """Run ``viasd frontier``; what is no option of its own is one of ``viasd fit``.

    A member whose fit is there already is kept; costs of passes are measured anew for all of them, one after the other.

    Returns:
        The frontier; None in a process that only helps to train.

    Raises:
        CalibrationError: target costs that cannot be, an option that is not the user's to set, or members that were
            fitted on different prompts.
    """
    options, of_fit = parse_options(words)
    costs = parse_costs(options.target_costs)
    low_bits = parse_low_bits(options.low_bits)
    check_free(of_fit)
    check_out_folder("--out", options.out)
    check_device(options.device)
    check_model(options.verifier)
    check_fit(given_options(with_shipped_configurations(of_fit)))
    out = Path(options.out)
    members = fit_members(of_fit, planned_members(out, costs, low_bits))

    from lightning.pytorch.utilities import rank_zero_only

    found: lazy_types.Frontier | None = rank_zero_only(write_frontier)(out, members, options)
    return found


def fit_members(words: Sequence[str], planned: Sequence[PlannedMember]) -> list[PlannedMember]:
    """Fit the members that are not there yet; their verifier is loaded once.

    Returns:
        Those that are there now: bits that cannot be chosen within a target cost are left out, with a notice.
    """
    load = SharedVerifiers()
    fitted: list[PlannedMember] = []
    for member in planned:
        folder, cost = str(member.folder), member.target_cost
        own = ["--out", folder, "--trainer.default_root_dir", folder, *member.words]
        own += [] if cost is None else ["--model.target_cost", str(cost)]
        try:
            if not (member.folder / FIT_FILE).is_file():
                fit([*words, *own], load)
        except SpecError as error:
            if not member.words:
                raise
            notice(f"{member.folder.name} is left out: {error}")
        else:
            fitted.append(member)
    return fitted


def write_frontier(out: Path, members: Sequence[PlannedMember], options: Namespace) -> lazy_types.Frontier:
    """Measure the members, print the table, and say where the results are."""
    found = measure_frontier(out, members, options.verifier, options.dtype, options.device)
    Console(highlight=False).print(frontier_table(found))
    say_written(out / FRONTIER_FILE)
    say_written(out / PICTURE)
    return found


def parse_options(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and the words that are meant for ``viasd fit``."""
    parser = FrontierParser(
        prog="viasd frontier",
        allow_abbrev=False,
        description="Fit a slim verifier for each of several target costs, and set agreement against cost.",
        epilog="All other options, --config among them, are those of viasd fit: see viasd fit --help.",
    )
    parser.add_argument("--target_costs", required=True, help="JSON list of target costs: '[0.35, 0.5, 0.65]'")
    parser.add_argument("--out", required=True, help="folder for the fits, the table and the picture")
    parser.add_argument("--verifier", help="where to find the verifier for the timing, in place of the name in the fit")
    parser.add_argument(
        "--low_bits",
        default="",
        help="members in low bits beside them, comma-separated: 8 (all sublayers), 4_mlp (MLPs in 4 bits, the rest in "
        "8), 4_mlp_gptq (the same, rounded by GPTQ), 8_span (a run of layers left out for each target cost, the rest "
        "in 8), auto (bits chosen for each target cost), or all",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="number format of the timing; where it is left out float32, or bfloat16 where members have low bits and "
        "this machine kernels for them",
    )
    parser.add_argument("--device", default="cpu", help="where passes are timed")
    return parser.parse_known_args([with_underscores(word) for word in words])


def parse_costs(words: str) -> list[float]:
    """Target costs, rising, each once.

    Raises:
        CalibrationError: no list of costs.

    Example:
        >>> parse_costs("[0.5, 0.35, 0.5]")
        [0.35, 0.5]
    """
    try:
        return sorted(set(Costs.validate_json(words)))
    except ValidationError as error:
        raise CalibrationError(
            f"--target_costs is {words!r}; give a JSON list of shares of q's cost between 0 and 1: '[0.35, 0.5]'"
        ) from error


def parse_low_bits(words: str) -> list[str]:
    """Names of members in low bits, each once.

    Raises:
        CalibrationError: there is none of that name.

    Example:
        >>> parse_low_bits("auto,8"), parse_low_bits("")
        (['auto', '8'], [])
    """
    if words.strip() == "all":
        return [*LOW_BIT_FITS]
    return parse_methods(words, LOW_BIT_FITS, CalibrationError) if words.strip() else []


def check_free(words: Sequence[str]) -> None:
    """Refuse options of ``viasd fit`` that are the frontier's to set.

    Raises:
        CalibrationError: naming the first one.
    """
    taken = [word for word in words if word.partition("=")[0] in OWN_OPTIONS]
    if taken:
        raise CalibrationError(f"{taken[0]} differs from member to member of a frontier, which sets it; leave it out")


def frontier_table(frontier: lazy_types.Frontier) -> Table:
    """What was measured, as a table: one row a member."""
    from viasd_calib.evaluation.frontier import CONFIDENT_SHARES

    widths = list(frontier.members[0].relative_cost)
    headings = ["", *(f"cost, width {width}" for width in widths), "agreement"]
    most_confident = [f"most confident {float(share):.0%}" for share in CONFIDENT_SHARES]
    low = any(member.low_bits for member in frontier.members)
    table = new_table(
        "frontier, on texts held back",
        [*headings, *most_confident, "attention skipped", "MLP skipped", *(["low bits"] if low else [])],
        caption=f"cost: of a slim pass over a full one, measured; {frontier.dtype}, {frontier.hardware['device']}",
    )
    for member in frontier.members:
        costs = [f"{member.relative_cost[width]:.2f}" for width in widths]
        confident = [f"{member.agreement_confident[share]:.4f}" for share in CONFIDENT_SHARES]
        parts = [runs(member.attention_skip), runs(member.mlp_skip), *([member.low_bits or "none"] if low else [])]
        table.add_row(member.folder, *costs, f"{member.agreement:.4f}", *confident, *parts)
    return table
