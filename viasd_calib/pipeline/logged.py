"""Decoding with a log: a monitor reads along, and decoding becomes exact once the certified bound is exceeded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.decoding.sampling import Sampling
from viasd_calib.errors import CalibrationError, MethodError, SamplingError, UsageError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_out_file
from viasd_calib.pipeline.monitor import read_into
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.options import GenerateOptions
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Audit, RoutingSpec


def check_log(options: GenerateOptions, sampling: Sampling, spec: RoutingSpec) -> lazy_types.Monitor | None:
    """The monitor that a log is to be read by, at the end of what the file holds already; None without a log.

    Raises:
        ViasdError: the options ask for texts that the certificate is not about, or the file is no log of this spec.
    """
    path = options.log
    if path is None:
        if options.fallback is not None:
            raise UsageError("--fallback follows from the texts of a log; give --log FILE too")
        return None
    check_out_file("--log", path)
    if options.method != "three_tier":
        raise MethodError(
            f"--log watches a certificate, which is of three_tier, and not {options.method}; leave it out"
        )
    if sampling != Sampling(seed=sampling.seed):
        raise SamplingError("--log judges texts that are greedy; leave it out, or temperature and the other settings")

    from viasd_calib.calibration.monitor import Monitor, watched
    from viasd_calib.calibration.text_log import read_log

    watch = watched(spec)
    if options.audit not in (None, "strict", watch.audit):
        raise CalibrationError(
            f"--audit is {options.audit}, and the certificate to be watched is of audit {watch.audit}; leave out "
            "--audit or --log"
        )
    certified = spec.certificate.max_new_tokens if spec.certificate is not None else 0
    if options.max_new_tokens > certified:
        raise CalibrationError(
            f"--max-new-tokens is {options.max_new_tokens}, and the certificate to be watched is of texts of at most "
            f"{certified}; ask for as few, or leave out --log"
        )
    run = Monitor(watch, options.level)
    if Path(path).exists():
        read_into(run, read_log(path))
    return run


class LoggedDecoding:
    """Gives the decoder for each text, and takes its answers for the log.

    Args:
        path: of the log.
        run: the monitor, which has read what the log held before.
        audit: of the user, in place of the spec's own.
        fallback: whether to decode exactly once the bound is exceeded.
        drafting_pays_at: of the user, in place of the spec's own.

    Raises:
        CalibrationError: the engine's certificate is void.
    """

    def __init__(
        self,
        engine: lazy_types.Engine,
        path: str,
        run: lazy_types.Monitor,
        *,
        audit: Audit | None,
        fallback: bool,
        drafting_pays_at: float | None = None,
    ) -> None:
        from viasd_calib.calibration.text_log import read_log

        if engine.spec.certified_bound is None:
            raise CalibrationError(
                "the spec's certificate is void with what is loaded here, so there is no bound to watch; load what it "
                "was made with, or leave out --log"
            )
        self._engine, self._path, self._run, self._fallback = engine, path, run, fallback
        self._audit: Audit = audit or run.watch.audit
        self._pays_at = drafting_pays_at
        self._decoder = engine.decoder(audit=audit, judge=True, drafting_pays_at=drafting_pays_at)
        self._lines = len(read_log(path).texts) if Path(path).exists() else 0
        if run.exceeded_at is not None:
            self._exceeded()

    @property
    def decoder(self) -> lazy_types.Decoder:
        """For the next text."""
        return self._decoder

    def add(self, prompt: Prompt, turns: Sequence[lazy_types.Turn]) -> None:
        """Log the answers to a prompt, if there are any, and look at what they come to.

        Raises:
            CalibrationError: their loss cannot be computed from what catch-up gives.
            StorageError: the log cannot be written.
        """
        from viasd_calib.calibration.judged_text import logged_text
        from viasd_calib.calibration.text_log import append_text

        text = logged_text(self._run.watch, self._audit, prompt, turns)
        append_text(self._path, text)
        self._lines += 1
        before = self._run.exceeded_at
        self._run.add(text, f"{self._path}, line {self._lines}")
        if before is None and self._run.exceeded_at is not None:
            self._exceeded()

    def _exceeded(self) -> None:
        """Say that the bound is exceeded, and fall back."""
        found, watch = self._run.exceeded_at, self._run.watch
        assert found is not None, "asked by the caller"
        if self._fallback:
            self._audit = "strict"
            self._decoder = self._engine.decoder(audit="strict", judge=True, drafting_pays_at=self._pays_at)
        then = "texts are decoded with audit strict from here on"
        if not self._fallback:
            then = "--fallback strict would decode exactly from here on"
        notice(
            f"the certified bound of {watch.bound:g} on {watch.loss} is exceeded at text {found.text} ({found.where}): "
            f"e-value {found.e_value:.3g}, {1 / self._run.level:.3g} needed; {then}"
        )
