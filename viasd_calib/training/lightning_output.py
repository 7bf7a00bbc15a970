"""Lightning's messages that do not help, named one by one; all others are shown."""

from __future__ import annotations

import logging
import re
import warnings

CHATTER = (
    "Tip: For seamless cloud",  # an advertisement of other packages
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "LOCAL_RANK:",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_",  # the end that was asked for
)
"""What Lightning logs on every run; the bar and what is printed after it show the same."""

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.accelerators.cuda",
)
"""Where it logs that."""

BESIDE_THE_POINT = (
    # Lightning's own use of torch: nothing a user could mend.
    "`isinstance(treespec, LeafSpec)` is deprecated",
    # `viasd fit` passes on its own arguments so.
    "LightningCLI's args parameter is intended to run from within Python",
)
"""How warnings begin that are wrong for this package's training."""


def quiet_lightning() -> None:
    """Silence Lightning's ``CHATTER`` and the warnings in ``BESIDE_THE_POINT``, and nothing else."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(no_chatter)
    for beginning in BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", message=re.escape(beginning), module=r"lightning\.")


def no_chatter(record: logging.LogRecord) -> bool:
    """Whether a log record may be shown: a warning always, and else what is not of every run.

    Example:
        >>> seed = logging.makeLogRecord({"msg": "Seed set to 0", "levelno": logging.INFO})
        >>> ended = logging.makeLogRecord({"msg": "`Trainer.fit` stopped: No data.", "levelno": logging.INFO})
        >>> no_chatter(seed), no_chatter(ended)
        (False, True)
    """
    return record.levelno >= logging.WARNING or not any(words in record.getMessage() for words in CHATTER)
