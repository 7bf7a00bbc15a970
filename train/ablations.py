"""What each part of the recipe of a fit gains: one fit with and without it, compared on texts of other prompts.

Every variant is `viasd fit` with the same configuration, seed and number of steps, but for what its name says. Routes
come from a `viasd search`, so that no variant looks for its own. A variant that is done is neither trained nor
compared again.

    python train/ablations.py --config configs/fit/ablations.yaml --search runs/search.json \
        --judge runs/smollm2-135m/traces-gates --out runs/ablations
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.cli.fit import fit
from viasd_calib.cli.fit_cli import FitCLI
from viasd_calib.errors import SpecError
from viasd_calib.file_names import FIT_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.host_memory import keep_freed_memory
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.pipeline.fit_once import gate_texts
from viasd_calib.pipeline.low_bit_fits import LOW_BIT_FITS
from viasd_calib.pipeline.notices import notice
from viasd_calib.replay.agreement import ComparedPlaces, compare_places, directly_after, text_cache
from viasd_calib.replay.student import run_starts
from viasd_calib.slim.decoding_copy import decoding_cost
from viasd_calib.slim.loading import load_routed
from viasd_calib.slim.low_bit import widened_weights
from viasd_calib.slim.parts.base import Sizes, load_parts
from viasd_calib.tables import new_table
from viasd_calib.traces.texts import TraceText
from viasd_calib.training.search.record import SearchResult, load_search

RESULT = "ablations.json"
RUN = 8
"""Longest run of pending places that every variant is compared at, whatever it was trained for."""
COST_WIDTH = 4
"""Tokens of the passes whose costs are compared."""
GATE_STEPS = 60
"""Steps in which gates learn a route."""
ONE_STEP = ("--trainer.max_steps", "1", "--model.adapter_learning_rate", "0", "--model.bridge_learning_rate", "0")
"""What is fitted in closed form stays as it is."""
NO_ADAPTER = ("--model.adapter_rank", "0")
NO_BRIDGES = ("--model.bridges", "false")
NO_CARRY = ("--model.bridge_carry", "false")

PARTS: Mapping[str, Sequence[str]] = {
    "nothing trained, no bridge": (*NO_ADAPTER, *NO_BRIDGES, *ONE_STEP),
    "bridge in closed form, no carry": (*NO_ADAPTER, *NO_CARRY, *ONE_STEP),
    "bridge in closed form": (*NO_ADAPTER, *ONE_STEP),
    "bridge, trained": NO_ADAPTER,
    "adapter alone": NO_BRIDGES,
    "bridge and adapter, no carry": NO_CARRY,
    "bridge and adapter": (),
    "trained directly after q alone": ("--model.max_run", "1"),
    "trained on its own cache": ("--model.max_run", "100000"),
    "total variation": ("--model.objective", "total_variation"),
    "margin cost": ("--model.objective", "margin"),
    "10,000 trace tokens": ("--data.limit_tokens", "10000"),
    "50,000 trace tokens": ("--data.limit_tokens", "50000"),
}
"""Options of ``viasd fit`` by what they leave out or put in another's place; all on the route of the span."""
LOW_BITS: Mapping[str, Sequence[str]] = {
    "all in 8 bits": LOW_BIT_FITS["8"],
    "MLPs in 4 bits, the rest in 8": LOW_BIT_FITS["4_mlp"],
    "MLPs in 4 bits by GPTQ, the rest in 8": LOW_BIT_FITS["4_mlp_gptq"],
    "bits chosen": LOW_BIT_FITS["auto"],
}
"""Options for slim verifiers that leave out nothing; nothing of them is trained."""
SPAN_IN_8 = ("--model.parts", "{low_bit: {bits: 8}}")
"""What the route of the span keeps is in 8 bits."""


class Row(BaseModel):
    """One variant on the held-back texts.

    Attributes:
        agreement: directly after q.
        confident: the same on the 60 % of places where q' is most_confident.
        pending: agreement up to ``RUN`` - 1 places after q, as a decoder meets them.
        kl: KL(q || q') directly after q, in nats.
        cost: of a slim pass over a full one of width ``COST_WIDTH``, as both decode here; None in what earlier releases
            wrote.
    """

    agreement: float
    confident: float
    pending: float
    kl: float
    cost: float | None = None


class Ablations(BaseModel):
    """All variants, by name, on the same texts.

    Attributes:
        judge: trace folder of the held-back texts.
        limit: how many of them.
    """

    judge: str
    limit: int
    rows: dict[str, Row]


def rows_kept(path: Path, judge: str, limit: int) -> dict[str, Row]:
    """Variants that an earlier run has compared on the same texts."""
    if not path.is_file():
        return {}
    found = Ablations.model_validate_json(path.read_text(encoding="utf-8"))
    return found.rows if (found.judge, found.limit) == (judge, limit) else {}


def variants(found: SearchResult, search: str, steps: int) -> Iterator[tuple[str, list[str]]]:
    """Every variant's name and its options.

    Args:
        steps: of bridge and adapter; the gates learn a route in steps of their own before.
    """
    for name, options in PARTS.items():
        yield name, [*given(search, "span"), *options]
    for method, row in found.found.items():
        if method != "span" and row.route.low_bit is None:
            yield f"route by {method}", given(search, method)
    span = given(search, "span")
    yield "bridge in closed form, the rest in 8 bits", [*span, *NO_ADAPTER, *ONE_STEP, *SPAN_IN_8]
    yield "bridge and adapter, the rest in 8 bits", [*span, *SPAN_IN_8]
    target = ["--model.target_cost", str(found.settings.target_cost)]
    for name, options in LOW_BITS.items():
        yield name, [*options, *target]
    learned = {
        "--model.route_choice": "gates",
        "--model.route_steps": str(GATE_STEPS),
        "--model.target_cost": str(found.settings.target_cost),
        "--trainer.max_steps": str(GATE_STEPS + steps),
    }
    yield "route by gates", [word for option in learned.items() for word in option]


def given(search: str, method: str) -> list[str]:
    """Options that take a route which was searched."""
    return ["--model.route_choice", "given", "--model.route_file", search, "--model.route_method", method]


def compared(verifier: Verifier, folder: Path, texts: Sequence[TraceText]) -> Row:
    """The q' of a fit on texts that it did not learn from."""
    fitted = read_json(FitArtifact, folder / FIT_FILE, "viasd fit")
    routed = load_routed(verifier.model, fitted.route, folder)
    draw = torch.Generator().manual_seed(0)
    after: list[ComparedPlaces] = []
    pending: list[ComparedPlaces] = []
    with widened_weights(routed.slim_networks):
        for text in texts:
            cache = text_cache(routed, text)
            starts = run_starts(len(text.ids) - 1, RUN, draw)
            after.append(compare_places(routed, routed.slim_sublayers, text, cache, directly_after(text)))
            pending.append(compare_places(routed, routed.slim_sublayers, text, cache, starts))
    close = ComparedPlaces.joined(after)
    held = load_parts(fitted.route, folder, Sizes.of_config(verifier.model.config))
    cost = decoding_cost(verifier.model, fitted.route, held, widths=[COST_WIDTH])
    return Row(
        agreement=close.agreement(),
        confident=close.agreement(0.6),
        pending=ComparedPlaces.joined(pending).agreement(),
        kl=float(close.kl.mean()),
        cost=cost.measured[COST_WIDTH],
    )


def table_of(rows: Mapping[str, Row]) -> Table:
    """One row a variant."""
    headings = ["", "agreement", "most confident 60 %", f"0 to {RUN - 1} pending", "KL", "cost"]
    table = new_table(
        "variants of one fit",
        headings,
        caption=f"cost: of a slim pass over a full one of width {COST_WIDTH}, measured as both decode here",
    )
    for name, row in rows.items():
        numbers = [f"{number:.3f}" for number in (row.agreement, row.confident, row.pending, row.kl)]
        table.add_row(name, *numbers, "–" if row.cost is None else f"{row.cost:.2f}")
    return table


def command_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="Train variants of one fit and compare them on the same texts.")
    parser.add_argument("--config", required=True, help="of viasd fit, for all of them")
    parser.add_argument("--search", required=True, help="what viasd search wrote, with the method span")
    parser.add_argument("--judge", required=True, help="trace folder with texts of other prompts")
    parser.add_argument("--limit", type=int, default=100, help="texts to compare on")
    parser.add_argument("--only", default="", help="variants whose names hold these words; all where left out")
    parser.add_argument("--out", required=True, help="folder for the fits and the table")
    return parser


def main() -> None:
    options = command_parser().parse_args()
    keep_freed_memory()
    out = Path(options.out)
    rows = rows_kept(out / RESULT, options.judge, options.limit)
    held_back = gate_texts([options.judge], seed=0)
    verifier = load_verifier(held_back.verifier_ref().name_or_path)
    steps = FitCLI(["--config", options.config]).config.trainer.max_steps
    for name, words in variants(load_search(Path(options.search)), options.search, steps):
        if name in rows or options.only not in name:
            continue
        folder = out / name.replace(" ", "-")
        try:
            if not (folder / FIT_FILE).is_file():
                fit(["--config", options.config, "--out", str(folder), *words])
        except SpecError as error:  # where nothing has kernels for low bits, none can be chosen
            if name not in LOW_BITS:
                raise
            notice(f"{name} is left out: {error}")
            continue
        rows[name] = compared(verifier, folder, held_back.drawn_texts(options.limit))
        write_json(out / RESULT, Ablations(judge=options.judge, limit=options.limit, rows=rows))
    Console(highlight=False).print(table_of(rows))


if __name__ == "__main__":
    main()
