"""What the gates would have seen at every place of traced texts: features, and whether q agreed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.features import DraftStatistics, draft_features, slim_features
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.top_k import TopKStatistics, top_k_of
from viasd_calib.errors import TraceError
from viasd_calib.replay.agreement import slim_logits_on, text_cache
from viasd_calib.replay.student import run_starts
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.data import TraceText


@dataclass(frozen=True)
class LabelledTokens:
    """Candidate tokens with their features and a label: whether q agrees.

    Attributes:
        features: each [n], float32.
        agrees: whether the candidate is q's choice, [n], bool.
    """

    features: dict[str, Tensor]
    agrees: Tensor

    def at(self, places: Tensor) -> LabelledTokens:
        """Those at some places ([n], bool)."""
        return LabelledTokens({name: values[places] for name, values in self.features.items()}, self.agrees[places])


@dataclass(frozen=True)
class ScoredText:
    """One traced text as the gates see it; n is the number of its generated tokens.

    Attributes:
        draft: the drafted tokens with draft features, [n]; of a drafter with a distribution, where it drafted: after
            the draft model's context it does not.
        accept: the drafted tokens with slim features, at the same places.
        own: q's slim choices with slim features, at the same places.
        own_alone: q's slim choices where nothing was drafted, [n].
    """

    draft: LabelledTokens
    accept: LabelledTokens
    own: LabelledTokens
    own_alone: LabelledTokens


def traced_draft_statistics(text: TraceText) -> DraftStatistics:
    """Statistics of the draft model's proposals on a text.

    Raises:
        TraceError: the traces were captured without a drafter.
    """
    if len(text.p_token) == 0:
        raise TraceError("the traces hold no proposals; capture them with the drafter the decoder will use")
    top_k = None
    if text.p_top_k is not None:
        ids, log_probs = text.p_top_k
        unused = torch.zeros_like(text.p_entropy)  # features look at no log-sum-exp of p
        top_k = TopKStatistics(ids, log_probs, unused, text.p_entropy, text.p_margin)
    return DraftStatistics(text.p_token, top_k, text.p_depth)


@torch.inference_mode()
def score_texts(model: RoutedModel, texts: Sequence[TraceText], max_run: int, seed: int = 0) -> Iterator[ScoredText]:
    """Run q' over traced texts as it will run, and label what the gates would be asked.

    q reads the prompt, as it does when it decodes: runs of pending places begin after it.

    Args:
        model: the verifier with its route.
        max_run: longest run of pending places.
        seed: of the runs.
    """
    generator = torch.Generator().manual_seed(seed)
    for text in texts:
        begin, length = text.prompt_length - 1, len(text.ids) - 1
        starts = run_starts(length, max_run, generator)  # [length]
        logits = slim_logits_on(model, model.slim_sublayers, text, text_cache(model, text), starts)  # [n, vocabulary]
        pending = torch.arange(begin, length) - starts[begin:].clamp(min=begin)  # [n]
        yield _score(text, logits, pending)


def _score(text: TraceText, logits: Tensor, pending: Tensor) -> ScoredText:
    choice = text.q_ids[:, 0]  # [n]
    draft = traced_draft_statistics(text)
    drafted = draft.tokens.clamp(min=0)  # -1 means no proposal; it never agrees
    statistics = logit_statistics(logits, drafted)
    slim = top_k_of(statistics, logits, 1)
    own = slim.ids[:, 0]
    own_ratio = torch.zeros_like(slim.entropy)
    place = draft.depth
    agrees = draft.tokens == choice
    asked = torch.ones_like(agrees) if draft.top_k is None else draft.tokens >= 0
    return ScoredText(
        draft=LabelledTokens(draft_features(draft), agrees).at(asked),
        accept=LabelledTokens(slim_features(statistics.log_ratio, logits, slim, draft, place, pending), agrees).at(
            asked
        ),
        own=LabelledTokens(slim_features(own_ratio, logits, slim, draft, place, pending), own == choice).at(asked),
        own_alone=LabelledTokens(
            slim_features(own_ratio, logits, slim, None, torch.zeros_like(place), pending), own == choice
        ),
    )


def join(parts: Sequence[LabelledTokens]) -> LabelledTokens:
    """All candidates of several texts or kinds as one."""
    names = parts[0].features.keys()
    features = {name: torch.cat([part.features[name] for part in parts]) for name in names}
    return LabelledTokens(features, torch.cat([part.agrees for part in parts]))
