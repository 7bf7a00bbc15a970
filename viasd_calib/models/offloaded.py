"""Models whose decoder layers stay in their files: what reads them brings them in, one layer after another."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from viasd_calib.errors import ModelError
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models.checkpoint import Checkpoint
from viasd_calib.models.hashes import cache_folder
from viasd_calib.models.loading import local_file, use_capped_attention
from viasd_calib.models.names import resolve_model
from viasd_calib.models.weights import weights_sha256

PATTERNS = ["*.safetensors", "*.json"]
"""Of what is downloaded of a model."""
OTHER_FORMS = ["*/*", "consolidated*"]
"""Of what is not: the same weights as other programs read them."""
ATTRIBUTE = "viasd_layer_weights"
"""Of a model that was loaded without its layers: where they are read from."""


class LayerWeights:
    """The weights of linear layers inside decoder layers, which are read from a checkpoint when they are asked for.

    Their parameters have the right shape and number format, and no memory: every value is 0 until they are read. A
    layer that would calculate with these zeros, or save them, raises a ModelError; so it does in copies of it.

    Args:
        model: the model, whose other weights are in memory.
        read: gives weights of these shapes by their names in the model.

    Attributes:
        sha256: hash of the model's weights, under which what is made of them is kept; None where nobody can say.
    """

    sha256: str | None = None

    def __init__(
        self, model: PreTrainedModel, read: Callable[[Mapping[str, Sequence[int]]], dict[str, Tensor]]
    ) -> None:
        self._read = read
        self._model = model.name_or_path
        # With the parameters themselves: the identity of one that is gone may be another's later.
        self._names = {id(weight): (weakref.ref(weight), name) for name, weight in model.named_parameters()}
        self.linears = layer_linears(model.get_decoder().layers)
        for one in self.linears:
            one.register_forward_pre_hook(_refuse_zeros)
            one.register_state_dict_pre_hook(_refuse_to_save_zeros)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ModelError(f"the model {self._model!r} was loaded without its layers, and cannot be copied; load another")

    def read(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What parameters are to hold: [out, in], in the model's number format.

        Raises:
            ModelError: a file is missing or damaged.
        """
        names = [self._names[id(weight)][1] for weight in weights]
        try:
            found = self._read({name: weight.shape for name, weight in zip(names, weights, strict=True)})
        except (OSError, ValueError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"cannot read the layers of the model {self._model!r}: {reason}; download it again, or save it again"
            ) from error
        return [found[name] for name in names]

    def has(self, weights: Iterable[Tensor]) -> bool:
        """Whether all of these are the model's own parameters, and so what its files hold, until :meth:`release`."""
        return all(id(weight) in self._names and self._names[id(weight)][0]() is weight for weight in weights)

    def keep(self, weights: Sequence[Tensor]) -> None:
        """Bring weights into memory, for good; those that are in memory stay as they are."""
        weights = [weight for weight in weights if is_without_memory(weight)]
        for weight, values in zip(weights, self.read(weights), strict=True):
            weight.data = values.to(weight.device)

    @contextmanager
    def in_memory(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Bring weights into memory for as long as the block lasts; all that holds the same parameters sees them."""
        weights = [weight for weight in weights if is_without_memory(weight)]
        try:
            self.keep(weights)
            yield
        finally:
            for weight in weights:
                weight.data = without_memory(weight)
            give_freed_memory_back()

    def move(self, device: torch.device) -> None:
        """Bring weights without memory to a device, where they take none either; ``Module.to`` would fill them."""
        for one in self.linears:
            if is_without_memory(one.weight):
                one.weight.data = without_memory(one.weight, device)

    def release(self) -> None:
        """Hold no layer any longer, so that plain weights go once a backend has packed them; nothing is read after."""
        self.linears = []
        self._names = {}


def _refuse_zeros(linear: nn.Module, _: Any) -> None:
    if isinstance(linear.weight, Tensor) and is_without_memory(linear.weight):
        raise ModelError(
            "the verifier was loaded without its layers, and runs only in an engine that reads them: give load_engine "
            "an Offload, or load the verifier with its layers"
        )


def _refuse_to_save_zeros(linear: nn.Module, *_: Any) -> None:
    if isinstance(linear.weight, Tensor) and is_without_memory(linear.weight):
        raise ModelError(
            "the weights of a verifier that was loaded without its layers cannot be saved; load it with them, and save "
            "that"
        )


def refuse_without_layers(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose linear layers have weights without memory, for what reads weights without a forward.

    Raises:
        ModelError: naming the mend.
    """
    for one in layer_linears(modules):
        _refuse_zeros(one, None)


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


def layer_linears(layers: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear layers of decoder layers, in order.

    Example:
        >>> layer = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 3), nn.ReLU())})
        >>> layer_linears([layer, layer])
        [Linear(in_features=2, out_features=3, bias=True), Linear(in_features=2, out_features=3, bias=True)]
    """
    return [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]


def without_memory(weight: Tensor, device: torch.device | None = None) -> Tensor:
    """Zeros of the shape and number format of a weight, which all are one number.

    Args:
        device: that of the weight where it is left out, or the CPU where that has no values.
    """
    device = device or (torch.device("cpu") if weight.is_meta else weight.device)
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
        ValueError: a weight is missing or has another shape, or the checkpoint is of integers that a library packed.
        OSError: a file cannot be read.
        SafetensorError: a file is damaged.
    """
    if not Path(folder).is_dir():
        folder = snapshot_download(folder, revision=revision, allow_patterns=PATTERNS, ignore_patterns=OTHER_FORMS)
        revision = None
    config = AutoConfig.from_pretrained(folder, revision=revision, **arguments)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised by a library, and cannot be read layer by layer; load a plain one")
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments)
    use_capped_attention(model)
    checkpoint = Checkpoint(folder, revision)
    linears = layer_linears(model.get_decoder().layers)
    inside = {id(one.weight) for one in linears}
    every = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: one.shape for name, one in every.items() if id(one) not in inside and checkpoint.has(name)}
    for name, weight in checkpoint.read(shapes, dtype).items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(weight, requires_grad=False))
    # As from_pretrained does: what is there twice, with different values, is not tied whatever the configuration says.
    model.tie_weights({name for name in every if not checkpoint.has(name)}, recompute_mapping=False)
    missing = [name for name, weight in model.named_parameters() if weight.is_meta and not checkpoint.has(name)]
    if missing:
        raise ValueError(f"its weights are incomplete, {missing[0]} is missing")
    for one in linears:
        one.weight = nn.Parameter(without_memory(one.weight), requires_grad=False)
    weights = LayerWeights(model, lambda wanted: checkpoint.read(wanted, dtype))
    if local_file(folder, "generation_config.json", revision) is not None:
        model.generation_config = GenerationConfig.from_pretrained(folder, revision=revision or "main")
    object.__setattr__(model, ATTRIBUTE, weights)
    return model


def load_by_accelerate(name_or_path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model whose decoder layers transformers and accelerate keep on disk, or beside a GPU in the host's memory.

    It is what others would run in little memory: a layer is read when it is needed, through the system's own cache.
    What has to be written for that, as the checkpoints of some models are, lies under the hash of the weights.

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
    digest = weights_sha256(name_or_path) or hashlib.sha256(name_or_path.encode()).hexdigest()
    written = cache_folder() / "accelerate" / f"{digest}-{str(dtype).removeprefix('torch.')}"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=places, offload_folder=str(written)
    )
    model.eval()
    return model
