"""LightningCLI as the parser of ``viasd fit``."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from viasd_calib.choices import OffloadKind
from viasd_calib.cli.parser import CommandParserMixin, HelpFormatter
from viasd_calib.pipeline.fit_options import TRAINER_DEFAULTS, FitOptions, lightning_refusals
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.lightning_output import quiet_lightning
from viasd_calib.training.options import SlimVerifierOptions


class FitParser(CommandParserMixin, LightningArgumentParser):  # type: ignore[misc]  # argparse's has overloads
    """Lightning's options and those of a fit."""


class FitCLI(LightningCLI):
    """Reads the options of a fit, and makes its trainers.

    Args:
        words: of ``viasd fit``.
    """

    def __init__(self, words: Sequence[str]) -> None:
        quiet_lightning()
        super().__init__(
            datamodule_class=TraceDataModule,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={**TRAINER_DEFAULTS},
            args=[*words],
            run=False,
            parser_kwargs={"prog": "viasd fit"},
        )

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """A parser that reads dashes and flags, and refuses in one line."""
        parser = FitParser(formatter_class=HelpFormatter, **options)
        parser.add_argument("-c", "--config", action="config", help="a configuration, YAML or JSON")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer and traces, and the options of a fit in place of a module's: a fit may make two modules."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_class_arguments(SlimVerifierOptions, "model", sub_configs=True)
        parser.add_lightning_class_args(TraceDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are not Lightning's, and those of the trainer's ``fit``."""
        parser.add_argument("--out", type=str, default="runs/fit", help="folder for route, adapter and gates")
        parser.add_argument(
            "--gate_folders",
            type=list[str] | None,
            default=None,
            help="traces that gates are fitted and tested on, in place of those the route learned from: of prompts "
            "that neither drafter nor slim verifier was trained on, whose answers both know too well",
        )
        parser.add_argument(
            "--rounds",
            type=PositiveInt,
            default=1,
            help="how often to train, trainer.max_steps each: between two rounds the three-tier decoder answers the "
            "prompts of the traces, and the next round learns from these texts too (all are under OUT/round-1, ...)",
        )
        parser.add_argument(
            "--memory",
            type=int | str | None,
            default=None,
            help="bytes that weights may take where it will decode with layers read for each pass, as 300MB: chooses "
            "the bits of a slim verifier of all layers; calibrate then reads layers so unless told otherwise",
        )
        parser.add_argument(
            "--offload",
            type=OffloadKind | None,
            default=None,
            help="disk: fit gates alone with the verifier's layers read for each of its passes, for a verifier larger "
            "than memory; calibrate then reads layers so unless told otherwise",
        )
        parser.add_method_arguments(Trainer, "fit", skip={*self.subcommands()["fit"]})

    def instantiate_classes(self) -> None:
        """Make what the options describe, but no trainer: a fit may take two. What trainers write goes to ``out``."""
        if self.config.trainer.default_root_dir is None:
            self.config.trainer.default_root_dir = self.config.out
        with lightning_refusals():
            self.config_init = self.parser.instantiate_classes(self.config)

    def instantiate_trainer(self, **changes: Any) -> Trainer:
        """A trainer of the options, but for ``changes``, with callbacks of its own."""
        callbacks = deepcopy(self.config_init.trainer.callbacks)
        return super().instantiate_trainer(**{"callbacks": callbacks, **changes})

    def save_config(self) -> None:
        """Write what was read into ``out``, as trainers do: for a fit that makes none, once its result is there."""
        folder = Path(self.config.out)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(folder / "config.yaml"), overwrite=True, multifile=False)

    @property
    def options(self) -> FitOptions:
        """What was read."""
        read = self.config_init
        return FitOptions(
            data=read.data,
            out=read.out,
            model=read.model,
            trainer=self.config.trainer.as_dict(),
            gate_folders=read.gate_folders or (),
            rounds=read.rounds,
            seed=None if read.seed_everything is False else read.seed_everything,
            ckpt_path=read.ckpt_path,
            memory=read.memory,
            offload=read.offload,
        )
