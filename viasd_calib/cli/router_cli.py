"""LightningCLI for the router: the options of ``viasd fit``, and what one training does."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from viasd_calib.cli.fit_result import say_fit
from viasd_calib.cli.notices import say_written
from viasd_calib.cli.parser import CommandParserMixin, HelpFormatter
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import FIT_FILE
from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.pipeline.fit import write_fit
from viasd_calib.prompts import SplitShares
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.fit import fit_slim_verifier
from viasd_calib.training.options import SlimVerifierOptions
from viasd_calib.training.warm_start import save_warm_start


class RouterParser(CommandParserMixin, LightningArgumentParser):  # type: ignore[misc]  # argparse's has overloads
    """Lightning's options and the router's."""


class RouterCLI(LightningCLI):
    """LightningCLI with the folder that route, adapter and gates are written to.

    Args:
        load: where the router's verifier comes from.
        state: where the trained state is written for a next round to go on from; None for nowhere.
        options: LightningCLI's own.
    """

    def __init__(self, *, load: LoadVerifier, state: Path | None = None, **options: Any) -> None:
        self._load = load
        self._state = state
        self._trained = False
        super().__init__(
            datamodule_class=TraceDataModule,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            },
            **options,
        )

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """A parser that reads dashes and flags, and refuses in one line."""
        parser = RouterParser(formatter_class=HelpFormatter, **options)
        parser.add_argument("-c", "--config", action="config", help="a configuration, YAML or JSON")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer and traces, and the options of a fit in place of a module's: a fit may make two modules."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_class_arguments(SlimVerifierOptions, "model", sub_configs=True)
        parser.add_lightning_class_args(TraceDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are not Lightning's."""
        parser.add_argument("--out", type=str, default="runs/fit", help="folder for route, adapter and gates")
        parser.add_argument(
            "--gate_folders",
            type=list[str] | None,
            default=None,
            help="traces that gates are fitted and judged on, in place of those the route learned from: of prompts "
            "that neither drafter nor slim verifier was trained on, whose answers both know too well",
        )
        parser.add_argument(
            "--rounds",
            type=PositiveInt,
            default=1,
            help="how often to train, trainer.max_steps each: between two rounds the three-tier decoder answers the "
            "prompts of the traces, and the next round learns from these texts too (all are under OUT/round-1, ...)",
        )

    def before_fit(self) -> None:
        """Refuse what cannot be trained in rounds.

        Raises:
            CalibrationError: several processes train in rounds.
        """
        if self._state is not None and self.trainer.world_size > 1:
            raise CalibrationError(
                f"rounds train in one process, not in {self.trainer.world_size}; set trainer.devices to 1, or leave "
                "out --rounds and capture between two fits with viasd capture --spec"
            )

    def instantiate_trainer(self, **changes: Any) -> Trainer:
        """A trainer with callbacks of its own, as a fit may take two."""
        callbacks = deepcopy(self._get(self.config_init, "trainer")["callbacks"])
        return super().instantiate_trainer(callbacks=callbacks, **changes)

    def trainer_with(self, **changes: Any) -> Trainer:
        """The trainer that the options describe, or another for what they are not to be or for a further stage."""
        options = self._get(self.config, "trainer")
        if self._trained or any(options[name] != value for name, value in changes.items()):
            self.trainer = self.instantiate_trainer(**changes)
        self._trained = True
        return self.trainer

    def fit(self, model: SlimVerifierOptions, datamodule: TraceDataModule, ckpt_path: str | None, **_: Any) -> None:
        """Train all stages, and write what was learned; where several processes train, the first one alone."""
        options = self.config["fit"]
        steps = options["trainer"]["max_steps"]
        module = fit_slim_verifier(
            model, datamodule, self.trainer_with, max_steps=steps, ckpt_path=ckpt_path, load=self._load
        )
        if self._state is not None:
            save_warm_start(self.trainer, self._state)
        if self.trainer.is_global_zero:
            out = Path(options["out"])
            say_fit(write_fit(module, datamodule, out, options["gate_folders"] or ()))
            say_written(out / FIT_FILE)


class OptionsCLI(RouterCLI):
    """The options of ``viasd fit`` alone, read and checked; nothing is made of them.

    Attributes:
        words: as they are read: flags have their values.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words: list[str] = []
        super().__init__(load=load_verifier, args=[*words], run=False, parser_kwargs={"prog": "viasd fit"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what the subcommand ``fit`` has of the trainer."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip={*self.subcommands()["fit"]})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the words, and keep them."""
        assert isinstance(parser, RouterParser)
        self.words = parser.read(args)
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Make neither trainer nor module."""


def data_of(options: Namespace) -> TraceDataModule:
    """The traces that options of ``viasd fit`` name."""
    entries = options.data.as_dict()
    shares = entries.pop("shares")
    data = TraceDataModule(**entries, shares=None if shares is None else SplitShares.model_validate(shares))
    data.setup()
    return data
