"""transformers' own ``generate`` as a decoder: what every strategy is compared with."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.slim.cache import check_context
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.token_ids import TokenIds, read_count, read_token_ids


class TransformersDecoder:
    """transformers' own ``generate`` on the same weights, greedily; the reference of our autoregressive loop. Lossless.

    Args:
        verifier: the opened verifier.
        eos_ids: tokens that end a text.
    """

    def __init__(self, verifier: RoutedModel, eos_ids: frozenset[int]) -> None:
        self.verifier = verifier
        self.eos_ids = eos_ids
        self._model: Any = with_plain_generation(verifier.model, eos_ids)

    def generate(self, prompt: TokenIds, max_new_tokens: int) -> Generation:
        """Decode one text greedily.

        Raises:
            PromptError: the prompt is not the ids of one text, or does not fit the context.
        """
        read = read_token_ids(prompt, self.verifier.config.vocab_size)
        count = read_count(max_new_tokens, "max_new_tokens")
        check_context(self.verifier.config, len(read) + count)  # refuses what does not fit, in our words
        ids = torch.tensor([read], device=self.verifier.device)
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        tokens: list[int] = out[0, len(read) :].tolist()
        counts = Counts(full_passes=len(tokens))  # one a token, as our own loop counts them
        return Generation(tokens, [Tier.ESCALATE] * len(tokens), [False] * len(tokens), counts)


def with_plain_generation(model: PreTrainedModel, eos_ids: Collection[int]) -> PreTrainedModel:
    """The same model, whose ``generate`` takes nothing from the generation settings that came with its weights.

    transformers fills in what a call leaves open from ``model.generation_config``, also where the call brings a whole
    configuration of its own. So a shallow copy, which shares all modules and weights, gets a fresh one; ``model``
    itself stays as it is.

    Args:
        eos_ids: tokens that end a text; none where empty.
    """
    plain = copy.copy(model)
    plain.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids) or None, pad_token_id=0)
    return plain
