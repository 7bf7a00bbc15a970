"""Prompts in Parquet files, and in data sets of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from viasd_calib.errors import PromptError
from viasd_calib.prompts.records import Record

HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
"""``name``, ``name:split`` or ``name:configuration:split``."""

REACHED_WITHIN = 10.0
"""Seconds until the hub must have answered."""


def parquet_records(path: Path) -> list[Record]:
    """Entries of a Parquet file, a row each.

    Raises:
        PromptError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path}: a damaged Parquet file ({_first_line(error)}); write it again") from error
    return [Record(f"row {number}", row) for number, row in enumerate(rows, 1)]


def hub_records(source: str) -> list[Record]:
    """Entries of a split of a data set of the hub, a row each.

    Args:
        source: as :data:`HUB_NAME` has it; a split may be left out where there is but one.

    Raises:
        PromptError: there is no such data set, it cannot be reached, or the split is not said.
    """
    from huggingface_hub import HfApi, constants

    matched = HUB_NAME.fullmatch(source)
    assert matched is not None, "the caller asks only for names"
    name, config, split = matched["name"], matched["config"], matched["split"]
    if split is None:
        config, split = None, config
    try:
        if not constants.HF_HUB_OFFLINE:  # offline, datasets looks into its cache; else it tries for half a minute
            HfApi().dataset_info(name, timeout=REACHED_WITHIN)
        import datasets

        datasets.disable_progress_bars()
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # offline, unknown, gated, or of another form: each library below fails in its own way
        raise PromptError(
            f"cannot read prompts from {source!r}: there is no such file, and as a data set of the hub it cannot be "
            f"loaded ({_first_line(error)}); give the path of a local file (.jsonl, .json, .csv, .tsv, .txt, "
            ".parquet), or NAME:SPLIT or NAME:CONFIGURATION:SPLIT of a data set"
        ) from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise PromptError(f"{source!r} has the splits {', '.join(found)}; say which: {source}:{next(iter(found))}")
        (found,) = found.values()
    rows = found.with_format("arrow")[:].to_pylist()
    return [Record(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
