"""``model.generate(custom_generate=viasd_calib.generate)``: transformers' own text, by another way."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin

import viasd_calib
from tests.tiny import (
    EOS,
    VOCAB,
    TinyFolder,
    constant_gate,
    letter_tokenizer,
    noisy_copy,
    save_tiny,
    tiny_tokenizer,
)
from viasd_calib.decoding import transformers_adapter
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import ModelError, PromptError, SamplingError, SpecError
from viasd_calib.models import Verifier
from viasd_calib.slim.families import cache_argument
from viasd_calib.slim.parts.adapter import adapted_layers, adapter_ref, save_adapter
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, save_widths
from viasd_calib.spec import CausalLMDraft, Decoding, Gates, Route, RoutingSpec, load_spec, save_spec

PROMPTS = [[1, 4, 9, 7, 5], [6], [8, 3, 3, 20, 11, 12, 13], [23, 22]]


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder, tiny_verifier: Verifier) -> Path:
    """A spec that keeps every tier busy: a draft model that is right part of the time, an adapter, easy gates."""
    folder = tmp_path_factory.mktemp("adapter_spec")
    near = save_tiny(folder / "near")
    noisy_copy().save_pretrained(near)
    layers = adapted_layers(tiny_verifier.model.get_decoder().layers, 2, 4, ["v_proj"])
    route = Route(attention_skip=[1])
    save_adapter(layers, route, folder / "adapter.safetensors")
    ref = adapter_ref(folder / "adapter.safetensors", folder, 2, 4, ["v_proj"])
    spec = RoutingSpec(
        verifier=tiny_verifier.ref,
        draft=CausalLMDraft(name_or_path=str(near)),
        route=route.model_copy(update={"adapter": ref}),
        gates=Gates(
            slim=constant_gate("slim_margin", 0.0).model_copy(update={"weight": [1.0]}),
            accept_at=0.55,
            regenerate_at=0.55,
        ),
        decoding=Decoding(draft_length=4, max_pending=9),
    )
    save_spec(spec, folder / "routing.json")
    return folder / "routing.json"


@pytest.fixture
def model(tiny_folder: TinyFolder) -> Any:
    """The verifier as a user of transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def plain(model: Any, prompt: list[int], **settings: Any) -> Any:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)


def routed(model: Any, spec: Any, prompt: list[int], **settings: Any) -> Any:
    return plain(model, prompt, custom_generate=viasd_calib.generate, viasd_spec=spec, **settings)


class Recorder(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ends = 0

    def put(self, value: Any) -> None:
        assert self.ends == 0
        self.told.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ends += 1


class Forbid(LogitsProcessor):
    """Never twice the same token in a row; writes into the scores, as many processors do."""

    stateless = True

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[torch.arange(scores.shape[0]), input_ids[:, -1]] = -torch.inf
        return scores


class Unknown(LogitsProcessor):
    """Says nothing of itself."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


class Once(StoppingCriteria):
    """Neither does this one."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([False])


GREEDY_SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 24},
    {"max_length": 20},
    {"max_new_tokens": 24, "eos_token_id": [3, 5, 7, 11, 13]},
    {"max_new_tokens": 24, "eos_token_id": 9},
    {"max_new_tokens": 24, "repetition_penalty": 1.4},
    {"max_new_tokens": 24, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    {"max_new_tokens": 24, "logits_processor": LogitsProcessorList([Forbid()])},
    {"max_new_tokens": 24, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(9)])},
    {
        "max_new_tokens": 24,
        "stopping_criteria": StoppingCriteriaList([StopStringCriteria(letter_tokenizer(), ["ab", "c", "é"])]),
    },
    {"generation_config": GenerationConfig(max_new_tokens=12, eos_token_id=None, repetition_penalty=0.8)},
    {"max_new_tokens": 24, "temperature": 0.5, "return_dict_in_generate": True},
]


@pytest.mark.parametrize("settings", GREEDY_SETTINGS, ids=lambda settings: "-".join(settings))
def test_a_greedy_text_is_that_of_transformers(model: Any, spec_path: Path, settings: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        ours, theirs = Recorder(), Recorder()
        expected = plain(model, prompt, do_sample=False, streamer=theirs, **settings)
        found = routed(model, str(spec_path), prompt, do_sample=False, streamer=ours, **settings)
        if settings.get("return_dict_in_generate"):
            assert type(found) is type(expected)
            found, expected = found.sequences, expected.sequences
        assert found.dtype == expected.dtype
        assert not found.is_inference()
        assert found.tolist() == expected.tolist()
        assert (ours.told, ours.ends) == (theirs.told, theirs.ends) == (ours.told, 1)


def test_the_tiers_are_at_work(model: Any, spec_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The equality above is not that of q with itself."""
    tiers: set[Any] = set()
    stream = transformers_adapter.Decoder.stream

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for emitted in stream(self, *args, **kwargs):
            tiers.add(emitted.tier)
            yield emitted

    monkeypatch.setattr(transformers_adapter.Decoder, "stream", watched)
    for prompt in PROMPTS:
        routed(model, spec_path, prompt, do_sample=False, max_new_tokens=24)
    assert len(tiers) == 3


def test_a_streamer_for_another_thread_comes_to_its_end(model: Any, spec_path: Path) -> None:
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=5)
    found = routed(model, spec_path, PROMPTS[0], do_sample=False, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer) == tiny_tokenizer().decode(found[0, len(PROMPTS[0]) :])


def test_arguments_may_be_bound_before(model: Any, spec_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is read off the caller's frame."""
    monkeypatch.setattr(transformers_adapter, "_withheld", None)
    ours, theirs = Recorder(), Recorder()
    expected = plain(model, PROMPTS[0], do_sample=False, max_new_tokens=12, streamer=theirs)
    decode = viasd_calib.custom_generate(spec_path, tokenizer=tiny_tokenizer(), streamer=ours)
    found = plain(model, PROMPTS[0], do_sample=False, max_new_tokens=12, custom_generate=decode)
    assert found.tolist() == expected.tolist()
    assert (ours.told, ours.ends) == (theirs.told, 1)
    other = viasd_calib.custom_generate(spec_path, tokenizer=letter_tokenizer())
    with pytest.raises(SpecError, match="tokenizer_sha256"):
        plain(model, PROMPTS[0], max_new_tokens=4, custom_generate=other)
    unproven = LogitsProcessorList([Unknown()])
    with pytest.raises(SamplingError, match="Unknown, may remember earlier"):
        plain(model, PROMPTS[0], max_new_tokens=4, custom_generate=decode, logits_processor=unproven)
    trusting = viasd_calib.custom_generate(spec_path, assume_stateless=True)
    plain(model, PROMPTS[0], max_new_tokens=4, custom_generate=trusting, logits_processor=unproven)


SAMPLED = {"do_sample": True, "max_new_tokens": 20, "temperature": 0.9, "top_k": 12, "top_p": 0.95, "min_p": 0.01}


def test_a_seed_makes_a_sampled_text_repeat(model: Any, spec_path: Path) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(routed(model, spec_path, PROMPTS[0], **SAMPLED).tolist())
    assert texts[0] == texts[1] != texts[2]
    assert routed(model, spec_path, PROMPTS[0], **SAMPLED).tolist() != texts[2]  # the state goes on


def test_a_sampled_text_heeds_the_settings(model: Any, spec_path: Path) -> None:
    """With one token to draw from, the text is the greedy one."""
    greedy = plain(model, PROMPTS[0], do_sample=False, max_new_tokens=20)
    found = routed(model, spec_path, PROMPTS[0], **{**SAMPLED, "top_k": 1})
    assert found.tolist() == greedy.tolist()


def test_a_sampled_text_ends_at_its_end(model: Any, spec_path: Path) -> None:
    eos = [3, 5, 7]
    for seed in range(20):
        torch.manual_seed(seed)
        new = routed(model, spec_path, [8], **SAMPLED, eos_token_id=eos)[0, 1:].tolist()
        assert not set(eos).intersection(new[:-1])
        assert len(new) == 20 or new[-1] in eos


def test_a_second_call_loads_nothing(model: Any, spec_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = routed(model, spec_path, PROMPTS[0], do_sample=False, max_new_tokens=8, tokenizer=tiny_tokenizer())
    monkeypatch.setattr(transformers_adapter, "load_spec", None)
    assert routed(model, spec_path, PROMPTS[0], do_sample=False, max_new_tokens=8).tolist() == first.tolist()


def test_a_model_is_not_kept_alive(tiny_folder: TinyFolder, spec_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    routed(model, spec_path, PROMPTS[0], do_sample=False, max_new_tokens=4)
    assert len(getattr(model, transformers_adapter.LOADED)) == 1
    assert len(getattr(copy.deepcopy(model), transformers_adapter.LOADED)) == 0
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


def test_the_model_is_left_as_it_was(model: Any, spec_path: Path, tmp_path: Path) -> None:
    before = {name: (weight.requires_grad, weight.clone()) for name, weight in model.named_parameters()}
    routed(model, spec_path, PROMPTS[0], do_sample=False, max_new_tokens=4)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name].requires_grad == grad and torch.equal(after[name], w) for name, (grad, w) in before.items())
    model.save_pretrained(tmp_path / "saved")
    assert any(grad for grad, _ in before.values())


def test_neurons_in_another_order_leave_the_text_and_what_can_be_trained(model: Any, spec_path: Path) -> None:
    expected = plain(model, PROMPTS[0], do_sample=False, max_new_tokens=16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    spec, order = load_spec(spec_path), torch.arange(32).flip(0)
    widths = save_widths({1: KeptNeurons(order, 20)}, spec_path.parent / "widths.safetensors", spec_path.parent)
    narrow = spec_path.with_name("narrow.json")
    save_spec(spec.model_copy(update={"route": spec.route.model_copy(update={"mlp_keep": widths})}), narrow)
    assert routed(model, narrow, PROMPTS[0], do_sample=False, max_new_tokens=16).tolist() == expected.tolist()
    after = dict(model.named_parameters())
    assert all(weight.requires_grad for weight in after.values())
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(after[name], before[name][:, order])


def test_an_engine_may_stand_for_its_spec(model: Any, spec_path: Path, tiny_folder: TinyFolder) -> None:
    engine = load_engine(spec_path, verifier=str(tiny_folder))
    expected = plain(model, PROMPTS[0], do_sample=False, max_new_tokens=16)
    found = routed(engine.verifier.model, engine, PROMPTS[0], do_sample=False, max_new_tokens=16)
    assert found.tolist() == expected.tolist()
    with pytest.raises(ModelError, match="the engine holds another model"):
        routed(model, engine, PROMPTS[0], max_new_tokens=4)


def test_another_verifier_is_refused(spec_path: Path, tmp_path: Path) -> None:
    other: Any = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, vocab=VOCAB + 8), dtype=torch.float32)
    with pytest.raises(SpecError, match="vocab_size 32"):
        routed(other, spec_path, PROMPTS[0], max_new_tokens=4)


def test_another_tokenizer_is_refused(model: Any, spec_path: Path) -> None:
    for _ in range(2):  # also when the parts are there already
        with pytest.raises(SpecError, match="tokenizer_sha256"):
            routed(model, spec_path, PROMPTS[0], max_new_tokens=4, tokenizer=letter_tokenizer())
    routed(model, spec_path, PROMPTS[0], max_new_tokens=4, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"num_beams": 2}, ModelError, "num_beams is 2, only 1"),
        ({"num_return_sequences": 2, "do_sample": True}, ModelError, "num_return_sequences is 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, ModelError, "output_scores is not supported"),
        ({"output_logits": True, "return_dict_in_generate": True}, ModelError, "output_logits is not supported"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, ModelError, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, ModelError, "generation mode 'assisted_generation'"),
        ({"guidance_scale": 1.5}, SamplingError, "UnbatchedClassifierFreeGuidanceLogitsProcessor, remembers earlier"),
        ({"logits_processor": LogitsProcessorList([Unknown()])}, SamplingError, "Unknown, may remember earlier"),
        ({"stopping_criteria": StoppingCriteriaList([Once()])}, SamplingError, "Once, may remember earlier calls"),
        ({"prefix_allowed_tokens_fn": lambda _batch, _ids: [3]}, SamplingError, "calls a function of yours"),
        ({"synced_gpus": True}, ModelError, "synced_gpus is not supported"),
        ({"position_ids": torch.arange(3, 8)[None]}, PromptError, "position_ids do not count from 0"),
        ({"max_new_tokens": 300}, PromptError, "context holds 256"),
    ],
)
def test_what_is_not_supported_is_refused(
    model: Any, spec_path: Path, settings: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        routed(model, spec_path, PROMPTS[0], **{"max_new_tokens": 4, "do_sample": False, **settings})


def test_a_cache_of_the_users_own_is_refused_under_its_name(model: Any, spec_path: Path) -> None:
    """Earlier transformers do not say whose an empty cache is."""
    name, own = cache_argument(model), DynamicCache()
    if "_is_user_defined" not in inspect.getsource(GenerationMixin):
        model(torch.tensor([PROMPTS[0][:-1]]), **{name: own})
    with pytest.raises(PromptError, match=f"{name} is not supported, the decoder has a cache of its own"):
        routed(model, spec_path, PROMPTS[0], max_new_tokens=4, **{name: own})


@pytest.mark.parametrize("name", ["cache", "past_key_values", "some_later_name"])
def test_what_generate_prepares_is_checked_by_what_it_is(name: str) -> None:
    ids, empty, filled = torch.tensor([[3, 4]]), DynamicCache(), DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    prepared = {"attention_mask": None, "position_ids": torch.tensor([[0, 1]]), "use_cache": True, "logits_to_keep": 1}
    transformers_adapter._check_prompt(ids, {**prepared, name: empty})
    with pytest.raises(PromptError, match=f"{name} is not supported"):
        transformers_adapter._check_prompt(ids, {**prepared, name: filled})
    with pytest.raises(ModelError, match=f"argument '{name}' is not supported"):
        transformers_adapter._check_prompt(ids, {**prepared, name: torch.zeros(1, 2, 8)})


def test_a_users_word_is_taken(model: Any, spec_path: Path) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "prefix_allowed_tokens_fn": lambda _batch, ids: [3, 4]}
    expected = plain(model, PROMPTS[0], **settings)
    found = routed(model, spec_path, PROMPTS[0], viasd_assume_stateless=True, **settings)
    assert found.tolist() == expected.tolist()


def test_an_assistant_model_is_refused(model: Any, spec_path: Path) -> None:
    with pytest.raises(ModelError, match="assistant_model is not supported: the routing spec names"):
        routed(model, spec_path, PROMPTS[0], max_new_tokens=4, assistant_model=noisy_copy())


def test_a_missing_spec_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="add viasd_spec="):
        plain(model, PROMPTS[0], custom_generate=viasd_calib.generate, max_new_tokens=4)
    with pytest.raises(SpecError, match="cannot read the routing spec"):
        routed(model, tmp_path / "none.json", PROMPTS[0], max_new_tokens=4)


def test_a_model_in_training_mode_is_refused(model: Any, spec_path: Path) -> None:
    with pytest.raises(ModelError, match=r"call model\.eval\(\) first"):
        routed(model.train(), spec_path, PROMPTS[0], max_new_tokens=4)


def test_a_model_in_another_number_format_is_refused(model: Any, spec_path: Path) -> None:
    with pytest.raises(ModelError, match=r"torch\.float64 is not supported; load it in float32"):
        routed(model.double(), spec_path, PROMPTS[0], max_new_tokens=4)


def test_more_than_one_text_is_refused(model: Any, spec_path: Path) -> None:
    ids = torch.tensor([[3, 4], [0, 5]])
    settings = {"custom_generate": viasd_calib.generate, "viasd_spec": spec_path, "max_new_tokens": 4}
    with pytest.raises(PromptError, match="2 texts are given"):
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
    with pytest.raises(PromptError, match="hides a part of the prompt"):
        model.generate(ids[1:], attention_mask=torch.tensor([[0, 1]]), pad_token_id=0, **settings)


def test_the_end_of_text_is_the_models_own(model: Any, spec_path: Path) -> None:
    """Without an argument the model's generation config says it."""
    assert model.generation_config.eos_token_id == EOS
    for first in range(VOCAB):
        expected = plain(model, [first], do_sample=False, max_new_tokens=30)
        assert routed(model, spec_path, [first], do_sample=False, max_new_tokens=30).tolist() == expected.tolist()


def test_threads_load_a_spec_once_and_give_each_its_text(
    model: Any, spec_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, opened = copy.deepcopy(model), []
    load = transformers_adapter.load_spec
    monkeypatch.setattr(transformers_adapter, "load_spec", lambda path: opened.append(path) or load(path))

    def run(prompt: list[int], **options: Any) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        return own.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options)[0].tolist()  # type: ignore[no-any-return]

    prompts = [[5, 6, 7], [8, 9, 10, 11], [3, 4]]
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda ids: run(ids, custom_generate=viasd_calib.generate, viasd_spec=spec_path), prompts)
        )
    assert found == [run(prompt) for prompt in prompts]
    assert len(opened) == 1


def test_a_tokenizer_that_is_none_is_refused() -> None:
    name: Any = "gpt2"
    with pytest.raises(ModelError, match="tokenizer is a str; give the verifier's own"):
        viasd_calib.custom_generate("routing.json", tokenizer=name)
