"""Whether the loss bound of a certificate still holds, by the logs of texts that its policy has decoded."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.errors import SpecError, UsageError
from viasd_calib.files import write_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_out_file
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.options import MonitorOptions
from viasd_calib.shipped import shipped
from viasd_calib.spec import load_spec


def monitor(options: MonitorOptions) -> lazy_types.MonitorReport:
    """Read logs, one after the other, and test the certified bound on their texts.

    Raises:
        ViasdError: a file cannot be read, a line is no text of a log or is of another spec, or nothing is certified.
    """
    if not options.files:
        raise UsageError("there is no log to read; give the path of a file that viasd generate --log wrote")
    if not options.spec.strip():
        raise SpecError("--spec is empty; give the path of a routing spec")
    if options.json is not None:
        check_out_file("--json", options.json)
    spec = load_spec(shipped(options.spec))

    from viasd_calib.calibration.monitor import Monitor, watched
    from viasd_calib.calibration.text_log import read_log

    run = Monitor(watched(spec), options.level, skip_others=options.skip_others)
    unfinished: list[str] = []
    for file in options.files:
        unfinished += read_into(run, read_log(file))
    report = run.report(unfinished)
    if options.json is not None:
        write_json(Path(options.json), report)
    return report


def read_into(run: lazy_types.Monitor, log: lazy_types.ReadLog) -> list[str]:
    """Let a monitor read a log; a notice names a line that is left out as it does not end.

    Returns:
        That line, if there is one.
    """
    for line, text in log.texts:
        run.add(text, log.place(line))
    if log.unfinished is None:
        return []
    place = log.place(log.unfinished)
    notice(f"{place} does not end, a process was stopped while it wrote it: it is left out")
    return [place]
