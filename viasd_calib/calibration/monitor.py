"""Whether a certified loss bound still holds where a policy is used, by what the log of its texts says.

"The expected loss of a text, whatever came before it, is at most the certified bound" is tested text by text
(:mod:`viasd_calib.calibration.exceedance`), and may be looked at after each. While it is true, it is ever called
exceeded with a probability of at most the level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.exceedance import ExceedanceTest
from viasd_calib.calibration.text_log import LoggedText
from viasd_calib.choices import EARLIER_CERTIFICATE_LOSSES
from viasd_calib.digest import policy_digest
from viasd_calib.errors import CalibrationError
from viasd_calib.spec import Audit, RoutingSpec

LeftOut = Literal["strict", "repeated", "made_from", "other_policy"]
"""Why a text is no evidence: it was decoded exactly; its prompt came before; the spec was made from it; it was decoded,
or judged, by another spec."""


@dataclass(frozen=True)
class Watched:
    """What a spec's certificate says that texts are watched for.

    Attributes:
        policy: digest of the policy.
        audit: of the policy.
        loss: name of what is bounded.
        rounding_gap: in nats.
        made_from: short hashes of the prompts that the spec was fitted and calibrated on.
    """

    policy: str
    audit: Audit
    loss: str
    bound: float
    rounding_gap: float
    made_from: frozenset[str]

    def differs(self, text: LoggedText) -> Iterator[str]:
        """What a text was decoded or judged by otherwise, with what was expected."""
        if text.policy != self.policy:
            yield f"policy {text.policy[:12]} (the spec's is {self.policy[:12]})"
        elif text.audit not in ("strict", self.audit):
            yield f"audit {text.audit} (the spec's is {self.audit})"
        if text.loss != self.loss:
            yield f"loss {text.loss} (the spec's is {self.loss})"
        if text.rounding_gap != self.rounding_gap:
            yield f"rounding_gap {text.rounding_gap:g} (the spec's is {self.rounding_gap:g})"


def watched(spec: RoutingSpec) -> Watched:
    """What to watch for of a spec.

    Raises:
        CalibrationError: nothing is certified, or the spec decodes exactly.
    """
    certificate = spec.certificate
    if certificate is None or certificate.bound is None or spec.decoding.audit == "strict":
        raise CalibrationError(
            "the spec certifies no loss bound, so none can be exceeded: its texts are exact; give a spec with a bound, "
            "or calibrate one with viasd calibrate"
        )
    return Watched(
        policy=policy_digest(spec),
        audit=spec.decoding.audit,
        loss=EARLIER_CERTIFICATE_LOSSES.get(certificate.loss, certificate.loss),
        bound=certificate.bound,
        rounding_gap=certificate.rounding_gap or 0.0,
        made_from=frozenset() if spec.prompts is None else spec.prompts.all,
    )


class Exceeded(BaseModel):
    """Where a bound was first called exceeded.

    Attributes:
        text: number of the text among those that were tested, from 1.
        where: the line of the log.
        e_value: after this text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: int
    where: str
    e_value: float


class MonitorReport(BaseModel):
    """What a monitor has found so far; the JSON of ``viasd monitor``.

    Attributes:
        policy: digest.
        loss: name of what is bounded.
        level: probability with which a bound that holds is ever called exceeded, at most.
        n_texts: that were tested.
        mean_loss: of these; None where there is none.
        e_value: evidence against the bound after the last text.
        largest_e_value: the same after the text where it was largest.
        p_value: 1 / ``largest_e_value``.
        answer: ``exceeded`` where the p-value has come down to the level.
        exceeded_at: where it first did.
        left_out: texts that are no evidence, by why.
        unfinished: lines that a killed process has left, which are not read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str
    loss: str
    bound: float
    level: float
    n_texts: int
    mean_loss: float | None
    e_value: float
    largest_e_value: float
    p_value: float
    answer: Literal["holds_so_far", "exceeded"]
    exceeded_at: Exceeded | None
    left_out: dict[LeftOut, int]
    unfinished: list[str]


class Monitor:
    """Reads the lines of logs in their order, and tests whether the bound still holds.

    A prompt counts once, where it first comes: the same text decoded again has the same loss, and says nothing new.

    Args:
        level: of the test.
        skip_others: leave out texts of other policies, in place of refusing them.

    Raises:
        CalibrationError: a level that is none.
    """

    def __init__(self, watch: Watched, level: float = 0.05, *, skip_others: bool = False) -> None:
        if not 0 < level < 1:
            raise CalibrationError(f"a level of {level} cannot be tested at; give one above 0 and below 1")
        self.watch = watch
        self.level = level
        self.exceeded_at: Exceeded | None = None
        self._skip_others = skip_others
        self._test = ExceedanceTest(watch.bound)
        self._total = 0.0
        self._seen: set[str] = set()
        self._left_out: Counter[LeftOut] = Counter()

    def add(self, text: LoggedText, where: str) -> None:
        """Read one line.

        Args:
            where: it is, as "log.jsonl, line 3".

        Raises:
            CalibrationError: it is of another policy, or was judged for another certificate, and these are not skipped.
        """
        differing = list(self.watch.differs(text))
        if differing and not self._skip_others:
            raise CalibrationError(
                f"{where} is of another spec: {', '.join(differing)}; give the spec that decoded it, or a log of its "
                "own for each (viasd monitor --skip-others leaves such lines out)"
            )
        why = "other_policy" if differing else self._no_evidence(text)
        if why is not None:
            self._left_out[why] += 1
            return
        self._seen.add(text.prompt)
        self._total += text.value
        self._test.add(text.value)
        if self.exceeded_at is None and self._test.p_value <= self.level:
            self.exceeded_at = Exceeded(text=len(self._seen), where=where, e_value=self._test.e_value)

    def _no_evidence(self, text: LoggedText) -> LeftOut | None:
        if text.audit == "strict":
            return "strict"
        if text.prompt in self._seen:
            return "repeated"
        return "made_from" if text.prompt in self.watch.made_from else None

    def report(self, unfinished: Sequence[str] = ()) -> MonitorReport:
        """What was found so far.

        Args:
            unfinished: lines that were not read.
        """
        count = len(self._seen)
        return MonitorReport(
            policy=self.watch.policy,
            loss=self.watch.loss,
            bound=self.watch.bound,
            level=self.level,
            n_texts=count,
            mean_loss=self._total / count if count else None,
            e_value=self._test.e_value,
            largest_e_value=self._test.largest_e_value,
            p_value=self._test.p_value,
            answer="holds_so_far" if self.exceeded_at is None else "exceeded",
            exceeded_at=self.exceeded_at,
            left_out=dict(self._left_out),
            unfinished=list(unfinished),
        )
