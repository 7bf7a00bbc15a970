"""One model off the disk: which files its weights are in, and every weight from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

ADAPTER_CONFIG = "adapter_config.json"
CONFIG_FILES = ("config.json", ADAPTER_CONFIG)
"""One of these lies among the files of every model."""


def load_complete(folder: str, **arguments: Any) -> PreTrainedModel:
    """What ``AutoModelForCausalLM.from_pretrained`` gives; it fills weights that a file lacks with random ones.

    Raises:
        ValueError: naming the first such weight, and whatever transformers raises.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    model: PreTrainedModel
    report: Mapping[str, Any]
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"its weights are incomplete, {missing[0]} is missing")
    use_capped_attention(model)
    return model


def use_capped_attention(model: PreTrainedModel) -> None:
    """Let a model that caps its attention scores run ``eager``: sdpa, which some transformers choose, has no caps."""
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def weight_files(name_or_path: str | Path, revision: str | None = None) -> dict[str, Path]:
    """The files that transformers reads a model's weights from, by name; none where they are not on this machine.

    Args:
        name_or_path: a folder, or a hub id whose files have been downloaded.
        revision: of a hub id.
    """

    def locate(name: str) -> Path | None:
        return local_file(name_or_path, name, revision)

    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (path := locate(whole)) is not None:
            return {whole: path}
        if (path := locate(index)) is not None:
            shards = {name: locate(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
            return {name: shard for name, shard in shards.items() if shard is not None}
    return {}


def local_file(name_or_path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of a model that lies on this machine: in its folder, or in the hub's cache."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        found = try_to_load_from_cache(str(name_or_path), name, revision=revision)
    except ValueError:  # neither a folder nor a name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None
