"""``viasd fit``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from viasd_calib.cli.configurations import with_shipped_configurations
from viasd_calib.cli.fit_options import check_devices, check_given, given_options, last_checkpoint
from viasd_calib.cli.parser import with_underscores
from viasd_calib.errors import CalibrationError
from viasd_calib.pipeline import lazy_types


def fit(words: Sequence[str], _load: lazy_types.LoadVerifier | None = None) -> None:
    """Run ``viasd fit`` with LightningCLI's options.

    Raises:
        ViasdError: options that the router cannot be trained with; most are refused before Lightning is loaded.
    """
    words = with_shipped_configurations([with_underscores(word) for word in words])
    given = given_options(words)
    check_given(given)
    if given.get("ckpt_path") == "last":
        checkpoint = last_checkpoint(given)
        print(f"notice: goes on from {checkpoint}", file=sys.stderr)
        words = [*words, f"--ckpt_path={checkpoint}"]

    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from viasd_calib.cli.rounds import fit_rounds
    from viasd_calib.cli.router_cli import OptionsCLI, RouterCLI
    from viasd_calib.models import load_verifier
    from viasd_calib.training.lightning_output import quiet_lightning

    load = _load or load_verifier
    quiet_lightning()
    read = OptionsCLI(words)
    check_devices(read.config.trainer.accelerator, read.config.trainer.precision)
    try:
        if read.config.rounds == 1:
            RouterCLI(load=load, args=["fit", *read.words])
        else:
            fit_rounds(read.words, read.config, load)
    except MisconfigurationException as error:
        raise CalibrationError(f"Lightning refuses these options: {' '.join(str(error).split())}") from error
