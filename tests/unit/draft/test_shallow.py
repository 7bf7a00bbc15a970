from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.rounding import assert_near
from tests.strategies import families, token_lists
from tests.tiny import (
    LAYERS,
    TINY_FAMILIES,
    VOCAB,
    propose,
    small_disk,
    tiny_model,
    tiny_shallow,
    tiny_shape,
    transformers_logits,
)
from viasd_calib.draft.base import CachedTextDrafter
from viasd_calib.draft.shallow import (
    ShallowDrafter,
    ShallowModel,
    UnrolledStore,
    load_shallow,
    save_shallow,
    unrolled_mask,
    unrolled_states,
)
from viasd_calib.errors import ModelError, StorageError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import ShallowShape

CAPACITY = 64
HIDDEN = 16
TAPS = 2


def verifier(family: str = "llama") -> RoutedModel:
    return RoutedModel(tiny_model(0, family))


def make_drafter(family: str = "llama") -> ShallowDrafter:
    return ShallowDrafter(tiny_shallow(verifier(family)))


def start(family: str = "llama") -> CachedTextDrafter:
    return make_drafter(family).start(CAPACITY)


def random_states(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, TAPS, HIDDEN, generator=torch.Generator().manual_seed(seed))


WINDOWS = st.none() | st.integers(1, 9)


@settings(max_examples=40)
@given(family=families(), prompt=token_lists(1, 8), depths=st.integers(1, 6), seed=st.integers(0, 9), window=WINDOWS)
@torch.inference_mode()
def test_score_at_a_depth_is_what_is_proposed_so_far_behind_an_observation(
    family: str, prompt: list[int], depths: int, seed: int, window: int | None
) -> None:
    weights = ShallowDrafter(tiny_shallow(verifier(family)), window)
    drafter = weights.start(CAPACITY)
    seen = len(prompt) - 1  # the verifier has not passed over the last token
    tapped = random_states(seen + depths, seed)
    if seen:
        drafter.observe(0, tapped[:seen])
    proposal = propose(drafter, torch.tensor(prompt), depths)
    text = torch.cat([torch.tensor(prompt), proposal.tokens[:-1]])
    depth = torch.cat([torch.zeros(seen, dtype=torch.long), torch.arange(depths)])
    tokens, logits = weights.score(text, tapped, depth, len(prompt))
    assert proposal.logits is not None
    torch.testing.assert_close(logits[seen:], proposal.logits, atol=1e-3, rtol=1e-3)
    assert tokens[seen:].tolist() == proposal.tokens.tolist()
    by_depth = weights.score_by_depth(text, tapped, depths, len(prompt))
    for number, (said, _) in zip(range(depths), by_depth, strict=True):
        assert said[seen + number] == proposal.tokens[number]


@given(
    prompt=token_lists(4, 8), rounds=st.lists(st.tuples(st.integers(0, 5), token_lists(1, 2)), min_size=1, max_size=5)
)
@torch.inference_mode()
def test_with_a_window_a_text_is_drafted_as_if_it_began_there(
    prompt: list[int], rounds: list[tuple[int, list[int]]]
) -> None:
    """The first token that is read stands for the first of a text, in every round after, too."""
    window, states = 3, random_states(CAPACITY)
    skipped = len(prompt) - window
    drafter = ShallowDrafter(tiny_shallow(verifier()), window).start(CAPACITY)
    cut = start()
    text, observed = list(prompt), 0
    for keep, other in rounds:
        seen = len(text) - 1
        drafter.observe(observed, states[observed:seen])
        cut.observe(max(observed - skipped, 0), states[max(observed, skipped) : seen])
        observed = seen
        own, expected = (propose(one, torch.tensor(ids), 4) for one, ids in ((drafter, text), (cut, text[skipped:])))
        assert own.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(own.logits, expected.logits, atol=1e-3, rtol=1e-3)
        text = [*text, *own.tokens.tolist()[:keep], *other]
        drafter.rollback(observed)
        cut.rollback(observed - skipped)
    assert drafter.steps == cut.steps


@torch.inference_mode()
def test_a_window_reads_less_of_a_long_prompt() -> None:
    """By the places that the model is run at."""
    widths: list[int] = []
    for window in (None, 5):
        model = tiny_shallow(verifier())
        model.register_forward_pre_hook(lambda _module, args: widths.append(args[0].shape[1]))
        drafter = ShallowDrafter(model, window).start(CAPACITY)
        drafter.observe(0, random_states(39))
        propose(drafter, torch.arange(40) % VOCAB, 1)
    assert widths == [40, 5]


ROUNDS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), token_lists(1, 2)), min_size=1, max_size=6)


@given(family=families(), prompt=token_lists(1, 8), rounds=ROUNDS)
@torch.inference_mode()
def test_rounds_leave_no_trace(family: str, prompt: list[int], rounds: list[tuple[int, int, list[int]]]) -> None:
    """After any rounds of drafting and observing, a proposal is that of a drafter that saw the text at once."""
    drafter = start(family)
    states = random_states(CAPACITY)
    text, observed = list(prompt), 0
    for limit, keep, other in rounds:
        drafted = propose(drafter, torch.tensor(text), limit).tokens.tolist()
        text = [*text, *drafted[:keep], *other]
        drafter.observe(observed, states[observed : len(text) - 1])
        observed = len(text) - 1
        drafter.rollback(observed)
    proposal = propose(drafter, torch.tensor(text), 5)
    fresh = start(family)
    fresh.observe(0, states[:observed])
    expected = propose(fresh, torch.tensor(text), 5)
    assert proposal.logits is not None
    torch.testing.assert_close(proposal.logits, expected.logits, atol=1e-3, rtol=1e-3)
    assert proposal.tokens.tolist() == expected.tokens.tolist()


@given(prompt=token_lists(2, 8), cut=st.integers(1, 8), other=token_lists(1, 3))
@torch.inference_mode()
def test_a_text_that_is_cut_and_goes_on_otherwise(prompt: list[int], cut: int, other: list[int]) -> None:
    """As after an audit that fails: states of the part that fell away are not read again."""
    drafter, fresh = start(), start()
    states, kept = random_states(CAPACITY), min(cut, len(prompt) - 1)
    drafter.observe(0, random_states(len(prompt) - 1, seed=1))
    propose(drafter, torch.tensor(prompt), 3)
    drafter.rollback(kept)
    text = prompt[:kept] + other
    for each in (drafter, fresh):
        each.observe(0, states[: len(text) - 1])
    proposal = propose(drafter, torch.tensor(text), 4)
    expected = propose(fresh, torch.tensor(text), 4)
    torch.testing.assert_close(proposal.logits, expected.logits, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_it_listens_to_the_verifier() -> None:
    one, other = start(), start()
    one.observe(0, random_states(3, seed=1))
    other.observe(0, random_states(3, seed=2))
    text = torch.tensor([4, 7, 9, 1])
    heard, otherwise = (propose(each, text, 1).logits for each in (one, other))
    assert heard is not None
    assert otherwise is not None
    assert not torch.allclose(heard, otherwise, atol=1e-2)


@torch.inference_mode()
def test_proposals_are_ids_of_its_vocabulary() -> None:
    weights = make_drafter()
    assert weights.vocabulary is not None
    allowed, drafter = set(weights.vocabulary.tolist()), weights.start(CAPACITY)
    drafter.observe(0, random_states(1))
    proposal = propose(drafter, torch.tensor([4, 7]), 20)
    assert set(proposal.tokens.tolist()) <= allowed
    assert len(set(proposal.tokens.tolist())) > 1
    assert proposal.logits is not None
    assert proposal.logits.shape == (20, len(allowed))
    assert drafter.steps == 20


@torch.inference_mode()
def test_what_another_drafted_is_read_token_by_token() -> None:
    """Where no verifier has read a place, it reads what the one before it gives, as in a draft of its own."""
    drafter, told = start(), start()
    for each in (drafter, told):
        each.observe(0, random_states(3))
    own = propose(drafter, torch.tensor([4, 7, 9, 1]), 4)
    after = propose(told, torch.cat([torch.tensor([4, 7, 9, 1]), own.tokens[:3]]), 1)
    assert told.steps == drafter.steps == 4
    assert own.logits is not None
    torch.testing.assert_close(after.logits, own.logits[3:], atol=1e-4, rtol=1e-4)


def test_nothing_is_asked_nothing_is_proposed() -> None:
    proposal = propose(start(), torch.tensor([4, 7]), 0)
    assert len(proposal) == 0
    assert proposal.logits is None


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.inference_mode()
def test_at_first_it_is_the_verifiers_layers(family: str) -> None:
    """The untrained drafter on all of q's layers is q: the embedding passes, head and norm are q's."""
    routed = verifier(family)
    model = ShallowModel(routed, tiny_shape(LAYERS, VOCAB))
    model.use_vocabulary(torch.arange(VOCAB))
    text = torch.tensor([[4, 7, 9, 1, 1, 20]])
    states = unrolled_states(model.eval(), text, torch.zeros(1, 6, TAPS, HIDDEN), 1)[0]
    expected = transformers_logits(routed.model, text[0].tolist())
    assert_near(model.logits(states)[0], expected)


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen3_sliding", "gemma3_text"])
@torch.inference_mode()
def test_its_layers_are_of_the_verifiers_types(family: str) -> None:
    """Given what enters q's last three layers they say what q says, with the same windows and rotary tables."""
    routed = verifier(family)
    text = torch.tensor([[4, 7, 9, 1, 1, 20, 3, 3]])
    window = CacheWindow(routed.new_cache(8), 0, 8, 8)
    entering = routed.full(text, window, (1,)).tapped[:, :, 0]
    model = ShallowModel(routed, tiny_shape(3, VOCAB)).eval()
    model.use_vocabulary(torch.arange(VOCAB))
    model.from_token.weight.zero_()
    positions, mask_of = torch.arange(8)[None], partial(unrolled_mask, 8, 1, torch.device("cpu"))
    states = model(text, entering, positions, mask_of, UnrolledStore())
    expected = transformers_logits(routed.model, text[0].tolist())
    assert_near(model.logits(states)[0], expected)


def test_embeddings_are_not_its_own_and_weights_are() -> None:
    routed = verifier()
    model = ShallowModel(routed, tiny_shape())
    theirs = {parameter.data_ptr() for parameter in routed.model.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("embed" in name for name in model.state_dict())
    assert not any(parameter.requires_grad for parameter in routed.model.parameters())


def test_a_shape_that_does_not_fit_the_verifier_is_refused() -> None:
    with pytest.raises(ModelError, match="drafter of 5 layers is deeper than the verifier, which has 4"):
        ShallowModel(verifier(), tiny_shape(num_layers=LAYERS + 1))
    with pytest.raises(ModelError, match="reads the verifier after layer 5, the verifier has 4"):
        ShallowModel(verifier(), tiny_shape(taps=(0, LAYERS + 1)))


@torch.inference_mode()
def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = tiny_shallow(verifier())
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.to(torch.bfloat16))  # as it is stored
    save_shallow(model, tmp_path / "draft.safetensors")
    loaded = load_shallow(verifier(), model.shape, tmp_path / "draft.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training
    one, other = ShallowDrafter(model), ShallowDrafter(loaded)
    text = torch.tensor([4, 7, 9])
    expected = propose(one.start(CAPACITY), text, 6).tokens.tolist()
    assert propose(other.start(CAPACITY), text, 6).tokens.tolist() == expected


def test_stored_in_two_bytes_a_weight(tmp_path: Path) -> None:
    model = tiny_shallow(verifier())
    save_shallow(model, tmp_path / "draft.safetensors")
    tensors = load_file(tmp_path / "draft.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name != "vocabulary"} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(t.numel() for t in model.state_dict().values())


@pytest.mark.parametrize("shape", [tiny_shape(3), tiny_shape(1), tiny_shape(2, 13), tiny_shape(taps=(1,))])
def test_tensors_of_another_shape_are_refused(tmp_path: Path, shape: ShallowShape) -> None:
    path = tmp_path / "draft.safetensors"
    save_shallow(tiny_shallow(verifier()), path)
    with pytest.raises(ModelError, match=r"draft\.safetensors is not a shallow drafter for this verifier"):
        load_shallow(verifier(), shape, path)


def test_damaged_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "draft.safetensors"
    save_shallow(tiny_shallow(verifier()), path)
    path.write_bytes(path.read_bytes()[:-3])
    foreign = tmp_path / "foreign.safetensors"
    tiny_model(7).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(foreign)
    for wrong in (path, tmp_path / "nowhere.safetensors", foreign):
        with pytest.raises(ModelError, match=rf"{wrong.name} is not a shallow drafter"):
            load_shallow(verifier(), tiny_shape(), wrong)


def test_a_full_disk_leaves_the_old_drafter(tmp_path: Path) -> None:
    path = tmp_path / "draft.safetensors"
    save_shallow(tiny_shallow(verifier()), path)
    old = path.read_bytes()
    with pytest.raises(StorageError, match=r"draft\.safetensors"), small_disk(500):
        save_shallow(tiny_shallow(verifier(), seed=1), path)
    assert path.read_bytes() == old


@given(length=st.integers(1, 6), passes=st.integers(1, 4), sliding=st.none() | st.integers(1, 6))
def test_what_a_drafted_place_reads(length: int, passes: int, sliding: int | None) -> None:
    """Slot k of pass n: the pass in which k would have been drafted, if the query lies ``passes - 1`` after q."""
    mask = unrolled_mask(length, passes, torch.device("cpu"), sliding)[0, 0]
    assert mask.shape == (length, passes * length)
    for query in range(length):
        verified = query - (passes - 1)  # the last place that reads the verifier's features
        read = {(1, place) for place in range(max(verified + 1, 0))}
        read |= {(number, verified + number - 1) for number in range(2, passes + 1) if verified + number - 1 >= 0}
        read = {(number, place) for number, place in read if sliding is None or query - place < sliding}
        found = {(slot // length + 1, slot % length) for slot in torch.nonzero(mask[query])[:, 0].tolist()}
        assert found == read
