"""``viasd generate``: answer one prompt, token by token, or the prompts of a file, a line each."""

from __future__ import annotations

import sys
import time

from viasd_calib.cli.printing import print_answer, print_answers, print_tiers
from viasd_calib.pipeline import generate as job
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.options import GenerateOptions


def answer(options: GenerateOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Answer, and print each token once it is final; of a file's prompts each one's answers."""
    if options.prompts is not None:
        print_answers(job.answer_file(options, load))
        return
    answered = job.answer(options, load)
    begin = time.perf_counter()
    if not options.show_tiers:
        print_answer(answered)
        return
    count = print_tiers(answered)
    print(f"{count} tokens, {count / (time.perf_counter() - begin):.1f} tokens/s", file=sys.stderr)
