"""Where a model is looked for, and how long."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import TinyFolder, save_tiny, tiny_spec, write_gguf
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.draft.places import relocated
from viasd_calib.errors import ModelError, WeightsWarning
from viasd_calib.model_names import is_path
from viasd_calib.models import beside, load_verifier, weights_sha256
from viasd_calib.models.names import resolve_model
from viasd_calib.pipeline.export import seen_from
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    Gates,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    save_spec,
)


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec and the models that it names by relative paths; the working directory is another one."""
    place = tmp_path / "place"
    save_tiny(place / "models" / "v")
    save_tiny(place / "models" / "d", seed=1)
    draft = CausalLMDraft(name_or_path="models/d", weights_sha256=weights_sha256(str(place / "models" / "d")))
    ref = load_verifier(str(place / "models" / "v")).ref.model_copy(update={"name_or_path": "models/v"})
    spec = RoutingSpec(
        verifier=ref,
        draft=draft,
        route=Route(attention_skip=[1], mlp_skip=[2]),
        gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    )
    save_spec(spec, place / "routing.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


@pytest.fixture(autouse=True)
def _no_hub(no_network: list[object]) -> Iterator[None]:
    """The hub is not asked for what can only be a path."""
    yield
    assert no_network == []


def test_models_named_relative_to_the_spec_lie_beside_it(moved: Path) -> None:
    for path in (moved / "routing.json", Path("../place/routing.json")):
        engine = load_engine(path)
        assert engine.decoder("speculative").generate([7, 8, 9], 6).counts.draft_steps > 0


def test_then_in_the_working_directory(moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec").mkdir()
    shutil.copy(moved / "routing.json", tmp_path / "spec")
    Path("models").mkdir()
    with pytest.raises(ModelError, match="cannot load the model 'models/d': there is no such folder"):
        load_engine(tmp_path / "spec" / "routing.json")
    monkeypatch.chdir(moved)
    load_engine(tmp_path / "spec" / "routing.json")


@pytest.mark.parametrize("command", [["generate", "--prompt", "w1", "--max-new-tokens", "2"]])
def test_both_models_can_be_told_where_they_are(
    moved: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (moved / "models").rename(tmp_path / "new")
    words = [*command, "--spec", str(moved / "routing.json"), "--verifier", "../new/v", "--draft-model"]
    assert main([*words, "../new/d"]) == 0
    assert "notice" not in capsys.readouterr().err
    assert main([*words, "../new/none"]) == 1
    assert "error: cannot load the model '../new/none': there is no such folder; " in capsys.readouterr().err
    assert main([*words, "../new/v"]) == 0, "another model of that tokenizer"
    assert "notice: the weights of " in capsys.readouterr().err


def test_other_weights_of_the_draft_model_are_noticed(moved: Path) -> None:
    save_tiny(moved / "models" / "d", seed=2)
    with pytest.warns(WeightsWarning, match=r"models/d \(SHA-256 .* texts stay exact"):
        load_engine(moved / "routing.json")


def test_a_draft_model_elsewhere_keeps_what_it_is() -> None:
    named = CausalLMDraft(name_or_path="a", quantize="int8", weights_sha256="0" * 64)
    assert relocated(named, "org/b") == named.model_copy(update={"name_or_path": "org/b"})
    both: DraftSpec = CombinedDraft(model=named)
    assert relocated(both, "org/b") == CombinedDraft(model=named.model_copy(update={"name_or_path": "org/b"}))
    with pytest.raises(ModelError, match="of kind prompt_lookup, which names no model; leave out --draft-model"):
        relocated(PromptLookupDraft(), "b")


def test_an_override_is_relative_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    found = relocated(CausalLMDraft(name_or_path="a"), "d")
    assert isinstance(found, CausalLMDraft)
    assert found.name_or_path == str(tmp_path / "d")


def test_a_spec_without_a_model_to_draft_refuses_one(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leave out --draft-model"):
        load_engine(tiny_spec(tiny_folder, tmp_path), draft_model=str(tiny_folder))


def test_an_exported_name_leads_there_from_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "d").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("out/spec").mkdir(parents=True)
    assert seen_from("models/d", Path("out/spec")) == "../../models/d"
    assert Path(beside("../../models/d", Path("out/spec"))).resolve() == tmp_path / "models" / "d"
    assert seen_from("org/model", Path("out")) == "org/model"
    assert seen_from(str(tmp_path / "models" / "d"), Path("out")) == str(tmp_path / "models" / "d")


@pytest.mark.parametrize(
    "name",
    ["./m", "../m", ".", "/m", "~/m", "a/b/c", "a\\b", "m/", "m.safetensors", "m.GGUF", "sub/m", "m.gguf", "C:/models"],
)
def test_names_that_can_only_be_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    if name != "C:/models":  # on Windows alone
        assert is_path(name)
    if name not in (".", "C:/models"):
        with pytest.raises(ModelError, match=r"no GGUF file at|there is no such folder") as caught:
            load_verifier(name)
        assert "--verifier" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "gpt2", "org/model.v2"])
def test_names_that_may_be_the_hubs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_path(name)
    assert resolve_model(name) == (name, None)


def test_a_file_of_a_model_is_not_the_model(tiny_folder: TinyFolder) -> None:
    with pytest.raises(ModelError, match="it is a file; give the folder that it lies in"):
        load_verifier(str(tiny_folder / "model.safetensors"))


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny(tmp_path / "m")
    assert load_verifier("~/m").ref.weights is not None


@pytest.mark.parametrize("suffix", ["gguf", "GGUF", "Gguf"])
def test_a_gguf_file_in_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf").rename(tmp_path / f"tiny.{suffix}")
    assert load_verifier(str(path)).ref.architecture == "LlamaForCausalLM"
