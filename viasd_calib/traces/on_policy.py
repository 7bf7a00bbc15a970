"""Texts that a policy decodes in place of q, and statistics of q at every place of them.

Gates and q' see their own text at run time; one that learned from q's texts alone never saw what follows a token that
diverged (exposure bias; DAgger, arXiv 1011.0686, mends it in the same way: the learner acts, the expert labels).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.top_k import top_k_statistics
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, Route
from viasd_calib.traces.generation import Answer


@dataclass(frozen=True)
class Policy:
    """A decoder that writes texts in place of q.

    Attributes:
        name: what a trace folder calls it; two policies that may write different texts differ in it.
    """

    name: str
    decoder: Decoder

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        top_k_size: int,
        taps: Sequence[int],
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Decode a batch of prompts, and read each text with q in one teacher-forced pass.

        Args:
            prompts: token ids, each at least one long.
            top_k_size: tokens of q's distribution that statistics keep.
            taps: after how many layers the residual stream is kept.
            numbers: of the texts, what their draws follow from; their places where it is left out.

        Raises:
            PromptError: a prompt does not fit the context.
            NumericsError: q's logits are not finite.
        """
        found: list[Answer] = []
        texts = self._texts(prompts, max_new_tokens, range(len(prompts)) if numbers is None else numbers)
        for prompt, text in zip(prompts, texts, strict=True):
            logits, tapped = read_answer(self.decoder.verifier, prompt, text.tokens, taps)
            top_k = top_k_statistics(logits, top_k_size)
            found.append(Answer(text.tokens, [tapped], [top_k[row] for row in range(len(text.tokens))]))
        return found

    def _texts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, numbers: Sequence[int]) -> list[Generation]:
        """Greedy texts together; drawn ones alone, so that none hangs on its place in a batch."""
        if self.decoder.sampler.greedy:
            return self.decoder.generate_batch(prompts, max_new_tokens, batch_size=len(prompts))
        named = zip(prompts, numbers, strict=True)
        return [self.decoder.generate(prompt, max_new_tokens, number=number) for prompt, number in named]


def policy_name(method: str, draft: str, route: Route, gates: Gates, decoding: Decoding) -> str:
    """A name for all that decides a policy's texts beside the settings of the capture.

    What was only measured or counted, the route's cost and memory, is no part of it.
    """
    parts = [one.model_dump_json() for one in (route.unmeasured(), gates, decoding)]
    digest = hashlib.sha256("\n".join([draft, *parts]).encode()).hexdigest()
    return f"{method} {digest}"


@torch.inference_mode()
def read_answer(
    verifier: RoutedModel, prompt: Sequence[int], tokens: Sequence[int], taps: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """One teacher-forced q pass over a prompt and its answer, whoever wrote that.

    Args:
        prompt: ids, at least one.
        tokens: of the answer, at least one.
        taps: after how many layers the residual stream is kept.

    Returns:
        q's logits at the places of the answer, [tokens, vocabulary], and its residual stream at the taps for the whole
        text but the last token, [length - 1, taps, hidden].
    """
    text = torch.tensor([*prompt, *tokens], device=verifier.device)  # [length]
    width = text.shape[0] - 1
    window = CacheWindow(verifier.new_cache(width), 0, width, width)
    states = verifier.full(text[None, :-1], window, taps)
    return verifier.logits(states.last[0, len(prompt) - 1 :]), states.tapped[0]
