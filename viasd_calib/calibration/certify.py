"""The certificate: candidates decoded on calibration prompts, their losses tested, the fastest sure one kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.betting import BettingTest
from viasd_calib.calibration.candidates import Candidate
from viasd_calib.calibration.floor import Floor
from viasd_calib.calibration.judging import judge
from viasd_calib.calibration.losses.base import CertificateLoss, loss_named
from viasd_calib.calibration.risk import PROCEDURE, certified
from viasd_calib.decoding.conversation import answer_batch
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.errors import CalibrationError
from viasd_calib.ledger import Ledger
from viasd_calib.models import Verifier
from viasd_calib.progress import tracked
from viasd_calib.prompt_copies import SHORT, normalised_sha256
from viasd_calib.prompt_lengths import check_lengths
from viasd_calib.prompts import Prompt, Split, step_names
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Certificate, level_of, prompts_needed


class TestedCandidate(BaseModel):
    """What the certification found of one candidate; an entry of the JSON of ``viasd calibrate``.

    Attributes:
        bound: the score at which its gates trust a token.
        replayed_loss: *simulated* share of tokens that would be emitted and are not q's choice.
        replayed_trust: *simulated* share of tokens that would not need q.
        observed_loss: mean over the calibration prompts that were decoded, each counting the same.
        observed_by_token: the same, each prompt counting by its tokens; None in what earlier releases wrote.
        n_prompts: prompts that were decoded; fewer than there are where the test was decided early.
        p_value: of "the expected loss is at least the loss bound".
        full_passes_per_token: what the candidate spent.
    """

    __test__ = False  # the name is no test's

    model_config = ConfigDict(extra="forbid", frozen=True)

    bound: float
    replayed_loss: float
    replayed_trust: float
    observed_loss: float
    observed_by_token: float | None = None
    n_prompts: int
    p_value: float
    full_passes_per_token: float


@dataclass(frozen=True)
class TestedLosses:
    """The prompts that one candidate was tested on, in that order.

    Attributes:
        prompts: short hashes of their texts.
        losses: of each.
        tokens: that were decoded for each.
    """

    __test__ = False  # the name is no test's

    prompts: list[str]
    losses: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class CertifiedResult:
    """A candidate that passed the test.

    Attributes:
        tested: what was found of it.
        losses: that show it.
    """

    candidate: Candidate
    tested: TestedCandidate
    losses: TestedLosses


@dataclass(frozen=True)
class Certification:
    """What certification came to.

    Attributes:
        certificate: of the last that passed, or of why none did.
        tested: all that were decoded with.
        passed: all that are certified together, most careful first; none where nothing could be.
    """

    certificate: Certificate
    tested: list[TestedCandidate]
    passed: list[CertifiedResult]

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that trusts most of those that passed; None where none did."""
        return self.passed[-1].candidate if self.passed else None


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
    loss: str = "token_divergence",
    floor: Floor | None = None,
    attempt: int = 1,
    ledger: Ledger | None = None,
    batch: int = 1,
) -> Certification:
    """Test candidates from the most careful to the fastest and certify as far as they hold.

    Fixed-sequence testing stops at the first candidate that fails. A candidate passes as soon as its p-value has come
    down to the level, and is given up where that can no longer be; both keep the error rate, as the test by betting
    holds after each prompt. Prompts are decoded in the order of their hashes, whatever the order they are given in: a
    file sorted by task would be judged by the tasks that come first.

    Args:
        candidates: most careful first.
        decoder_for: a decoder with a candidate's gates and audit ``off``.
        prompts: of the calibrate split; one loss each.
        loss: name of what is bounded.
        floor: what rounding comes to; without it every token counts that is not q's choice.
        attempt: its number among those on these prompts, from 1 (:mod:`viasd_calib.calibration.attempts`).
        ledger: holds the losses that are known; their prompts are not decoded again.
        batch: prompts that are decoded together, more than one only where each text is then what it is alone. The test
            takes their losses one by one, and ends where it would.

    Raises:
        PromptError: prompts do not fit the verifier's context; nothing is decoded.
        CalibrationError: one text stands twice among them; the same.
    """
    prompts = in_test_order(prompts)
    check_lengths(verifier, prompts, max_new_tokens)
    kept, measured, level = ledger or Ledger(), loss_named(loss), level_of(confidence, attempt)
    gap = 0.0 if floor is None else floor.rounding_gap
    tested: list[TestedCandidate] = []
    losses_of: list[TestedLosses] = []
    enough = len(prompts) >= prompts_needed(max_loss, level)
    for number, candidate in enumerate(candidates if enough else ()):
        decode = partial(_decode, decoder_for(candidate), verifier, routed, measured, max_new_tokens, gap)
        names = (f"candidate {number}, prompt {name}" for name in step_names(prompts))
        losses = _recalled(kept, dict(zip(names, prompts, strict=True)), decode, batch)
        shown = tracked(losses, f"certify threshold {candidate.threshold:.4f}", len(prompts), "prompts")
        with closing(shown):  # testing may end before all prompts are decoded
            result, seen = _test(candidate, shown, len(prompts), max_loss, level)
        tested.append(result)
        losses_of.append(_losses(prompts, seen))
        if result.p_value > level:
            break
    count = certified([result.p_value for result in tested], level)
    passed = [CertifiedResult(*one) for one in zip(candidates[:count], tested, losses_of, strict=False)]
    held = passed[-1].tested if passed else None
    certificate = Certificate(
        loss=loss,
        bound=max_loss if held else None,
        confidence=confidence,
        procedure=PROCEDURE,
        attempt=attempt,
        candidates_tested=len(tested),
        n_prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        split_sha256=split_sha256,
        observed=held.observed_loss if held else None,
        observed_by_token=held.observed_by_token if held else None,
        rounding_gap=None if floor is None else floor.rounding_gap,
        floor=None if floor is None else floor.loss,
        p_value=held.p_value if held else None,
        note="" if held else _why_nothing(tested, len(prompts), max_loss, confidence, attempt),
    )
    return Certification(certificate, tested, passed)


@dataclass(frozen=True)
class DecodedPrompt:
    """What decoding one prompt came to."""

    loss: float
    tokens: int
    full_passes: int


def _recalled(
    ledger: Ledger,
    prompts: Mapping[str, Prompt],
    decode: Callable[[Sequence[Prompt]], list[DecodedPrompt]],
    batch: int,
) -> Iterator[DecodedPrompt]:
    """What each prompt comes to, as it was noted or else decoded with those of its batch that are not noted either.

    Args:
        prompts: by the names of their steps.
    """
    for begin in range(0, len(prompts), batch):
        names = [*prompts][begin : begin + batch]
        missing = [name for name in names if not ledger.holds(name)]
        found = dict(zip(missing, decode([prompts[name] for name in missing]), strict=True)) if missing else {}

        def now(name: str, found: Mapping[str, DecodedPrompt] = found) -> DecodedPrompt:
            return found[name] if name in found else decode([prompts[name]])[0]  # noted, but it cannot be read

        for name in names:
            yield ledger.recall(name, DecodedPrompt, partial(now, name))


def _decode(
    decoder: Decoder,
    verifier: Verifier,
    routed: RoutedModel,
    measured: CertificateLoss,
    max_new_tokens: int,
    rounding_gap: float,
    prompts: Sequence[Prompt],
) -> list[DecodedPrompt]:
    """Decode prompts together and measure the loss of each."""
    answered = answer_batch(decoder, verifier, prompts, max_new_tokens, len(prompts))
    return [
        DecodedPrompt(
            loss=measured.of_prompt(judge(routed, prompt, turns, rounding_gap)),
            tokens=sum(len(turn.generation.tokens) for turn in turns),
            full_passes=sum(turn.generation.counts.full_passes for turn in turns),
        )
        for prompt, turns in zip(prompts, answered, strict=True)
    ]


def in_test_order(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in the order in which they are tested: that of the hashes of their texts, which nobody chose.

    Raises:
        CalibrationError: one text stands twice; its loss would count twice, as if it had been drawn twice.
    """
    by_hash = {normalised_sha256(prompt): prompt for prompt in prompts}
    if len(by_hash) < len(prompts):
        kept = {id(prompt) for prompt in by_hash.values()}
        copy = next(prompt for prompt in prompts if id(prompt) not in kept)
        raise CalibrationError(
            f"{len(prompts) - len(by_hash)} of {len(prompts)} calibration prompts are copies of others, but for id, "
            f"case and white space (the first is {copy.id!r}); leave them out"
        )
    return [by_hash[digest] for digest in sorted(by_hash)]


def _test(
    candidate: Candidate, decoded: Iterable[DecodedPrompt], n_prompts: int, max_loss: float, level: float
) -> tuple[TestedCandidate, list[DecodedPrompt]]:
    """Test one candidate, until it has passed, or no prompt still to come could save it."""
    seen: list[DecodedPrompt] = []
    test = BettingTest(max_loss)
    for prompt in decoded:
        seen.append(prompt)
        test.add(prompt.loss)
        if test.p_value <= level or test.least_p_value(n_prompts - len(seen)) > level:
            break
    tokens = sum(prompt.tokens for prompt in seen)
    result = TestedCandidate(
        bound=candidate.threshold,
        replayed_loss=candidate.replayed_loss,
        replayed_trust=candidate.replayed_trust,
        observed_loss=sum(prompt.loss for prompt in seen) / len(seen),
        observed_by_token=sum(prompt.loss * prompt.tokens for prompt in seen) / tokens,
        n_prompts=len(seen),
        p_value=test.p_value,
        full_passes_per_token=sum(prompt.full_passes for prompt in seen) / tokens,
    )
    return result, seen


def _losses(prompts: Sequence[Prompt], decoded: Sequence[DecodedPrompt]) -> TestedLosses:
    """Of the prompts that were decoded before the test was decided, the first ones."""
    return TestedLosses(
        [normalised_sha256(prompt)[:SHORT] for prompt in prompts[: len(decoded)]],
        [prompt.loss for prompt in decoded],
        [prompt.tokens for prompt in decoded],
    )


def _why_nothing(
    tested: list[TestedCandidate], n_prompts: int, max_loss: float, confidence: float, attempt: int
) -> str:
    needed = prompts_needed(max_loss, level_of(confidence, attempt))
    if not tested:
        return (
            f"nothing certified: {n_prompts} calibration prompts cannot show a loss of {max_loss} with confidence "
            f"{confidence}, even without a loss; at least {needed} are needed"
        )
    first = tested[0]
    return (
        f"nothing certified: the most careful candidate lost {first.observed_loss:.4f} on the first {first.n_prompts} "
        f"of {n_prompts} calibration prompts (p-value {first.p_value:.3g}); give more prompts or a larger loss"
    )
