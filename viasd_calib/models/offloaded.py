"""Models whose decoder layers stay in their files: what reads them brings them in, one layer after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from viasd_calib.errors import ModelError
from viasd_calib.models.checkpoint import Checkpoint
from viasd_calib.models.hashes import cache_folder
from viasd_calib.models.loading import local_file
from viasd_calib.models.names import resolve_model

ATTRIBUTE = "viasd_layer_weights"
"""Of a model that was loaded without its layers: where they are read from."""


class LayerLinear(NamedTuple):
    """A linear layer inside a decoder layer.

    Attributes:
        layer: number of the decoder layer.
        path: name inside it, as ``self_attn.q_proj``.
    """

    layer: int
    path: str
    linear: nn.Linear


class LayerWeights:
    """The weights of linear layers inside decoder layers, which are read from a checkpoint when they are asked for.

    Their parameters have the right shape and number format, and no memory: every value is 0 until they are read.

    Args:
        model: the model, whose other weights are in memory.
        read: gives weights by their names in the model.
    """

    def __init__(self, model: PreTrainedModel, read: Callable[[Iterable[str]], dict[str, Tensor]]) -> None:
        self._read = read
        self._model = model.name_or_path
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self.linears = layer_linears(model.get_decoder().layers)
        for one in self.linears:
            one.linear.weight.data = without_memory(one.linear.weight)

    def of_layer(self, layer: int) -> list[LayerLinear]:
        """The linear layers of a decoder layer."""
        return [one for one in self.linears if one.layer == layer]

    def read(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What parameters are to hold: [out, in], in the model's number format.

        Raises:
            ModelError: a file is missing or damaged.
        """
        names = [self._names[id(weight)] for weight in weights]
        try:
            found = self._read(names)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"cannot read the layers of the model {self._model!r}: {error}") from error
        for name, weight in zip(names, weights, strict=True):
            if found[name].shape != weight.shape:
                raise ModelError(
                    f"{name} of the model {self._model!r} has the shape {list(found[name].shape)}, not "
                    f"{list(weight.shape)}; download the model again"
                )
        return [found[name] for name in names]

    def keep(self, weights: Sequence[Tensor]) -> None:
        """Bring weights into memory, for good; those that are in memory stay as they are."""
        weights = [weight for weight in weights if is_without_memory(weight)]
        for weight, values in zip(weights, self.read(weights), strict=True):
            weight.data = values.to(weight.device)

    @contextmanager
    def in_memory(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Bring weights into memory for as long as the block lasts; all that holds the same parameters sees them."""
        weights = [weight for weight in weights if is_without_memory(weight)]
        self.keep(weights)
        try:
            yield
        finally:
            for weight in weights:
                weight.data = without_memory(weight)


def layer_weights(model: nn.Module) -> LayerWeights | None:
    """Where the layers of a model are read from; None where they are in memory."""
    found: LayerWeights | None = getattr(model, ATTRIBUTE, None)
    return found


@contextmanager
def layers_in_memory(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Have weights of a model's layers in memory for as long as the block lasts, wherever they are else."""
    source = layer_weights(model)
    with nullcontext() if source is None else source.in_memory(weights):
        yield


def layer_linears(layers: Iterable[nn.Module]) -> list[LayerLinear]:
    """The linear layers of decoder layers, in order.

    Example:
        >>> layer = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 3), nn.ReLU())})
        >>> [(one.layer, one.path) for one in layer_linears([layer, layer])]
        [(0, 'mlp.0'), (1, 'mlp.0')]
    """
    return [
        LayerLinear(number, path, module)
        for number, layer in enumerate(layers)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]


def without_memory(weight: Tensor) -> Tensor:
    """Zeros of the shape, number format and device of a weight, which all are one number."""
    device = "cpu" if weight.is_meta else weight.device
    return torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape)


def is_without_memory(weight: Tensor) -> bool:
    """Whether a weight is what :func:`without_memory` gives.

    Example:
        >>> is_without_memory(without_memory(torch.ones(2, 3))), is_without_memory(torch.ones(2, 3))
        (True, False)
    """
    return weight.numel() > 1 and not any(weight.stride())


def load_without_layers(folder: str, revision: str | None, dtype: torch.dtype, **arguments: Any) -> PreTrainedModel:
    """A model with all of its weights but those of the linear layers in its decoder layers (:func:`layer_weights`).

    Args:
        folder: a folder with safetensors, or a hub id; what the hub has and this machine lacks is downloaded.
        arguments: of ``from_pretrained``.

    Raises:
        ValueError: a weight is missing, or the checkpoint is of integers that a library packed.
        OSError: a file cannot be read.
    """
    if not Path(folder).is_dir():
        folder = snapshot_download(folder, revision=revision, allow_patterns=["*.safetensors", "*.json"])
        revision = None
    config = AutoConfig.from_pretrained(folder, revision=revision, **arguments)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised by a library, and cannot be read layer by layer; load a plain one")
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments)
    checkpoint = Checkpoint(folder, revision)
    inside = {id(one.linear.weight) for one in layer_linears(model.get_decoder().layers)}
    wanted = [name for name, weight in model.named_parameters() if id(weight) not in inside and checkpoint.has(name)]
    for name, weight in checkpoint.read(wanted, dtype).items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    missing = [name for name, weight in model.named_parameters() if weight.is_meta and id(weight) not in inside]
    if missing:
        raise ValueError(f"its weights are incomplete, {missing[0]} is missing")
    for one in layer_linears(model.get_decoder().layers):
        one.linear.weight = nn.Parameter(without_memory(one.linear.weight), requires_grad=False)
    weights = LayerWeights(model, lambda names: checkpoint.read(names, dtype))
    if local_file(folder, "generation_config.json", revision) is not None:
        model.generation_config = GenerationConfig.from_pretrained(folder, revision=revision or "main")
    object.__setattr__(model, ATTRIBUTE, weights)
    return model


def load_by_accelerate(name_or_path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model whose decoder layers transformers and accelerate keep on disk, or beside a GPU in the host's memory.

    It is what others would run in little memory: a layer is read when it is needed, through the system's own cache.

    Args:
        name_or_path: as for :func:`~viasd_calib.models.load_verifier`.

    Raises:
        ModelError: nothing of that name.
        OSError: a file cannot be read.
    """
    folder, _ = resolve_model(name_or_path)
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    layers = empty.get_decoder().layers
    prefix = next(name for name, module in empty.named_modules() if module is layers)
    named = [name for name, _ in (*empty.named_parameters(), *empty.named_buffers())]
    others = [name for name in named if not name.startswith(f"{prefix}.")]
    away = "cpu" if device.type == "cuda" else "disk"
    places = {name.rpartition(".")[0]: str(device) for name in others}
    places |= {f"{prefix}.{number}": away for number in range(len(layers))}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=places, offload_folder=str(cache_folder() / "accelerate")
    )
    model.eval()
    return model
