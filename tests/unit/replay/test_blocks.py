"""The blocks of a replay are those of the decoder's rounds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.replay.blocks import block_runs, replay_blocks
from viasd_calib.traces.capture import random_depths

TEXTS = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 2)), min_size=1, max_size=30)
SEEDS = st.integers(0, 1000)


def rounds(proposed: list[int], written: list[int], depth: list[int], starts: list[int]) -> list[tuple[str, int]]:
    """What is asked at each place, and the place in the block, block by block as the decoder goes."""
    asked: list[tuple[str, int]] = []
    whole, length = False, 0  # of the block before
    for place in range(len(depth)):
        if depth[place] == 0:
            kept = True  # so far
        if depth[place] == 0 and whole and starts[place] != place:
            asked.append(("both" if proposed[place] >= 0 else "alone", length))
        elif not kept:
            asked.append(("alone", 0))
        else:
            asked.append(("drafted" if proposed[place] >= 0 else "alone", depth[place]))
        kept = kept and proposed[place] == written[place]
        whole, length = kept, depth[place] + 1
    return asked


@given(text=TEXTS, longest=st.integers(1, 5), max_run=st.integers(1, 9), seed=SEEDS)
def test_places_are_asked_as_the_decoder_asks_them(
    text: list[tuple[int, int]], longest: int, max_run: int, seed: int
) -> None:
    proposed, written = (torch.tensor(column) for column in zip(*text, strict=True))
    depth = random_depths(len(text), longest, seed)
    starts = block_runs(depth, max_run, torch.Generator().manual_seed(seed))
    found = replay_blocks(proposed, written, depth, starts)
    wanted = rounds(proposed.tolist(), written.tolist(), depth.tolist(), starts.tolist())
    assert found.drafted.tolist() == [kind in ("drafted", "both") for kind, _ in wanted]
    assert found.undrafted.tolist() == [kind in ("alone", "both") for kind, _ in wanted]
    alone = found.undrafted
    assert found.block_place[alone].tolist() == [place for kind, place in wanted if kind in ("alone", "both")]


@given(length=st.integers(1, 60), longest=st.integers(1, 5), max_run=st.integers(1, 20), seed=SEEDS)
def test_a_run_is_of_whole_blocks_and_no_longer_than_it_may(length: int, longest: int, max_run: int, seed: int) -> None:
    depth = random_depths(length, longest, seed)
    starts = block_runs(depth, max_run, torch.Generator().manual_seed(seed))
    places = torch.arange(length)
    begins = starts == places
    assert (depth[begins] == 0).all()
    assert torch.equal(starts, places.where(begins, torch.zeros_like(places)).cummax(0).values)
    pending = places - starts
    assert (pending >= depth).all()
    blocks_before = pending - depth  # a run of several blocks is within the bound
    assert (pending[blocks_before > 0] < max_run).all()


def test_a_block_that_began_in_the_prompt_is_asked_of_no_gate() -> None:
    """As traces of earlier releases have them: what q wrote in the prompt's place was not drafted."""
    depth = torch.tensor([2, 3, 0])
    found = replay_blocks(torch.tensor([4, 4, 4]), torch.tensor([4, 4, 4]), depth, torch.zeros(3, dtype=torch.long))
    assert found.drafted.tolist() == [False, False, True]
