"""Traces as batches: padding, what a batch may hold, which texts are held back, and going on in an epoch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.data import _set_sampler_epoch

from viasd_calib.errors import TraceError
from viasd_calib.prompts import SplitShares, split_of
from viasd_calib.traces.batches import LengthBatches, TraceLoader
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.texts import TraceText, collate

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)
SEEDS = st.integers(0, 5)
ALL = SplitShares(fit=1.0, calibrate=0.0, test=0.0)


def text_of(index: int, prompt: int, generated: int) -> TraceText:
    """A text of ``prompt`` + ``generated`` tokens; no token is 0, which is what padding is."""
    places = torch.arange(1, generated + 1)
    return TraceText(
        index=index,
        prompt_id=str(index),
        turn=0,
        prompt_sha256=hashlib.sha256(str(index).encode()).hexdigest(),
        task="qa",
        ids=torch.arange(1, prompt + generated + 1) + 100 * index,
        prompt_length=prompt,
        q_ids=torch.stack([places + prompt + 100 * index, places], 1),
        q_log_probs=-torch.stack([places, places + 1], 1).float(),
        p_token=torch.full((generated,), -1),
        p_depth=torch.zeros(generated, dtype=torch.long),
        p_top_k=None,
        p_entropy=torch.zeros(generated),
        p_margin=torch.zeros(generated),
    )


def texts_of(shapes: Sequence[tuple[int, int]]) -> list[TraceText]:
    return [text_of(index, prompt, generated) for index, (prompt, generated) in enumerate(shapes)]


def loader_of(
    lengths: Sequence[int],
    max_tokens: int = 60,
    seed: int = 0,
    *,
    shuffle: bool = True,
    processes: int = 1,
    rank: int = 0,
) -> TraceLoader:
    texts = texts_of([(1, length - 1) for length in lengths])
    batches = LengthBatches(lengths, max_tokens, shuffle=shuffle, seed=seed, processes=processes, rank=rank)
    return TraceLoader(texts, batches)


def epoch_of(loader: TraceLoader, epoch: int) -> list[list[int]]:
    """The texts of an epoch's batches, as Lightning would ask for them."""
    _set_sampler_epoch(loader, epoch)
    return [batch.indices for batch in loader]


@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_padding_leaves_every_text_as_it_is(shapes: list[tuple[int, int]]) -> None:
    texts = texts_of(shapes)
    batch = collate(texts)
    assert batch.ids.shape == batch.predicts.shape == (len(texts), max(len(text.ids) for text in texts))
    assert batch.indices == list(range(len(texts)))
    for row, predicts, text in zip(batch.ids, batch.predicts, texts, strict=True):
        assert torch.equal(row[: len(text.ids)], text.ids)
        assert not row[len(text.ids) :].any()
        after = predicts.nonzero()[:, 0] + 1
        assert torch.equal(row[after], text.generated)
    nexts = batch.ids.roll(-1, 1)[batch.predicts]
    assert torch.equal(nexts, batch.q_ids[:, 0]), "q's tokens lie in the order of the places that predict them"
    assert batch.q_ids.shape == batch.q_log_probs.shape == (int(batch.predicts.sum()), 2)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 120), shuffle=st.booleans(), seed=SEEDS, epoch=st.integers(0, 3))
def test_batches_hold_each_text_once_within_the_limit(
    lengths: list[int], max_tokens: int, shuffle: bool, seed: int, epoch: int
) -> None:
    batches = LengthBatches(lengths, max_tokens, shuffle=shuffle, seed=seed)
    batches.set_epoch(epoch)
    given_out = list(batches)
    assert len(given_out) == len(batches)
    assert sorted(place for batch in given_out for place in batch) == list(range(len(lengths)))
    for batch in given_out:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= max_tokens
    spans = sorted((min(of), max(of)) for of in ([lengths[place] for place in batch] for batch in given_out))
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), "of like length"


@given(lengths=LENGTHS, seed=SEEDS)
def test_an_epoch_is_repeatable_and_made_of_the_same_batches(lengths: list[int], seed: int) -> None:
    loader = loader_of(lengths, seed=seed)
    epochs = [epoch_of(loader, epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] == epoch_of(loader_of(lengths, seed=seed), 0)
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_epochs_differ_where_batches_are_shuffled_alone() -> None:
    lengths = list(range(2, 40))
    shuffled, sorted_ones = loader_of(lengths), loader_of(lengths, shuffle=False)
    assert epoch_of(shuffled, 0) != epoch_of(shuffled, 1)
    assert epoch_of(sorted_ones, 0) == epoch_of(sorted_ones, 1)


@given(lengths=LENGTHS, epoch=st.integers(0, 3), data=st.data())
def test_a_loader_goes_on_behind_its_state(lengths: list[int], epoch: int, data: st.DataObject) -> None:
    whole = epoch_of(loader_of(lengths), epoch)
    stopped = data.draw(st.integers(0, len(whole)))
    first = loader_of(lengths)
    _set_sampler_epoch(first, epoch)
    running = iter(first)
    begun = [next(running).indices for _ in range(stopped)]
    second = loader_of(lengths)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    iter(second)  # Lightning makes an iterator that it may not use
    assert begun + epoch_of(second, epoch) == whole
    assert len(second) == len(whole)
    assert epoch_of(second, epoch) == whole, "the whole epoch, if it is asked for again"
    assert epoch_of(second, epoch + 1) == epoch_of(loader_of(lengths), epoch + 1)


@given(lengths=LENGTHS, processes=st.integers(1, 4), epoch=st.integers(0, 2))
def test_processes_take_turns_in_the_order_of_one(lengths: list[int], processes: int, epoch: int) -> None:
    whole = epoch_of(loader_of(lengths), epoch)
    if len(whole) < processes:
        with pytest.raises(TraceError, match=f"{len(whole)} batches cannot be shared by {processes} processes"):
            loader_of(lengths, processes=processes)
        return
    loaders = [loader_of(lengths, processes=processes, rank=rank) for rank in range(processes)]
    shares = [epoch_of(loader, epoch) for loader in loaders]
    assert {len(share) for share in shares} == {len(loaders[0])}, "all must make equally many steps"
    together = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert together == whole[: len(together)]
    assert len(whole) - len(together) < processes


def test_a_process_goes_on_behind_the_state_that_the_first_one_saved() -> None:
    lengths = list(range(2, 40))
    loaders = [loader_of(lengths, processes=2, rank=rank) for rank in (0, 1)]
    whole = [epoch_of(loader, 0) for loader in loaders]
    running = iter(loaders[0])
    for _ in range(3):
        next(running)
    second = loader_of(lengths, processes=2, rank=1)
    second.load_state_dict(loaders[0].state_dict())
    assert epoch_of(second, 0) == whole[1][3:]


@pytest.mark.parametrize("other", [{"seed": 1}, {"max_tokens": 50}, {"lengths": list(range(3, 30))}, {"processes": 2}])
def test_a_state_of_other_batches_is_refused(other: dict[str, object]) -> None:
    state = loader_of(list(range(2, 30))).state_dict()
    loader = loader_of(**{"lengths": list(range(2, 30)), **other})  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="another order of batches"):
        loader.load_state_dict(state)


def module_of(count: int, validation_share: float) -> TraceDataModule:
    data = TraceDataModule([], validation_share=validation_share)
    data.texts = texts_of([(1, 2)] * count)
    return data


@given(count=st.integers(2, 60), share=st.floats(0, 0.9))
def test_what_is_held_back_is_decided_prompt_by_prompt(count: int, share: float) -> None:
    data = module_of(count, share)
    held = {text.index for text in data.texts} - {text.index for text in data.training_texts()}
    assert {text.index for text in data.validation_texts()} == (held or {count - 1})
    more = module_of(count + 5, share)
    kept = {text.index for text in more.training_texts() if text.index < count}
    assert kept == {text.index for text in data.training_texts()}, "more texts do not move those already there"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_that_is_held_back_is_about_what_was_asked(share: float) -> None:
    data = module_of(2000, share)
    assert len(data.validation_texts()) / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


def test_holding_back_is_independent_of_the_split() -> None:
    """Both are by hash; were they by the same digits, a split would be held back whole or not at all."""
    data = module_of(2000, 0.3)
    shares = SplitShares(fit=0.3, calibrate=0.4, test=0.3)
    for split in ("fit", "calibrate", "test"):
        of_split = {text.index for text in data.texts if split_of(text.prompt_sha256, shares) == split}
        held = [text for text in data.validation_texts() if text.index in of_split]
        assert len(held) / len(of_split) == pytest.approx(0.3, abs=0.08)


def test_tokens_are_counted_in_training_texts_alone() -> None:
    data = module_of(20, 0.5)
    counts = data.token_counts()
    assert counts.total() == sum(len(text.generated) for text in data.training_texts())
    assert not any(int(token) in counts for text in data.validation_texts() for token in text.generated)


def test_what_q_would_have_chosen_is_counted_where_a_policy_wrote() -> None:
    data = module_of(4, 0.0)
    data.texts = [dataclasses.replace(text, q_ids=torch.full_like(text.q_ids, 7)) for text in data.texts]
    assert set(data.token_counts()) == {7}


def test_a_module_that_has_not_trained_has_no_state() -> None:
    assert module_of(3, 0.0).state_dict() == {}


@given(limit=st.integers(0, 40))
def test_a_limit_takes_whole_texts_by_hash_and_no_others_when_it_grows(limit: int) -> None:
    data = module_of(20, 0.3)
    every, longest = data.training_texts(), max(len(text.generated) for text in data.texts)
    data.limit_tokens = limit
    taken = data.training_texts()
    tokens = sum(len(text.generated) for text in taken)
    assert tokens <= limit or len(taken) == 1
    assert len(taken) == len(every) or tokens + longest > limit
    data.limit_tokens = limit + 10
    assert {text.index for text in taken} <= {text.index for text in data.training_texts()}
    assert len(data.validation_texts()) + len(every) == 20


def test_a_split_without_texts_is_refused(traces: Path) -> None:
    data = TraceDataModule([str(traces)], split="test", shares=ALL)
    with pytest.raises(TraceError, match="no text of the split 'test'"):
        data.setup()


def test_held_back_texts_are_no_training_texts(traces: Path) -> None:
    data = TraceDataModule([str(traces)], shares=ALL, validation_share=0.3)
    data.setup()
    fitted = {text.prompt_sha256 for text in data.training_texts()}
    held = {text.prompt_sha256 for text in data.validation_texts()}
    assert fitted
    assert held
    assert not fitted & held


def test_batches_hold_every_text_once_within_the_limit(traces: Path) -> None:
    data = TraceDataModule([str(traces)], shares=ALL, validation_share=0.0, max_batch_tokens=100)
    data.setup()
    seen: list[int] = []
    for batch in data.train_dataloader():
        assert batch.ids.numel() <= 100 or len(batch.indices) == 1
        assert int(batch.predicts.sum()) == len(batch.q_ids)
        nexts = batch.ids[:, 1:][batch.predicts[:, :-1]]
        assert torch.equal(nexts, batch.q_ids[:, 0])  # greedy texts: the token after a place is q's most probable one
        seen += batch.indices
    assert sorted(seen) == [text.index for text in data.training_texts()]
