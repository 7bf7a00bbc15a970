"""Agreement and divergence of q' and q, place by place, on texts that q wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.features import top_k_kl
from viasd_calib.replay.student import student_states
from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.cache import SharedCache
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.plan import Sublayer
from viasd_calib.traces.texts import TraceText


@dataclass(frozen=True)
class ComparedPlaces:
    """q' against q at the n places of a text where q wrote.

    Attributes:
        kl: KL(q || q') over q's traced top k and the rest, in nats, [n].
        agrees: whether both choose the same token, [n], bool.
        confidence: what q' gives its choice, [n].
    """

    kl: Tensor
    agrees: Tensor
    confidence: Tensor

    @classmethod
    def joined(cls, parts: Sequence[ComparedPlaces]) -> ComparedPlaces:
        """The places of several texts, one text after the other."""
        return cls(
            torch.cat([part.kl for part in parts]),
            torch.cat([part.agrees for part in parts]),
            torch.cat([part.confidence for part in parts]),
        )

    def only(self, chosen: Tensor) -> ComparedPlaces:
        """The places where ``chosen`` ([n], bool) holds."""
        return ComparedPlaces(self.kl[chosen], self.agrees[chosen], self.confidence[chosen])

    def agreement(self, share: float = 1.0) -> float:
        """Agreement on this share of the places, those where q' is most confident of its choice; on one at least.

        Example:
            >>> places = ComparedPlaces(torch.zeros(2), torch.tensor([True, False]), torch.tensor([0.9, 0.2]))
            >>> places.agreement(), places.agreement(0.5)
            (0.5, 1.0)
        """
        return most_confident_agreement(self.agrees, self.confidence, share)


def most_confident_agreement(agrees: Tensor, confidence: Tensor, share: float) -> float:
    """Share of ``agrees`` ([n], bool) that holds on the ``share`` of places with the highest ``confidence`` ([n]).

    At least one place counts; of equally confident ones, the earlier.
    """
    most_confident = confidence.argsort(descending=True, stable=True)
    return float(agrees[most_confident[: max(1, round(share * len(most_confident)))]].float().mean())


def text_cache(model: RoutedModel, text: TraceText) -> SharedCache:
    """q's keys and values on a text."""
    return read_text(model, text.ids[None, :-1].to(model.device))[1]


def directly_after(text: TraceText) -> Tensor:
    """Starts for q' directly after q: every place is a run of its own, [length - 1], long."""
    return torch.arange(len(text.ids) - 1)


@torch.no_grad()
def slim_logits_on(
    model: RoutedModel, sublayers: Sequence[Sublayer], text: TraceText, cache: SharedCache, starts: Tensor
) -> Tensor:
    """Run q' on a text, reading q's cache up to the start of each place's run.

    Args:
        sublayers: what q' runs.
        cache: q's, as :func:`text_cache` gives it.
        starts: of each place's run of pending tokens, [length - 1].

    Returns:
        Its logits at the n places where q wrote: [n, vocabulary], float32, on the host.
    """
    ids = text.ids[None, :-1].to(model.device)
    states = student_states(model, sublayers, ids, cache, starts.to(model.device), begin=text.prompt_length - 1)
    return model.slim_logits(states[0]).float().cpu()


def compare_places(
    model: RoutedModel, sublayers: Sequence[Sublayer], text: TraceText, cache: SharedCache, starts: Tensor
) -> ComparedPlaces:
    """Run q' on a text, as :func:`slim_logits_on` does, and compare it with q."""
    logits = slim_logits_on(model, sublayers, text, cache, starts)
    return compare_logits(text.q_ids, text.q_log_probs, logits)


def compare_logits(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> ComparedPlaces:
    """Compare what q' gives at n places with what q gave there.

    Args:
        q_ids: q's top tokens, the most probable first, [n, k], long.
        q_log_probs: their log-probabilities, [n, k], float32.
        logits: of q', [n, vocabulary], float32.

    Example:
        >>> log_probs = torch.tensor([[0.9, 0.1]]).log()
        >>> compare_logits(torch.tensor([[1, 0]]), log_probs, torch.tensor([[0.0, 2.0, 1.0]])).agrees
        tensor([True])
    """
    top, log_sum_exp = logits.max(-1), logits.logsumexp(-1)
    return ComparedPlaces(
        kl=top_k_kl(q_ids, q_log_probs, logits, log_sum_exp),
        agrees=top.indices == q_ids[:, 0],
        confidence=(top.values - log_sum_exp).exp(),
    )
