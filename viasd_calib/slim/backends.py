"""Backends: what runs the modules of verifier and drafter on the machine at hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from viasd_calib.choices import Backend
from viasd_calib.errors import MachineWarning, ModelError
from viasd_calib.models.offloaded import refuse_without_layers
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.grouped_query_attention import group_heads
from viasd_calib.slim.linears import StreamedLinear
from viasd_calib.slim.low_bit import LowBitLinear
from viasd_calib.slim.low_bit_kernel import use_kernel, why_no_triton_kernel
from viasd_calib.slim.native.library import kernels, why_no_kernels
from viasd_calib.slim.native.linear import native_linear, pack_low_bits
from viasd_calib.slim.native.model import NativeModel
from viasd_calib.slim.native.stack import why_not_run
from viasd_calib.slim.onednn_linear import can_pack, pack_linears, why_not_packed
from viasd_calib.spec import DType, Route


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that measured best of those that are ready at once.

    In float32 PyTorch's own kernels read plain weights as fast as packed ones. ``compiled`` is faster on a CPU, but has
    to compile for minutes first; on CUDA, which it is made for, it was not measured.

    Example:
        >>> default_backend(torch.device("cpu"), torch.float32)
        'eager'
    """
    return "native" if why_no_kernels(device, dtype) is None else _without_kernels(device, dtype)


def _without_kernels(device: torch.device, dtype: torch.dtype) -> Backend:
    return "packed" if dtype == torch.bfloat16 and can_pack(device, dtype) else "eager"


def fastest_dtype(device: torch.device) -> DType:
    """The number format to decode in: bfloat16 where the device calculates in it, else float32.

    Example:
        >>> fastest_dtype(torch.device("mps"))
        'float32'
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "float32" if default_backend(device, torch.bfloat16) == "eager" else "bfloat16"


def low_bits_have_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether something here runs low bits faster than it runs 16, for models that it knows.

    Example:
        >>> low_bits_have_kernels(torch.device("cpu"), torch.float32)
        False
    """
    return why_no_triton_kernel(device, dtype) is None or why_no_kernels(device, dtype) is None


def kernel_family(backend: Backend, device: torch.device) -> str:
    """The device and the kernels that a backend computes with there: within a family texts differ by rounding alone.

    Example:
        >>> kernel_family("packed", torch.device("cpu")), kernel_family("native", torch.device("cpu"))
        ('cpu torch', 'cpu native')
    """
    return f"{device.type} {'native' if backend == 'native' else 'torch'}"


def choose_backend(model: PreTrainedModel) -> Backend:
    """The same for a model at hand, with a warning where something is slower here than it could be.

    Kernels of backend ``native`` are compiled now, where they are not yet. Where that fails, or the model is of a type
    that they do not know, its linear layers are packed.
    """
    device, dtype = model.device, model.dtype
    if default_backend(device, dtype) == "native" and why_not_run(model.config) is None:
        try:
            kernels()
        except ModelError as error:
            warnings.warn(
                f"backend native cannot be used ({str(error).partition('; ')[0]}); what decodes in its place is slower",
                MachineWarning,
                stacklevel=2,
            )
        else:
            return "native"
    backend, why = _without_kernels(device, dtype), why_not_packed(device, dtype)
    if backend == "eager" and device.type == "cpu" and dtype != torch.float32 and why is not None:
        warnings.warn(
            f"backend eager runs the models, since packed weights cannot be used ({why}); texts are as good, but "
            f"{dtype} is slow here: --dtype float32 may be faster where the memory suffices",
            MachineWarning,
            stacklevel=2,
        )
    return backend


def open_model(model: PreTrainedModel, route: Route, held: Mapping[str, object], backend: Backend) -> RoutedModel:
    """A verifier opened into the sublayers that ``backend`` runs; arguments and errors as for ``RoutedModel``."""
    match backend:
        case "compiled":
            return CompiledModel(model, route, held)
        case "native":
            return NativeModel(model, route, held)
        case _:
            return RoutedModel(model, route, held)


def prepare(modules: Iterable[nn.Module], backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Make ``modules`` ready for a backend, in place; they can then no longer be trained or saved.

    Raises:
        ModelError: the backend does not run on ``device`` in ``dtype``, or a verifier was loaded without its layers and
            nothing reads them.
    """
    modules = tuple(modules)
    refuse_without_layers(modules)
    if backend != "native" and why_no_triton_kernel(device, dtype) is None:
        use_kernel(modules)
    _warn_of_low_bits(modules, backend, device, dtype)
    if backend == "eager":
        return
    if backend == "native":
        lacking = why_no_kernels(device, dtype)
        if lacking is not None:
            raise ModelError(f"the kernels of backend native cannot run here: {lacking}; choose another backend")
        kernels()  # compiled now, where they are not yet
        pack_low_bits(modules)
        pack_linears(modules, native_linear)
        group_heads(modules)
        return
    if backend == "compiled" and not (dtype == torch.bfloat16 and can_pack(device, dtype)):
        group_heads(modules)
        return
    why = why_not_packed(device, dtype)
    if why is not None:
        raise ModelError(
            f"backend packed needs a CPU that calculates in {dtype} and a PyTorch with oneDNN: {why}; "
            "choose backend eager"
        )
    pack_linears(modules)
    group_heads(modules)


def _warn_of_low_bits(modules: Iterable[nn.Module], backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Tell a user that sublayers in low bits are no faster where a backend has no kernels for them."""
    kinds = {type(one) for module in modules for one in module.modules()}
    if backend == "native" or LowBitLinear not in kinds:
        return
    gains = "nothing here" if StreamedLinear not in kinds else "here what is not read for it, and nothing more"
    lacking = why_no_kernels(device, dtype)
    why = "choose backend native" if lacking is None else f"backend native has kernels for them, but {lacking}"
    if low_bits_have_kernels(device, torch.bfloat16) and not low_bits_have_kernels(device, dtype):
        why = "kernels for them calculate in bfloat16; give --dtype bfloat16"
    warnings.warn(
        f"backend {backend} runs sublayers in low bits, but no faster than others, so that a slim pass gains {gains}: "
        f"{why}",
        MachineWarning,
        stacklevel=3,
    )
