"""Prompts by how long they are: what decodes fast after a short prompt may not after a long one."""

from __future__ import annotations

from collections.abc import Sequence

from viasd_calib.models import Verifier, encode_prompt
from viasd_calib.prompts import Prompt

SHORTEST_BAND = 256
"""Tokens up to which prompts are one band; each further band reaches twice as far."""


def band_of(length: int) -> int:
    """The most tokens of a prompt in the same band as one of ``length``.

    Example:
        >>> [band_of(length) for length in (1, 256, 257, 1024, 1025)]
        [256, 256, 512, 1024, 2048]
    """
    bound = SHORTEST_BAND
    while bound < length:
        bound *= 2
    return bound


def context_bands(verifier: Verifier, prompts: Sequence[Prompt], max_new_tokens: int) -> list[int]:
    """The band of each prompt by its first turn, in tokens with the chat template.

    Args:
        max_new_tokens: of an answer, for which the context must have room.

    Raises:
        PromptError: a prompt does not fit the verifier's context.
    """
    return [band_of(len(encode_prompt(verifier, prompt, [], max_new_tokens))) for prompt in prompts]
