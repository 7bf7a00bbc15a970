"""Other ways of choosing a route, compared on the same traces."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from viasd_calib.choices import SEARCH_METHODS
from viasd_calib.devices import check_device
from viasd_calib.errors import CalibrationError
from viasd_calib.ledger import ledger_beside
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_model, check_out_file, check_traces
from viasd_calib.pipeline.lists import parse_methods, split_names
from viasd_calib.pipeline.notices import notice_resumed
from viasd_calib.pipeline.options import SearchOptions
from viasd_calib.prompts import combined_sha256
from viasd_calib.spec import first_problem
from viasd_calib.training.search.record import SearchResult, SearchSettings, save_search


def search(options: SearchOptions, load: lazy_types.LoadVerifier | None = None) -> SearchResult:
    """Choose a route in several ways, and compare the routes on held-back texts; write what was found as JSON.

    Nothing is trained: bridges are fitted in closed form, and there is no adapter. What methods found is noted beside
    the result until all are done: run again, a search that was stopped goes on with the next method.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    settings = _settings(
        target_cost=options.target_cost,
        methods=parse_methods(options.methods, SEARCH_METHODS, CalibrationError),
        budget=options.budget,
        keep_layers=options.keep_layers,
        bridges=options.bridges,
        bridge_rank=options.bridge_rank,
        seed=options.seed,
    )
    check_out_file("--json", options.json)
    check_device(options.device)
    check_model(options.verifier)
    folders = split_names(options.traces)
    check_traces("--traces", folders)

    from viasd_calib.hardware import hardware
    from viasd_calib.models import load_verifier
    from viasd_calib.slim.forward import RoutedModel
    from viasd_calib.traces.data import TraceDataModule
    from viasd_calib.traces.folder import refuse_other_verifier
    from viasd_calib.training.search.compare import compare_choices, divide_texts, measured_space

    data = TraceDataModule(
        folders, split=options.split, shares=options.shares, validation_share=options.validation_share
    )
    data.setup()
    texts = divide_texts(data, options.limit_texts)
    wanted = data.verifier_ref()
    name = options.verifier or wanted.name_or_path
    loaded = (load or load_verifier)(name, dtype=options.dtype, device=options.device)
    refuse_other_verifier(wanted, loaded.ref)
    model = RoutedModel(loaded.model)
    job = {
        "settings": settings.model_dump(mode="json", exclude={"methods"}),
        "texts": [
            [text.prompt_sha256 for text in group] for group in (texts.bridges, texts.evaluation, texts.held_back)
        ],
        "verifier": [loaded.ref.config_sha256, loaded.ref.weights, options.dtype],
        "hardware": hardware(model.device),
    }
    ledger = ledger_beside(options.json, job)
    notice_resumed(ledger, "steps")
    space = measured_space(model, settings, ledger)
    result = SearchResult(
        verifier=loaded.ref,
        settings=settings,
        bridge_texts=len(texts.bridges) if options.bridges else 0,
        judging_texts=len(texts.evaluation),
        held_back_texts=len(texts.held_back),
        prompts_sha256=combined_sha256([text.prompt_sha256 for text in data.texts]),
        found={},
    )
    for method, found in compare_choices(model, space, texts, settings, ledger):
        result.found[method] = found
        save_search(result, Path(options.json))  # after each: a search may take hours, and the next method may fail
    ledger.close()
    return result


def _settings(**options: object) -> SearchSettings:
    """Settings from options.

    Raises:
        CalibrationError: naming the first option that makes no sense.
    """
    try:
        return SearchSettings.model_validate(options)
    except ValidationError as error:
        raise CalibrationError(f"--{first_problem(error)}") from error
