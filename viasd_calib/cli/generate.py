"""``viasd generate``: answer one prompt, token by token."""

from __future__ import annotations

import sys
import time

from viasd_calib.cli.printing import print_answer, print_tiers
from viasd_calib.pipeline import generate as job
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.options import GenerateOptions


def answer(options: GenerateOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Answer, and print each token once it is final."""
    answered = job.answer(options, load)
    begin = time.perf_counter()
    if not options.show_tiers:
        print_answer(answered)
        return
    count = print_tiers(answered)
    print(f"{count} tokens, {count / (time.perf_counter() - begin):.1f} tokens/s", file=sys.stderr)
