"""``viasd route-quality``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from viasd_calib.choices import Backend
from viasd_calib.cli.notices import say_written
from viasd_calib.devices import check_device
from viasd_calib.files import write_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_out_file, check_spec
from viasd_calib.pipeline.numbers import Count
from viasd_calib.pipeline.prompt_choice import check_prompts, choose_unseen
from viasd_calib.prompts import EMBEDDED, Split, SplitShares
from viasd_calib.spec import DType
from viasd_calib.tables import new_table


def route_quality(
    spec: str,
    json: str,
    prompts: str = EMBEDDED,
    split: Split | None = None,
    shares: SplitShares | None = None,
    limit: Count | None = None,
    include_fitted: bool = False,
    max_new_tokens: Count = 128,
    batch_size: Count = 16,
    verifier: str | None = None,
    draft_model: str | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
    _load: lazy_types.LoadVerifier | None = None,
) -> lazy_types.RouteQuality:
    """Measure how well the slim verifier speaks for the full one, and what a pass of it costs.

    The full verifier answers the prompts greedily; the slim one is asked at every place of these answers.

    Args:
        spec: path of the routing spec.
        json: where the result is written.
        prompts: prompt file (JSONL or another: see README), NAME:SPLIT of a data set of the hub, or "embedded" for the
            package's own.
        split: take this split's prompts alone, by hash; null takes all.
        shares: shares of the splits.
        limit: take this many prompts, spread evenly over the tasks.
        include_fitted: take in the prompts that the spec was fitted or calibrated on, which are left out by default.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        verifier: where to find the verifier, in place of the name in the spec.
        draft_model: the same for the draft model, where the spec names one.
        dtype: number format, in place of the spec's.
        device: where models run.
        backend: what runs them: eager, packed (CPU) or compiled (minutes to compile first); the faster one of the
            first two where it is left out.
    """
    check_out_file("--json", json)
    check_device(device)
    spec, read = check_spec(spec, verifier, draft_model)
    chosen = choose_unseen(prompts, split, shares, limit, read, include_fitted=include_fitted).prompts

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.evaluation.route_quality import measure_quality
    from viasd_calib.models import load_verifier
    from viasd_calib.slim.cost import CONTEXT, relative_cost
    from viasd_calib.traces.capture import capture
    from viasd_calib.traces.data import read_texts
    from viasd_calib.traces.folder import CaptureSettings

    load = _load or load_verifier
    engine = load_engine(
        spec,
        spec=read,
        verifier=verifier,
        draft_model=draft_model,
        dtype=dtype,
        device=device,
        backend=backend,
        load=load,
    )
    check_prompts(engine.verifier, chosen, max_new_tokens)
    engine.prepare_passes([CONTEXT])
    cost = relative_cost(engine.routed)  # before other work warms or fills the caches
    with tempfile.TemporaryDirectory(prefix="viasd-") as folder:
        settings = CaptureSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
        capture(engine.verifier, None, "none", chosen, Path(folder), settings)
        texts = read_texts(Path(folder))
    quality = measure_quality(engine.routed, texts, cost)
    write_json(Path(json), quality)
    Console(highlight=False).print(quality_table(quality))
    say_written(json)
    return quality


def quality_table(quality: lazy_types.RouteQuality) -> Table:
    """What was measured, as a table."""
    table = new_table("slim verifier against full verifier", ["", "agreement"])
    table.add_row("all places, directly after the full verifier", f"{quality.agreement:.4f}")
    for share, agreement in quality.agreement_confident.items():
        table.add_row(f"  the most confident {float(share):.0%}", f"{agreement:.4f}")
    for distance, agreement in quality.by_distance.items():
        table.add_row(f"{distance} tokens after it", f"{agreement:.4f}")
    for task, agreement in quality.by_task.items():
        table.add_row(task, f"{agreement:.4f}")
    costs = ", ".join(f"{cost:.2f} at width {width}" for width, cost in quality.relative_cost.items())
    table.caption = f"KL {quality.kl:.4f} nats; relative cost of a slim pass {costs}"
    return table
