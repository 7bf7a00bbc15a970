"""Which rounds of an interleaved timing other work on the machine has slowed down, so that no cost hangs on them.

A round runs every pass once. Other work makes all passes of a round slower alike, and only ever slower: so a round is
compared with what each pass takes undisturbed, its lower quartile over the rounds. Of three rounds in four that are
slowed all are found. Work that goes on all the time is not: it looks like a slower machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

DISTURBED = 1.25
"""A round is disturbed where its passes take so many times as long as undisturbed, by their median."""
NOISY = 0.2
"""The machine is called noisy where more rounds than this share are disturbed."""


def slowness(seconds: Sequence[Sequence[float]]) -> list[float]:
    """How many times as long as undisturbed the passes of each round took, by their median; one for each round.

    Args:
        seconds: of each pass, one pass at least, in every round, two at least.

    Example:
        >>> slowness([[1.0, 1.0, 3.0, 1.0], [2.0, 2.0, 5.0, 2.0]])
        [1.0, 1.0, 2.75, 1.0]
    """
    usual = [statistics.quantiles(taken, n=4, method="inclusive")[0] for taken in seconds]
    return [
        statistics.median(taken[number] / own for taken, own in zip(seconds, usual, strict=True))
        for number in range(len(seconds[0]))
    ]


def undisturbed(seconds: Sequence[Sequence[float]]) -> list[int]:
    """Numbers of the rounds that count: those that are not disturbed, and two at least, the fastest.

    Args:
        seconds: as for :func:`slowness`.

    Example:
        >>> undisturbed([[1.0, 1.0, 3.0, 1.0], [2.0, 2.0, 5.0, 2.0]])
        [0, 1, 3]
    """
    slow = slowness(seconds)
    fastest = sorted(range(len(slow)), key=slow.__getitem__)[:2]
    return sorted({*fastest, *(number for number, times in enumerate(slow) if times <= DISTURBED)})


def disturbed_share(seconds: Sequence[Sequence[float]]) -> float:
    """Share of the rounds that do not count.

    Example:
        >>> disturbed_share([[1.0, 1.0, 3.0, 1.0], [2.0, 2.0, 5.0, 2.0]])
        0.25
    """
    rounds = len(seconds[0])
    return 1 - len(undisturbed(seconds)) / rounds


def noise_words(share: float) -> str | None:
    """A warning where the machine was noisy; None where it was quiet.

    Args:
        share: of rounds that were disturbed.

    Example:
        >>> noise_words(0.1) is None
        True
        >>> str(noise_words(0.4)).partition(";")[0]
        'the machine was noisy: other work slowed 40 % of the timed rounds, which are left out'
    """
    if share <= NOISY:
        return None
    return (
        f"the machine was noisy: other work slowed {100 * share:.0f} % of the timed rounds, which are left out; "
        "end it and measure again where two ways to decode are close"
    )
