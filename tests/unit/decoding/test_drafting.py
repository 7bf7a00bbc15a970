from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import VOCAB, constant_gate, make_drafter, tiny_model
from viasd_calib.decoding import drafting, logit_statistics
from viasd_calib.decoding.drafting import Block, EarlyStop, draft, draft_statistics
from viasd_calib.decoding.ending import Ending
from viasd_calib.decoding.features import draft_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Session, open_session
from viasd_calib.decoding.top_k import top_k_statistics
from viasd_calib.decoding.verification import make_sampler
from viasd_calib.passes.requests import finish
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import LogisticGate

GATE = LogisticGate(
    features=["draft_entropy", "draft_log_top1", "draft_margin", "draft_depth"],
    mean=[0.0] * 4,
    scale=[1.0] * 4,
    weight=[-0.1, 0.2, 0.3, -0.1],
    bias=3.0,
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def session(kind: str, sampling: Sampling | None = None) -> Session:
    routed = RoutedModel(tiny_model())
    sampler = make_sampler(sampling or Sampling())
    return open_session(routed, make_drafter(kind, routed), [3, 1, 4, 15, 9], 40, Ending(), sampler)


def test_drafting_stops_by_the_chance_of_the_whole_block() -> None:
    """Each token alone is likelier than the bound; three of them together are not, and a new block begins anew."""
    gate = Gate(constant_gate("draft_depth", 1.0))
    score = torch.sigmoid(torch.tensor(1.0)).item()
    assert score**3 < 0.5 < score**2
    logits = torch.tensor([0.0, 1.0])
    for _ in range(2):
        early_stop = EarlyStop(gate, 0.5, 0)
        assert [bool(early_stop.stop(logits, place)) for place in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["shallow", "near", "lookup+shallow"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_statistics_of_a_block_are_computed_once_a_row(
    kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pick, stop rule, draft gate and slim rule together."""
    rows: list[int] = []

    def counted(logits: torch.Tensor, *arguments: torch.Tensor) -> logit_statistics.LogitStatistics:
        rows.append(logits.shape[0])
        return read(logits, *arguments)

    read = logit_statistics.logit_statistics
    monkeypatch.setattr(logit_statistics, "logit_statistics", counted)
    monkeypatch.setattr(drafting, "logit_statistics", counted)
    one = session(kind, Sampling(temperature=temperature))
    block = finish(draft(one, 5, Gate(GATE), 1e-6))
    assert len(block) == 5
    assert block.early_stop is not None
    draft_statistics(one, block, 1)
    draft_statistics(one, block, 4)
    assert rows == [1] * 5


@given(kind=st.sampled_from(["shallow", "near", "lookup+near"]), top=st.integers(1, 6))
def test_statistics_while_drafting_are_those_of_the_logits(kind: str, top: int) -> None:
    one = session(kind)
    block = finish(draft(one, 5, Gate(GATE), 1e-6))
    assert block.logits is not None
    assert block.early_stop is not None
    found, expected = block.top_k(top), top_k_statistics(block.logits, top, block.vocabulary)
    assert found is not None
    for name in ("ids", "log_probs", "log_sum_exp", "entropy", "margin"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.ids[:, 0], block.tokens)
    scores = Gate(GATE)(draft_features(draft_statistics(one, block, 1)))
    torch.testing.assert_close(torch.cat(block.early_stop.scores), scores)


def test_a_block_that_the_gate_is_not_asked_about_has_no_scores() -> None:
    """Looked up, or drafted without a bound."""
    routed = RoutedModel(tiny_model())
    drafter = make_drafter("lookup+near", routed)
    again = open_session(routed, drafter, [3, 1, 4, 15, 9, 3, 1], 40, Ending(), make_sampler(Sampling()))
    block = finish(draft(again, 4, Gate(GATE), 0.5))
    assert block.tokens.tolist() == [4, 15, 9, 3]
    assert block.early_stop is None
    assert finish(draft(session("near"), 4, Gate(GATE), 0.0)).early_stop is None


@pytest.mark.parametrize("kind", ["near", "random"])
def test_an_empty_block_has_no_scores(kind: str) -> None:
    """With logits of no rows, or without any."""
    block = finish(draft(session(kind), 0, Gate(GATE), 0.5))
    assert len(block) == 0
    assert block.early_stop is None
    found = block.top_k(2)
    assert found is None or found.entropy.shape == (0,)


def test_the_rest_of_a_block() -> None:
    vocabulary = torch.tensor([2, 5])
    block = Block(torch.tensor([5, 2]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.eye(VOCAB)[[5, 2]], vocabulary)
    rest = block.after(1)
    assert rest.tokens.tolist() == [2]
    assert rest.proposal_probs is not None
    assert rest.proposal_probs.argmax(-1).tolist() == [2]
    found = rest.top_k(1)
    assert found is not None
    assert found.ids.tolist() == [[2]]


def test_there_is_no_top_k_where_none_is_wanted_or_known() -> None:
    assert Block(torch.tensor([3])).top_k(1) is None
    assert Block(torch.tensor([0]), torch.zeros(1, 4)).top_k(0) is None
