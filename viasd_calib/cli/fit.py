"""``viasd fit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from viasd_calib.cli.configurations import given_options, with_shipped_configurations
from viasd_calib.cli.gate_table import gate_table
from viasd_calib.cli.notices import say_written
from viasd_calib.cli.parser import with_underscores
from viasd_calib.file_names import FIT_FILE
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.fit_checks import check_fit
from viasd_calib.pipeline.lists import runs
from viasd_calib.pipeline.recipes import default_recipe
from viasd_calib.tables import new_table


def fit(words: Sequence[str], load: lazy_types.LoadVerifier | None = None) -> None:
    """Fit with LightningCLI's options, and print what was learned.

    Words that name neither a configuration nor what is trained take a recipe (:func:`default_recipe`).

    Raises:
        ViasdError: options that a slim verifier cannot be trained with; most are refused before Lightning is loaded.
    """
    words = with_shipped_configurations([with_underscores(word) for word in words])
    given = given_options(words)
    check_fit(given)
    if {"--help", "-h", "--config", "-c"}.isdisjoint(word.partition("=")[0] for word in words):
        recipe = default_recipe(given)
        words = words if recipe is None else ["--config", recipe, *words]

    from viasd_calib.cli.fit_cli import FitCLI
    from viasd_calib.pipeline import fit as job
    from viasd_calib.pipeline.fit_gates import gates_alone

    read = FitCLI(words)
    options = read.options
    artifact = job.fit(options, load, read.instantiate_trainer)
    if gates_alone(options):
        read.save_config()
    if artifact is not None:
        say_fit(artifact)
        say_written(Path(options.out) / FIT_FILE, f"that of round {options.rounds}" if options.rounds > 1 else "")


def say_fit(artifact: lazy_types.FitArtifact) -> None:
    """Say what was learned: the route, how good the gates are, how often q' and q agree, and what low bits cost."""
    from viasd_calib.evaluation.report_rows import cost_words
    from viasd_calib.slim.parts.base import route_words

    route, layers = artifact.route, artifact.verifier.num_layers
    table = new_table("what was learned", ["", "kept", "layers skipped"])
    for name, skipped in (("attention", route.attention_skip), ("MLP", route.mlp_skip)):
        table.add_row(name, f"{layers - len(skipped)} of {layers}", runs(skipped))
    console = Console(highlight=False)
    console.print(table)
    if artifact.reliability:
        console.print(gate_table(artifact.reliability))
    console.print(f"agreement of slim and full verifier: {artifact.agreement:.4f}")
    console.print(f"slim verifier: {route_words(route, layers)}")
    if route.relative_cost is not None:
        console.print(f"cost of a slim pass: {cost_words(route)}")
    if artifact.outside_head_vocab > 0:
        console.print(
            f"the full verifier's choice, of {artifact.verifier.vocab_size:,} tokens, is none of the slim verifier's "
            f"at {artifact.outside_head_vocab:.4f} of held-back places, agreement lost at most"
        )
