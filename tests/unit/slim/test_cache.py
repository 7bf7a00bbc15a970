from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import LAYERS, tiny_config
from viasd_calib.errors import PromptError
from viasd_calib.slim.cache import CacheRow, CacheWindow, SharedCache, repeat_last, window_of_rows

CAPACITY = 32
HEADS, WIDTH = 2, 4


def random_cache(batch: int = 1, seed: int = 0) -> SharedCache:
    cache = SharedCache(tiny_config(), CAPACITY, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
    return cache


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["mark_exact", "mark_provisional", "rollback"]), st.integers(0, CAPACITY)),
    max_size=30,
)


@given(operations=OPERATIONS)
def test_lengths_are_ordered_and_no_tensor_is_touched(operations: list[tuple[str, int]]) -> None:
    cache = random_cache()
    keys, values = cache.keys.clone(), cache.values.clone()
    exact = provisional = 0
    for name, length in operations:
        if name == "mark_provisional" and length < exact:
            with pytest.raises(ValueError, match=f"fewer than the {exact} that q has seen"):
                cache.mark_provisional(length)
            continue
        getattr(cache, name)(length)
        if name == "mark_exact":
            exact = provisional = length
        elif name == "mark_provisional":
            provisional = length
        else:
            exact, provisional = min(exact, length), min(provisional, length)
        assert (cache.exact, cache.provisional) == (exact, provisional)
        assert 0 <= cache.exact <= cache.provisional <= CAPACITY
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.values, values)


@st.composite
def batched_writes(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Starts of the rows, the width they share, and how far to read."""
    width = draw(st.integers(1, 6))
    starts = draw(st.lists(st.integers(0, CAPACITY - width), min_size=1, max_size=4))
    return starts, width, draw(st.integers(max(starts) + width, CAPACITY))


WINDOWS = st.none() | st.integers(1, CAPACITY)


@given(write=batched_writes(), layer=st.integers(0, LAYERS - 1), sliding=WINDOWS)
def test_rows_of_one_window_are_windows_of_one_row(
    write: tuple[list[int], int, int], layer: int, sliding: int | None
) -> None:
    starts, width, extent = write
    batched = random_cache(batch=len(starts))
    window = CacheWindow(batched, torch.tensor(starts), width, extent)
    keys, values = torch.randn(2, len(starts), HEADS, width, WIDTH)
    singles = []
    for row in range(len(starts)):
        single = SharedCache(tiny_config(), CAPACITY)
        single.keys.copy_(batched.keys[:, row : row + 1])
        single.values.copy_(batched.values[:, row : row + 1])
        singles.append(single)
    read = window.update(keys, values, layer)
    mask = window.mask(sliding)
    assert mask is not None
    for row, (single, start) in enumerate(zip(singles, starts, strict=True)):
        alone = CacheWindow(single, start, width, extent)
        expected = alone.update(keys[row : row + 1], values[row : row + 1], layer)
        assert torch.equal(read[0][row : row + 1], expected[0])
        assert torch.equal(read[1][row : row + 1], expected[1])
        assert torch.equal(batched.keys[:, row : row + 1], single.keys)
        assert torch.equal(batched.values[:, row : row + 1], single.values)
        assert torch.equal(window.positions()[row : row + 1], alone.positions())
        own = alone.mask(sliding)
        assert torch.equal(mask[row], torch.ones_like(mask[row]) if own is None else own[0])


@given(data=st.data(), layer=st.integers(0, LAYERS - 1), sliding=WINDOWS)
def test_rows_of_unlike_widths_write_and_read_what_they_do_alone(
    data: st.DataObject, layer: int, sliding: int | None
) -> None:
    """Some rows of a cache, at starts and widths of their own; the others stay as they are."""
    cache = random_cache(batch=4)
    before = cache.keys.clone(), cache.values.clone()
    taking_part = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(sorted))
    rows = [cache.rows()[number] for number in taking_part]
    widths = [data.draw(st.integers(1, 5)) for _ in rows]
    starts = [data.draw(st.integers(0, CAPACITY - width)) for width in widths]
    new = [torch.randn(2, HEADS, width, WIDTH) for width in widths]
    window = window_of_rows(rows, starts, widths)
    padded = repeat_last([each.permute(2, 0, 1, 3) for each in new])  # [rows, widest, 2, heads, head width]
    keys, values = padded.permute(2, 0, 3, 1, 4)
    read, mask = window.update(keys, values, layer), window.mask(sliding)
    assert mask is not None
    for place, (number, start, width) in enumerate(zip(taking_part, starts, widths, strict=True)):
        single = SharedCache(tiny_config(), CAPACITY)
        single.keys.copy_(before[0][:, number : number + 1])
        single.values.copy_(before[1][:, number : number + 1])
        alone = CacheRow(single).window(start, width)
        expected = alone.update(new[place][0][None], new[place][1][None], layer)
        own = alone.mask(sliding)
        extent = start + width
        for got, want in zip(read, expected, strict=True):
            assert torch.equal(got[place, :, :extent], want[0])
        assert torch.equal(cache.keys[:, number], single.keys[:, 0])
        assert torch.equal(cache.values[:, number], single.values[:, 0])
        assert torch.equal(window.positions()[place, :width], alone.positions()[0])
        assert window.positions()[place, -1] == extent - 1
        seen = mask[place if mask.shape[0] > 1 else 0, 0, :width]
        assert torch.equal(seen[:, :extent], torch.ones_like(seen[:, :extent]) if own is None else own[0, 0])
        assert not seen[:, extent:].any()
    for number in set(range(4)).difference(taking_part):
        assert torch.equal(cache.keys[:, number], before[0][:, number])


def test_one_row_of_a_batch_is_a_cache_over_the_same_slots() -> None:
    cache = random_cache(batch=3)
    new = torch.zeros(1, HEADS, 2, WIDTH)
    cache.rows()[1].window(4, 2).update(new, new, 0)
    assert not cache.keys[0, 1, :, 4:6].any()
    assert cache.keys[0, [0, 2], :, 4:6].all()
    assert random_cache().only(0).batch == 1


@given(start=st.integers(0, CAPACITY - 6), width=st.integers(1, 6))
def test_a_window_writes_its_slots_of_its_layer_and_no_others(start: int, width: int) -> None:
    cache = random_cache()
    before = cache.keys.clone()
    new = torch.zeros(1, HEADS, width, WIDTH)
    keys, _ = CacheWindow(cache, start, width, start + width).update(new, new, 1)
    before[1, :, :, start : start + width] = 0
    assert torch.equal(cache.keys, before)
    assert torch.equal(keys, before[1, :, :, : start + width])


@given(start=st.integers(0, 9), width=st.integers(1, 5), more=st.integers(0, 4), sliding=st.none() | st.integers(1, 12))
def test_a_token_reads_up_to_itself(start: int, width: int, more: int, sliding: int | None) -> None:
    """As far back as its window goes, itself included."""
    extent = start + width + more
    mask = CacheWindow(random_cache(), start, width, extent).mask(sliding)
    back = CAPACITY if sliding is None else sliding
    expected = [[start + step - back < slot <= start + step for slot in range(extent)] for step in range(width)]
    if mask is None:
        assert all(map(all, expected))
    else:
        assert mask[0, 0].tolist() == expected


def test_a_step_that_reads_everything_needs_no_mask() -> None:
    window = CacheWindow(random_cache(), 4, 1, 5)
    assert window.mask() is None
    assert window.mask(5) is None
    assert window.mask(4) is not None


def test_kept_rows_are_the_ones_asked_for() -> None:
    cache = random_cache(batch=4)
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.keep_rows(torch.tensor([0, 3]))
    assert torch.equal(cache.keys, keys[:, [0, 3]])
    assert torch.equal(cache.values, values[:, [0, 3]])


def test_more_room_than_the_context_is_refused() -> None:
    SharedCache(tiny_config(max_position_embeddings=8), 8)
    with pytest.raises(PromptError, match=r"9 positions are asked for.*context holds 8"):
        SharedCache(tiny_config(max_position_embeddings=8), 9)


def test_a_head_width_of_its_own_is_respected() -> None:
    assert SharedCache(tiny_config("qwen3", head_dim=8), 4).keys.shape[-1] == 8
