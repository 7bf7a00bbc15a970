from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import constant_gate
from viasd_calib.decoding.features import SLIM_FEATURES, TRACED_TOP_K, DraftStatistics, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.calibrated import CalibratedRule, candidate_scores
from viasd_calib.decoding.slim_rules.margin import MarginRule
from viasd_calib.decoding.slim_rules.ratio import RatioRule
from viasd_calib.decoding.top_k import top_k_statistics
from viasd_calib.spec import LogisticGate

VOCAB = 40
COUNT = len(SLIM_FEATURES)
GATE = Gate(
    LogisticGate(
        features=list(SLIM_FEATURES),
        mean=[0.0] * COUNT,
        scale=[1.0] * COUNT,
        weight=[0.1 * (number - 4) for number in range(COUNT)],
        bias=0.2,
    )
)


@pytest.mark.parametrize(
    ("rule", "tokens"),
    [
        (CalibratedRule(GATE, 0.9, 0.9), TRACED_TOP_K),
        (CalibratedRule(Gate(constant_gate("slim_margin", 1.0)), 0.9, 0.9), 1),
        (MarginRule(), 1),
        (RatioRule(0.7, 0.5), 0),
    ],
)
def test_a_rule_asks_for_as_many_tokens_as_it_looks_at(rule: SlimRule, tokens: int) -> None:
    assert rule.draft_top == tokens


@given(seed=st.integers(0, 99), k=st.integers(0, 4), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_margins_are_those_of_the_probabilities(seed: int, k: int, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(k + 1, VOCAB, generator=torch.Generator().manual_seed(seed))).to(dtype)
    drafted = torch.zeros(k, dtype=torch.long)
    first, second = logits.double().softmax(-1).topk(2).values.unbind(-1)
    for least in (0.1, 0.3):
        masks = MarginRule(least).masks(logits, DraftStatistics(drafted, None, drafted), 0)
        sure = first - second >= least
        assert masks.regenerate.tolist() == sure.tolist()
        assert masks.accept.tolist() == (sure[:k] & (logits.argmax(-1)[:k] == 0)).tolist()


@given(seed=st.integers(0, 99), k=st.integers(0, 4), pending=st.integers(0, 9), certain=st.booleans())
def test_both_candidates_of_a_place_have_the_scores_of_their_features(
    seed: int, k: int, pending: int, certain: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, p_logits = (2 * torch.randn(rows, VOCAB, generator=generator) for rows in (k + 1, k))
    drafted = torch.randint(VOCAB, (k,), generator=generator)
    draft = DraftStatistics(drafted, None if certain else top_k_statistics(p_logits, TRACED_TOP_K), torch.arange(k))
    accept, own = candidate_scores(GATE, logits, draft, pending)
    reading, slim = logit_statistics(logits, drafted), top_k_statistics(logits, 1)
    for scores, ratio, end in ((accept, reading.log_ratio, k), (own[:k], torch.zeros(k), k)):
        place = torch.arange(end)
        features = slim_features(ratio, logits[:end], slim[:end], draft, place, pending + place)
        torch.testing.assert_close(scores, GATE(features))
    place = torch.tensor([k])
    after = slim_features(torch.zeros(1), logits[k:], slim[k:], None, place, pending + place)
    torch.testing.assert_close(own[k:], GATE(after))
