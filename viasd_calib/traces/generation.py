"""Batched generation with the full verifier: finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from viasd_calib.decoding.draws import draw, process_rows
from viasd_calib.decoding.sampling import Sampling, seed_of_text
from viasd_calib.decoding.top_k import TopKStatistics, top_k_statistics
from viasd_calib.errors import NumericsError, SamplingError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel


@dataclass
class Answer:
    """A text that q wrote after a prompt, and statistics of its logits.

    Attributes:
        tokens: the new tokens, up to and including the first end-of-text token.
        tapped: q's residual stream for the prompt and every new token but the last, in pieces of
            [any, taps, hidden].
        top_k: statistics of q's logits, one a token.
    """

    tokens: list[int]
    tapped: list[Tensor]
    top_k: list[TopKStatistics]


@torch.inference_mode()
def answer_batch(
    verifier: RoutedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    sampling: Sampling,
    top_k_size: int = 2,
    taps: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """Let q answer a batch of prompts, and keep statistics of its logits at every token.

    Args:
        prompts: token ids, each at least one long.
        top_k_size: tokens of q's distribution that statistics keep.
        taps: after how many layers the residual stream is kept.
        numbers: of the texts; each is drawn with the seed that :func:`~viasd_calib.decoding.sampling.seed_of_text` has
            for its number, whatever else is in the batch. Their places where it is left out.

    Raises:
        NumericsError: q's logits are not finite.
        SamplingError: a repetition penalty, which texts of a batch would need one by one.
    """
    if sampling.repetition_penalty != 1:
        raise SamplingError("traces are captured without a repetition penalty; leave it out")
    device = verifier.device
    seeds = [seed_of_text(sampling.seed, number) for number in (numbers or range(len(prompts)))]
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    processors = sampling.processors()
    ids, lengths = pad_right(prompts, device)  # [batch, longest], [batch]
    longest = ids.shape[1]
    cache = verifier.new_cache(longest + max_new_tokens, batch=len(prompts))
    stops = torch.tensor(sorted(eos_ids), device=device)

    states = verifier.full(ids, CacheWindow(cache, 0, longest, longest), taps)
    answers = [Answer([], [states.tapped[row, : len(prompt)]], []) for row, prompt in enumerate(prompts)]
    hidden = states.last[torch.arange(len(prompts), device=device), lengths - 1]  # [batch, hidden]
    live = list(answers)
    for step in range(max_new_tokens):
        logits = verifier.logits(hidden)  # [live, vocabulary]
        top_k = top_k_statistics(logits, top_k_size)
        tokens = _choose(logits, sampling, processors, generators)
        finite, *values = torch.cat([torch.isfinite(top_k.log_sum_exp).all().long()[None], tokens]).tolist()
        if not finite:
            raise NumericsError("the verifier's logits are not finite; load it in float32 or check its weights")
        for row, (answer, token) in enumerate(zip(live, values, strict=True)):
            answer.tokens.append(token)
            answer.top_k.append(top_k[row])
        keep = torch.nonzero(~torch.isin(tokens, stops))[:, 0]
        if len(keep) == 0 or step == max_new_tokens - 1:
            break
        if len(keep) < len(live):
            live = [live[place] for place in keep.tolist()]
            generators = [generators[place] for place in keep.tolist()]
            tokens, lengths = tokens[keep], lengths[keep]
            cache.keep_rows(keep)
        window = CacheWindow(cache, lengths, 1, int(lengths.max()) + 1)
        states = verifier.full(tokens[:, None], window, taps)
        hidden = states.last[:, 0]  # [live, hidden]
        for row, answer in enumerate(live):
            answer.tapped.append(states.tapped[row])
        lengths = lengths + 1
    return answers


def _choose(
    logits: Tensor, sampling: Sampling, processors: LogitsProcessorList, generators: Sequence[torch.Generator]
) -> Tensor:
    """Next tokens from logits [batch, vocabulary], each row drawn by its own generator: [batch], long."""
    if sampling.greedy:
        return logits.argmax(-1)
    scores = process_rows(processors, logits, torch.empty(0, dtype=torch.long))  # none of them looks at the text
    rows = zip(scores.softmax(-1), generators, strict=True)
    return torch.stack([draw(probs, generator) for probs, generator in rows])


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor, zeros after the shorter ones: [batch, longest], and lengths [batch].

    Example:
        >>> pad_right([[1, 2], [3]], torch.device("cpu"))[0].tolist()
        [[1, 2], [3, 0]]
    """
    tensors = [torch.tensor(list(row), device=device) for row in rows]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths
