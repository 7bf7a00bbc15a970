"""What every test shares: no network, no traces in the user's cache folders, one thread, repeatable examples."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import socket
import tempfile
from pathlib import Path

# Read once, when huggingface_hub and datasets are imported: so before anything else is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For the processes that tests start, as pyproject.toml has it for their own.
os.environ.setdefault(
    "PYTHONWARNINGS",
    "error::DeprecationWarning,error::FutureWarning,ignore::DeprecationWarning:lightning.pytorch.cli,"
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning,ignore:`isinstance(treespec:FutureWarning",
)
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="viasd-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny import TinyFolder, save_tiny, tiny_prompts
from viasd_calib.models import Verifier, load_verifier

# For machines with a GPU, by `make gpu`: collected where their folder is named alone.
collect_ignore = ["gpu"]

# A tiny model takes milliseconds, and its width one thread. `--hypothesis-profile=explore` looks for new examples.
torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    deadline=None,
    max_examples=20,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False, max_examples=600)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """No host is found and none can be reached, though nothing forbids to ask; what was asked for is noted here."""
    asked: list[object] = []

    def find(host: object, *_arguments: object, **_options: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def connect(_socket: object, address: object) -> None:
        asked.append(address)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return asked


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in place of the one where the package keeps what it converts."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "viasd_calib"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """A folder that ``load_verifier`` loads: a tiny Llama and a word-level tokenizer with a chat template."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_verifier(tiny_folder: TinyFolder) -> Verifier:
    """The verifier of that folder."""
    return load_verifier(str(tiny_folder))


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces of the tiny verifier."""
    from viasd_calib.traces.capture import capture_traces
    from viasd_calib.traces.folder import CaptureSettings

    folder = tmp_path_factory.mktemp("traces")
    settings = CaptureSettings(max_new_tokens=16, batch_size=8)
    capture_traces(load_verifier(str(tiny_folder)), None, "none", tiny_prompts(24), folder, settings)
    return folder
