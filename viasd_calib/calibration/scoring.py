"""What the gates would have seen at every place of traced texts: features, and whether q agreed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from viasd_calib.decoding.features import DraftStatistics, draft_features, slim_features
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.top_k import TopKStatistics, top_k_of
from viasd_calib.errors import TraceError
from viasd_calib.replay.agreement import slim_logits_on, text_cache
from viasd_calib.replay.blocks import ReplayedBlocks, block_runs, replay_blocks
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.texts import TraceText


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

    The four kinds of candidates are given at all n places. A gate is asked at some of them alone, and fitted on those:
    :meth:`draft_candidates`, :meth:`slim_candidates`.

    Attributes:
        draft: the drafted tokens with draft features, [n].
        accept: the drafted tokens with slim features, [n].
        own: q's slim choices with slim features, beside a drafted token, [n].
        own_alone: q's slim choices where there is no drafted token, [n].
        proposed: whether the drafter proposed a token, [n], bool.
        blocks: at which places which gate is asked.
        prompt: hash of the text's prompt.
        task: of the prompt.
    """

    draft: LabelledTokens
    accept: LabelledTokens
    own: LabelledTokens
    own_alone: LabelledTokens
    proposed: Tensor
    blocks: ReplayedBlocks
    prompt: str = ""
    task: str = ""

    def draft_candidates(self) -> LabelledTokens:
        """What the draft gate is asked: the drafted tokens whose block has come to them."""
        return self.draft.at(self.blocks.drafted)

    def slim_candidates(self) -> LabelledTokens:
        """What the slim gate is asked: the same drafted tokens, and q's slim choice where it is another or alone.

        Where both choose one token there is one candidate, not two.
        """
        other = self.own.features["same_choice"] == 0
        drafted, undrafted = self.blocks.drafted, self.blocks.undrafted
        return join([self.accept.at(drafted), self.own.at(drafted & other), self.own_alone.at(undrafted)])


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


SlimReader = Callable[[RoutedModel, TraceText, Tensor], Tensor]
"""Runs q' on a text, in runs that begin at given starts ([length]): its logits at the n generated places,
[n, vocabulary], float32, on the host."""


def at_once(model: RoutedModel, text: TraceText, starts: Tensor) -> Tensor:
    """All runs in one forward of the eager modules: a :data:`SlimReader`."""
    return slim_logits_on(model, model.slim_sublayers, text, text_cache(model, text), starts)


def run_by_run(model: RoutedModel, text: TraceText, starts: Tensor) -> Tensor:
    """One slim pass a run, as decoding makes it, by whatever backend runs the model: a :data:`SlimReader`."""
    begin, length = text.prompt_length - 1, len(text.ids) - 1
    ids, cache = text.ids[None, :-1].to(model.device), text_cache(model, text)
    bounds = [*starts[begin:].clamp(min=begin).unique().tolist(), length]
    found: list[Tensor] = []
    # The last run first: what q' writes into the cache lies at or after its run's begin, where no earlier one reads.
    for first, after in reversed([*pairwise(bounds)]):
        states = model.slim(ids[:, first:after], CacheWindow(cache, first, after - first, after))
        found.append(model.slim_logits(states.last[0]).float().cpu())
    return torch.cat(found[::-1])


@torch.inference_mode()
def score_texts(
    model: RoutedModel, texts: Sequence[TraceText], max_run: int, seed: int = 0, read: SlimReader = at_once
) -> Iterator[ScoredText]:
    """Run q' over traced texts as it will run, and label what the gates would be asked.

    q reads the prompt, as it does when it decodes: runs of pending places begin after it, and are of whole blocks.

    Args:
        model: the verifier with its route.
        max_run: longest run of pending places.
        seed: of the runs.
        read: how q' runs.

    Raises:
        TraceError: the traces were captured without a drafter.
    """
    generator = torch.Generator().manual_seed(seed)
    for text in texts:
        draft = traced_draft_statistics(text)
        begin = text.prompt_length - 1
        starts = block_runs(draft.depth, max_run, generator)  # [n]
        whole = torch.cat([torch.arange(begin), begin + starts])  # [length]: in the prompt nothing is pending
        logits = read(model, text, whole)  # [n, vocabulary]
        blocks = replay_blocks(draft.tokens, text.generated, draft.depth, starts)
        yield _score(text, draft, blocks, logits, torch.arange(len(starts)) - starts)


def _score(
    text: TraceText, draft: DraftStatistics, blocks: ReplayedBlocks, logits: Tensor, pending: Tensor
) -> ScoredText:
    choice = text.q_ids[:, 0]  # [n]
    proposed = draft.tokens >= 0
    statistics = logit_statistics(logits, draft.tokens.clamp(min=0))
    slim = top_k_of(statistics, logits, 1)
    own, agrees = slim.ids[:, 0], draft.tokens == choice
    own_ratio = torch.zeros_like(slim.entropy)
    place, alone = draft.depth, blocks.block_place
    return ScoredText(
        draft=LabelledTokens(draft_features(draft), agrees),
        accept=LabelledTokens(slim_features(statistics.log_ratio, logits, slim, draft, place, pending), agrees),
        own=LabelledTokens(slim_features(own_ratio, logits, slim, draft, place, pending), own == choice),
        own_alone=LabelledTokens(slim_features(own_ratio, logits, slim, None, alone, pending), own == choice),
        proposed=proposed,
        blocks=blocks,
        prompt=text.prompt_hash,
        task=text.task,
    )


def join(parts: Sequence[LabelledTokens]) -> LabelledTokens:
    """All candidates of several texts or kinds as one."""
    names = parts[0].features.keys()
    features = {name: torch.cat([part.features[name] for part in parts]) for name in names}
    return LabelledTokens(features, torch.cat([part.agrees for part in parts]))
