from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import VOCAB, TinyFolder, save_tiny, tiny_model, tiny_shallow, tiny_shape, tiny_tokenizer
from viasd_calib.draft.build import build_drafter, describe_shallow, name_draft
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.quantised import Int8Linear, QuantisedLinear
from viasd_calib.draft.shallow import ShallowDrafter, save_shallow
from viasd_calib.errors import ModelError
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.linears import plain_linears
from viasd_calib.spec import CausalLMDraft, CombinedDraft, PromptLookupDraft, ShallowDraft, tensor_file


def test_prompt_lookup() -> None:
    drafter = build_drafter(PromptLookupDraft(max_ngram=5, min_ngram=2), Path(), RoutedModel(tiny_model()))
    assert isinstance(drafter, PromptLookup)
    assert (drafter.max_ngram, drafter.min_ngram) == (5, 2)


def test_shallow(tmp_path: Path) -> None:
    routed = RoutedModel(tiny_model())
    path = tmp_path / "draft.safetensors"
    save_shallow(tiny_shallow(routed), path)
    spec = ShallowDraft(**tiny_shape().model_dump(), tensors=tensor_file(path, tmp_path))
    drafter = build_drafter(spec, tmp_path, routed)
    assert isinstance(drafter, ShallowDrafter)
    assert drafter.vocabulary is not None
    assert drafter.vocabulary.shape == (12,)


def test_causal_lm(tiny_folder: TinyFolder) -> None:
    drafter = build_drafter(
        CausalLMDraft(name_or_path=str(tiny_folder)), Path(), RoutedModel(tiny_model()), tiny_tokenizer()
    )
    assert isinstance(drafter, CausalDrafter)
    assert drafter.model.config.vocab_size == VOCAB


def test_lookup_and_a_model(tmp_path: Path, tiny_folder: TinyFolder) -> None:
    routed = RoutedModel(tiny_model())
    save_shallow(tiny_shallow(routed), tmp_path / "drafter.safetensors")
    describe_shallow(tmp_path, tiny_shape())
    for name, kind in ((tmp_path, ShallowDrafter), (tiny_folder, CausalDrafter)):
        drafter = build_drafter(*name_draft(f"prompt_lookup+{name}"), routed, tiny_tokenizer())
        assert isinstance(drafter, CombinedDrafter)
        assert isinstance(drafter.model, kind)
        assert (drafter.vocab_size, drafter.max_ngram, drafter.min_ngram) == (VOCAB, 5, 3)
    lookup = PromptLookupDraft(max_ngram=4, min_ngram=2)
    drafter = build_drafter(
        CombinedDraft(lookup=lookup, model=CausalLMDraft(name_or_path=str(tiny_folder))),
        Path(),
        routed,
        tiny_tokenizer(),
    )
    assert isinstance(drafter, CombinedDrafter)
    assert (drafter.max_ngram, drafter.min_ngram) == (4, 2)


def test_integer_weights(tmp_path: Path, tiny_folder: TinyFolder) -> None:
    """What a name asks for is what its spec says, and what the drafter has; its verifier keeps plain weights."""
    routed = RoutedModel(tiny_model())
    save_shallow(tiny_shallow(routed), tmp_path / "drafter.safetensors")
    described = describe_shallow(tmp_path, tiny_shape())
    plain = CausalLMDraft(name_or_path=str(tiny_folder))
    for name, spec in (
        (f"int8:{tmp_path}", described.model_copy(update={"quantize": "int8"})),
        (f"int8:{tiny_folder}", plain.model_copy(update={"quantize": "int8"})),
        (f"prompt_lookup+int8:{tiny_folder}", CombinedDraft(model=plain.model_copy(update={"quantize": "int8"}))),
    ):
        named, folder = name_draft(name)
        assert named == type(named).model_validate_json(named.model_dump_json()) == spec
        (network,) = build_drafter(named, folder, routed, tiny_tokenizer()).networks
        assert any(type(module) is Int8Linear for module in network.modules())
        assert not plain_linears([network])
    assert plain_linears([routed.model])
    assert not any(isinstance(module, QuantisedLinear) for module in routed.model.modules())
    assert name_draft(str(tmp_path))[0] == described


def test_a_drafter_too_small_for_four_bits_is_refused(tiny_folder: TinyFolder) -> None:
    with pytest.raises(ModelError, match=r"cannot have int4 weights.*quantize to int8"):
        build_drafter(*name_draft(f"int4:{tiny_folder}"), RoutedModel(tiny_model()), tiny_tokenizer())


def test_settings_of_a_draft_model_follow_one_another(tiny_folder: TinyFolder) -> None:
    model = CausalLMDraft(name_or_path=str(tiny_folder), quantize="int4", prompt_window=128)
    named = f"int4:window128:{tiny_folder}"
    assert name_draft(named)[0] == model
    assert name_draft(f"prompt_lookup+{named}")[0] == CombinedDraft(model=model)
    plain = model.model_copy(update={"quantize": None})
    drafter = build_drafter(plain, Path(), RoutedModel(tiny_model()), tiny_tokenizer())
    assert isinstance(drafter, CausalDrafter)
    assert drafter.prompt_window == 128


@pytest.mark.parametrize(("name", "said"), [("window0:a", "window from 1 on"), ("window5:", "name one draft model")])
def test_a_window_of_nothing_is_refused(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        name_draft(name)


@pytest.mark.parametrize("after", ["", "prompt_lookup", "prompt_lookup+draft"])
def test_integer_weights_are_a_models_alone(after: str) -> None:
    with pytest.raises(ModelError, match="name one draft model after int4:"):
        name_draft(f"int4:{after}")


@pytest.mark.parametrize("after", ["", "prompt_lookup", "prompt_lookup+draft"])
def test_lookup_is_combined_with_a_model_alone(after: str) -> None:
    with pytest.raises(ModelError, match=r"name one draft model after prompt_lookup\+"):
        name_draft(f"prompt_lookup+{after}")


def test_a_causal_lm_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, vocab=VOCAB + 8)
    with pytest.raises(ModelError, match="another tokenizer than the verifier"):
        build_drafter(CausalLMDraft(name_or_path=str(tmp_path)), Path(), RoutedModel(tiny_model()), tiny_tokenizer())


def test_a_causal_lm_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model"):
        build_drafter(CausalLMDraft(name_or_path=str(tmp_path / "nowhere")), Path(), RoutedModel(tiny_model()))
