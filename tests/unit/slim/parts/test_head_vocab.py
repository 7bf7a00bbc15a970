"""The reduced head of q': the same logits for fewer tokens, and a file that is what the spec says."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import TINY_FAMILIES, VOCAB, tiny_model
from viasd_calib.errors import ModelError, SpecError
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_routed
from viasd_calib.slim.onednn_linear import OneDNNLinear, can_pack
from viasd_calib.slim.parts.adapter import adapted_layers
from viasd_calib.slim.parts.base import Sizes, load_parts
from viasd_calib.slim.parts.head_vocab import IDS, HeadVocabulary, over_vocabulary, save_head_ids
from viasd_calib.spec import Route

SIZES = Sizes.of_config(tiny_model().config)
IDS_OF_SOME = torch.tensor([2, 5, 6, 11, 23])
STATES = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))


def inside() -> Tensor:
    """Which of the verifier's tokens are among ``IDS_OF_SOME``: [vocabulary], bool."""
    return torch.isin(torch.arange(VOCAB), IDS_OF_SOME)


def check_logits(slim: Tensor, whole: Tensor) -> None:
    """q's logits for some tokens, -inf for the others."""
    assert slim.shape == whole.shape
    torch.testing.assert_close(slim[..., inside()], whole[..., inside()], rtol=1e-4, atol=1e-4)
    assert slim[..., ~inside()].isneginf().all()


@given(part=st.lists(st.integers(0, VOCAB - 1), min_size=1, unique=True), rows=st.integers(0, 3))
def test_a_part_over_the_whole_vocabulary(part: list[int], rows: int) -> None:
    logits = torch.randn(rows, len(part))
    whole = over_vocabulary(logits, torch.tensor(part), VOCAB)
    for row in range(rows):
        expected = dict(zip(part, logits[row].tolist(), strict=True))
        assert whole[row].tolist() == [expected.get(token, -torch.inf) for token in range(VOCAB)]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_logits_are_the_verifiers_own_for_some_tokens(family: str) -> None:
    model = tiny_model(family=family)
    routed = RoutedModel(model, held={"head_vocab": IDS_OF_SOME})
    whole = RoutedModel(model).logits(STATES)
    assert torch.equal(routed.logits(STATES), whole)  # q has its whole head
    check_logits(routed.slim_logits(STATES), whole)


def test_without_ids_the_head_is_the_verifiers() -> None:
    routed = RoutedModel(tiny_model(), Route(attention_skip=[1]))
    assert torch.equal(routed.slim_logits(STATES), routed.logits(STATES))
    assert not [*itertools.chain(*(network.parameters() for network in routed.slim_networks))]


def test_rows_are_gathered_once_and_the_whole_head_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_model())
    whole = RoutedModel(model).logits(STATES)
    routed = RoutedModel(model, held={"head_vocab": IDS_OF_SOME})
    monkeypatch.setattr(RoutedModel, "head_rows", lambda *_: pytest.fail("rows were gathered in a pass"))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the whole head was run"))
    check_logits(routed.slim_logits(STATES), whole)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
def test_a_packed_head_says_the_same() -> None:
    """It is packed with the layers of q'; and it can be made from a verifier that is packed already."""
    model = copy.deepcopy(tiny_model())
    whole = RoutedModel(model).logits(STATES)
    slim_layers = adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj"])
    routed = RoutedModel(model, Route(), {"adapter": slim_layers, "head_vocab": IDS_OF_SOME})
    prepare((model, *routed.slim_networks), "packed", routed.device, routed.dtype)
    *layers, head = routed.slim_networks
    assert layers == list(slim_layers)
    assert isinstance(head.linear, OneDNNLinear)
    check_logits(routed.slim_logits(STATES), whole)
    check_logits(RoutedModel(model, held={"head_vocab": IDS_OF_SOME}).slim_logits(STATES), whole)


def saved(folder: Path) -> Route:
    """A route whose head vocabulary lies in ``folder``."""
    return Route(mlp_skip=[1], head_vocab=save_head_ids(IDS_OF_SOME, folder / "slim" / "head.safetensors", folder))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    route = saved(tmp_path)
    assert route.head_vocab is not None
    assert (route.head_vocab.size, route.head_vocab.tensors.path) == (5, "slim/head.safetensors")
    ids = HeadVocabulary().load(route, tmp_path, SIZES)
    assert ids is not None
    assert torch.equal(ids, IDS_OF_SOME)
    routed = load_routed(tiny_model(), route, tmp_path)
    check_logits(routed.slim_logits(STATES), routed.logits(STATES))
    assert load_parts(Route(), Path("nowhere"), SIZES) == {}


def test_a_route_without_its_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names a head vocabulary, but not its ids; open it with load_routed"):
        RoutedModel(tiny_model(), saved(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({IDS: torch.tensor([2, 5, 6, 11])}, r"\[4\], the spec names 5 token ids"),
        ({IDS: torch.tensor([[2, 5, 6, 11, 23]])}, r"\[1, 5\], the spec names 5 token ids"),
        ({IDS: torch.tensor([2.0, 5.0, 6.0, 11.0, 23.0])}, r"float32 \[5\], the spec names 5 token ids"),
        ({IDS: torch.tensor([2, 5, 6, 11, VOCAB])}, "from 0 to 23"),
        ({IDS: torch.tensor([-1, 5, 6, 11, 23])}, "from 0 to 23"),
        ({IDS: torch.tensor([2, 6, 5, 11, 23])}, "in rising order"),
        ({IDS: torch.tensor([2, 5, 5, 11, 23])}, "once each"),
        ({"tokens": torch.tensor([2, 5, 6, 11, 23])}, "cannot be read as a head vocabulary"),
    ],
    ids=["too few", "another shape", "no integers", "beyond", "below", "in no order", "twice", "another name"],
)
def test_foreign_ids_are_refused(tmp_path: Path, tensors: dict[str, Tensor], complaint: str) -> None:
    route = saved(tmp_path)
    save_file(tensors, tmp_path / "slim" / "head.safetensors")
    with pytest.raises(SpecError, match=rf"head\.safetensors.*{complaint}.*export the spec again"):
        HeadVocabulary().load(route, tmp_path, SIZES)


@pytest.mark.parametrize("keep", [0, 20])
def test_a_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    route = saved(tmp_path)
    path = tmp_path / "slim" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SpecError, match="cannot be read as a head vocabulary"):
        HeadVocabulary().load(route, tmp_path, SIZES)
