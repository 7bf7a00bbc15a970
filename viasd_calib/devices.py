"""Where models may run: a device is looked at before anything is loaded onto it."""

from __future__ import annotations

import re

from viasd_calib.errors import ModelError

_CHOICES = "choose cpu, cuda, cuda:NUMBER or mps"


def check_device(device: str) -> None:
    """Refuse a device that there is not on this machine.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:0``, ``mps``, or another name that PyTorch knows.

    Raises:
        ModelError: saying what to choose.

    Example:
        >>> check_device("cpu")
        >>> check_device("gpu")
        Traceback (most recent call last):
        ...
        viasd_calib.errors.ModelError: there is no device 'gpu'; for a GPU of NVIDIA or AMD write cuda
    """
    found = re.fullmatch(r"([a-z]+)(?::(\d+))?", device)
    kind, number = found.groups() if found else (None, None)
    if kind == "cpu" and number in (None, "0"):
        return
    if device.strip().lower().partition(":")[0] in ("gpu", "nvidia", "rocm", "hip"):
        raise ModelError(f"there is no device {device!r}; for a GPU of NVIDIA or AMD write cuda")
    if kind in (None, "cpu", "meta"):
        raise ModelError(f"there is no device {device!r}; {_CHOICES}")

    import torch  # takes seconds, so not for what is wrong anyway

    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(
                f"device {device} needs a GPU and a PyTorch built for it, and {_cuda_lack()}; "
                "leave --device out to run on the CPU"
            )
        count = torch.cuda.device_count()
        if number is not None and int(number) >= count:
            raise ModelError(f"there is no device {device}: this machine has cuda:0 to cuda:{count - 1}")
        return
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ModelError("device mps needs a Mac with Apple's own chip; leave --device out to run on the CPU")
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        raise ModelError(f"there is no device {device!r} here ({_first_line(error)}); {_CHOICES}") from error


def _cuda_lack() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built for CPUs alone"
    return f"PyTorch {torch.__version__} finds none"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
