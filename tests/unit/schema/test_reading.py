"""A spec is loaded as it was saved; a broken, foreign or newer file is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.certificates import make_certificate
from tests.strategies import gate_sets, routes
from tests.tiny import LAYERS, small_document, small_gates, small_spec, write_document
from viasd_calib.errors import SpecError
from viasd_calib.spec import (
    SCHEMA_VERSION,
    CausalLMDraft,
    CertifiedCandidate,
    CombinedDraft,
    Decoding,
    DraftSpec,
    Evidence,
    GateBounds,
    HashedFile,
    PromptLookupDraft,
    RelativeCost,
    load_spec,
    save_spec,
    spec_problems,
)

SHARES = st.floats(0, 1)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = NUMBERS.filter(lambda number: number > 0)


def drafts() -> st.SearchStrategy[DraftSpec]:
    ngrams = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted)
    return (
        st.builds(
            CausalLMDraft,
            name_or_path=st.text(min_size=1),
            revision=st.none() | st.text("abc0123/.-", min_size=1),
            quantize=st.sampled_from([None, "int8", "int4"]),
        )
        | ngrams.map(lambda pair: PromptLookupDraft(min_ngram=pair[0], max_ngram=pair[1]))
        | ngrams.map(
            lambda pair: CombinedDraft(
                lookup=PromptLookupDraft(min_ngram=pair[0], max_ngram=pair[1]),
                model=CausalLMDraft(name_or_path="draft"),
            )
        )
    )  # fmt: skip


def candidates() -> st.SearchStrategy[CertifiedCandidate]:
    digests, bounds = st.text("0123456789abcdef", min_size=64, max_size=64), st.floats(0, 2, exclude_min=True)
    return st.builds(
        CertifiedCandidate,
        bounds=st.builds(
            GateBounds,
            draft_stop_below=SHARES,
            speculative_stop_below=st.none() | SHARES,
            draft_accept_at=bounds,
            accept_at=bounds,
            regenerate_at=bounds,
        ),
        decoding=st.builds(Decoding, audit=st.just("off"), draft_length=st.integers(0, 64)),
        digest=digests,
        bound=st.floats(0, 1, exclude_min=True, exclude_max=True),
        observed=SHARES,
        observed_by_token=SHARES,
        p_value=SHARES,
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        backend=st.text(min_size=1),
        losses=st.builds(HashedFile, path=st.just("certificate/a.json"), sha256=digests),
    )


@given(
    route=routes().filter(lambda route: not len(route.attention_skip) == len(route.mlp_skip) == LAYERS),
    gates=gate_sets(),
    draft=drafts(),
    decoding=st.builds(
        Decoding,
        audit=st.sampled_from(["strict", "tolerant", "off"]),
        tolerance=st.floats(0, 1, exclude_min=True),
        draft_length=st.integers(0, 64),
        max_pending=st.integers(0, 256),
        drafter=st.sampled_from([None, "lookup"]),
    ),
    certificate=st.none()
    | st.builds(
        make_certificate,
        bound=st.floats(0.02, 0.9),
        observed=st.floats(0, 0.02),
        note=st.text(),
        candidates=st.none() | st.lists(candidates(), min_size=1, max_size=4, unique_by=lambda one: one.digest),
    ),
    evidence=st.none()
    | st.builds(
        lambda length, **others: Evidence(acceptance_length=length, full_passes_per_token=1 / length, **others),
        st.floats(0.5, 100),
        rejection_rate=SHARES,
        tier_shares=SHARES.map(lambda share: {"accept": 0.3 * share, "regenerate": 0.7 * share, "escalate": 1 - share}),
        speedup_vs=st.fixed_dictionaries(dict.fromkeys(["autoregressive", "speculative"], POSITIVE)),
        hardware=st.dictionaries(st.text(), st.text() | st.integers() | NUMBERS),
    ),
)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, **parts: Any) -> None:
    if parts["certificate"] is None:
        parts["decoding"] = parts["decoding"].model_copy(update={"audit": "strict"})
    path = tmp_path_factory.mktemp("spec") / "routing.json"
    spec = small_spec(**parts)
    save_spec(spec, path)
    assert load_spec(path) == spec


@pytest.mark.parametrize(
    "where",
    [(), ("producer",), ("verifier",), ("draft",), ("route",), ("gates",), ("gates", "slim"), ("decoding",)],
    ids=lambda where: ".".join(where) or "top",
)
def test_unknown_entry_is_refused(tmp_path: Path, where: tuple[str, ...]) -> None:
    document = small_document()
    inner = document
    for name in where:
        inner = inner[name]
    inner["surprise"] = 1
    with pytest.raises(SpecError, match=r"routing\.json: .*surprise"):
        load_spec(write_document(tmp_path / "routing.json", document))


@pytest.mark.parametrize("name", ["verifier", "draft", "route", "gates"])
def test_missing_part_is_refused(tmp_path: Path, name: str) -> None:
    document = small_document()
    del document[name]
    with pytest.raises(SpecError, match=name):
        load_spec(write_document(tmp_path / "routing.json", document))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ["bias", "weight", "accept_at"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, number: str, place: str) -> None:
    document = small_document()
    if place == "bias":
        document["gates"]["slim"]["bias"] = "HERE"
    elif place == "weight":
        document["gates"]["slim"]["weight"] = ["HERE"]
    else:
        document["gates"]["accept_at"] = "HERE"
    path = tmp_path / "routing.json"
    path.write_text(json.dumps(document).replace('"HERE"', number))
    with pytest.raises(SpecError, match="finite number"):
        load_spec(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_cannot_be_put_in(number: float) -> None:
    with pytest.raises(ValidationError):
        small_gates(accept_at=number)
    with pytest.raises(ValidationError):
        RelativeCost(measured={1: number}, device="cpu", dtype="float32")


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "", "one", None, 2, "1", "1.x", "1.0.0", "-1.0", "1.٣"])
def test_unknown_major_version_is_refused(tmp_path: Path, version: object) -> None:
    document = {**small_document(), "schema_version": version}
    with pytest.raises(SpecError, match="schema_version"):
        load_spec(write_document(tmp_path / "routing.json", document))


def test_version_is_looked_at_before_anything_else(tmp_path: Path) -> None:
    path = write_document(tmp_path / "routing.json", {"schema_version": "2.0", "unheard": "of"})
    with pytest.raises(SpecError, match=r"made by a newer version of viasd_calib \(schema_version 2\.0"):
        load_spec(path)


@pytest.mark.parametrize("version", ["1.10", "1.11", "3.0"])
def test_a_newer_version_is_refused_by_its_name(tmp_path: Path, version: str) -> None:
    document = {**small_document(), "schema_version": version, "new": {"in": "it"}}
    path = write_document(tmp_path / "routing.json", document)
    known = SCHEMA_VERSION.replace(".", r"\.")
    message = rf"newer version of viasd_calib \(schema_version {version}, .* up to {known}\); update viasd_calib"
    with pytest.raises(SpecError, match=message):
        load_spec(path)
    with pytest.raises(SpecError, match=message):
        spec_problems(path)


def test_an_earlier_minor_version_is_read_and_written_as_this_one(tmp_path: Path) -> None:
    path = write_document(tmp_path / "routing.json", {**small_document(), "schema_version": "1.0"})
    spec = load_spec(path)
    assert (spec.schema_version, spec.route) == ("1.0", small_spec().route)
    save_spec(spec, path)
    assert load_spec(path).schema_version == SCHEMA_VERSION


def test_a_spec_without_its_version_is_refused(tmp_path: Path) -> None:
    document = small_document()
    del document["schema_version"]
    with pytest.raises(SpecError, match="schema_version None"):
        load_spec(write_document(tmp_path / "routing.json", document))


def test_a_truncated_spec_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    save_spec(small_spec(), tmp_path / "whole.json")
    whole = (tmp_path / "whole.json").read_text().rstrip()
    cut = tmp_path / "cut.json"
    for length in range(0, len(whole), 37):
        cut.write_text(whole[:length])
        with pytest.raises(SpecError, match=r"cut\.json"):
            load_spec(cut)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"3", b"null", b'"spec"', b"\xff\xfe", b"\x00" * 64, b"[" * 100_000],
    ids=["list", "number", "null", "string", "not UTF-8", "zeros", "nested"],
)
def test_a_corrupt_spec_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routing.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"routing\.json"):
        load_spec(path)


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_a_spec_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"cannot read the routing spec .*check the path"):
        load_spec(tmp_path / name)


def test_the_parts_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        small_spec().decoding.audit = "off"  # type: ignore[misc]
