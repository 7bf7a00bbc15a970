"""How many policies a minute the planner replays on one core, over made-up texts, and how few passes a token it counts.

python train/replay_speed.py --places 50000 --policies 1000
"""

from __future__ import annotations

import argparse
import time

import torch

from viasd_calib.decoding.policies import Policy
from viasd_calib.planning.replay import replay
from viasd_calib.planning.traced import DraftedPlaces, ReplayTable, ReplayText, SlimPlaces

AGES, DEPTHS, TEXT = 13, 8, 128


def made_up(length: int) -> ReplayText:
    """A text in which p is right at two places of three and q' at nine of ten, and gates know it roughly."""
    agrees = torch.rand(DEPTHS, length) < 0.65
    right = torch.rand(AGES, length) < 0.9
    trust = torch.where(right, 0.3 + 0.7 * torch.rand(AGES, length), 0.8 * torch.rand(AGES, length))
    scores = trust[:, None].expand(-1, DEPTHS + 1, -1).contiguous()
    sure = torch.where(agrees, 0.2 + 0.8 * torch.rand(DEPTHS, length), 0.9 * torch.rand(DEPTHS, length))
    drafted = DraftedPlaces(torch.ones_like(agrees), agrees, sure, torch.zeros(length, dtype=torch.bool))
    accept = torch.where(agrees, scores[:, :DEPTHS], 0.2)
    return ReplayText(length, drafted, SlimPlaces(accept, scores[:, :DEPTHS].clone(), scores, right))


def some_policies(count: int) -> list[Policy]:
    """Of all kinds that draft with a model, as a search has them."""
    every = [
        Policy(None, length, stop, draft, accept, pending)
        for length in (1, 2, 3, 4, 6, 8)
        for stop in (0.0, 0.2, 0.4, 0.6, 0.8)
        for draft in (0.9, 1.01)
        for accept in (0.5, 0.6, 0.7, 0.8, 0.9, 1.01)
        for pending in (4, 6, 8, 12)
    ]
    return [every[number * len(every) // count] for number in range(count)]


def main() -> None:
    """Replay, and say how fast."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=50_000)
    parser.add_argument("--policies", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = ReplayTable.of([made_up(TEXT) for _ in range(options.places // TEXT)])
    policies = some_policies(options.policies)
    begin = time.perf_counter()
    found = replay(policies, texts)
    seconds = time.perf_counter() - begin
    print(
        f"{len(policies)} policies on {texts.places} places in {seconds:.1f} s: {60 * len(policies) / seconds:.0f} "
        f"a minute; {float(found.full_per_token.min()):.2f} full passes a token at least, simulated"
    )


if __name__ == "__main__":
    main()
