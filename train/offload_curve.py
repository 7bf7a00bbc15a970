"""Where three tiers pay: decoding at several speeds of reading the verifier's layers, each tuned for it.

Each speed is a point: thresholds and stop bounds are searched on calibrate prompts at its costs, for the three tiers
and for speculative decoding alike, by a replay of the verifier's own answers and by decoding what it proposes; then all
methods decode other prompts. Speeds of --rates are *simulated*: layers lie in the host's memory, and reading them is
slowed down. --memory is the same with nothing slowed down, --disk the disk as it is. --profile draws a line where a
machine lies by what ``viasd profile --offload disk`` measured on it; nothing was decoded there.

Each point is a file in --out, written once it is whole. A run that was stopped goes on after the last one; points of
other prompts, or of another spec, are refused and never written over.

    python train/offload_curve.py --spec checkpoints/smollm2-135m/offload.json --prompts spec_bench.jsonl --limit 12 \
        --rates '500MB,1GB,2GB,4GB,8GB,16GB' --disk --memory --out runs/offload_curve
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.policy_search import time_policies
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.digest import policy_digest
from viasd_calib.errors import BenchError, ViasdError
from viasd_calib.evaluation.bench import BenchResult, BenchSettings, run_bench
from viasd_calib.evaluation.plots import CostPoint, read_off, speedup_against_cost, write_figure
from viasd_calib.files import read_json, write_json
from viasd_calib.host_memory import keep_freed_memory
from viasd_calib.option_types import bytes_of
from viasd_calib.pipeline.checks import check_out_folder
from viasd_calib.pipeline.fitted import policy_decoder, with_policy
from viasd_calib.pipeline.options import BenchOptions
from viasd_calib.pipeline.prompt_choice import choose_unseen, load_prompts
from viasd_calib.pipeline.replayed import calibrate_grid, predict_policies
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.held_back import text_of
from viasd_calib.profiling.profile import LatencyProfile, check_profile, load_profile
from viasd_calib.prompts import EMBEDDED, Prompt, SplitShares, draw_prompts, select_split, split_sha256
from viasd_calib.slim.cost import CONTEXT
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.spec import Gates, RoutingSpec, load_spec
from viasd_calib.traces.texts import TraceText

METHODS = ["autoregressive", "speculative", "three_tier", "self_speculative"]
KEPT_UP = 0.9
"""Share of a rate at which layers must have been read for the point to be said to have that rate."""


class Asked(BaseModel):
    """What a point is a measurement of, beside its speed; points of one picture have the same.

    Attributes:
        policy_sha256: of the spec, whose thresholds the search replaces.
        tuning_sha256: of the prompts that thresholds were searched on.
        prompts_sha256: of those that were then decoded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy_sha256: str
    tuning_sha256: str
    prompts_sha256: str
    max_new_tokens: int


class Point(BaseModel):
    """One speed of reading.

    Attributes:
        bytes_per_second: what reading was slowed down to; None for as fast as it is.
        full_seconds: of a full pass over one new token.
        slim_seconds: of a slim one.
        gates: what the search found.
    """

    name: str
    asked: Asked
    bytes_per_second: float | None
    full_seconds: float
    slim_seconds: float
    gates: Gates
    bench: BenchResult

    def drawn(self) -> CostPoint:
        """The point in the picture; a rate at which layers could not be read is named with what was reached."""
        rows = self.bench.methods
        found = {name: row.decode_speedup_vs_speculative for name, row in rows.items() if name != "speculative"}
        speedups = {name: one for name, one in found.items() if one is not None}
        name, read = self.name, self.bench.offload
        if self.bytes_per_second is not None and read is not None:
            reached = read.cold_bytes_per_second
            name = f"{self.bytes_per_second / 1e9:g} GB/s"
            name += f" (read at {reached / 1e9:.2g})" if reached < KEPT_UP * self.bytes_per_second else ""
        return CostPoint(name, self.full_seconds / self.slim_seconds, self.bytes_per_second is not None, speedups)


def answers(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> list[tuple[TraceText, int]]:
    """The verifier's own, to replay: what it writes is what it chooses."""
    decoder = engine.decoder("three_tier", "strict")
    turns = [turn for prompt in prompts for turn in converse(decoder, engine.verifier, prompt, tokens)]
    found = [(torch.tensor(turn.prompt_ids), torch.tensor(turn.generation.tokens)) for turn in turns]
    return [
        (text_of(number, torch.cat([prompt, answer]), answer, len(prompt)), tokens)
        for number, (prompt, answer) in enumerate(found)
    ]


def tuned(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> tuple[Engine, ReplayCosts]:
    """The same with thresholds and stop bounds that were fastest on these prompts, and what passes cost."""
    decoding = engine.spec.decoding
    grid = calibrate_grid(decoding.draft_length, decoding.max_pending)
    found = predict_policies(engine, answers(engine, prompts, tokens), prompts, tokens, grid)
    predicted = {one.policy: one.seconds for one in found.every if one.policy.drafter in (None, "none")}
    timing = time_policies(
        lambda policy: policy_decoder(engine, policy), predicted, engine.verifier, prompts, tokens, deciding=prompts
    )
    best = with_policy(engine, timing.fastest_with_slim.policy)
    gates = best.spec.gates.model_copy(update={"speculative_stop_below": timing.speculative_stop})
    return replace(best, spec=best.spec.model_copy(update={"gates": gates})), found.costs


def measure(
    spec: str, name: str, offload: Offload, asked: Asked, tuning: Sequence[Prompt], prompts: Sequence[Prompt]
) -> Point:
    """One speed, searched and then compared."""
    engine, costs = tuned(load_engine(spec, offload=offload), tuning, asked.max_new_tokens)
    settings = BenchSettings(
        methods=METHODS, max_new_tokens=asked.max_new_tokens, dtype=engine.spec.verifier.dtype, audit="strict", seed=0,
        backend=engine.backend, offload=offload.entry(),
    )  # fmt: skip
    return Point(
        name=name, asked=asked, bytes_per_second=offload.bytes_per_second, full_seconds=costs.full[0],
        slim_seconds=costs.slim[0], gates=engine.spec.gates, bench=run_bench(engine, prompts, settings),
    )  # fmt: skip


def kept_points(out: Path, names: Sequence[str], asked: Asked) -> dict[str, Point]:
    """Points of these names that an earlier run has measured.

    Raises:
        BenchError: a file is damaged, or of something else; nothing is written over.
    """
    mend = "give another --out, or remove the file to measure it again"
    found: dict[str, Point] = {}
    for name in names:
        path = out / f"{name}.json"
        if not path.exists():
            continue
        try:
            found[name] = read_json(Point, path, "train/offload_curve.py", BenchError)
        except BenchError as error:
            raise BenchError(f"{str(error).partition(';')[0]}; {mend}") from error
        other = [key for key, value in asked if value != getattr(found[name].asked, key)]
        if other:
            raise BenchError(f"{path} was measured with another {', '.join(other)}; {mend}")
    return found


def machine_ratio(profile: LatencyProfile, spec: RoutingSpec) -> float:
    """Seconds of a full pass over one new token on a profile's machine, over those of a slim one.

    At the context at which the points' passes are timed, or at the nearest that the profile has.

    Raises:
        ViasdError: it was measured with another spec, or at no width of one token.
    """
    check_profile(profile, spec)
    contexts = profile.settings.contexts
    context = min(max(CONTEXT, contexts[0]), contexts[-1])
    return profile.seconds("full", 1, context) / profile.seconds("slim", 1, context)


def say_machine(path: str, profile: LatencyProfile, ratio: float, points: Sequence[CostPoint]) -> None:
    """Print where a profile's machine lies, and what the lines say there."""
    read, way = profile.offload, "all layers in memory"
    if read is not None:
        way = f"layers read from {'disk' if read.kind == 'disk' else 'memory'}"
        way += "" if read.bandwidth is None else f", slowed down to {read.bandwidth / 1e9:g} GB/s (simulated)"
    speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in read_off(points, ratio).items())
    print(f"{path} ({way}): a full pass costs {ratio:.1f} slim ones; "
          f"read off the lines, not measured: {speeds or 'nothing, since they end before'}")  # fmt: skip


def offloads(rates: str, disk: bool, memory: bool) -> dict[str, Offload]:
    """The speeds, by name."""
    named = [rate.strip() for rate in rates.split(",") if rate.strip()]
    found = {rate: Offload("cpu", bytes_per_second=bytes_of("--rates", rate)) for rate in named}
    found |= {"disk": Offload("disk")} if disk else {}
    return found | ({"memory": Offload("cpu")} if memory else {})


def draw_curve(args: argparse.Namespace) -> None:
    """Measure what is not measured yet, and draw all.

    Raises:
        ViasdError: options that cannot be, before anything is measured.
    """
    speeds = offloads(args.rates, args.disk, args.memory)
    if not speeds:
        raise BenchError("no speed is asked for; give --rates, --disk or --memory")
    check_out_folder("--out", str(args.out))
    spec = load_spec(args.spec)
    profiles: Mapping[str, LatencyProfile] = {} if args.profile is None else {args.profile: load_profile(args.profile)}
    ratios = {path: machine_ratio(profile, spec) for path, profile in profiles.items()}
    options = BenchOptions(spec=args.spec, prompts=args.prompts, limit=args.limit, json=str(args.out))
    prompts = [*choose_unseen(options, spec).prompts]
    tuning = draw_prompts(select_split(load_prompts(args.tuning_prompts), "calibrate", SplitShares()), args.tuning)
    asked = Asked(
        policy_sha256=policy_digest(spec), tuning_sha256=split_sha256(tuning), prompts_sha256=split_sha256(prompts),
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    points = kept_points(args.out, [*speeds], asked)
    for name, offload in speeds.items():
        if name not in points:
            points[name] = measure(args.spec, name, offload, asked, tuning, prompts)
            write_json(args.out / f"{name}.json", points[name])
        drawn = points[name].drawn()
        speedups = ", ".join(
            f"{method} {one.median:.2f}" + ("" if one.bounds is None else f" ({one.low:.2f} to {one.high:.2f})")
            for method, one in drawn.speedups.items()
        )
        simulated = ", simulated" if drawn.simulated else ""
        print(f"{drawn.name}{simulated}: a full pass costs {drawn.cost_ratio:.1f} slim ones; "
              f"over tuned speculative decoding: {speedups}", flush=True)  # fmt: skip
    drawn_points = [points[name].drawn() for name in speeds]
    for path, ratio in ratios.items():
        say_machine(path, profiles[path], ratio, drawn_points)
    write_figure(speedup_against_cost(drawn_points, next(iter(ratios.values()), None)), args.out / "offload_curve.png")
    print(f"wrote {args.out / 'offload_curve.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--prompts", required=True, help="JSONL that nothing was learned from")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--tuning", type=int, default=6, help="calibrate prompts to search on")
    parser.add_argument(
        "--tuning-prompts", default=EMBEDDED, help="where these come from; the package's own by default"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rates", default="500MB,1GB,2GB,4GB,8GB,16GB", help="bytes a second, simulated")
    parser.add_argument("--disk", action="store_true", help="the disk as it is, too")
    parser.add_argument("--memory", action="store_true", help="layers in the host's memory, not slowed down, too")
    parser.add_argument("--profile", help="JSON of viasd profile --offload: draws where that machine lies")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    try:
        draw_curve(args)
    except ViasdError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
