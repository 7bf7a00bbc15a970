"""How good a route is: agreement and divergence of q' and q on unseen prompts, and what a slim pass costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from viasd_calib.calibration.reliability import Reliability
from viasd_calib.errors import BenchError
from viasd_calib.progress import steps
from viasd_calib.replay.agreement import ComparedPlaces, compare_logits, text_cache
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.cost import nothing
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.texts import TraceText

CONFIDENT_SHARES = ("0.5", "0.6", "0.7", "0.9")
"""Shares of the places, those where q' is most confident, that agreement is given for."""

NEAR = 9
"""Distances from 0 on at which every place is compared."""

FAR = (15, 23, 31)
"""Distances at which some places are compared."""

EVERY = 4
"""Places from one run that reaches the far distances to the next."""


class RouteQuality(BaseModel):
    """What ``viasd route-quality`` measured, at the places where q wrote, q' reading q's cache.

    Attributes:
        agreement: share of places where both choose the same token, q having seen all before (distance 0).
        kl: KL(q || q') there, in nats, over q's top 16 tokens and the rest.
        agreement_confident: agreement on the share of places where q' is most confident of its choice.
        relative_cost: time of a slim pass over that of a full pass of the same width, head included, interleaved.
        by_distance: agreement by how many tokens before the place q has not seen.
        places_by_distance: how many places that is the agreement of.
        by_task: agreement by the prompts' task.
        gates: how well the spec's gates are calibrated, by ``draft`` and ``slim``; a gate that was asked nothing is
            left out, and in what earlier releases wrote both are.
    """

    model_config = ConfigDict(extra="forbid")

    agreement: float
    kl: float
    agreement_confident: dict[str, float]
    relative_cost: dict[int, float]
    by_distance: dict[int, float]
    places_by_distance: dict[int, int]
    by_task: dict[str, float]
    gates: dict[str, Reliability] = {}


def measure_quality(
    model: RoutedModel,
    texts: Sequence[TraceText],
    relative_cost: dict[int, float],
    near: int = NEAR,
    far: Sequence[int] = FAR,
    every: int = EVERY,
) -> RouteQuality:
    """Compare q' with q on texts that q wrote.

    Args:
        relative_cost: of a slim pass, by width.
        near: distances from 0 on, one at least; this, ``far`` and ``every`` as for :func:`compare_at_distances`.

    Raises:
        BenchError: there is no generated place to compare.
    """
    texts = [text for text in texts if len(text.generated)]
    if not texts:
        raise BenchError("the verifier wrote nothing on these prompts; give others")
    with steps("comparing q' with q", sum(len(text.generated) for text in texts), "places") as running:
        by_text = [compare_at_distances(model, text, near, far, every, running.advance) for text in texts]
    direct = [found[0] for found in by_text]
    together = ComparedPlaces.joined(direct)
    distances = sorted({distance for found in by_text for distance in found})
    hits = {d: torch.cat([found[d].agrees for found in by_text if d in found]) for d in distances}
    return RouteQuality(
        agreement=round(together.agreement(), 4),
        kl=_mean(together.kl),
        agreement_confident={share: round(together.agreement(float(share)), 4) for share in CONFIDENT_SHARES},
        relative_cost={width: round(cost, 4) for width, cost in relative_cost.items()},
        by_distance={distance: _mean(agrees) for distance, agrees in hits.items()},
        places_by_distance={distance: len(agrees) for distance, agrees in hits.items()},
        by_task={
            task: _mean(torch.cat([p.agrees for p, text in zip(direct, texts, strict=True) if text.task == task]))
            for task in sorted({text.task for text in texts})
        },
    )


def _mean(values: Tensor) -> float:
    return round(float(values.float().mean()), 4)


@torch.inference_mode()
def compare_at_distances(
    model: RoutedModel,
    text: TraceText,
    near: int = NEAR,
    far: Sequence[int] = FAR,
    every: int = EVERY,
    advance: Callable[[], object] = nothing,
) -> dict[int, ComparedPlaces]:
    """q' at the places of a text where q wrote, by how many tokens before a place q has not seen.

    A run begins at every place, and is one slim pass as decoding makes it: q' reads q's cache up to the run's begin,
    and what it wrote itself inside the run. The place at distance d is the run's (d + 1)th, so that a run of 32 places
    gives all distances at once. Most runs reach the near distances alone, one of ``every`` the far ones, too. Of a text
    of n tokens n - d places have a near distance d, and ceil((n - d) / every) a far one: of 24 texts of 48 tokens,
    every 4 places, 120 have distance 31, where an agreement of 0.9 has a standard error of 0.03 or, since runs overlap,
    somewhat more.

    A text of n tokens takes n slim passes, as many as its writing took full ones.

    Memory is that of q's cache over the text, of a pass of max(far) + 1 tokens, and of a row of logits for each
    distance of a run.

    Args:
        near: distances 0 to ``near`` - 1 are compared at every place.
        far: further distances.
        every: places from one run that reaches them to the next, from the first place on.
        advance: called after each run; there are as many as places.

    Returns:
        Places by distance, in rising order of both; a distance that no place has is left out.
    """
    begin, length = text.prompt_length - 1, len(text.ids) - 1
    ids, cache = text.ids[None, :-1].to(model.device), text_cache(model, text)
    runs: list[tuple[list[int], ComparedPlaces]] = []
    # The last run first: what q' writes into the cache lies at or after its run's begin, where no later one reads.
    for start in reversed(range(begin, length)):
        reached = {*range(near), *(() if (start - begin) % every else far)}
        distances = sorted(distance for distance in reached if start + distance < length)
        width = distances[-1] + 1
        states = model.slim(ids[:, start : start + width], CacheWindow(cache, start, width, start + width))
        logits = model.slim_logits(states.last[0, distances]).float().cpu()  # [distances, vocabulary]
        places = torch.tensor(distances) + (start - begin)
        runs.append((distances, compare_logits(text.q_ids[places], text.q_log_probs[places], logits)))
        advance()
    runs.reverse()
    reached_by = torch.tensor([distance for distances, _ in runs for distance in distances])
    joined = ComparedPlaces.joined([places for _, places in runs])
    return {distance: joined.only(reached_by == distance) for distance in reached_by.unique().tolist()}
