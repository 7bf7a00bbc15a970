"""Other people's rules with the same interface: same weights, same kernels, same drafter.

Each class or function says what its rule is, where it comes from, what it samples from and whether it is
lossless. ``Autoregressive`` and ``Speculative`` live with the decoder's own rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from math import nextafter
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from viasd_calib.decoding.acceptance import Tier, accept_greedy, accept_sampled, audit, row
from viasd_calib.decoding.drafting import Block, draft_limit
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.rounds import Judged, Method, Speculative, ThreeTier, Verification, catch_up
from viasd_calib.decoding.session import Counts, Generation, Session
from viasd_calib.decoding.slim_rules import MarginRule, RatioRule
from viasd_calib.decoding.verification import RejectionSampler, TokenSampler, Verdict
from viasd_calib.draft.base import draft_stepwise, likeliest, never_stop
from viasd_calib.passes.model_passes import PassResult, SlimPass
from viasd_calib.passes.requests import Passes
from viasd_calib.slim.cache import check_context
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.token_ids import TokenIds, read_count, read_token_ids


@dataclass
class SpeculativeFixed(Speculative):
    """Speculative decoding with blocks of one length (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

    Samples from q; lossless.
    """

    name: ClassVar[str] = "speculative_fixed"


@dataclass
class SelfSpeculative(Method):
    """q' drafts token by token and q verifies: SWIFT's shape (Xia et al. 2025, arXiv 2410.06916), on a fixed route.

    Samples from q; lossless.

    Attributes:
        draft_length: most tokens drafted a round.
    """

    name: ClassVar[str] = "self_speculative"
    needs_drafter: ClassVar[bool] = False
    draft_length: int = 6

    def round(self, session: Session) -> Passes[None]:
        block = yield from self._draft(session)
        yield from catch_up(session, block)

    def _draft(self, session: Session) -> Passes[Block]:
        place = session.row.exact

        def advance(ids: Tensor) -> Passes[Tensor]:
            nonlocal place
            result: PassResult = yield SlimPass(session.verifier, session.row, place, ids, wanted=1)
            place += ids.shape[0]
            session.counts.slim_passes += 1
            return result.logits[0]

        text = session.text[: session.length]
        pick = session.sampler.picker(text, session.verifier.config.vocab_size)
        limit = draft_limit(session, self.draft_length)
        proposal = yield from draft_stepwise(advance, text[place:], limit, never_stop, pick, None)
        return Block(proposal.tokens, proposal.logits, pick.proposal_probs(proposal.tokens))


def via_sd_fixed(draft_length: int, max_pending: int) -> ThreeTier:
    """VIA-SD with fixed bands on r = q'(v) / max q', repaired (arXiv 2606.12243).

    Accept at r >= 0.7, regenerate at 0.5 <= r < 0.7, escalate below: the published cuts 1 - alpha_2 = 0.7 and
    1 - alpha_1 = 0.5 the other way round, so that the middle band is not empty. No audit; lossy. When sampling, a
    drafted token in the upper two bands goes through the speculative step from p to q'.
    """
    return _ratio_bands(0.7, 0.5, draft_length, max_pending)


def via_sd_published(draft_length: int, max_pending: int) -> ThreeTier:
    """VIA-SD with the published constants as they stand (arXiv 2606.12243): alpha_1 = 0.5, alpha_2 = 0.3.

    Accept at r >= 1 - alpha_1 = 0.5, escalate at r < 1 - alpha_2 = 0.7: the regenerate band is empty, and what
    is accepted is accepted first. No audit; lossy. When sampling, a drafted token above the cut goes through the
    speculative step from p to q'.
    """
    return _ratio_bands(0.5, nextafter(0.5, 0), draft_length, max_pending)


def _ratio_bands(accept_at: float, escalate_below: float, draft_length: int, max_pending: int) -> ThreeTier:
    rule = RatioRule(accept_at, escalate_below)
    return ThreeTier(rule, draft_length=draft_length, max_pending=max_pending, audit="off")


def trispec(draft_length: int, max_pending: int, least: float = 0.5) -> ThreeTier:
    """TriSpec (arXiv 2601.23180): q' decides where its two likeliest tokens are ``least`` apart, else q.

    Published lambda = 0.5. No audit. When sampling, what q' decides is drawn from q'; lossy.
    """
    return ThreeTier(MarginRule(least), draft_length=draft_length, max_pending=max_pending, audit="off")


def sprinter(gate: Gate, draft_length: int, max_pending: int, accept_at: float = 0.5) -> ThreeTier:
    """SPRINTER (arXiv 2502.04557): a classifier on the drafter alone says when q is called.

    Leading drafted tokens with P(q's choice = token) >= ``accept_at`` stand unverified; q is called for the
    first that does not. No audit. When sampling, what stands is drawn from p; lossy.
    """
    return ThreeTier(
        None,
        draft_gate=gate,
        draft_accept_at=accept_at,
        draft_length=draft_length,
        max_pending=max_pending,
        audit="off",
    )


@dataclass
class Lenient(Speculative):
    """Speculative decoding that accepts with min(1, q / (l * p)), l < 1 (Leviathan et al. 2023, appendix A.5).

    Discussed in arXiv 2607.26627. Where a token falls, q's is drawn from max(q - l * p, 0). Greedily a drafted
    token stands where q(x) >= l * max q. Samples from no stated distribution but at l = 1, which is q; lossy.

    Attributes:
        leniency: l, in (0, 1].
    """

    name: ClassVar[str] = "lenient"
    leniency: float = 0.3

    def verification(self) -> Verification:
        return self._verify

    def _verify(self, sampler: TokenSampler, judged: Judged) -> Verdict:
        tokens, kept = judged.tokens, judged.tokens.new_zeros(())
        if isinstance(sampler, RejectionSampler):
            assert judged.proposal_probs is not None, "a sampled token comes with its proposal"
            return _verify_sampled(sampler, tokens, self.leniency * judged.proposal_probs, judged.scores.softmax(-1))
        choices = likeliest(judged.scores)  # [k + 1]
        accepted = audit(tokens, judged.scores[:-1], choices[:-1], "tolerant", self.leniency)
        return Verdict(kept, accepted, row(choices, accepted))


@dataclass
class StaticEnsemble(Speculative):
    """Speculative decoding that verifies against w * q + (1 - w) * p (arXiv 2604.07622).

    Samples from that mixture at drafted places and from q at the bonus token; lossy but at w = 1.

    Attributes:
        weight: w, in (0, 1].
    """

    name: ClassVar[str] = "static_ensemble"
    weight: float = 0.5

    def verification(self) -> Verification:
        return self._verify

    def _verify(self, sampler: TokenSampler, judged: Judged) -> Verdict:
        probs = judged.scores.float().softmax(-1)  # [k + 1, vocabulary]
        proposal_probs = judged.proposal_probs
        if proposal_probs is None:
            proposal_probs = draft_probs(judged.block, probs.shape[-1])
            proposal_probs = proposal_probs.masked_fill(
                judged.scores[:-1] == -torch.inf, 0
            )  # processors forbid it, whoever says it
        mixed = torch.cat([self.weight * probs[:-1] + (1 - self.weight) * proposal_probs, probs[-1:]])
        if isinstance(sampler, RejectionSampler):
            return _verify_sampled(sampler, judged.tokens, proposal_probs, mixed)
        choices = likeliest(mixed)
        accepted = accept_greedy(judged.tokens, choices[:-1])
        return Verdict(judged.tokens.new_zeros(()), accepted, row(choices, accepted))


def draft_probs(block: Block, vocab_size: int) -> Tensor:
    """p at the places of a block over the verifier's vocabulary: [k, vocab_size]; sure where p gives no logits."""
    if block.logits is None:
        return torch.nn.functional.one_hot(block.tokens, vocab_size).float()
    probs = block.logits.float().softmax(-1)  # [k, draft vocabulary]
    if block.vocabulary is None:
        return probs
    return probs.new_zeros(len(block), vocab_size).index_add_(1, block.vocabulary, probs)


def _verify_sampled(sampler: RejectionSampler, tokens: Tensor, proposal_probs: Tensor, target: Tensor) -> Verdict:
    """The speculative rule on drafted tokens alone, against any target ([k + 1, vocabulary])."""
    accepted = accept_sampled(tokens, proposal_probs, target[:-1], sampler.uniforms(len(tokens)))
    return Verdict(tokens.new_zeros(()), accepted, sampler.draw_after(target, proposal_probs, accepted))


class TransformersDecoder:
    """transformers' own ``generate`` on the same weights; the yardstick for our autoregressive loop. Lossless.

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
    """The same model, whose ``generate`` takes nothing from the generation settings that lie beside its weights.

    transformers fills in what a call leaves open from ``model.generation_config``, also where the call brings a whole
    configuration of its own. So a shallow copy, which shares all modules and weights, gets a fresh one; ``model``
    itself stays as it is.

    Args:
        eos_ids: tokens that end a text; none where empty.
    """
    plain = copy.copy(model)
    plain.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids) or None, pad_token_id=0)
    return plain
