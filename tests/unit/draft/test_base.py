from __future__ import annotations

import torch

from tests.tiny import RandomDrafter, propose
from viasd_calib.draft.base import Proposal, never_stop, to_verifier_ids


def test_ids_of_a_smaller_vocabulary() -> None:
    places = torch.tensor([[0, 2], [1, 1]])
    assert to_verifier_ids(places, torch.tensor([5, 7, 11])).tolist() == [[5, 11], [7, 7]]
    assert to_verifier_ids(places, None) is places


def test_a_proposal_is_as_long_as_its_tokens() -> None:
    assert len(Proposal(torch.tensor([4, 5, 6]), None)) == 3
    assert len(Proposal(torch.empty(0, dtype=torch.long), None)) == 0


def test_never_stop_goes_on() -> None:
    assert never_stop(torch.zeros(3), 99) is False


def test_a_drafter_needs_neither_to_observe_nor_to_roll_back() -> None:
    drafter = RandomDrafter(8, 0)
    drafter.start(16)
    drafter.observe(0, torch.zeros(3, 0, 4))
    drafter.rollback(2)
    assert len(propose(drafter, torch.tensor([1]), 4)) == 4
