"""What Lightning says that does not help, named one by one; everything else it says is shown."""

from __future__ import annotations

import logging
import re
import warnings

ADVERTISEMENT = "Tip: For seamless cloud"
"""How Lightning begins its advertisements of other packages."""

BESIDE_THE_POINT = (
    # Lightning's own use of torch: nothing a user could mend.
    "`isinstance(treespec, LeafSpec)` is deprecated",
    # A checkpoint is to hold the state after the step, so that a resumed run goes on with the next one.
    "Using ModelCheckpoint with manual optimization and every_n_train_steps, but no pre-optimization state",
    # That is how `viasd fit` hands over the words after its own.
    "LightningCLI's args parameter is intended to run from within Python",
)
"""How warnings begin that are wrong for this package's training."""


def quiet_lightning() -> None:
    """Silence Lightning's advertisements and the warnings in ``BESIDE_THE_POINT``, and nothing else."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    for beginning in BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", message=re.escape(beginning), module=r"lightning\.")


def no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a log record may be shown.

    Example:
        >>> said = logging.makeLogRecord({"msg": "Tip: For seamless cloud logging, try ..."})
        >>> no_advertisement(said), no_advertisement(logging.makeLogRecord({"msg": "GPU available: False"}))
        (False, True)
    """
    return ADVERTISEMENT not in record.getMessage()
