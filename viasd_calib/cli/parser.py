"""Reading the words of a command: dashes in names, flags without a value, errors of one line."""

from __future__ import annotations

import inspect
import re
from argparse import Action
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, auto_cli

from viasd_calib.cli.configurations import read_configuration, with_shipped_configurations
from viasd_calib.cli.usage import readable, values_of
from viasd_calib.errors import UsageError, ViasdError
from viasd_calib.option_types import type_words

OPTION = re.compile(r"--[A-Za-z][\w.-]*(?=[=+]|$)")
SHOWN = re.compile(r"--[A-Za-z][\w.]*_[\w.]*")


def with_underscores(word: str) -> str:
    """Let options be written with dashes: ``--max-new-tokens=8`` is ``--max_new_tokens=8``.

    Example:
        >>> with_underscores("--max-new-tokens=a-b"), with_underscores("a-b"), with_underscores("--a-b is text")
        ('--max_new_tokens=a-b', 'a-b', '--a-b is text')
    """
    return OPTION.sub(lambda found: "--" + found[0][2:].replace("-", "_"), word, count=1) if word[:2] == "--" else word


def with_flag_values(words: Sequence[str], flags: set[str]) -> list[str]:
    """Let flags stand alone: ``--show_tiers`` is ``--show_tiers=true`` and ``--no_show_tiers`` is ``=false``.

    Example:
        >>> with_flag_values(["--a", "--b", "false", "--no_model.c", "--d"], {"a", "b", "model.c"})
        ['--a=true', '--b', 'false', '--model.c=false', '--d']
    """
    read = []
    for place, word in enumerate(words):
        after = words[place + 1] if place + 1 < len(words) else None
        name = word.removeprefix("--")
        denied = name.removeprefix("no_")
        if word != f"--{name}":
            read.append(word)
        elif name in flags and (after is None or OPTION.match(after)):
            read.append(f"--{name}=true")
        elif denied != name and denied in flags and name not in flags:
            read.append(f"--{denied}=false")
        else:
            read.append(word)
    return read


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, which would show a number's range as it stands in the code."""

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        if "Annotated[" not in text:
            return text
        shown = f"({type_words(kind_of(action))}"
        return re.sub(r"\(type: .*?(?=, default: [^\[\]]*\)$|\)$)", lambda _: shown, text)


def kind_of(action: Action) -> Any:
    """The type of an option."""
    return getattr(action, "_typehint", None) or action.type


class CommandParserMixin:
    """What our parsers have in common; stands before one of jsonargparse's classes.

    Help shows dashes, and underscores are read too. A mistake is a :class:`UsageError`.
    """

    _actions: list[Action]
    _words: Sequence[str] = ()

    def kinds(self) -> dict[str, Any]:
        """Types of the options, by name."""
        return {action.dest: kind_of(action) for action in self._actions if action.dest != "help"}

    def flags(self) -> set[str]:
        """Options that are true or false."""
        return {name for name, kind in self.kinds().items() if kind is bool or bool in get_args(kind)}

    def read(self, words: Sequence[str]) -> list[str]:
        """The words as jsonargparse reads them."""
        return with_flag_values([with_underscores(word) for word in words], self.flags())

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Parse ``args``; flags may stand alone.

        Raises:
            UsageError: words that make no sense, or a configuration that cannot be read.
        """
        self._words = [] if args is None else with_shipped_configurations(self.read(args))
        for configuration in values_of("--config", self._words):
            read_configuration(configuration)
        return super().parse_args(None if args is None else self._words, *more, **options)  # type: ignore[misc]

    def format_help(self, *args: Any, **options: Any) -> str:
        """Help in which options have dashes."""
        return _with_dashes(super().format_help(*args, **options))  # type: ignore[misc]

    def format_usage(self) -> str:
        """Usage in which options have dashes."""
        return _with_dashes(super().format_usage())  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, in one line.

        Raises:
            UsageError: always, unless another parser asks to know itself.
        """
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)  # type: ignore[misc]
        if isinstance(ex, ViasdError):
            raise ex
        positional = [action.dest for action in self._actions if not action.option_strings]
        prog = getattr(self, "prog", "viasd")
        raise UsageError(f"{readable(message, self.kinds(), self._words, positional)} (see {prog} --help)") from ex

    def instantiate(self, *args: Any, **options: Any) -> Any:
        """Make objects of what was parsed.

        Raises:
            UsageError: a value that its type does not take.
        """
        # Before 4.49 jsonargparse had it by another name, at which it now warns.
        made = getattr(super(), "instantiate", None) or super().instantiate_classes  # type: ignore[misc]
        try:
            return made(*args, **options)
        except (TypeError, ValueError) as error:
            self.error(str(error), error)

    def instantiate_classes(self, *args: Any, **options: Any) -> Any:
        """The same, by its older name."""
        return self.instantiate(*args, **options)


def _with_dashes(text: str) -> str:
    return SHOWN.sub(lambda found: found[0].replace("_", "-"), text)


class OptionsParser(CommandParserMixin, ArgumentParser):  # type: ignore[misc]  # argparse's has overloads
    """The options of one command."""


def run_command(function: Callable[..., object], words: Sequence[str], prog: str, positional: bool = False) -> None:
    """Read the words of a command and call its function.

    Args:
        positional: whether options without a default are given without their names.

    Raises:
        UsageError: the words make no sense.
    """
    kind = options_class(function)
    read = auto_cli(
        kind or function,
        args=list(words),
        as_positional=positional,
        prog=prog,
        parser_class=OptionsParser,
        formatter_class=HelpFormatter,
    )
    if kind is not None:
        function(read)


def options_class(function: Callable[..., object]) -> type | None:
    """The dataclass of options that a command takes; None for one whose parameters are its options."""
    first, *_ = [*inspect.signature(function).parameters.values(), None]
    kind = first and function.__globals__.get(str(first.annotation))
    return kind if isinstance(kind, type) and is_dataclass(kind) else None
