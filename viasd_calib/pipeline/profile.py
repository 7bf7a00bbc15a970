"""What passes and decoded tokens take on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.devices import check_device
from viasd_calib.errors import PlanningError
from viasd_calib.evaluation.pictures import picture_format
from viasd_calib.pipeline.checks import check_out_file, check_spec
from viasd_calib.pipeline.opening import open_engine
from viasd_calib.pipeline.options import ProfileOptions
from viasd_calib.profiling.profile import LatencyProfile, ProfileSettings, save_profile


def profile(options: ProfileOptions) -> LatencyProfile:
    """Measure a latency profile; write it as JSON, and as a picture where one is asked for.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    settings = profile_settings(options.widths, options.contexts, options.batches, options.repeats)
    check_out_file("--json", options.json)
    check_device(options.device)
    if options.plot is not None:
        check_out_file("--plot", options.plot)
        picture_format(Path(options.plot))
    path, spec = check_spec(options.spec, options.verifier, options.draft_model)

    from viasd_calib.profiling.measure import measure_profile

    engine = open_engine(path, spec, options, backend=options.backend)
    result = measure_profile(engine, settings)
    save_profile(result, options.json)
    if options.plot is not None:
        from viasd_calib.evaluation.plots import latency_profile, write_figure

        write_figure(latency_profile(result), Path(options.plot))
    return result


def profile_settings(
    widths: Sequence[int], contexts: Sequence[int], batches: Sequence[int], repeats: int
) -> ProfileSettings:
    """Settings from options.

    Raises:
        PlanningError: naming the first option that makes no sense.
    """
    for name, values in {"widths": widths, "contexts": contexts, "batches": batches}.items():
        if not values or min(values) < 1:
            raise PlanningError(f"--{name} is {[*values]}; give a list, '[..., ...]', each a whole number, at least 1")
    if repeats < 2:  # one has no quartiles
        raise PlanningError(f"--repeats is {repeats}; give a whole number, at least 2")
    return ProfileSettings(widths=tuple(widths), contexts=tuple(contexts), batches=tuple(batches), repeats=repeats)
