"""A certificate holds for one policy: whatever is edited or exchanged is found, when a spec is checked and loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import bind, make_certificate
from tests.tiny import TinyFolder, save_tiny, tiny_spec
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import CertificateWarning
from viasd_calib.spec import CausalLMDraft, file_sha256, load_spec

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def path(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """A spec with audit ``off`` and a certificate of it."""
    made = tiny_spec(tiny_folder, tmp_path)
    draft = CausalLMDraft(name_or_path=str(tiny_folder), weights_sha256=load_spec(made).verifier.weights_sha256)
    bind(load_spec(made).model_copy(update={"draft": draft}), made)
    return made


def edit(path: Path, change: Edit) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def entry(*names: str | int, value: object) -> Edit:
    """Sets one entry of a document."""

    def change(document: Any) -> None:
        for name in names[:-1]:
            document = document[name]
        document[names[-1]] = value

    return change


EDITS: dict[str, tuple[Edit, str]] = {
    "accept_at": (entry("gates", "accept_at", value=0.6), "gates"),
    "all gates": (entry("gates", value={"convention": "ratio", "accept_at": 0.01, "escalate_below": 0.0}), "gates"),
    "max_pending": (entry("decoding", "max_pending", value=200), "decoding"),
    "audit": (entry("decoding", "audit", value="tolerant"), "decoding"),
    "temperature_scope": (entry("decoding", "temperature_scope", value=[0.0, 1.0]), "decoding"),
    "route": (entry("route", "mlp_skip", value=[1, 2]), "route"),
    "draft": (entry("draft", value={"kind": "prompt_lookup"}), "draft"),
    "number format": (entry("verifier", "dtype", value="bfloat16"), "verifier"),
    "certified number format": (entry("certificate", "dtype", value="bfloat16"), "certificate.dtype"),
    "backend": (entry("certificate", "backend", value="cpu native"), "certificate.backend"),
    "answer length": (entry("certificate", "max_new_tokens", value=4096), "certificate.max_new_tokens"),
    "loss": (entry("certificate", "loss", value="overshoot"), "certificate.loss"),
    "gap": (entry("certificate", "rounding_gap", value=3.0), "certificate.rounding_gap"),
    "digest": (entry("certificate", "digest", value="0" * 64), "the policy's digest"),
}  # fmt: skip
NUMBERS: dict[str, tuple[Edit, str]] = {
    "bound": (entry("certificate", "bound", value=0.12), "the p-value is"),
    "p-value": (entry("certificate", "p_value", value=0.01), "the p-value is"),
    "observed": (entry("certificate", "observed", value=0.001), "the observed loss is"),
    "by token": (entry("certificate", "observed_by_token", value=0.001), "the observed loss by token is"),
    "procedure": (entry("certificate", "procedure", value="divination"), "is not that of this release"),
    "prompts": (entry("prompts", "calibrate", 0, value="f" * 16), "not of the spec's calibrate prompts"),
}  # fmt: skip


def audit_of(path: Path, **changes: Any) -> str:
    """The audit with which a spec decodes."""
    return load_engine(path, **changes).decoder().strategy.audit


def test_a_spec_as_it_was_exported_holds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0
    assert "audit off, loss <= 0.1" in " ".join(capsys.readouterr().out.split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audit_of(path) == "off"


@pytest.mark.parametrize(("change", "named"), EDITS.values(), ids=EDITS)
def test_an_edit_is_found(path: Path, change: Edit, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(path, change)
    assert main(["validate", str(path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the certificate was made for something else" in said
    assert named in said
    with pytest.warns(CertificateWarning, match="decoded with audit strict") as told:
        assert audit_of(path) == "strict"
    assert any(named in str(one.message) for one in told)


@pytest.mark.parametrize(("change", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_the_losses_do_not_have_are_found(
    path: Path, change: Edit, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(path, change)
    assert main(["validate", str(path)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_decodes_must_be_what_was_certified(path: Path, tmp_path: Path) -> None:
    with pytest.warns(CertificateWarning, match=r"the number format \(bfloat16 here, certified float32\)"):
        assert audit_of(path, dtype="bfloat16") == "strict"
    other = save_tiny(tmp_path / "other", seed=3)
    with pytest.warns(match="are not those the spec was made for"):
        assert audit_of(path, verifier=str(other)) == "strict"
    with pytest.warns(match="are not those the spec was made for"):
        assert audit_of(path, draft_model=str(other)) == "strict"


def test_other_kernels_are_found(path: Path) -> None:
    edit(path.parent / "certificate" / path.name, entry("backend", value="cpu native"))
    edit(path, entry("certificate", "backend", value="cpu native"))
    edit(path, entry("certificate", "losses", "sha256", value=file_sha256(path.parent / "certificate" / path.name)))
    with pytest.warns(CertificateWarning, match=r"the kernels \(cpu torch here, certified cpu native\)"):
        assert audit_of(path) == "strict"


@pytest.mark.parametrize("way", ["missing", "edited", "damaged"])
def test_the_losses_must_be_there(path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    losses = path.parent / "certificate" / path.name
    if way == "missing":
        losses.unlink()
    elif way == "edited":
        edit(losses, entry("losses", 0, value=0.5))
    else:
        losses.write_text('{"losses": [0.1]}')
        edit(path, entry("certificate", "losses", "sha256", value=file_sha256(losses)))
    assert main(["validate", str(path)]) == 1
    said = capsys.readouterr().err
    assert {"missing": "cannot be read", "edited": "SHA-256 differs", "damaged": "no losses of"}[way] in said
    with pytest.warns(CertificateWarning, match="decoded with audit strict"):
        assert audit_of(path) == "strict"


def test_a_bound_that_was_typed_in_is_found(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With audit off, all gates at 0.01 and a bound of 0.001: ``validate`` once answered "loss <= 0.001"."""
    typed = make_certificate(0.001, n_prompts=6000, p_value=0.01, max_new_tokens=64).model_dump(mode="json")
    edit(path, entry("certificate", value=typed))
    edit(path, entry("prompts", value=None))
    edit(path, EDITS["all gates"][0])
    assert main(["validate", str(path)]) == 1
    assert "does not say which policy it holds for" in " ".join(capsys.readouterr().err.split())
    with pytest.warns(CertificateWarning, match="does not say which policy it holds for"):
        assert audit_of(path) == "strict"


def test_a_spec_of_an_earlier_release_without_a_bound_is_as_it_was(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    path = tiny_spec(tiny_folder, tmp_path, make_certificate(None))
    edit(path, entry("schema_version", value="1.3"))
    assert main(["validate", str(path)]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audit_of(path) == "strict"
