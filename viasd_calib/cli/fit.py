"""``viasd fit``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from viasd_calib.cli import lazy_types
from viasd_calib.cli.checks import check_out_folder, check_traces
from viasd_calib.errors import CalibrationError


def fit(words: Sequence[str], _load: lazy_types.LoadVerifier | None = None) -> None:
    """Run ``viasd fit`` with LightningCLI's options."""
    check_words(words)

    from viasd_calib.cli.rounds import fit_rounds
    from viasd_calib.cli.router_cli import OptionsCLI, RouterCLI
    from viasd_calib.models import load_verifier
    from viasd_calib.training.lightning_output import quiet_lightning

    load = _load or load_verifier
    quiet_lightning()
    options = OptionsCLI(words).config
    if options.rounds == 1:
        RouterCLI(load=load, args=["fit", *words])
    else:
        fit_rounds(words, options, load)


def check_words(words: Sequence[str]) -> None:
    """Refuse files and folders that are not there, before Lightning is loaded.

    Raises:
        ViasdError: naming the first.
    """
    for config in values_of("--config", words):
        if not Path(config).is_file():
            raise CalibrationError(f"there is no configuration {config}; give --config the path of a YAML file")
    for out in values_of("--out", words):
        check_out_folder("--out", out)
    for folders in values_of("--data.folders", words):
        try:
            listed = json.loads(folders)
        except ValueError:
            continue  # LightningCLI reads more than JSON, or says what is wrong
        if isinstance(listed, list) and all(isinstance(folder, str) for folder in listed):
            check_traces("--data.folders", listed)


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Every value that ``words`` give an option.

    Example:
        >>> values_of("--out", ["--out", "a", "--limit=3", "--out=b"])
        ['a', 'b']
    """
    spaced = [value for word, value in pairwise(words) if word == option]
    return spaced + [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]
