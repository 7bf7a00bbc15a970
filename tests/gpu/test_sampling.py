"""Sampled texts on the device have q's distribution: the chi-square test of tests/statistical, in batches.

False-alarm rate: ``FALSE_ALARM`` (1e-5) for each test, so that of these a right decoder fails one in 20,000 runs of
other seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.statistical.test_sampled_text import (
    BLIND,
    CUT,
    FALSE_ALARM,
    FULL,
    LENGTH,
    PLAIN,
    PROMPT,
    SLIM,
    TRUSTING,
    VOCAB,
    TableModel,
    drafter,
    exact,
    p_value,
    three_tier,
    variation,
)
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.speculative import Speculative

pytestmark = pytest.mark.gpu

TEXTS = {"cpu": 400, "cuda": 1000}
BATCH = 200

Case = tuple[Callable[[], Strategy], str, Sampling]

CASES: dict[str, Case] = {
    "speculative": (lambda: Speculative(2), "near", PLAIN),
    "three tiers": (lambda: three_tier(5), "near", PLAIN),
    "three tiers, cut": (lambda: three_tier(8), "far", CUT),
    "three tiers, q' always trusted": (lambda: three_tier(5, **TRUSTING), "near", PLAIN),
    "three tiers, p always trusted": (lambda: three_tier(5, **BLIND), "far", PLAIN),
}


@functools.cache
def model_on(device: torch.device) -> type[TableModel]:
    """The bigram tables, on a device."""

    class OnDevice(TableModel):
        place = device

    return OnDevice


def sample(method: Strategy, kind: str, sampling: Sampling, device: torch.device) -> np.ndarray:
    """How often each continuation is drawn, [vocabulary ** length]."""
    model = model_on(device)
    decoder = Decoder(model(FULL, SLIM), drafter(kind, model), method, sampling=sampling)
    counts = np.zeros(VOCAB**LENGTH)
    for text in decoder.generate_batch([PROMPT] * TEXTS[device.type], LENGTH, batch_size=BATCH):
        one, two, three = text.tokens
        counts[(one * VOCAB + two) * VOCAB + three] += 1
    return counts


@pytest.mark.parametrize("name", CASES)
def test_a_strict_text_has_qs_distribution(
    name: str, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    method, kind, sampling = CASES[name]
    counts, chances = sample(method(), kind, sampling, device), exact(sampling)
    found = p_value(counts, chances)
    for key, value in {"p_value": found, "texts": counts.sum(), "false_alarm": FALSE_ALARM}.items():
        record_property(key, float(value))
    record_property("total_variation", variation(counts, chances))
    assert found > FALSE_ALARM


def test_an_audit_that_is_off_is_found_out(
    device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """The negative control."""
    method = three_tier(5, **TRUSTING)
    method.audit = "off"
    found = p_value(sample(method, "near", PLAIN, device), exact(PLAIN))
    record_property("p_value", found)
    assert found < FALSE_ALARM
