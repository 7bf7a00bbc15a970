"""How good a route is: agreement and divergence of q' and q on unseen prompts, and what a slim pass costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from viasd_calib.errors import BenchError
from viasd_calib.progress import tracked
from viasd_calib.replay.agreement import ComparedPlaces, compare_places, text_cache
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.data import TraceText

CONFIDENT_SHARES = ("0.5", "0.6", "0.7", "0.9")
"""Shares of the places, those where q' is most confident, that agreement is given for."""


class RouteQuality(BaseModel):
    """What ``viasd route-quality`` measured, at the places where q wrote, q' reading q's cache.

    Attributes:
        agreement: share of places where both choose the same token, q having seen all before (distance 0).
        kl: KL(q || q') there, in nats, over q's top 16 tokens and the rest.
        agreement_confident: agreement on the share of places where q' is most confident of its choice.
        relative_cost: time of a slim pass over that of a full pass of the same width, head included, interleaved.
        by_distance: agreement by how many tokens before the place q has not seen.
        by_task: agreement by the prompts' task.
    """

    model_config = ConfigDict(extra="forbid")

    agreement: float
    kl: float
    agreement_confident: dict[str, float]
    relative_cost: dict[int, float]
    by_distance: dict[int, float]
    by_task: dict[str, float]


def measure_quality(
    model: RoutedModel, texts: Sequence[TraceText], relative_cost: dict[int, float], distances: int = 9
) -> RouteQuality:
    """Compare q' with q on texts that q wrote.

    Args:
        relative_cost: of a slim pass, by width.
        distances: how many distances from the last q pass are compared, from 0 on.

    Raises:
        BenchError: there is no generated place to compare.
    """
    if not any(len(text.generated) for text in texts):
        raise BenchError("the verifier wrote nothing on these prompts; give others")
    shown = tracked(texts, "comparing q' with q", len(texts), "texts")
    by_text = [compare_at_distances(model, text, distances) for text in shown]
    direct = [found[0] for found in by_text]
    together = ComparedPlaces.joined(direct)
    by_distance = [torch.cat([found[distance].agrees for found in by_text]) for distance in range(distances)]
    return RouteQuality(
        agreement=round(together.agreement(), 4),
        kl=_mean(together.kl),
        agreement_confident={share: round(together.agreement(float(share)), 4) for share in CONFIDENT_SHARES},
        relative_cost={width: round(cost, 4) for width, cost in relative_cost.items()},
        by_distance={distance: _mean(hits) for distance, hits in enumerate(by_distance) if len(hits)},
        by_task={
            task: _mean(torch.cat([p.agrees for p, text in zip(direct, texts, strict=True) if text.task == task]))
            for task in sorted({text.task for text in texts})
        },
    )


def _mean(values: Tensor) -> float:
    return round(float(values.float().mean()), 4)


def compare_at_distances(model: RoutedModel, text: TraceText, distances: int) -> list[ComparedPlaces]:
    """q' at every place of a text, 0, 1, ... tokens after what q has seen.

    A place nearer to the prompt's end than a distance is left out there. Runs of ``distances`` places, begun one place
    further in each forward, bring every place to every distance in as many forwards.
    """
    begin, length = text.prompt_length - 1, len(text.ids) - 1
    cache = text_cache(model, text)
    own = torch.arange(length - begin)  # places of the text that q wrote, [n]
    compared: list[tuple[Tensor, ComparedPlaces]] = []
    for offset in range(min(distances, len(own))):
        after = (own - offset) % distances  # [n], in a run that begins before the first place where it is larger
        starts = torch.cat([torch.arange(begin), begin + (own - after).clamp(min=0)])
        places = compare_places(model, model.slim_sublayers, text, cache, starts)
        compared.append((torch.where(after <= own, after, -1), places))
    return [_of_distance(compared, distance) for distance in range(distances)]


def _of_distance(compared: Sequence[tuple[Tensor, ComparedPlaces]], distance: int) -> ComparedPlaces:
    chosen = [(after == distance, places) for after, places in compared]
    return ComparedPlaces(
        torch.cat([places.kl[mask] for mask, places in chosen]),
        torch.cat([places.agrees[mask] for mask, places in chosen]),
        torch.cat([places.confidence[mask] for mask, places in chosen]),
    )
