"""What a fit can check in milliseconds: options that Lightning takes and a slim verifier cannot be trained with."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viasd_calib.errors import CalibrationError
from viasd_calib.option_types import bytes_of, check_option
from viasd_calib.pipeline.checks import check_model, check_out_folder, check_traces
from viasd_calib.pipeline.lists import dashed

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")
NOTHING = (
    ("trainer.limit_train_batches", "leave it out to train on all"),
    ("trainer.max_steps", "give the number of steps to train, or -1 for no limit"),
    ("trainer.max_epochs", "give the number of epochs to train, or -1 for no limit"),
)
"""Options of the trainer with which nothing would be learned where they are 0."""
SEEDS = 2**32
"""numpy takes seeds below it."""


def check_fit(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be, before Lightning is loaded.

    Args:
        options: those that are given, by their names with dots, as on the command line.

    Raises:
        ViasdError: naming the first, with its mend.
    """
    if "out" in options:
        check_out_folder("--out", str(options["out"] or ""))
    for name in ("data.folders", "gate_folders"):
        folders = options.get(name)
        if isinstance(folders, list) and (folders or name == "data.folders"):
            check_traces(dashed(name), [str(folder) for folder in folders])
    if isinstance(options.get("model.verifier"), str):
        check_model(options["model.verifier"])
    for name in ("trainer.max_steps", "trainer.max_epochs"):
        check_option(dashed(name), options.get(name), int | None, CalibrationError)
    for name, mend in NOTHING:
        if name in options and type(options[name]) in (int, float) and options[name] == 0:
            raise CalibrationError(f"{dashed(name)} is 0, so nothing would be learned; {mend}")
    accumulate, same = options.get("model.accumulate"), options.get("trainer.accumulate_grad_batches")
    if len({accumulate, same} - {None, 1}) == 2:
        raise CalibrationError(
            f"--model.accumulate is {accumulate} and --trainer.accumulate-grad-batches {same}; both are the batches of "
            "a step, so give one of them"
        )
    if options.get("memory") is not None:
        bytes_of("--memory", options["memory"])
    _check_seed(options.get("seed_everything"))
    _check_precision(options.get("trainer.precision"))
    _check_monitors(options)
    if options.get("ckpt_path") is not None and options.get("rounds", 1) != 1:
        raise CalibrationError("--rounds goes on from its own rounds; leave out --ckpt-path")
    if options.get("ckpt_path") == "last":
        last_checkpoint(options)
    elif options.get("ckpt_path") is not None:
        _check_checkpoint(str(options["ckpt_path"]))


def _check_seed(seed: object) -> None:
    if type(seed) is not bool:  # Lightning's own, for a random one and for none
        check_option("--seed-everything", seed, int | None, CalibrationError)
    if type(seed) is int and not 0 <= seed < SEEDS:
        raise CalibrationError(f"--seed-everything is {seed}; give a whole number of at least 0 and below 2**32")


def _check_precision(precision: object) -> None:
    if precision is not None and str(precision) not in PRECISIONS:
        raise CalibrationError(
            f"--trainer.precision {precision} is not supported: adapter and bridges are trained in float32; give "
            "32-true, bf16-mixed or, on a GPU, 16-mixed"
        )


def _check_monitors(options: Mapping[str, Any]) -> None:
    """Refuse callbacks that wait for what is never logged."""
    objective = options.get("model.objective", "kl")
    logged = ["agreement", f"adapter_{objective}", "epoch", "step"]
    if options.get("model.route_choice") == "gates":
        logged += [f"route_{objective}", "expected_cost"]
    callbacks = options.get("trainer.callbacks")
    found = [_argument(one, "monitor") for one in _listed(callbacks)]
    for monitor in (*found, options.get("trainer.callbacks.monitor")):
        if monitor is not None and monitor not in logged:
            raise CalibrationError(
                f"a callback of --trainer.callbacks monitors {monitor!r}, which is never logged; monitor one of "
                f"{', '.join(logged)}"
            )


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _argument(callback: object, name: str) -> Any:
    """An argument of a callback, of one that a configuration describes too; None where it has none."""
    return callback.get("init_args", {}).get(name) if isinstance(callback, Mapping) else getattr(callback, name, None)


def _check_checkpoint(path: str) -> None:
    """Refuse a checkpoint that is not there, or that is none."""
    file = Path(path)
    if not file.is_file():
        raise CalibrationError(
            f"there is no checkpoint {path}; give --ckpt-path the path of a .ckpt file, or last for the newest one"
        )
    if not zipfile.is_zipfile(file):
        raise CalibrationError(f"{path} is no checkpoint, or was cut short; give --ckpt-path another")


def last_checkpoint(options: Mapping[str, Any]) -> Path:
    """The checkpoint that was written last where the trainer of these options writes them.

    Raises:
        CalibrationError: there is none.
    """
    root = Path(options.get("trainer.default_root_dir") or ".")
    places = [root / "lightning_logs", root / "checkpoints"]
    folders = [_argument(one, "dirpath") for one in _listed(options.get("trainer.callbacks"))]
    places += [Path(folder) for folder in folders if folder]
    found = [path for place in places for path in place.rglob("*.ckpt")]
    if not found:
        raise CalibrationError(
            f"--ckpt-path last: there is no checkpoint under {', '.join(map(str, places))}; leave it out to begin "
            "anew, or give the path of one"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def check_devices(accelerator: object, precision: object) -> None:
    """Refuse what this machine cannot train on.

    Args:
        accelerator: of the trainer, by its name.
        precision: of the trainer.

    Raises:
        CalibrationError: naming it, with its mend.
    """
    import torch
    from lightning.pytorch.accelerators import AcceleratorRegistry

    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if isinstance(accelerator, str) and accelerator not in known:
        raise CalibrationError(f"--trainer.accelerator is {accelerator!r}; give one of {', '.join(known)}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": cuda, "mps": mps, "gpu": cuda or mps}
    if isinstance(accelerator, str) and not there.get(accelerator, True):
        raise CalibrationError(
            f"--trainer.accelerator {accelerator}: PyTorch finds no such device on this machine; leave it out, or give "
            "cpu"
        )
    on_gpu = accelerator != "cpu" and there["gpu"]
    if str(precision) in ("16-mixed", "16") and not on_gpu:
        raise CalibrationError(
            f"--trainer.precision {precision} needs a GPU; on a CPU give bf16-mixed, or leave it out for 32-true"
        )
