"""The certificate: candidates decoded on calibration prompts, their losses tested, the fastest sure one kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.candidates import Candidate
from viasd_calib.calibration.losses.base import CertificateLoss, loss_named
from viasd_calib.calibration.risk import PROCEDURE, best_p_value, certified, p_value
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.ledger import Ledger
from viasd_calib.models import Verifier
from viasd_calib.progress import tracked
from viasd_calib.prompt_lengths import check_lengths
from viasd_calib.prompts import Prompt, Split, step_names
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Certificate, prompts_needed


class TestedCandidate(BaseModel):
    """What the certification found of one candidate; an entry of the JSON of ``viasd calibrate``.

    Attributes:
        bound: the score at which its gates trust a token.
        replayed_loss: *simulated* share of tokens that would be emitted and are not q's choice.
        replayed_trust: *simulated* share of tokens that would not need q.
        observed_loss: mean over the calibration prompts that were decoded.
        n_prompts: prompts that were decoded; fewer than there are where the candidate was given up early.
        p_value: of "the expected loss exceeds the loss bound"; 1 where the candidate was given up early.
        full_passes_per_token: what the candidate spent.
    """

    __test__ = False  # the name is no test's

    model_config = ConfigDict(extra="forbid", frozen=True)

    bound: float
    replayed_loss: float
    replayed_trust: float
    observed_loss: float
    n_prompts: int
    p_value: float
    full_passes_per_token: float


@dataclass(frozen=True)
class Certification:
    """What certification came to; ``chosen`` is None where nothing could be certified."""

    chosen: Candidate | None
    certificate: Certificate
    tested: list[TestedCandidate]


def certify(
    candidates: Sequence[Candidate],
    decoder_for: Callable[[Candidate], Decoder],
    verifier: Verifier,
    routed: RoutedModel,
    prompts: Sequence[Prompt],
    *,
    max_loss: float,
    confidence: float,
    max_new_tokens: int,
    split_sha256: dict[Split, str],
    loss: str = "divergence",
    ledger: Ledger | None = None,
) -> Certification:
    """Test candidates from the most careful to the fastest and certify as far as they hold.

    Fixed-sequence testing stops at the first candidate that fails, and a candidate whose p-value can no
    longer come down to the level is given up early; both keep the error rate.

    Args:
        candidates: most careful first.
        decoder_for: a decoder with a candidate's gates and audit ``off``.
        prompts: of the calibrate split; one loss each.
        loss: name of what is bounded.
        ledger: holds the losses that are known; their prompts are not decoded again.

    Raises:
        PromptError: prompts do not fit the verifier's context; nothing is decoded.
    """
    check_lengths(verifier, prompts, max_new_tokens)
    kept, measured = ledger or Ledger(), loss_named(loss)
    tested: list[TestedCandidate] = []
    enough = len(prompts) >= prompts_needed(max_loss, confidence)
    for number, candidate in enumerate(candidates if enough else ()):
        decode = partial(_decode, decoder_for(candidate), verifier, routed, measured, max_new_tokens)
        losses = (
            kept.recall(f"candidate {number}, prompt {name}", DecodedPrompt, partial(decode, prompt))
            for name, prompt in zip(step_names(prompts), prompts, strict=True)
        )
        shown = tracked(losses, f"certify threshold {candidate.threshold:.4f}", len(prompts), "prompts")
        with closing(shown):  # testing may end before all prompts are decoded
            result = _test(candidate, shown, len(prompts), max_loss, confidence)
        tested.append(result)
        if result.p_value > 1 - confidence:
            break
    return _certification(candidates, tested, len(prompts), loss, max_loss, confidence, max_new_tokens, split_sha256)


@dataclass(frozen=True)
class DecodedPrompt:
    """What decoding one prompt came to."""

    loss: float
    tokens: int
    full_passes: int


def _decode(
    decoder: Decoder,
    verifier: Verifier,
    routed: RoutedModel,
    measured: CertificateLoss,
    max_new_tokens: int,
    prompt: Prompt,
) -> DecodedPrompt:
    """Decode a prompt and measure its loss."""
    turns = list(converse(decoder, verifier, prompt, max_new_tokens))
    return DecodedPrompt(
        loss=measured.of_prompt(routed, turns),
        tokens=sum(len(turn.generation.tokens) for turn in turns),
        full_passes=sum(turn.generation.counts.full_passes for turn in turns),
    )


def _test(
    candidate: Candidate, decoded: Iterable[DecodedPrompt], n_prompts: int, max_loss: float, confidence: float
) -> TestedCandidate:
    """Test one candidate; give up as soon as no prompt still to come could save it."""
    seen: list[DecodedPrompt] = []
    losses: list[float] = []
    for prompt in decoded:
        seen.append(prompt)
        losses.append(prompt.loss)
        if best_p_value(losses, n_prompts, max_loss) > 1 - confidence:
            break
    spent = sum(prompt.full_passes for prompt in seen) / sum(prompt.tokens for prompt in seen)
    complete = len(losses) == n_prompts
    return TestedCandidate(
        bound=candidate.threshold,
        replayed_loss=candidate.replayed_loss,
        replayed_trust=candidate.replayed_trust,
        observed_loss=sum(losses) / len(losses),
        n_prompts=len(losses),
        p_value=p_value(losses, max_loss) if complete else 1.0,
        full_passes_per_token=spent,
    )


def _certification(
    candidates: Sequence[Candidate],
    tested: list[TestedCandidate],
    n_prompts: int,
    loss: str,
    max_loss: float,
    confidence: float,
    max_new_tokens: int,
    split_sha256: dict[Split, str],
) -> Certification:
    count = certified([result.p_value for result in tested], confidence)
    held = tested[count - 1] if count else None
    chosen = candidates[count - 1] if count else None
    note = "" if held else _why_nothing(tested, n_prompts, max_loss, confidence)
    certificate = Certificate(
        loss=loss,
        bound=max_loss if held else None,
        confidence=confidence,
        procedure=PROCEDURE,
        candidates_tested=len(tested),
        n_prompts=n_prompts,
        max_new_tokens=max_new_tokens,
        split_sha256=split_sha256,
        observed=held.observed_loss if held else None,
        p_value=held.p_value if held else None,
        note=note,
    )
    return Certification(chosen, certificate, tested)


def _why_nothing(tested: list[TestedCandidate], n_prompts: int, max_loss: float, confidence: float) -> str:
    needed = prompts_needed(max_loss, confidence)
    if not tested:
        return (
            f"nothing certified: {n_prompts} calibration prompts cannot show a loss of {max_loss} with confidence "
            f"{confidence}, even without a loss; at least {needed} are needed"
        )
    first = tested[0]
    return (
        f"nothing certified: the most careful candidate lost {first.observed_loss:.4f} on the first {first.n_prompts} "
        f"of {n_prompts} calibration prompts; give more prompts or a larger loss"
    )
