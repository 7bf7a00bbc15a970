"""The reduced output head of q': logits for some tokens alone, by rows of q's own head.

The head is a large part of a slim pass (in SmolLM2-135M it has the weights of ten MLP sublayers), and nearly all
tokens of a text are frequent ones (FR-Spec, Zhao et al. 2025, arXiv 2502.14856, reduces a draft model's head so).
A token that q' does not have has the logit -inf in it: q' leaves it to q.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from viasd_calib.errors import CalibrationError, SpecError
from viasd_calib.files import write_bytes
from viasd_calib.slim.linears import linear_of
from viasd_calib.slim.parts.base import PartOptions, RoutePart, Sizes, register
from viasd_calib.slim.plan import SlimPlan
from viasd_calib.slim.tensors import read_tensors
from viasd_calib.spec import HeadVocab, Route, tensor_file

IDS = "ids"
"""Name of the only tensor of a head vocabulary's file."""


class SlimHead(nn.Module):
    """Some rows of an output head, or all of them, without soft-capping.

    Args:
        rows: [head vocabulary, hidden].
        ids: their ids in the verifier's vocabulary, [head vocabulary], long; None for all.
    """

    ids: Tensor | None

    def __init__(self, rows: Tensor, ids: Tensor | None = None) -> None:
        super().__init__()
        self.linear: nn.Module = linear_of(rows)  # a child, so that a backend can exchange it
        self.register_buffer("ids", ids)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., head vocabulary]."""
        return self.linear(hidden)  # type: ignore[no-any-return]


def over_vocabulary(logits: Tensor, vocabulary: Tensor | None, vocab_size: int) -> Tensor:
    """Logits over a part of the verifier's vocabulary put over all of it, -inf elsewhere.

    Args:
        logits: [..., part].
        vocabulary: the verifier ids of the part, [part], long; None for the lowest ones.
        vocab_size: of the verifier.

    Returns:
        [..., vocab_size], of the logits' type.

    Example:
        >>> over_vocabulary(torch.tensor([[5.0, 6.0]]), torch.tensor([2, 0]), 3).tolist()
        [[6.0, -inf, 5.0]]
    """
    places = torch.arange(logits.shape[-1], device=logits.device) if vocabulary is None else vocabulary
    whole = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    return whole.index_copy_(-1, places, logits)


class ChosenText(Protocol):
    """A text of which it is known what q chose."""

    @property
    def q_ids(self) -> Tensor:
        """q's most probable tokens at each place where it wrote, the first its choice: [places, k]."""
        ...


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


def share_outside(ids: Tensor, texts: Sequence[ChosenText]) -> float:
    """Share of generated places at which q's choice is none of ``ids`` ([n]): the agreement that is lost at most.

    Example:
        >>> share_outside(torch.tensor([2, 3]), [])
        0.0
    """
    if not texts:
        return 0.0
    choices = torch.cat([text.q_ids[:, 0] for text in texts])  # [places]
    return float((~torch.isin(choices, ids)).float().mean())


def save_head_ids(ids: Tensor, path: Path, folder: Path) -> HeadVocab:
    """Write the ids of a head vocabulary to ``path``, atomically.

    Args:
        ids: verifier ids, [head vocabulary], rising.
        folder: of the spec that will name the file.

    Returns:
        How that spec names it.
    """
    write_bytes(path, save({IDS: ids.to(torch.int32).contiguous().cpu()}))
    return HeadVocab(size=len(ids), tensors=tensor_file(path, folder))


def read_head_ids(entry: HeadVocab, folder: Path) -> Tensor:
    """The ids of a head vocabulary: [head vocabulary], long.

    Args:
        folder: of the spec that names it.

    Raises:
        SpecError: the file is missing or damaged, or holds something else.
    """
    path, size, what = folder / entry.tensors.path, entry.size, "a head vocabulary"
    try:
        ids = read_tensors(path, what)[IDS]
    except KeyError as error:
        raise SpecError(f"{path} cannot be read as {what} ({error}); export the spec again") from error
    if ids.shape != (size,) or ids.is_floating_point():
        raise SpecError(
            f"{path} holds {ids.dtype} {list(ids.shape)}, the spec names {size} token ids; export the spec again"
        )
    return ids.long()


@register
class HeadVocabulary(RoutePart[Tensor]):
    """Some output tokens alone: their verifier ids, [head vocabulary], long, rising."""

    name = "head_vocab"
    title = "a head vocabulary"
    contents = "its ids"
    fit_has_options = True

    def save(self, held: Tensor, route: Route, folder: Path, options: PartOptions) -> HeadVocab:
        return save_head_ids(held, self.tensors_path(folder), folder)

    def load(self, route: Route, folder: Path, sizes: Sizes) -> Tensor:
        entry = route.head_vocab
        assert entry is not None, "asked of a route with a head vocabulary"
        ids = read_head_ids(entry, folder)
        if ids[0] < 0 or ids[-1] >= sizes.vocab or not bool((ids.diff() > 0).all()):
            raise SpecError(
                f"{folder / entry.tensors.path}: token ids must be given once each, in rising order, from 0 to "
                f"{sizes.vocab - 1}; export the spec again"
            )
        return ids

    def install(self, plan: SlimPlan, held: Tensor) -> None:
        """Gather the rows of q's head for these tokens, once."""
        ids = held.to(plan.full.device)
        plan.head = SlimHead(plan.full.head_rows(ids).detach(), ids)

    def line(self, route: Route, layers: int) -> str:
        assert route.head_vocab is not None, "asked of a route with a head vocabulary"
        return f"{route.head_vocab.size:,} output tokens"
