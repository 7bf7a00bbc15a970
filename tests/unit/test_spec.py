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
from tests.tiny import LAYERS, constant_gate, tiny_shape, verifier_ref
from viasd_calib.errors import SpecError
from viasd_calib.spec import (
    SCHEMA_VERSION,
    SLIM_FEATURES,
    AdapterRef,
    BridgesRef,
    CausalLMDraft,
    CombinedDraft,
    Decoding,
    DraftSpec,
    Evidence,
    Gates,
    HeadVocab,
    LogisticGate,
    MlpWidths,
    PromptLookupDraft,
    RelativeCost,
    Route,
    RoutingSpec,
    ShallowDraft,
    TensorFile,
    check_verifier,
    config_sha256,
    file_sha256,
    json_schema,
    load_spec,
    save_spec,
    spec_problems,
    tensor_file,
    tensor_files,
    tokenizer_sha256,
)

HASH = "0123456789abcdef" * 4
SHARES = st.floats(0, 1)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = NUMBERS.filter(lambda number: number > 0)


def small_gates(**changes: Any) -> Gates:
    entries = {"slim": constant_gate("slim_entropy", 0.0), "accept_at": 0.9, "regenerate_at": 0.8}
    return Gates(**{**entries, **changes})


def small_spec(**changes: Any) -> RoutingSpec:
    entries: dict[str, Any] = {
        "verifier": verifier_ref(),
        "draft": PromptLookupDraft(),
        "route": Route(attention_skip=[1, 2], mlp_skip=[2]),
        "gates": small_gates(),
    }
    return RoutingSpec(**{**entries, **changes})


def full_spec(folder: Path) -> RoutingSpec:
    """A spec with every part there is, and its tensor files in ``folder``."""
    (folder / "draft.safetensors").write_bytes(b"draft")
    (folder / "slim").mkdir()
    (folder / "slim" / "adapter.safetensors").write_bytes(b"adapter")
    adapter = tensor_file(folder / "slim" / "adapter.safetensors", folder)
    (folder / "slim" / "head.safetensors").write_bytes(b"head")
    (folder / "slim" / "bridges.safetensors").write_bytes(b"bridges")
    (folder / "slim" / "widths.safetensors").write_bytes(b"widths")
    return small_spec(
        draft=ShallowDraft(**tiny_shape().model_dump(), tensors=tensor_file(folder / "draft.safetensors", folder)),
        route=Route(
            attention_skip=[0],
            mlp_keep=MlpWidths(keep={1: 20, 2: 9}, tensors=tensor_file(folder / "slim" / "widths.safetensors", folder)),
            head_vocab=HeadVocab(size=5, tensors=tensor_file(folder / "slim" / "head.safetensors", folder)),
            bridges=BridgesRef(rank=3, tensors=tensor_file(folder / "slim" / "bridges.safetensors", folder)),
            adapter=AdapterRef(rank=4, alpha=8.0, targets=["q_proj"], folded=True, tensors=adapter),
            relative_cost=RelativeCost(measured={1: 0.5, 8: 0.61}, device="cpu", dtype="float32"),
        ),
        certificate=make_certificate(),
        evidence=Evidence(
            acceptance_length=2.5,
            rejection_rate=0.2,
            full_passes_per_token=0.4,
            tier_shares={"accept": 0.5, "regenerate": 0.2, "escalate": 0.3},
            speedup_vs={"autoregressive": 1.5, "speculative": 1.1},
            hardware={"cpu": "two cores"},
        ),
    )


def write_document(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def small_document() -> dict[str, Any]:
    return small_spec().model_dump(mode="json")


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
    ),
    certificate=st.none()
    | st.builds(make_certificate, bound=st.floats(0.02, 0.9), observed=st.floats(0, 0.02), note=st.text()),
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


@given(
    values=st.lists(st.tuples(NUMBERS, POSITIVE, NUMBERS), min_size=1, max_size=len(SLIM_FEATURES)),
    bias=NUMBERS,
)
def test_the_numbers_of_a_gate_survive_to_the_last_bit(values: list[tuple[float, float, float]], bias: float) -> None:
    mean, scale, weight = (list(column) for column in zip(*values, strict=True))
    gate = LogisticGate(features=[*SLIM_FEATURES[: len(values)]], mean=mean, scale=scale, weight=weight, bias=bias)
    assert LogisticGate.model_validate_json(gate.model_dump_json()) == gate


def test_a_spec_with_all_its_parts_is_loaded_with_its_tensors(tmp_path: Path) -> None:
    spec = full_spec(tmp_path)
    save_spec(spec, tmp_path / "routing.json")
    assert load_spec(str(tmp_path / "routing.json")) == spec
    assert [file.path for file in tensor_files(spec)] == [
        "draft.safetensors",
        "slim/widths.safetensors",
        "slim/bridges.safetensors",
        "slim/head.safetensors",
        "slim/adapter.safetensors",
    ]


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


@pytest.mark.parametrize("version", ["1.9", "1.10", "3.0"])
def test_a_newer_version_is_refused_by_its_name(tmp_path: Path, version: str) -> None:
    document = {**small_document(), "schema_version": version, "new": {"in": "it"}}
    path = write_document(tmp_path / "routing.json", document)
    message = rf"made by a newer version of viasd_calib \(schema_version {version}, .* up to 1\.1\); update viasd_calib"
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


@pytest.mark.parametrize(
    "name", ["draft.safetensors", "slim/adapter.safetensors", "slim/head.safetensors", "slim/widths.safetensors"]
)
def test_foreign_and_missing_tensors_are_refused(tmp_path: Path, name: str) -> None:
    save_spec(full_spec(tmp_path), tmp_path / "routing.json")
    (tmp_path / name).write_bytes(b"another")
    with pytest.raises(SpecError, match=rf"{name} is not the tensor file"):
        load_spec(tmp_path / "routing.json")
    (tmp_path / name).unlink()
    with pytest.raises(SpecError, match=rf"{name} is missing"):
        load_spec(tmp_path / "routing.json")


@pytest.mark.parametrize("path", ["/etc/passwd", "../draft", "a/../../draft", "..", "a\\..\\b"])
def test_tensors_outside_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValidationError, match="inside the spec's folder"):
        TensorFile(path=path, sha256=HASH)
    document = small_document()
    document["draft"] = {
        "kind": "shallow",
        "num_layers": 1,
        "head_vocab": 2,
        "taps": [1],
        "tensors": {"path": path, "sha256": HASH},
    }
    with pytest.raises(SpecError, match="inside the spec's folder"):
        load_spec(write_document(tmp_path / "routing.json", document))


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, HASH.upper()])
def test_a_hash_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(ValidationError):
        TensorFile(path="a", sha256=digest)


def test_the_verifier_it_was_made_for_is_welcome() -> None:
    check_verifier(small_spec(), verifier_ref(name_or_path="elsewhere", revision="r", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "Qwen2ForCausalLM"),
        ("num_layers", LAYERS + 1),
        ("hidden_size", 32),
        ("vocab_size", 25),
        ("config_sha256", "c" * 64),
        ("tokenizer_sha256", "c" * 64),
    ],
)
def test_another_verifier_is_refused(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"{name} .*this verifier is other .*{value}"):
        check_verifier(small_spec(), verifier_ref(name_or_path="other", **{name: value}))


def test_the_hash_of_a_tokenizer_sees_words_ids_and_template() -> None:
    words = {"a": 0, "b": 1}
    assert tokenizer_sha256(words, "t") == tokenizer_sha256({"b": 1, "a": 0}, "t")
    others = [({"a": 0, "c": 1}, "t"), ({"a": 1, "b": 0}, "t"), ({"a": 0}, "t"), (words, "u"), (words, None)]
    assert tokenizer_sha256(words, "t") not in {tokenizer_sha256(*other) for other in others}


def test_the_hash_of_a_configuration_sees_what_is_computed() -> None:
    config = {"hidden_size": 8, "rope_theta": 1e4}
    assert config_sha256(config) == config_sha256({"rope_theta": 1e4, "hidden_size": 8, "_name_or_path": "x"})
    assert config_sha256(config) != config_sha256({**config, "rope_theta": 1e5})
    assert config_sha256(config) != config_sha256({**config, "rms_norm_eps": 1e-5})


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", ["attention_skip", "mlp_skip"])
def test_a_layer_beyond_the_verifier_is_refused(tmp_path: Path, name: str) -> None:
    document = small_document()
    document["route"][name] = [0, LAYERS]
    with pytest.raises(SpecError, match=rf"route\.{name} names layer {LAYERS}.* 0 to {LAYERS - 1}"):
        load_spec(write_document(tmp_path / "routing.json", document))
    document["route"][name] = [0, LAYERS - 1]
    assert getattr(load_spec(write_document(tmp_path / "routing.json", document)).route, name) == [
        0,
        LAYERS - 1,
    ]


WIDTHS_FILE = TensorFile(path="widths.safetensors", sha256=HASH)


def test_an_mlp_is_narrowed_or_skipped(tmp_path: Path) -> None:
    widths = MlpWidths(keep={2: 9, 0: 20}, tensors=WIDTHS_FILE)
    assert Route(mlp_skip=[1], mlp_keep=widths).narrowed == {0, 2}
    with pytest.raises(ValidationError, match=r"mlp_keep and mlp_skip both name layer 2; .* take it out of one"):
        Route(mlp_skip=[1, 2], mlp_keep=widths)


def test_a_narrowed_layer_beyond_the_verifier_is_refused() -> None:
    with pytest.raises(ValidationError, match=rf"route\.mlp_keep names layer {LAYERS}.* 0 to {LAYERS - 1}"):
        small_spec(route=Route(mlp_keep=MlpWidths(keep={0: 1, LAYERS: 1}, tensors=WIDTHS_FILE)))


@pytest.mark.parametrize("keep", [{}, {0: 0}, {-1: 4}])
def test_widths_that_cannot_be_are_refused(keep: dict[int, int]) -> None:
    with pytest.raises(ValidationError, match="keep"):
        MlpWidths(keep=keep, tensors=WIDTHS_FILE)


@pytest.mark.parametrize("layers", [[1, 1], [2, 1], [-1]])
def test_layers_that_are_no_rising_indices_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValidationError, match="rising order"):
        Route(attention_skip=layers)


@pytest.mark.parametrize(
    "entries",
    [
        {"accept_at": 0.5, "escalate_below": 0.5},
        {"accept_at": 0.3, "escalate_below": 0.5},
        {"accept_at": 0.8},
        {"accept_at": 0.8, "escalate_below": 0.5, "regenerate_at": 0.7},
    ],
)
def test_the_ratio_convention_needs_a_band_to_regenerate_in(entries: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Gates(convention="ratio", **entries)
    assert Gates(convention="ratio", accept_at=0.8, escalate_below=0.5).escalate_below == 0.5


@pytest.mark.parametrize(
    "changes",
    [{"slim": None}, {"regenerate_at": None}, {"escalate_below": 0.2}, {"accept_at": 0.0}],
)
def test_the_calibrated_convention_needs_its_gate_and_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        small_gates(**changes)


@pytest.mark.parametrize("changes", [{"draft_stop_below": 0.3}, {"draft_accept_at": 0.9}])
def test_bounds_on_the_draft_need_a_draft_gate(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need a draft gate"):
        small_gates(**changes)
    small_gates(draft=constant_gate("draft_margin", 0.0), **changes)


@pytest.mark.parametrize("changes", [{"weight": [1.0, 2.0]}, {"scale": [0.0]}, {"scale": [-1.0]}, {"features": []}])
def test_a_gate_of_uneven_parts_is_refused(changes: dict[str, Any]) -> None:
    entries = {"features": ["pending"], "mean": [0.0], "scale": [1.0], "weight": [1.0], "bias": 0.0}
    with pytest.raises(ValidationError):
        LogisticGate(**{**entries, **changes})


@pytest.mark.parametrize("audit", ["tolerant", "off"])
def test_a_lossy_audit_is_refused_where_nothing_is_certified(tmp_path: Path, audit: str) -> None:
    for nothing in (None, make_certificate(None)):
        document = small_spec(certificate=nothing).model_dump(mode="json")
        spec = load_spec(write_document(tmp_path / "strict.json", document))
        assert spec.decoding.audit == "strict"
        assert spec.certified_bound is None
        document["decoding"]["audit"] = audit
        with pytest.raises(SpecError, match=f"{audit}.*calibrate it, or set decoding.audit to strict"):
            load_spec(write_document(tmp_path / "lossy.json", document))
    document["certificate"] = make_certificate(0.02).model_dump(mode="json")
    spec = load_spec(write_document(tmp_path / "bound.json", document))
    assert spec.decoding.audit == audit
    assert spec.certified_bound == 0.02


def test_lookup_and_a_model_are_one_drafter(tmp_path: Path) -> None:
    shallow = full_spec(tmp_path).draft
    assert isinstance(shallow, ShallowDraft)
    draft = CombinedDraft(model=shallow)
    assert (draft.lookup.max_ngram, draft.lookup.min_ngram) == (5, 3)
    spec = small_spec(draft=draft)
    save_spec(spec, tmp_path / "routing.json")
    assert load_spec(tmp_path / "routing.json") == spec
    assert tensor_files(spec) == [shallow.tensors]
    (tmp_path / "draft.safetensors").unlink()
    with pytest.raises(SpecError, match=r"draft\.safetensors is missing"):
        load_spec(tmp_path / "routing.json")


@pytest.mark.parametrize("model", [PromptLookupDraft(), CombinedDraft(model=CausalLMDraft(name_or_path="draft"))])
def test_lookup_is_combined_with_a_model_alone(model: DraftSpec) -> None:
    document = {"kind": "combined", "model": model.model_dump()}
    with pytest.raises(ValidationError, match=r"does not match any of the expected tags: 'causal_lm', 'shallow'"):
        CombinedDraft.model_validate(document)


def test_a_lookup_of_no_length_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_ngram must not exceed max_ngram"):
        PromptLookupDraft(min_ngram=4, max_ngram=3)


def test_the_parts_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        small_spec().decoding.audit = "off"  # type: ignore[misc]


def test_the_schema_accepts_what_the_package_writes(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(small_document(), schema)
    jsonschema.validate(full_spec(tmp_path).model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**small_document(), "surprise": 1}, schema)


def test_the_schema_names_what_is_required() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {"verifier", "draft", "route", "gates"}
    assert schema["additionalProperties"] is False
    assert schema["$schema"].endswith("2020-12/schema")
