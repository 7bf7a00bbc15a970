"""One page on a spec and its benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.choices import StrategyName
from viasd_calib.devices import check_device
from viasd_calib.evaluation.provenance import check_policy, check_single_texts
from viasd_calib.file_names import CALIBRATE_FILE
from viasd_calib.files import read_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_bench, check_calibrate_folder, check_out_file, check_spec
from viasd_calib.pipeline.opening import open_engine
from viasd_calib.pipeline.options import ReportOptions
from viasd_calib.pipeline.prompt_choice import check_prompts, choose_unseen, notice_other_prompts
from viasd_calib.prompts import Prompt

ROUND_METHODS: tuple[StrategyName, ...] = ("speculative", "three_tier")
"""Methods of which the report shows a round."""

ROUND_PROMPTS = 2
"""Prompts that these rounds are recorded on: some dozens of rounds, of which one is shown."""


def report(options: ReportOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Write one self-contained HTML page: tables, route, gates, tiers, speed against loss, a text, a round, the
    break-even of the slim tier, and what a replay predicted against what was decoded.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    check_out_file("--out", options.out)
    check_device(options.device)
    provenance = check_bench("--bench", options.bench)
    if options.calibrate is not None:
        check_calibrate_folder("--calibrate", options.calibrate)
    path, spec = check_spec(options.spec, options.verifier, options.draft_model)
    check_policy(provenance, spec, options.bench)
    unseen = choose_unseen(options, spec)
    chosen = unseen.prompts
    if provenance is not None:
        names = (options.bench, options.prompts)
        notice_other_prompts(unseen, provenance.prompts, spec, options.shares, names)

    from viasd_calib.evaluation.bench import load_bench
    from viasd_calib.evaluation.report import ReportInputs, write_report

    measured = load_bench(options.bench)
    check_single_texts(measured, options.bench)
    engine = open_engine(path, spec, options, load)
    check_prompts(engine.verifier, chosen, options.max_new_tokens)
    decoder = engine.decoder()
    texts = [text for prompt in chosen for text in _decode(engine, decoder, prompt, options.max_new_tokens)]
    reliability, calibrated = _calibration(options.calibrate, options.fit)
    inputs = ReportInputs(
        spec=engine.spec,
        bench=measured,
        reliability=reliability,
        tiers=[text.tiers for text in texts],
        sample=_sample(engine, chosen[0], texts[0]),
        candidates=[] if calibrated is None else calibrated.tested,
        rounds=_rounds(engine, chosen[:ROUND_PROMPTS], options.max_new_tokens),
        timing=None if calibrated is None else calibrated.slim_worth,
    )
    write_report(inputs, Path(options.out))


def _decode(
    engine: lazy_types.Engine, decoder: lazy_types.Decoder, prompt: Prompt, max_new_tokens: int
) -> list[lazy_types.Generation]:
    from viasd_calib.decoding.conversation import converse

    return [turn.generation for turn in converse(decoder, engine.verifier, prompt, max_new_tokens)]


def _rounds(
    engine: lazy_types.Engine, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, lazy_types.TypicalRound]:
    """A typical round of each of ``ROUND_METHODS``, from the answers to the first turns of some prompts."""
    from viasd_calib.models import encode_prompt
    from viasd_calib.profiling.recording import RecordedText, typical_round

    texts = [encode_prompt(engine.verifier, prompt, [], max_new_tokens) for prompt in prompts]
    found: dict[str, lazy_types.TypicalRound] = {}
    for name in ROUND_METHODS:
        recorded = [one for text in texts for one in RecordedText(engine, name, text, max_new_tokens).finish().rounds]
        found[name] = typical_round(recorded)
    return found


def _calibration(
    folder: str | None, fit: str | None
) -> tuple[dict[str, lazy_types.Reliability], lazy_types.CalibrateArtifact | None]:
    """Reliability of the gates and what calibration came to; nothing without its folder."""
    if folder is None:
        return {}, None
    from viasd_calib.calibration.artifacts import CalibrateArtifact, load_fit_of

    calibrated = read_json(CalibrateArtifact, Path(folder) / CALIBRATE_FILE, "viasd calibrate")
    fitted, _ = load_fit_of(calibrated, Path(folder), fit)
    return fitted.reliability, calibrated


def _sample(engine: lazy_types.Engine, prompt: Prompt, generation: lazy_types.Generation) -> lazy_types.SampleText:
    from viasd_calib.evaluation.report import SampleText

    pieces = [str(engine.verifier.tokenizer.decode([token])) for token in generation.tokens]
    return SampleText(prompt.turns[0], pieces, generation.tiers, generation.drafted)
