"""``viasd fit``."""

from __future__ import annotations

from collections.abc import Sequence

from viasd_calib.cli.rounds import fit_rounds
from viasd_calib.cli.router_cli import OptionsCLI, RouterCLI
from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.training.lightning_output import quiet_lightning


def fit(words: Sequence[str], _load: LoadVerifier = load_verifier) -> None:
    """Run ``viasd fit`` with LightningCLI's options."""
    quiet_lightning()
    options = OptionsCLI(words).config
    if options.rounds == 1:
        RouterCLI(load=_load, args=["fit", *words])
    else:
        fit_rounds(words, options, _load)
