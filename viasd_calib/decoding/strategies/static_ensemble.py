"""Speculative decoding against a fixed mixture of q and p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import accept_greedy, select_row
from viasd_calib.decoding.catch_up import VerificationInputs, VerificationRule
from viasd_calib.decoding.drafting import Block
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.verification import RejectionSampler, TokenSampler, Verification, verify_against
from viasd_calib.slim.argmax import argmax


@register(lossless=False)
@dataclass
class StaticEnsemble(Speculative):
    """Speculative decoding that verifies against w * q + (1 - w) * p (arXiv 2604.07622).

    Samples from that mixture at drafted places and from q at the bonus token; lossy but at w = 1.

    Attributes:
        weight: w, in (0, 1].
    """

    weight: float = 0.5

    def verification(self) -> VerificationRule:
        return self._verify

    def _verify(self, sampler: TokenSampler, inputs: VerificationInputs) -> Verification:
        probs = inputs.scores.float().softmax(-1)  # [k + 1, vocabulary]
        proposal_probs = inputs.proposal_probs
        if proposal_probs is None:
            proposal_probs = draft_probs(inputs.block, probs.shape[-1])
            forbidden = inputs.scores[:-1] == -torch.inf  # by logits processors, which p has not been through
            proposal_probs = proposal_probs.masked_fill(forbidden, 0)
        mixed = torch.cat([self.weight * probs[:-1] + (1 - self.weight) * proposal_probs, probs[-1:]])
        if isinstance(sampler, RejectionSampler):
            return verify_against(sampler, inputs.tokens, proposal_probs, mixed)
        choices = argmax(mixed)
        accepted = accept_greedy(inputs.tokens, choices[:-1])
        return Verification(inputs.tokens.new_zeros(()), accepted, select_row(choices, accepted))


def draft_probs(block: Block, vocab_size: int) -> Tensor:
    """p at the places of a block over the verifier's vocabulary: [k, vocab_size]; one-hot where p gives no logits."""
    if block.logits is None:
        return torch.nn.functional.one_hot(block.tokens, vocab_size).float()
    probs = block.logits.float().softmax(-1)  # [k, draft vocabulary]
    if block.vocabulary is None:
        return probs
    return probs.new_zeros(len(block), vocab_size).index_add_(1, block.vocabulary, probs)
