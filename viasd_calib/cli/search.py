"""``viasd search``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from viasd_calib.choices import SEARCH_METHODS
from viasd_calib.cli.notices import notice_resumed, say_written
from viasd_calib.devices import check_device
from viasd_calib.errors import CalibrationError
from viasd_calib.ledger import ledger_beside
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_model, check_out_file, check_traces
from viasd_calib.pipeline.lists import parse_methods, split_names
from viasd_calib.pipeline.numbers import Count, Inside, Seed, Share
from viasd_calib.prompts import Split, SplitShares, combined_sha256
from viasd_calib.spec import DType, first_problem
from viasd_calib.tables import new_table
from viasd_calib.training.search.record import CONFIDENT_SHARES, SearchResult, SearchSettings, save_search


def search(
    traces: str,
    json: str,
    target_cost: Share = 0.5,
    methods: str = ",".join(SEARCH_METHODS),
    budget: Count = 200,
    limit_texts: Count | None = 60,
    bridges: bool = True,
    bridge_rank: Count | None = None,
    keep_layers: Sequence[int] = (0, -1),
    split: Split = "fit",
    shares: SplitShares | None = None,
    validation_share: Inside = 0.15,
    seed: Seed = 0,
    verifier: str | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    _load: lazy_types.LoadVerifier | None = None,
) -> SearchResult:
    """Choose a route in several ways, each with the same texts and budget, and compare the routes on held-back texts.

    Nothing is trained: bridges are fitted in closed form, and there is no adapter. What methods found is noted beside
    the result until all are done: run again, a search that was stopped goes on with the next method.

    Args:
        traces: trace folders, comma-separated.
        json: where the result is written.
        target_cost: measured cost of a slim pass over that of a full one, bridges left out.
        methods: comma-separated; an unknown one is answered with the list of those there are.
        budget: passes over the judging texts that each method may take.
        limit_texts: texts to search on, a fifth of them for judging and the others for bridges; also the most that
            routes are compared on. Null takes all.
        bridges: whether bridges stand in for skipped runs.
        bridge_rank: of the bridges; null for full ones.
        keep_layers: layers that are never skipped; negative ones count from the end.
        split: the split of prompts whose texts are taken, by hash.
        shares: shares of the splits.
        validation_share: prompts of the split that are held back, by hash.
        seed: of the methods that draw.
        verifier: where to find the verifier, in place of the name in the traces.
        dtype: number format of the verifier.
        device: where models run.
    """
    settings = _settings(
        target_cost=target_cost,
        methods=parse_methods(methods, SEARCH_METHODS, CalibrationError),
        budget=budget,
        keep_layers=keep_layers,
        bridges=bridges,
        bridge_rank=bridge_rank,
        seed=seed,
    )
    check_out_file("--json", json)
    check_device(device)
    check_model(verifier)
    folders = split_names(traces)
    check_traces("--traces", folders)

    from viasd_calib.hardware import hardware
    from viasd_calib.models import load_verifier
    from viasd_calib.slim.forward import RoutedModel
    from viasd_calib.traces.data import TraceDataModule
    from viasd_calib.traces.folder import refuse_other_verifier
    from viasd_calib.training.search.compare import compare_choices, divide_texts, measured_space

    data = TraceDataModule(folders, split=split, shares=shares, validation_share=validation_share)
    data.setup()
    texts = divide_texts(data, limit_texts)
    wanted = data.verifier_ref()
    load = _load or load_verifier
    loaded = load(verifier or wanted.name_or_path, dtype=dtype, device=device)
    refuse_other_verifier(wanted, loaded.ref)
    model = RoutedModel(loaded.model)
    job = {
        "settings": settings.model_dump(mode="json", exclude={"methods"}),
        "texts": [[text.prompt_sha256 for text in group] for group in (texts.bridges, texts.judging, texts.held_back)],
        "verifier": [loaded.ref.config_sha256, loaded.ref.weights, dtype],
        "hardware": hardware(model.device),
    }
    ledger = ledger_beside(json, job)
    notice_resumed(ledger, "steps")
    space = measured_space(model, settings, ledger)
    result = SearchResult(
        verifier=loaded.ref,
        settings=settings,
        bridge_texts=len(texts.bridges) if bridges else 0,
        judging_texts=len(texts.judging),
        held_back_texts=len(texts.held_back),
        prompts_sha256=combined_sha256([text.prompt_sha256 for text in data.texts]),
        found={},
    )
    for method, found in compare_choices(model, space, texts, settings, ledger):
        result.found[method] = found
        save_search(result, Path(json))  # after each: a search may take hours, and the next method may fail
    ledger.close()
    Console(highlight=False).print(search_table(result))
    say_written(json)
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


def search_table(result: SearchResult) -> Table:
    """What each method found, as a table: one row a method, in the order they were run."""
    settings = result.settings
    bridged = "each with its bridges" if settings.bridges else "without bridges"
    table = new_table(
        f"routes at cost {settings.target_cost:g}, {bridged}, on {result.held_back_texts} held-back texts",
        [
            "",
            "agreement",
            *(f"most confident {float(share):.0%}" for share in CONFIDENT_SHARES),
            "KL",
            "cost",
            "passes",
            "s",
        ],
        caption="cost: of a slim pass over a full one, measured, bridges included; passes over "
        f"{result.judging_texts} judging texts, at most {settings.budget}; s: seconds of search",
    )
    for method, found in result.found.items():
        most_confident = [f"{found.agreement_confident[share]:.4f}" for share in CONFIDENT_SHARES]
        cost = f"{found.relative_cost:.2f}"
        measured = [f"{found.agreement:.4f}", *most_confident, f"{found.kl:.4f}", cost, str(found.passes)]
        table.add_row(method, *measured, f"{found.seconds:.1f}")
    return table
