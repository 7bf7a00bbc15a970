"""The tokens of a pass as the kernels take them: one after the other, of one text or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.families import LayerType


class TextSpan(NamedTuple):
    """Neighbouring tokens of a text.

    Attributes:
        number: of the text in the cache.
        start: position of the first of them.
        width: how many they are.
    """

    number: int
    start: int
    width: int


@dataclass(frozen=True)
class Part:
    """Tokens that the kernels run at once.

    Attributes:
        texts: whose they are.
        window: over the same tokens, where they are of a single text; else that of the whole pass.
        rotary: cosine and sine of their positions by layer type, once they are known.
    """

    texts: list[TextSpan]
    window: CacheWindow
    rotary: dict[LayerType, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """Of all tokens, [tokens], long.

        Example:
            >>> Part([TextSpan(0, 4, 2), TextSpan(1, 9, 1)], None).positions.tolist()  # type: ignore[arg-type]
            [4, 5, 9]
        """
        return torch.cat([torch.arange(start, start + width) for _, start, width in self.texts])

    @property
    def tokens(self) -> int:
        """How many."""
        return sum(text.width for text in self.texts)

    @property
    def length(self) -> int:
        """Tokens of the longest text, up to these."""
        return max(start + width for _, start, width in self.texts)


def spans_of(window: CacheWindow) -> list[TextSpan]:
    """Where each text of a pass stands, without the tokens that only repeat its last one."""
    if isinstance(window.start, int):
        return [TextSpan(number, window.start, window.width) for number in range(window.cache.batch)]
    starts: list[int] = window.start.tolist()
    numbers = list(range(len(starts))) if window.rows is None else window.rows.tolist()
    widths = [window.width] * len(starts) if window.widths is None else window.widths.tolist()
    return [TextSpan(*one) for one in zip(numbers, starts, widths, strict=True)]


def parts_of(window: CacheWindow, spans: Sequence[TextSpan], widest: int) -> list[Part]:
    """A pass in parts of at most ``widest`` tokens each."""
    cut: list[list[TextSpan]] = [[]]
    room = widest
    for number, start, width in spans:
        end = start + width
        while start < end:
            if not room:
                cut.append([])
                room = widest
            taken = min(room, end - start)
            cut[-1].append(TextSpan(number, start, taken))
            start, room = start + taken, room - taken
    single = isinstance(window.start, int) and window.cache.batch == 1
    return [Part(texts, _window_of(window, *texts) if single else window) for texts in cut]


def _window_of(window: CacheWindow, text: TextSpan) -> CacheWindow:
    return replace(window, start=text.start, width=text.width, extent=text.start + text.width)


def places_of(spans: Sequence[TextSpan], width: int) -> tuple[Tensor, Tensor]:
    """Which of a pass's places [batch, width] the kernels run, and for each place the token that stands there.

    Returns:
        numbers of places in the flat pass, [tokens]; numbers of tokens, [batch, width].

    Example:
        >>> run, token = places_of([TextSpan(0, 4, 2), TextSpan(1, 9, 1)], 2)
        >>> run.tolist(), token.tolist()
        ([0, 1, 2], [[0, 1], [2, 2]])
    """
    widths = torch.tensor([span.width for span in spans])[:, None]  # [batch, 1]
    steps = torch.arange(width).expand(len(spans), width)
    begins = widths.cumsum(0) - widths
    own = steps < widths
    return own.flatten().nonzero()[:, 0], begins + torch.minimum(steps, widths - 1)
