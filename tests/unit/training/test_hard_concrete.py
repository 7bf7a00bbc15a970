"""Hard-concrete gates against the closed forms of their paper."""

from __future__ import annotations

import pytest
import torch

from viasd_calib.training.hard_concrete import HardConcrete


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_chance_open_is_the_share_of_samples_above_zero(chance: float) -> None:
    """A share of 20,000 draws is within 5 standard errors of its expectation (false alarms: 6 in 10 million)."""
    gates = HardConcrete(20_000, open_at_start=chance)
    share = (gates.sample(torch.Generator().manual_seed(0)) > 0).float().mean().item()
    assert abs(share - chance) < 5 * (chance * (1 - chance) / 20_000) ** 0.5
    assert gates.chance_open().mean().item() == pytest.approx(chance, abs=1e-5)


def test_samples_reach_both_ends_exactly() -> None:
    drawn = HardConcrete(5_000, open_at_start=0.5).sample(torch.Generator().manual_seed(1))
    assert (drawn == 0).any()
    assert (drawn == 1).any()
    assert ((drawn > 0) & (drawn < 1)).any()


def test_gradient_opens_a_gate_that_lowers_the_loss() -> None:
    gates = HardConcrete(2, open_at_start=0.5)
    optimizer = torch.optim.SGD(gates.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = gates.sample(generator)
        optimizer.zero_grad()
        (drawn[1] - drawn[0]).backward()
        optimizer.step()
    opened, closed = gates.chance_open().tolist()
    assert opened > 0.9
    assert closed < 0.1
