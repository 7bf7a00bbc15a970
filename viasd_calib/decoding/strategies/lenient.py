"""Lenient speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from viasd_calib.decoding.acceptance import audit, select_row
from viasd_calib.decoding.catch_up import VerificationInputs, VerificationRule
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.verification import RejectionSampler, TokenSampler, Verification, verify_against
from viasd_calib.slim.argmax import argmax


@register(lossless=False)
@dataclass
class Lenient(Speculative):
    """Speculative decoding that accepts with min(1, q / (l * p)), l < 1 (Leviathan et al. 2023, appendix A.5).

    Discussed in arXiv 2607.26627. After a rejected token, q's is drawn from max(q - l * p, 0). Greedily a drafted
    token is accepted where q(x) >= l * max q. Samples from no stated distribution but at l = 1, which is q; lossy.

    Attributes:
        leniency: l, in (0, 1].
    """

    leniency: float = 0.3

    def verification(self) -> VerificationRule:
        return self._verify

    def _verify(self, sampler: TokenSampler, inputs: VerificationInputs) -> Verification:
        tokens, scores = inputs.tokens, inputs.scores
        if isinstance(sampler, RejectionSampler):
            assert inputs.proposal_probs is not None, "a sampled token comes with its proposal"
            return verify_against(sampler, tokens, self.leniency * inputs.proposal_probs, scores.softmax(-1))
        choices = argmax(scores)  # [k + 1]
        accepted = audit(tokens, scores[:-1], choices[:-1], "tolerant", self.leniency)
        return Verification(tokens.new_zeros(()), accepted, select_row(choices, accepted))
