"""``viasd run``: the main job, one step after the other, each as its own command would do it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from viasd_calib.cli.bench import bench
from viasd_calib.cli.calibrate import calibrate
from viasd_calib.cli.capture import capture
from viasd_calib.cli.configurations import flattened, read_configuration
from viasd_calib.cli.export import export, record_evidence, validate
from viasd_calib.cli.fit import fit
from viasd_calib.cli.generate import answer
from viasd_calib.cli.notices import announce
from viasd_calib.cli.report import report
from viasd_calib.pipeline import run as job
from viasd_calib.pipeline.fit_checks import check_fit
from viasd_calib.pipeline.run import Jobs, RunPlaces
from viasd_calib.pipeline.run_options import RunOptions


def run(options: RunOptions) -> None:
    """Run all steps, each of which prints as its own command does."""
    jobs = Jobs(
        check_configuration,
        capture,
        fit,
        calibrate,
        export,
        validate,
        bench,
        record_evidence,
        report,
        answer,
        announce,
        conclude,
    )
    job.run(options, jobs)


def check_configuration(configuration: str) -> None:
    """Refuse a configuration of ``viasd fit`` that cannot be.

    Raises:
        ViasdError: naming the first entry, with its mend.
    """
    check_fit(flattened(read_configuration(configuration, "--fit-config")))


def conclude(places: RunPlaces, sentences: Sequence[str]) -> None:
    """Say where the results are, and what they come to."""
    Console().print(f"\nspec: {places.spec}\nreport: {places.report}\nbenchmark: {places.bench}\n")
    for sentence in sentences:
        Console(highlight=False).print(sentence, soft_wrap=True)
