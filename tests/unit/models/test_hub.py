"""Names that only the hub could know: asked once, and refused in one line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session

from tests.tiny import TinyFolder, save_tiny, tiny_spec
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import ModelError
from viasd_calib.models import Verifier, check_model, load_draft_model, load_verifier
from viasd_calib.spec import CausalLMDraft, load_spec, save_spec

LOADERS: list[Callable[[str], object]] = [load_verifier, load_draft_model, check_model]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache in which there is no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is tried once, not for a minute."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} seconds to try again")

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.parametrize("load", LOADERS)
def test_without_a_network_a_name_is_refused_at_once(load: Callable[[str], object], no_network: list[object]) -> None:
    with pytest.raises(ModelError) as caught:
        load("nobody/nothing")
    assert str(caught.value).startswith(
        "cannot load the model 'nobody/nothing': there is no such folder, and the hub cannot be reached ("
    )
    assert "go online once to download it, or give a hub id, a folder or a .gguf file" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert no_network


def test_the_base_model_of_an_adapter_is_refused_at_once(tmp_path: Path, no_network: list[object]) -> None:
    settings = {"base_model_name_or_path": "nobody/base", "peft_type": "LORA"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"cannot load the model 'nobody/base': .* the hub cannot be reached"):
        load_verifier("./adapter")
    assert no_network


def test_a_draft_model_is_looked_for_before_the_verifier_is_loaded(
    tiny_folder: TinyFolder, tmp_path: Path, no_network: list[object]
) -> None:
    path = tiny_spec(tiny_folder, tmp_path)
    spec = load_spec(path)
    save_spec(spec.model_copy(update={"draft": CausalLMDraft(name_or_path="nobody/draft")}), path)

    def load(name_or_path: str, **_options: object) -> Verifier:
        raise AssertionError(f"{name_or_path} is loaded")

    with pytest.raises(ModelError, match="cannot load the model 'nobody/draft'"):
        load_engine(path, load=load)
    assert no_network


def test_where_nothing_is_to_be_downloaded_the_hub_is_not_asked() -> None:
    """The tests run so."""
    with pytest.raises(ModelError, match="has not been downloaded, while HF_HUB_OFFLINE forbids to: unset it, or give"):
        load_verifier("nobody/nothing")


@pytest.mark.parametrize("load", [load_verifier, load_draft_model])
def test_without_a_network_what_has_been_downloaded_is_loaded_at_once(
    load: Callable[[str], object], tmp_path: Path, no_network: list[object]
) -> None:
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("c0ffee" + "0" * 34)
    save_tiny(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    load("some/model")
    assert len(set(no_network)) == 1
    assert check_model("some/model") == snapshot


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, answers: dict[str, tuple[int, str, str]]) -> Iterator[None]:
    """A hub on this machine.

    Args:
        answers: status, the hub's code for what is wrong and a document, by the end of the path.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code, body = next(answer for end, answer in answers.items() if self.path.endswith(end))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    close_session()  # its client keeps what it was told of proxies
    try:
        yield
    finally:
        close_session()
        server.shutdown()
        serving.join()
        server.server_close()


FOUND = json.dumps({"id": "org/model", "gated": False})
GATED = json.dumps({"id": "org/model", "gated": "manual"})


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"": (404, "RepoNotFound", "")}, "the hub has no model of that name, or a private one .*; give a hub id"),
        (
            {"/auth-check": (403, "GatedRepo", ""), "": (200, "", GATED)},
            "to those alone who have agreed to its terms: do so at http.*/org/model, and log in with hf auth login",
        ),
        ({"": (404, "RevisionNotFound", "")}, "the hub has no revision 'v2' of it; give another, or leave it out"),
    ],
    ids=["unknown", "gated", "revision"],
)
def test_what_the_hub_says_is_said_with_its_mend(
    answers: dict[str, tuple[int, str, str]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(monkeypatch, answers), pytest.raises(ModelError, match=message) as caught:
        check_model("org/model", "v2")
    assert str(caught.value).startswith("cannot load the model 'org/model': there is no such folder, and ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answers",
    [
        {"": (200, "", FOUND)},
        {"/auth-check": (200, "", "{}"), "": (200, "", GATED)},
        {"": (503, "", "busy")},
    ],
    ids=["free", "gated, with access", "busy"],
)
def test_a_hub_that_may_have_it_is_believed(
    answers: dict[str, tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(monkeypatch, answers):
        check_model("org/model")


def test_a_name_that_the_hub_could_not_have_is_said(no_network: list[object]) -> None:
    with pytest.raises(ModelError, match="the hub has no such names; give a hub id"):
        check_model("two words")
    assert no_network == []
