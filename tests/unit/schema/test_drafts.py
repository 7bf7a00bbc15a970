"""A drafter's entry in a spec."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.tiny import full_spec, small_spec
from viasd_calib.errors import SpecError
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    PromptLookupDraft,
    ShallowDraft,
    load_spec,
    save_spec,
    tensor_files,
)


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
