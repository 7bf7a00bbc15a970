"""Adapters of other training tools (PEFT) as models: the base model with the adapter merged into its weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from viasd_calib.errors import ModelError
from viasd_calib.models.hashes import files_sha256
from viasd_calib.models.loading import ADAPTER_CONFIG, load_complete, local_file

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PLACES = frozenset({"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"})
"""Entries of an adapter's configuration that say nothing of what it computes."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on this machine.

    Attributes:
        settings: its configuration, rank and scale among them.
        base: name of the model that it was trained on.
    """

    folder: Path
    settings: dict[str, Any]
    base: str
    base_revision: str | None

    @property
    def sha256(self) -> str | None:
        """Hash of its weights and of what says how they are used; None where they are not there."""
        found = [self.folder / name for name in ADAPTER_WEIGHTS if (self.folder / name).is_file()]
        if not found:
            return None
        used = {name: value for name, value in self.settings.items() if name not in PLACES}
        described = json.dumps(used, sort_keys=True) + files_sha256({"adapter_model": found[0]})
        return hashlib.sha256(described.encode()).hexdigest()


def find_adapter(name_or_path: str, revision: str | None = None) -> Adapter | None:
    """The adapter that lies in a folder, or among a hub id's files where they have been downloaded.

    Raises:
        ModelError: its configuration is damaged, names no base model, or lies beside a whole model.
    """
    path = local_file(name_or_path, ADAPTER_CONFIG, revision)
    if path is None:
        return None
    if local_file(name_or_path, "config.json", revision) is not None:
        raise ModelError(
            f"{name_or_path} holds a whole model and an adapter: remove {ADAPTER_CONFIG} where the adapter is merged "
            "into the model already, else the model's config.json, so that the adapter's base model is loaded"
        )
    try:
        settings = json.loads(path.read_bytes())
        base, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged or names no base model; save the adapter again") from error
    if not base:
        raise ModelError(f"{path} names no base model; write its name to base_model_name_or_path")
    return Adapter(path.parent, settings, str(base), revision)


def load_adapted(adapter: Adapter, folder: str, **arguments: Any) -> PreTrainedModel:
    """The base model with the adapter merged into its weights, as PEFT merges it: no backend sees an adapter.

    Args:
        adapter: what is merged.
        folder: where the base model lies.
        arguments: of ``from_pretrained``.

    Raises:
        ModelError: the adapter is of a kind that has no weights to merge, or PEFT is not installed.
        ValueError: its weights are not those of such a model, and whatever PEFT or transformers raise.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"{adapter.folder} is an adapter, which needs PEFT: pip install peft") from error
    model = load_complete(folder, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how PEFT calls transformers
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted: Any = PeftModel.from_pretrained(model, str(adapter.folder))
        except UserWarning as warning:
            raise ValueError(f"the adapter {adapter.folder} lacks weights: {warning}") from warning
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ModelError(
            f"{adapter.folder} is an adapter of type {adapter.settings.get('peft_type')}, which cannot be merged into "
            "a model; give a LoRA adapter or a whole model"
        )
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged
