"""How well a slim verifier predicts the full one on unseen prompts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from viasd_calib.devices import check_device
from viasd_calib.files import write_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_out_file, check_spec
from viasd_calib.pipeline.opening import open_engine
from viasd_calib.pipeline.options import RouteQualityOptions
from viasd_calib.pipeline.prompt_choice import check_prompts, choose_unseen


def route_quality(options: RouteQualityOptions, load: lazy_types.LoadVerifier | None = None) -> lazy_types.RouteQuality:
    """Measure how well the slim verifier predicts the full one, and what a pass of it costs; write that as JSON.

    The full verifier answers the prompts greedily; the slim one is asked at every place of these answers. One backend
    runs both. With ``native``, where the width of a pass over a single text does not matter, a slim verifier that is
    the full one agrees with it at every place; with others in bfloat16 at nearly all, since widths round differently.
    Where the spec has fitted gates, they are assessed on the same answers, with what its draft model proposes there.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    check_out_file("--json", options.json)
    check_device(options.device)
    path, spec = check_spec(options.spec, options.verifier, options.draft_model)
    chosen = choose_unseen(options, spec).prompts

    from viasd_calib.evaluation.gate_quality import assess_gates
    from viasd_calib.evaluation.route_quality import measure_quality
    from viasd_calib.slim.cost import CONTEXT, relative_cost
    from viasd_calib.traces.capture import capture_traces
    from viasd_calib.traces.folder import CaptureSettings
    from viasd_calib.traces.on_policy import Policy
    from viasd_calib.traces.texts import read_texts

    engine = open_engine(path, spec, options, load, options.backend)
    check_prompts(engine.verifier, chosen, options.max_new_tokens)
    engine.prepare_passes([CONTEXT])
    cost = relative_cost(engine.routed)  # before other work warms or fills the caches
    with tempfile.TemporaryDirectory(prefix="viasd-") as folder:
        settings = CaptureSettings(
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            draft_length=max(spec.decoding.draft_length, 1),
        )
        # A capture's own passes are eager ones, whatever backend has prepared the modules that they run.
        q = Policy("autoregressive", engine.decoder("autoregressive"))
        drafter = None if spec.gates.draft is None and spec.gates.slim is None else engine.drafter
        capture_traces(engine.verifier, drafter, spec.draft.kind, chosen, Path(folder), settings, q)
        texts = read_texts(Path(folder))
    quality = measure_quality(engine.routed, texts, cost)
    gates = assess_gates(engine.routed, engine.spec.gates, texts, max(spec.decoding.max_pending, 1))
    quality = quality.model_copy(update={"gates": gates})
    write_json(Path(options.json), quality)
    return quality
