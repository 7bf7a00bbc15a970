"""The plan of what q' runs: which sublayers a module replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.toy_part import Constant
from viasd_calib.errors import SpecError
from viasd_calib.slim.plan import SlimPlan


@pytest.mark.parametrize(
    ("begin", "end", "part", "message"),
    [
        (
            2,
            6,
            "constants",
            "bridges and constants both replace sublayers 2 to 5; fit again with --model.bridges false",
        ),
        (5, 7, "constants", "bridges and constants both replace sublayer 5; fit again with"),
        (0, 4, "bridges", "bridges and bridges both replace sublayers 2 to 3"),
        (6, 7, "constants", None),
    ],
)
def test_a_sublayer_is_replaced_once(begin: int, end: int, part: str, message: str | None) -> None:
    plan = SlimPlan(nn.ModuleList([nn.Identity() for _ in range(4)]), ["full_attention"] * 4)
    plan.replace(2, 6, Constant(torch.zeros(2)), "bridges")
    if message is None:
        plan.replace(begin, end, Constant(torch.zeros(2)), part)
        assert [(one.kind, one.end) for one in plan.sublayers()] == [
            ("attention", 1), ("mlp", 2), ("bridge", 6), ("bridge", 7), ("mlp", 8),
        ]  # fmt: skip
    else:
        with pytest.raises(SpecError, match=message):
            plan.replace(begin, end, Constant(torch.zeros(2)), part)
        assert [*plan.stand_ins] == [2]
