"""Where three tiers pay: decoding at several speeds of reading the verifier's layers, each tuned for it.

Each speed is a point: thresholds and stop bounds are searched on calibrate prompts at its costs, for the three tiers
and for speculative decoding alike, by a replay of the verifier's own answers and by decoding what it proposes; then all
methods decode other prompts. Speeds are *simulated*: layers lie in the host's memory, and reading them is slowed down.
One point, if asked for, is the disk as it is. A point that is done is not measured again.

    python train/offload_curve.py --spec checkpoints/smollm2-135m/offload.json --prompts spec_bench.jsonl --limit 12 \
        --rates '500MB,1GB,2GB,4GB,8GB,16GB' --disk --memory --out runs/offload_curve
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel

from viasd_calib.calibration.policy_search import time_policies
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.evaluation.bench import BenchResult, BenchSettings, run_bench
from viasd_calib.evaluation.plots import write_figure
from viasd_calib.evaluation.plots.offload import CostPoint, speedup_against_cost
from viasd_calib.files import read_json, write_json
from viasd_calib.host_memory import keep_freed_memory
from viasd_calib.option_types import bytes_of
from viasd_calib.pipeline.fitted import policy_decoder, with_policy
from viasd_calib.pipeline.options import BenchOptions
from viasd_calib.pipeline.prompt_choice import choose_unseen, load_prompts
from viasd_calib.pipeline.replayed import calibrate_grid, predict_policies
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.held_back import text_of
from viasd_calib.prompts import EMBEDDED, Prompt, SplitShares, draw_prompts, select_split
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.spec import Gates, load_spec
from viasd_calib.traces.texts import TraceText

METHODS = ["autoregressive", "speculative", "three_tier", "self_speculative"]


class Point(BaseModel):
    """One speed of reading.

    Attributes:
        bytes_per_second: what reading was slowed down to; None for as fast as it is.
        full_seconds: of a full pass over one new token.
        slim_seconds: of a slim one.
        gates: what the search found.
    """

    name: str
    bytes_per_second: float | None
    full_seconds: float
    slim_seconds: float
    gates: Gates
    bench: BenchResult

    def drawn(self) -> CostPoint:
        """The point in the picture."""
        rows = self.bench.methods
        found = {name: row.decode_speedup_vs_speculative for name, row in rows.items() if name != "speculative"}
        speedups = {name: one for name, one in found.items() if one is not None}
        return CostPoint(self.full_seconds / self.slim_seconds, self.bytes_per_second is not None, speedups)


def answers(engine: Engine, prompts: list[Prompt], tokens: int) -> list[tuple[TraceText, int]]:
    """The verifier's own, to replay: what it writes is what it chooses."""
    decoder = engine.decoder("three_tier", "strict")
    turns = [turn for prompt in prompts for turn in converse(decoder, engine.verifier, prompt, tokens)]
    found = [(torch.tensor(turn.prompt_ids), torch.tensor(turn.generation.tokens)) for turn in turns]
    return [
        (text_of(number, torch.cat([prompt, answer]), answer, len(prompt)), tokens)
        for number, (prompt, answer) in enumerate(found)
    ]


def tuned(engine: Engine, prompts: list[Prompt], tokens: int) -> tuple[Engine, ReplayCosts]:
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
    args: argparse.Namespace, name: str, offload: Offload, tuning: list[Prompt], prompts: list[Prompt]
) -> Point:
    """One speed, searched and then compared."""
    engine, costs = tuned(load_engine(args.spec, offload=offload), tuning, args.max_new_tokens)
    settings = BenchSettings(
        methods=METHODS, max_new_tokens=args.max_new_tokens, dtype=engine.spec.verifier.dtype, audit="strict", seed=0,
        backend=engine.backend, offload=offload.entry(),
    )  # fmt: skip
    return Point(
        name=name, bytes_per_second=offload.bytes_per_second, full_seconds=costs.full[0], slim_seconds=costs.slim[0],
        gates=engine.spec.gates, bench=run_bench(engine, prompts, settings),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--prompts", required=True, help="JSONL that nothing was learned from")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--tuning", type=int, default=6, help="embedded calibrate prompts to search on")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rates", default="500MB,1GB,2GB,4GB,8GB,16GB", help="bytes a second, simulated")
    parser.add_argument("--disk", action="store_true", help="the disk as it is, too")
    parser.add_argument("--memory", action="store_true", help="layers in the host's memory, not slowed down, too")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    keep_freed_memory()
    options = BenchOptions(spec=args.spec, prompts=args.prompts, limit=args.limit, json=str(args.out))
    prompts = [*choose_unseen(options, load_spec(args.spec)).prompts]
    tuning = draw_prompts(select_split(load_prompts(EMBEDDED), "calibrate", SplitShares()), args.tuning)
    speeds = {
        rate: Offload("cpu", bytes_per_second=bytes_of("--rates", rate)) for rate in args.rates.split(",") if rate
    }
    speeds |= {"disk": Offload("disk")} if args.disk else {}
    speeds |= {"memory": Offload("cpu")} if args.memory else {}
    points = []
    for name, offload in speeds.items():
        path = args.out / f"{name}.json"
        if not path.exists():
            write_json(path, measure(args, name, offload, tuning, prompts))
        points.append(read_json(Point, path, "train/offload_curve.py"))
        drawn = points[-1].drawn()
        speedups = {name: f"{one.median:.2f} {one.bounds}" for name, one in drawn.speedups.items()}
        print(f"{name}: a full pass costs {drawn.cost_ratio:.1f} slim ones; over speculative decoding {speedups}")
    write_figure(speedup_against_cost([point.drawn() for point in points]), args.out / "offload_curve.png")


if __name__ == "__main__":
    main()
