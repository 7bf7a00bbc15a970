"""``viasd calibrate``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.file_names import CALIBRATE_FILE
from viasd_calib.pipeline import calibrate as job
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.options import CalibrateOptions
from viasd_calib.spec import Certificate
from viasd_calib.tables import new_table


def calibrate(options: CalibrateOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Calibrate, and print what was tested, certified and timed."""
    artifact = job.calibrate(options, load)
    _say(artifact)
    say_written(Path(options.out) / CALIBRATE_FILE)


def _say(artifact: lazy_types.CalibrateArtifact) -> None:
    table = new_table(
        "candidates, most careful first",
        ["", "threshold", "loss (replayed, simulated)", "loss (observed)", "prompts", "p-value", "full/token"],
    )
    for number, row in enumerate(artifact.tested, start=1):
        table.add_row(
            str(number), f"{row.bound:.4f}", f"{row.replayed_loss:.4f}", f"{row.observed_loss:.4f}",
            str(row.n_prompts), f"{row.p_value:.3g}", f"{row.full_passes_per_token:.2f}",
        )  # fmt: skip
    from viasd_calib.calibration.losses.base import loss_named
    from viasd_calib.calibration.risk import certified

    console = Console()
    console.print(table)
    certificate, floor = artifact.certificate, artifact.floor
    if floor is not None:
        console.print(
            f"rounding: passes of other widths move logits by up to {floor.rounding_gap:.3g} nats in 999 of 1,000 "
            f"places; exact decoding comes to a loss of {floor.loss:.4f} beyond that gap, {floor.loss_without_gap:.4f} "
            f"without it ({floor.n_prompts} prompts)"
        )
    if certificate.bound is None:
        console.print(certificate.note)
    else:
        decoded = artifact.tested[certified([row.p_value for row in artifact.tested], certificate.level) - 1]
        console.print(
            f"certified: at most {certificate.bound} {loss_named(certificate.loss).claim}, "
            f"confidence {certificate.confidence}, observed {certificate.observed:.4f} "
            f"on {decoded.n_prompts} of {certificate.n_prompts} prompts{_by_token(certificate)}"
        )
        if artifact.candidates is not None:
            console.print(
                f"{len(artifact.candidates)} of {len(artifact.tested)} candidates are certified; the spec lists them "
                "all, and viasd plan --certified may choose among them"
            )
    timing = artifact.slim_worth
    console.print(_policies_table(timing))
    predicted = timing.prediction_words()
    if predicted is not None:
        console.print(predicted)
    found = timing.decision
    console.print(
        f"exact decoding takes {1000 * found.with_slim:.1f} ms a token with the slim tier "
        f"(threshold {timing.fastest_with_slim.policy.accept_at:.2f}), {1000 * found.without_slim:.1f} without: "
        f"it is {_slim_words(found.slim_speed)}"
    )
    if found.baselines:
        times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in found.baselines.items())
        console.print(f"without the slim tier: {times} a token")
    drafted = timing.drafter_words()
    if drafted is not None:
        console.print(drafted)
    if found.certified is not None:
        console.print(f"the certified policy takes {1000 * found.certified:.1f} ms a token")
    console.print(f"The spec will be exported with audit {artifact.policy().audit}.")


def _policies_table(timing: lazy_types.PolicyTiming) -> Table:
    """The policies that a replay proposed, as predicted and as decoded."""
    table = new_table(
        "policies of exact decoding that were decoded",
        ["", "ms/token", "predicted", "speed-up", "predicted", "policy"],
        caption=f"on {timing.n_prompts} prompts; predicted: by a replay, simulated; speed-up: over no drafting",
    )
    for one in timing.policies:
        predicted, measured = timing.speedup(one) or (None, None)
        table.add_row(
            one.policy.kind, f"{1000 * one.seconds_per_token:.1f}", f"{1000 * one.predicted:.1f}",
            "" if measured is None else f"{measured:.2f}", "" if predicted is None else f"{predicted:.2f}",
            one.policy.words,
        )  # fmt: skip
    return table


def _by_token(certificate: Certificate) -> str:
    """The loss where prompts count by their tokens: what is bounded is the mean of the prompts' own."""
    weighted = certificate.observed_by_token
    return "" if weighted is None else f" ({weighted:.4f} of all tokens, which is not bounded)"


def _slim_words(speed: lazy_types.Interval) -> str:
    """Whether the slim tier is kept, and what shows it."""
    if speed.bounds is None:
        return f"left out, as {speed.n} prompts are too few to show that it pays"
    shown = f"{speed.words} of the speed on {speed.n} prompts"
    return f"kept ({shown})" if speed.above_one else f"left out ({shown})"
