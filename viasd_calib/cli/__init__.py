"""The ``viasd`` command: one subcommand a step, each with ``--config`` and ``--print_config``."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console

from viasd_calib import __version__
from viasd_calib.cli.bars import Screen
from viasd_calib.errors import UsageError, ViasdError, ViasdWarning
from viasd_calib.host_memory import keep_freed_memory
from viasd_calib.progress import reporting


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives, and what it does in one line.

    Attributes:
        positional: whether options without a default are given without their names.
        raw: whether the function is given the words as they are, and parses them itself.
        going_on: how a run that was interrupted goes on; empty for one of a few seconds or minutes.
    """

    module: str
    function: str
    summary: str
    positional: bool = False
    raw: bool = False
    going_on: str = ""


command_line: ContextVar[str] = ContextVar("command_line", default="")
"""What was given to the command that runs, for results that note how they came about."""

SAME = "run the same command to go on where it stopped"

COMMANDS: dict[str, Command] = {
    "run": Command("run", "run", "the main job: capture, fit, calibrate, export, bench, report", going_on=SAME),
    "capture": Command(
        "capture", "capture", "log what draft model and verifier predict on your prompts", going_on=SAME
    ),
    "fit": Command(
        "fit",
        "fit",
        "learn route, adapter and first gates from traces (LightningCLI)",
        raw=True,
        going_on="give its last checkpoint with --ckpt_path to go on",
    ),
    "frontier": Command(
        "frontier", "frontier", "fit for several target costs: agreement against cost", raw=True, going_on=SAME
    ),
    "calibrate": Command(
        "calibrate", "calibrate", "choose the gates' thresholds and certify them on-policy", going_on=SAME
    ),
    "export": Command("export", "export", "write the routing spec"),
    "validate": Command("export", "validate", "check a routing spec and the tensors beside it", positional=True),
    "schema": Command("export", "schema", "print the JSON Schema of a routing spec"),
    "plan": Command("plan", "plan", "choose a policy by context length and batch: replay traces, decode the best"),
    "profile": Command("profile", "profile", "measure what drafting, slim and full passes cost on this machine"),
    "route-quality": Command(
        "route_quality", "route_quality", "measure how well the slim verifier predicts the full one"
    ),
    "search": Command("search", "search", "compare other ways of choosing a route on the same traces", going_on=SAME),
    "generate": Command("generate", "answer", "answer prompts with a routing spec"),
    "bench": Command("bench", "bench", "compare decoding strategies on a prompt file", going_on=SAME),
    "monitor": Command("monitor", "monitor", "test whether a certificate still holds, by logs of generate", raw=True),
    "report": Command("report", "report", "write one HTML page on a spec and its benchmark"),
    "cache": Command("caches", "cache", "show where caches lie and how large they are, or empty one"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 0 only if it did what was asked.

    A failure prints one readable message; ``--debug`` adds the traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command_line.set(shlex.join(["viasd", *words]))
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--version"]:
        return guarded(lambda: print(f"viasd_calib {__version__}"), debug)
    if not words or words[0] in ("-h", "--help"):
        return guarded(print_commands, debug) or (0 if words else 2)
    if words[0] not in COMMANDS:
        from viasd_calib.cli.usage import suggestion

        return fail(f"there is no command {words[0]!r}{suggestion(words[0], COMMANDS)} (see viasd --help)", status=2)
    return guarded(lambda: dispatch(words[0], words[1:]), debug, COMMANDS[words[0]].going_on)


def guarded(run: Callable[[], None], debug: bool, going_on: str = "") -> int:
    """Run a command and turn what goes wrong into one message and an exit status."""
    try:
        with warnings_as_notices():
            try:
                with reporting(Screen()):
                    run()
            finally:
                sys.stdout.flush()  # here, and not at Python's end, a reader that has gone is no complaint
    except KeyboardInterrupt:
        return fail("; ".join(filter(None, ["interrupted", going_on])), status=130)
    except BrokenPipeError:
        own = sys.__stdout__
        if own is not None and sys.stdout is own:  # Python flushes it at its end, and would complain of the same pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), own.fileno())
        return 141
    except Exception as error:  # the outermost frame: printed below, with its traceback on request
        if debug:
            traceback.print_exc()
        known = isinstance(error, ViasdError)
        hint = "" if known or debug else " (run again with --debug for the traceback)"
        status = 2 if isinstance(error, UsageError) else 1
        return fail(f"{error if known else f'{type(error).__name__}: {error}'}{hint}", status)
    return 0


@contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Within it, a warning of this package is one line on stderr; others look as they always do."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ViasdWarning)
        show = warnings.showwarning

        def notice(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, ViasdWarning):
                print(f"notice: {message}", file=sys.stderr)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = notice
        yield


def dispatch(name: str, words: Sequence[str]) -> None:
    """Load a subcommand's module, and nothing else, and run it with its arguments."""
    keep_freed_memory()
    quiet_libraries()
    command = COMMANDS[name]
    module = importlib.import_module(f"viasd_calib.cli.{command.module}")
    function = getattr(module, command.function)
    if command.raw:
        function(list(words))
        return
    from viasd_calib.cli.parser import run_command

    run_command(function, words, f"viasd {name}", command.positional)


def quiet_libraries() -> None:
    """Keep loading bars and hints of libraries out of the way of our own messages.

    Transformers takes seconds to load; where it is not loaded yet, it is told through its environment, in which what a
    user has set stands.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def print_commands() -> None:
    """Say what ``viasd`` can do."""
    print("usage: viasd COMMAND [options] [--config FILE.yaml] [--print_config] [--debug]\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<14} {command.summary}")
    print("\nviasd COMMAND --help shows the options of a command.")


def fail(message: str, status: int = 1) -> int:
    """Print one error message and return the exit status."""
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/] ", end="")
    print(message, file=sys.stderr)
    return status
