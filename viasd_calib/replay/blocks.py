"""The blocks that decoding would have made of a traced text, and the runs of pending tokens they lie in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReplayedBlocks:
    """Which gate is asked about what, at each of n generated places.

    Attributes:
        drafted: a drafted token stands here for decision: the drafter proposed one, and all that it proposed before in
            the block were kept. After a rejected token decoding begins a new block, so the rest of the old one is
            asked of no gate; [n], bool.
        undrafted: q's slim choice stands here with no drafted token beside it: nothing was proposed, or the place
            is the one after a block that was kept as a whole, or the block broke earlier, where q' may go on alone;
            [n], bool.
        block_place: drafted tokens of the block before an undrafted place: its length where it was kept, 0 where q'
            goes on alone; [n], long.
    """

    drafted: Tensor
    undrafted: Tensor
    block_place: Tensor


def replay_blocks(proposed: Tensor, written: Tensor, depth: Tensor, starts: Tensor) -> ReplayedBlocks:
    """Find the blocks of a text.

    Args:
        proposed: the drafter's token for each generated place, -1 where there is none, [n], long.
        written: the generated tokens, [n], long.
        depth: drafted tokens of the block before each place, [n], long: a place of depth 0 begins a block, the next
            ones are inside it.
        starts: of each place's run of pending tokens, as :func:`block_runs` cuts them, [n], long.

    Example:
        >>> depth, starts = torch.tensor([0, 1, 0, 1, 2]), torch.zeros(5, dtype=torch.long)
        >>> found = replay_blocks(torch.tensor([5, 6, 7, -1, 9]), torch.tensor([5, 6, 7, 8, 9]), depth, starts)
        >>> found.drafted.int().tolist(), found.undrafted.int().tolist(), found.block_place.tolist()
        ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 2, 1, 0])
    """
    places = torch.arange(len(depth))
    kept = proposed == written  # -1 is no token
    lost = torch.nn.functional.pad((~kept).long().cumsum(0), (1, 0))  # places before each that were not kept, [n + 1]
    begins = places - depth
    inside = begins >= 0  # traces of earlier releases let a block begin inside the prompt
    reached = inside & (lost[places] == lost[begins.clamp(min=0)])
    whole = reached & kept  # [n]: the block was kept up to here
    # The place after a kept block is of the same slim pass, unless q has seen all before it.
    after = torch.zeros_like(reached)
    after[1:] = whole[:-1] & (depth[1:] == 0) & (starts[1:] != places[1:])
    length = torch.zeros_like(depth)
    length[1:] = depth[:-1] + 1
    missing = reached & (proposed < 0)
    return ReplayedBlocks(
        drafted=reached & (proposed >= 0),
        undrafted=after | missing | ~reached,
        block_place=torch.where(after, length, torch.where(missing, depth, torch.zeros_like(depth))),
    )


def block_runs(depth: Tensor, max_run: int, generator: torch.Generator) -> Tensor:
    """Cut n places into runs of whole blocks; the start of each place's run, [n], long.

    q decides whole blocks with the catch-up that ends a run, so that a block begins where a run does and at least as
    many tokens are pending at a place as stand before it in its block. A run is of 1 to ``max_run`` places, drawn
    evenly, less what would cut a block; of one block at least.

    Args:
        depth: drafted tokens of the block before each place, [n], long; the first place begins a run at any depth.

    Example:
        >>> block_runs(torch.tensor([0, 1, 0, 1, 0]), 1, torch.Generator().manual_seed(0)).tolist()
        [0, 0, 2, 2, 4]
    """
    n = len(depth)
    begins = [place for place in range(n) if place == 0 or depth[place] == 0]
    ends = [*begins[1:], n][: len(begins)]
    drawn = torch.randint(1, max_run + 1, (n,), generator=generator).tolist()  # more than enough
    starts = torch.zeros_like(depth)
    run = -1  # the start of the current run; none yet
    for begin, end in zip(begins, ends, strict=True):
        if run < 0 or end - run > drawn[run]:
            run = begin
        starts[begin:end] = run
    return starts
