"""Choosing the output tokens of a reduced head from what q said in traces, and what leaving out the rest costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice

import torch
from torch import Tensor

from viasd_calib.errors import CalibrationError
from viasd_calib.traces.data import TraceText


def check_size(size: int, vocab_size: int, always: Collection[int] = ()) -> None:
    """Refuse a head vocabulary that cannot be.

    Raises:
        CalibrationError: it has fewer than two tokens, more than the verifier, or no room for ``always``.
    """
    least = max(2, len(set(always)))
    if not least <= size <= vocab_size:
        raise CalibrationError(
            f"head_vocab is {size}; give {least} to {vocab_size} tokens: the verifier has {vocab_size}, "
            f"{len(set(always))} of which end a text"
        )


def choose_tokens(counts: Counter[int], size: int, vocab_size: int, always: Collection[int] = ()) -> Tensor:
    """The most frequent tokens, then the lowest ids.

    Args:
        counts: how often q chose each token.
        size: of the head vocabulary.
        vocab_size: of the verifier.
        always: tokens that are among them whatever their count.

    Returns:
        Verifier ids, [size], long, rising.

    Raises:
        CalibrationError: the size cannot be.

    Example:
        >>> choose_tokens(Counter({7: 9, 3: 5, 8: 1}), size=3, vocab_size=10, always=[2]).tolist()
        [2, 3, 7]
    """
    check_size(size, vocab_size, always)
    frequent = (token for token, _ in counts.most_common())
    ranked = dict.fromkeys([*always, *frequent, *range(vocab_size)])  # each once, in this order
    return torch.tensor(sorted(islice(ranked, size)))


def share_outside(ids: Tensor, texts: Sequence[TraceText]) -> float:
    """Share of generated places at which q's choice is none of ``ids`` ([n]): the agreement that is lost at most.

    Example:
        >>> share_outside(torch.tensor([2, 3]), [])
        0.0
    """
    if not texts:
        return 0.0
    choices = torch.cat([text.q_ids[:, 0] for text in texts])  # [places]
    return float((~torch.isin(choices, ids)).float().mean())
