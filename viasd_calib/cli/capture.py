"""``viasd capture``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.draft.build import build_drafter, name_draft
from viasd_calib.models import SMOLLM2, LoadVerifier, load_verifier
from viasd_calib.prompts import EMBEDDED, Split, SplitShares, draw_prompts, read_prompts, select_split
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import DType
from viasd_calib.tables import new_table
from viasd_calib.traces import capture as capturing
from viasd_calib.traces.agreement import DraftAgreement, draft_agreement
from viasd_calib.traces.capture import CaptureReport, CaptureSettings


def capture(
    out: str,
    verifier: str = SMOLLM2,
    draft: str = "prompt_lookup",
    prompts: str = EMBEDDED,
    split: Split | None = "fit",
    shares: SplitShares | None = None,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    top_k: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: DType = "float32",
    device: str = "cpu",
    _load: LoadVerifier = load_verifier,
) -> CaptureReport:
    """Log what draft model and verifier say on prompts; a run that was stopped goes on where it was.

    Says at the end how often the draft model's proposals are the verifier's choice.

    Args:
        out: folder for the trace shards.
        verifier: hub id, folder, .gguf file or "smollm2-135m".
        draft: "prompt_lookup", a folder with a shallow drafter, a model with the verifier's vocabulary,
            "prompt_lookup+" and one of the latter two for both together, or "none"; "int8:" or "int4:" before
            folder or model gives it integer weights.
        prompts: prompt file (JSONL), or "embedded" for the package's own.
        split: take this split's prompts alone, by hash; null takes all.
        shares: shares of the splits.
        limit: take this many prompts, drawn by hash.
        max_new_tokens: longest answer.
        batch_size: texts generated together; also the texts of a shard.
        top_k: tokens of each distribution that are logged.
        temperature: 0 for greedy texts.
        seed: of sampling.
        dtype: number format of the verifier.
        device: where models run.
    """
    chosen = read_prompts(prompts)
    if split is not None:
        chosen = select_split(chosen, split, shares or SplitShares())
    chosen = draw_prompts(chosen, limit)
    loaded = _load(verifier, dtype=dtype, device=device)
    drafter = None if draft == "none" else build_drafter(*name_draft(draft), RoutedModel(loaded.model))
    settings = CaptureSettings(
        max_new_tokens=max_new_tokens, batch_size=batch_size, top_k=top_k, temperature=temperature, seed=seed
    )
    report = capturing.capture(loaded, drafter, draft, chosen, Path(out), settings)
    held = f"{report.texts} texts, {report.tokens} tokens, {report.bytes_per_token:.0f} bytes per token"
    if drafter is not None:
        Console().print(agreement_table(draft_agreement(report.folder)))
    say_written(report.folder, held)
    return report


def agreement_table(found: DraftAgreement) -> Table:
    """Share of proposals that are the verifier's choice: one row a task, one column a number of unverified tokens."""
    headings = ["unverified tokens before", *map(str, found.depths)]
    table = new_table("proposals that are the verifier's choice", headings)
    rows: list[tuple[str, str | None]] = [(task, task) for task in found.tasks]
    for name, task in [*rows, ("all", None)]:
        shares = [found.share(task, depth) for depth in found.depths]
        table.add_row(name, *("-" if share is None else f"{share:.3f}" for share in shares))
    return table
