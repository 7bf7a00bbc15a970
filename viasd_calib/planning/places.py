"""From traced texts and models to what a replay reads: p after any number of drafted tokens, q' at any age."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.features import (
    TRACED_TOP_K,
    DraftStatistics,
    draft_features,
    slim_features,
)
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.slim_rules.calibrated import as_drafted
from viasd_calib.decoding.top_k import TopKStatistics, top_k_of, top_k_statistics
from viasd_calib.draft.base import Drafter, MemorylessDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.planning.traced import DraftedPlaces, SlimPlaces
from viasd_calib.replay.agreement import slim_logits_on
from viasd_calib.slim.cache import SharedCache
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.texts import TraceText


@dataclass(frozen=True)
class Proposals:
    """What a drafter proposes at n places of a text, by how many drafted tokens come before.

    Attributes:
        by_depth: after 0, 1, ... drafted tokens that q agrees with, [n] each; a token of -1 is none.
        free: whether a block that begins at a place takes no step of a model, [n], bool.
    """

    by_depth: list[DraftStatistics]
    free: Tensor


@torch.inference_mode()
def proposals_of(drafter: Drafter, text: TraceText, tapped: Tensor, depths: int) -> Proposals:
    """What ``drafter`` would propose at every place of a text after 0 to ``depths`` - 1 drafted tokens.

    Args:
        tapped: the verifier's residual stream at the drafter's taps, [length - 1, taps, hidden].
        depths: 1 at least.
    """
    if isinstance(drafter, MemorylessDrafter):
        return _looked_up(drafter, text, depths)
    begin = text.prompt_length - 1
    read = text.ids[:-1].to(tapped.device)
    free = torch.zeros(len(text.generated), dtype=torch.bool)
    said = drafter.score_by_depth(read, tapped, depths, text.prompt_length)
    if said is not None:
        stated = []
        for number, (tokens, logits) in enumerate(said):
            top = None if logits is None else top_k_statistics(logits[begin:], TRACED_TOP_K, drafter.vocabulary)
            stated.append(_in_order(number, [(torch.arange(len(free), device=tokens.device), tokens[begin:], top)]))
        return Proposals(stated, free)
    parts: list[list[tuple[Tensor, Tensor, TopKStatistics | None]]] = [[] for _ in range(depths)]
    for offset in range(depths):
        depth = (torch.arange(len(read), device=read.device) + offset) % depths
        tokens, logits = drafter.score(read, tapped, depth, text.prompt_length)
        top = None if logits is None else top_k_statistics(logits[begin:], TRACED_TOP_K, drafter.vocabulary)
        for number in range(depths):
            rows = (depth[begin:] == number).nonzero()[:, 0]
            parts[number].append((rows, tokens[begin:][rows], None if top is None else top[rows]))
    if isinstance(drafter, CombinedDrafter):
        free = torch.tensor([len(drafter.look_up(read[: begin + place + 1], 1)) > 0 for place in range(len(free))])
    return Proposals([_in_order(number, part) for number, part in enumerate(parts)], free)


def _in_order(depth: int, parts: Sequence[tuple[Tensor, Tensor, TopKStatistics | None]]) -> DraftStatistics:
    """Rows of several passes put in the order of their places, on the host."""
    order = torch.cat([rows for rows, _, _ in parts]).argsort()
    tokens = torch.cat([tokens for _, tokens, _ in parts])[order].cpu()
    tops = [top for _, _, top in parts if top is not None]
    top_k = None
    if tops:
        names = ("ids", "log_probs", "log_sum_exp", "entropy", "margin")
        top_k = TopKStatistics(*(torch.cat([getattr(top, name) for top in tops])[order].cpu() for name in names))
    return DraftStatistics(tokens, top_k, torch.full_like(tokens, depth))


def _looked_up(drafter: MemorylessDrafter, text: TraceText, depths: int) -> Proposals:
    """Blocks as they are proposed at once: the token at depth d of the block that began d places before."""
    n = len(text.generated)
    tokens = torch.full((depths, n), -1)
    for place in range(n):
        found = drafter.propose(text.ids[: text.prompt_length + place], depths).tokens[: n - place]
        for depth, token in enumerate(found.tolist()):
            tokens[depth, place + depth] = token
    stated = [DraftStatistics(row, None, torch.full_like(row, depth)) for depth, row in enumerate(tokens)]
    return Proposals(stated, torch.ones(n, dtype=torch.bool))


def drafted_places(proposals: Proposals, gate: Gate | None, text: TraceText) -> DraftedPlaces:
    """Proposals with the draft gate's scores; without a gate every score is 1, and drafting never stops."""
    choice = text.q_ids[:, 0]
    proposed = torch.stack([one.tokens >= 0 for one in proposals.by_depth])
    agrees = torch.stack([one.tokens == choice for one in proposals.by_depth])
    score = torch.ones(proposed.shape)
    if gate is not None:
        score = torch.stack([gate(draft_features(one, gate.names)) for one in proposals.by_depth])
    return DraftedPlaces(proposed, agrees, torch.where(proposed, score, 0.0), proposals.free)


@torch.inference_mode()
def slim_places(
    model: RoutedModel,
    gate: Gate,
    text: TraceText,
    cache: SharedCache,
    drafted: Sequence[Sequence[DraftStatistics]],
    ages: int,
    passes: int,
) -> list[SlimPlaces]:
    """What q' says at every place of a text at ages 0 to ``ages`` - 1, beside what drafters propose there.

    Each pass runs q' over the text cut into runs of ``ages`` places, which begin elsewhere in every pass: ``ages``
    passes give every place every age. Of fewer, a place has at an age that it lacks what it has at the nearest one.

    Args:
        gate: on the host.
        cache: q's, as :func:`~viasd_calib.replay.agreement.text_cache` gives it.
        drafted: of each drafter, by depth.
        passes: from 1 to ``ages``.

    Returns:
        One for each drafter.
    """
    begin, n = text.prompt_length - 1, len(text.generated)
    place = torch.arange(n)
    choice = text.q_ids[:, 0]
    known = torch.zeros(ages, n, dtype=torch.bool)
    agrees = torch.zeros(ages, n, dtype=torch.bool)
    scores = [_SlimScores(ages, len(own), n) for own in drafted]
    for number in range(passes):
        age = torch.minimum((place + number * ages // passes) % ages, place)  # q has read the prompt
        starts = torch.arange(begin + n)
        starts[begin:] -= age
        logits = slim_logits_on(model, model.slim_sublayers, text, cache, starts)  # [n, vocabulary]
        slim = top_k_of(logit_statistics(logits), logits, 1)
        agrees[age, place] = slim.ids[:, 0] == choice
        known[age, place] = True
        for one, own in zip(scores, drafted, strict=True):
            one.fill(gate, logits, slim, own, age)
    nearest = _nearest(known)
    return [one.at(nearest, agrees) for one in scores]


def _nearest(known: Tensor) -> Tensor:
    """The nearest age that is known, the lower one of two, of every age and place ([ages, n], bool): [ages, n], long.

    Example:
        >>> _nearest(torch.tensor([[True], [False], [False], [True]]))[:, 0].tolist()
        [0, 0, 3, 3]
    """
    age = torch.arange(len(known))
    distance = (age[:, None] - age).abs()[..., None].expand(-1, -1, known.shape[1])  # [ages, ages, n]
    return torch.where(known[None], distance, len(known) + 1).argmin(1)


class _SlimScores:
    """The slim gate's scores of one drafter, by age and place in the block."""

    def __init__(self, ages: int, depths: int, n: int) -> None:
        self._accept, self._own = (torch.zeros(ages, depths, n) for _ in range(2))
        self._alone = torch.zeros(ages, depths + 1, n)

    def fill(
        self, gate: Gate, logits: Tensor, slim: TopKStatistics, drafted: Sequence[DraftStatistics], age: Tensor
    ) -> None:
        """Score what q' says in one pass, at an age at each place ([n])."""
        place, zeros = torch.arange(len(age)), torch.zeros_like(slim.entropy)
        top = logits.gather(-1, slim.ids)[:, 0]
        for depth in range(self._alone.shape[1]):
            block_place = torch.full_like(age, depth)
            alone = slim_features(zeros, logits, slim, None, block_place, age, gate.names)
            self._alone[age, depth, place] = gate(alone)
        for depth, draft in enumerate(drafted):
            tokens = draft.tokens.clamp(min=0)  # -1 is no proposal, which no block reaches
            ratio = logits.gather(-1, tokens[:, None])[:, 0] - top
            block_place = torch.full_like(age, depth)
            inside = gate.stack(slim_features(zeros, logits, slim, draft, block_place, age, gate.names))
            self._own[age, depth, place] = gate.of_stacked(inside)
            self._accept[age, depth, place] = gate.of_stacked(as_drafted(gate, inside, ratio))

    def at(self, nearest: Tensor, agrees: Tensor) -> SlimPlaces:
        """Every age from one that was filled in."""
        accept, own, alone = (
            one.gather(0, nearest[:, None].expand(-1, one.shape[1], -1))
            for one in (self._accept, self._own, self._alone)
        )
        return SlimPlaces(accept, own, alone, agrees.gather(0, nearest))
