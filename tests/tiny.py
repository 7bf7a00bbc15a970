"""Tiny random models that say something else at every place, and what the tests hold against them.

Models are made once for each set of arguments: a test that changes one takes a copy first.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from viasd_calib.decoding.transformers_baseline import with_plain_generation
from viasd_calib.draft.base import Drafter, GreedyPick, Pick, Proposal, StopRule, TextDrafter, never_stop
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.shallow import ShallowDrafter, ShallowModel
from viasd_calib.models import load_verifier
from viasd_calib.passes.requests import Passes, at_once, finish
from viasd_calib.profiling.profile import LatencyProfile, Measured, PassShape, ProfileSettings
from viasd_calib.prompts import Prompt
from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.bridges import new_bridges
from viasd_calib.spec import (
    Certificate,
    Gates,
    LogisticGate,
    PromptHashes,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    ShallowShape,
    VerifierRef,
    save_spec,
)
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.data import TraceText
from viasd_calib.traces.folder import CaptureSettings

VOCAB = 24
LAYERS = 4
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
EOS = 2
CHAT_TEMPLATE = (
    "<s>{% for turn in messages %} <{{ turn['role'] }}> {{ turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)

TinyFolder = Path

SLIDING = 3
"""Positions that a sliding layer of a tiny model reads: fewer than most texts of the tests have."""
_WINDOW: dict[str, Any] = {"sliding_window": SLIDING}
_GEMMA: dict[str, Any] = {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 6, "tie_word_embeddings": True}
_PHI: dict[str, Any] = {"head_dim": 8, "resid_pdrop": 0.5}
_TURN = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}

TINY_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral_sliding": (MistralConfig, {**_WINDOW, "head_dim": 8}),
    "qwen2": (Qwen2Config, {}),
    "qwen2_sliding": (Qwen2Config, {**_WINDOW, "use_sliding_window": True}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3_sliding": (Qwen3Config, {**_WINDOW, "use_sliding_window": True, "head_dim": 8}),
    "gemma2": (Gemma2Config, {**_GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}),
    "gemma3_text": (Gemma3TextConfig, {**_GEMMA, "final_logit_softcapping": 4.0}),
    "phi3": (Phi3Config, {**_PHI, "rope_parameters": _TURN}),
    "phi3_sliding": (Phi3Config, {**_PHI, **_WINDOW, "tie_word_embeddings": True}),
}
"""Tiny models by name, with what sets each apart from a Llama."""


def tiny_config(family: str = "llama", *, layers: int = LAYERS, vocab: int = VOCAB, **changes: Any) -> PreTrainedConfig:
    """Configuration of a tiny model; wide initial weights, so that the likeliest token varies."""
    kind, of_family = TINY_FAMILIES[family]
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.35,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind not in (LlamaConfig, MistralConfig, Phi3Config):  # these have no types
        slides = of_family.get("sliding_window") is not None
        kinds = ["sliding_attention", "full_attention"] if slides else ["full_attention"]
        common["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    return kind(**{**common, **of_family, **changes})


def longrope_config(context: int) -> PreTrainedConfig:
    """A Phi-3 that turns positions otherwise once a text is longer than ``context``."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": context,
    }
    return tiny_config("phi3", head_dim=4, original_max_position_embeddings=context, rope_parameters=longrope)


def random_bridges(route: Route, rank: int | None = None, carry: bool = False) -> nn.ModuleDict:
    """Bridges for a tiny model, exact in bfloat16."""
    bridges = new_bridges(route, 16, rank, carry)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in bridges.state_dict().values():
            tensor.copy_((0.1 * torch.randn(tensor.shape, generator=generator)).to(torch.bfloat16))
    return bridges.eval().requires_grad_(False)


@functools.cache
def tiny_model(seed: int = 0, family: str = "llama", *, layers: int = LAYERS, vocab: int = VOCAB) -> PreTrainedModel:
    """A tiny random model; the same arguments give the same object."""
    torch.manual_seed(seed)
    config = tiny_config(family, layers=layers, vocab=vocab)
    return make_model(config)


@functools.cache
def wide_model(seed: int = 0, family: str = "llama", noise: float = 0.0, *, layers: int = LAYERS) -> PreTrainedModel:
    """``tiny_model``, or ``noisy_copy``, with the same weights in float64.

    Two forwards of other shapes, or on another processor, may add up in another order. In float32 their logits then
    differ by about 1e-6, and one token in some ten thousand is nearer to a tie, or to a gate's bound, than that: so no
    text is sure to be the same twice. In float64 they differ by 1e-15, and round to the same float32 that
    the rules read. Whatever compares whole texts decodes such a model.
    """
    model = noisy_copy(seed, family, noise) if noise else tiny_model(seed, family, layers=layers)
    return copy.deepcopy(model).double()


def make_model(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A random model; its norms and biases differ too, which transformers begins all alike."""
    if getattr(config, "attn_logit_softcapping", None):
        attention = attention or "eager"  # what earlier transformers choose leaves the caps out
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape)
    return model


@functools.cache
def noisy_copy(seed: int = 0, family: str = "llama", noise: float = 0.05) -> PreTrainedModel:
    """``tiny_model(seed)`` with its weights disturbed: a draft model that is right part of the time."""
    model = copy.deepcopy(tiny_model(seed, family))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


def tiny_shape(num_layers: int = 2, head_vocab: int = 12, taps: tuple[int, ...] = (1, LAYERS)) -> ShallowShape:
    """Sizes of a shallow drafter for a tiny verifier."""
    return ShallowShape(num_layers=num_layers, head_vocab=head_vocab, taps=taps)


def tiny_shallow(verifier: RoutedModel, seed: int = 0, head_vocab: int = 12) -> ShallowModel:
    """A shallow drafter with random weights on half of the vocabulary."""
    torch.manual_seed(seed)
    model = ShallowModel(verifier, tiny_shape(head_vocab=head_vocab))
    model.use_vocabulary(torch.randperm(verifier.config.vocab_size)[:head_vocab].sort().values)
    for linear in (model.from_token, model.from_taps, model.from_own):
        torch.nn.init.normal_(linear.weight, std=0.3)
    return model.eval().requires_grad_(False)


def propose(drafter: TextDrafter, text: Tensor, limit: int, stop: StopRule = never_stop) -> Proposal:
    """A drafter's greedy proposal."""
    return finish(drafter.propose(text, limit, stop, GreedyPick()))


class RandomDrafter(Drafter):
    """Proposes anything at all, with a distribution that has nothing to do with it."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.seed = seed

    def start(self, capacity: int) -> TextDrafter:
        return RandomTextDrafter(self.vocab, self.seed)

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.randn(text.shape[0], self.vocab, generator=torch.Generator().manual_seed(self.seed))
        return logits.argmax(-1), logits


class RandomTextDrafter(TextDrafter):
    """Draws on from what it has drawn for the same text."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        self.steps += limit
        tokens = torch.randint(self.vocab, (limit,), generator=self.generator)
        return at_once(Proposal(tokens, 3 * torch.randn(limit, self.vocab, generator=self.generator)))


DRAFTERS = ("lookup", "causal", "near", "itself", "shallow", "random", "lookup+shallow", "lookup+near")


def make_drafter(kind: str, verifier: RoutedModel, seed: int = 0, family: str = "llama") -> Drafter:
    """A drafter for ``tiny_model(seed, family)``, from one that is never right to the verifier itself.

    It calculates in the verifier's type.
    """
    vocab = verifier.config.vocab_size
    if kind.startswith("lookup+"):
        inner = make_drafter(kind.removeprefix("lookup+"), verifier, seed, family)
        return CombinedDrafter(inner, vocab, max_ngram=3, min_ngram=2)
    if kind == "lookup":
        return PromptLookup()
    wide = verifier.dtype == torch.float64
    if kind == "causal":
        model = wide_model(seed + 100, family, layers=2) if wide else tiny_model(seed + 100, family, layers=2)
        return CausalDrafter(RoutedModel(model), vocab)
    if kind == "near":
        return CausalDrafter(RoutedModel(wide_model(seed, family, 0.05) if wide else noisy_copy(seed, family)), vocab)
    if kind == "itself":
        return CausalDrafter(RoutedModel(wide_model(seed, family) if wide else tiny_model(seed, family)), vocab)
    if kind == "shallow":
        return ShallowDrafter(tiny_shallow(verifier, seed))
    return RandomDrafter(vocab, seed)


def random_gate(names: Sequence[str], seed: int, bias: float = 0.0) -> LogisticGate:
    """A gate with random weights over ``names``."""
    rng = random.Random(seed)
    count = len(names)
    return LogisticGate(
        features=list(names),
        mean=[rng.uniform(-1, 1) for _ in names],
        scale=[rng.uniform(0.5, 2) for _ in names],
        weight=[rng.uniform(-1, 1) / count for _ in names],
        bias=bias,
    )


def constant_gate(name: str, logit: float) -> LogisticGate:
    """A gate that gives every token the score sigmoid(``logit``)."""
    return LogisticGate(features=[name], mean=[0.0], scale=[1.0], weight=[0.0], bias=logit)


def trusting_gates() -> Gates:
    """Gates that always take q' at its word, and never the drafter."""
    return Gates(
        draft=constant_gate("draft_depth", 0.0), slim=constant_gate("slim_margin", 0.0),
        draft_accept_at=2.0, accept_at=2.0, regenerate_at=0.2,
    )  # fmt: skip


def transformers_text(model: PreTrainedModel, prompt: Sequence[int], count: int, eos: Collection[int]) -> list[int]:
    """The new tokens of transformers' own greedy ``generate``, without what the model's generation settings ask."""
    ids = torch.tensor([list(prompt)])
    plain: Any = with_plain_generation(model, eos)
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return list(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def transformers_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The logits of transformers' own forward, [length, vocabulary]."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0]  # type: ignore[no-any-return]


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """One token a word: a few special ones, then ``w0``, ``w1``, …"""
    words = {word: place for place, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(vocab - len(SPECIAL)))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, ``VOCAB`` tokens: a few letters, the space, the two bytes of é, and pieces of more than one."""
    letters = ["a", "b", "c", "d", "Ġ", "Ã", "©"]
    pairs = "a b|b c|c d|a a|Ġ a|Ġ b|ab c|Ã ©|d a|Ġa b|b b|d d|b a|c a|aa b|c c|Ġ d"
    merges = [(first, second) for first, second in (pair.split() for pair in pairs.split("|"))]
    words = [*letters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(BPE({word: place for place, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny(
    folder: Path, seed: int = 0, family: str = "llama", *, vocab: int = VOCAB, eos: int | None = EOS
) -> TinyFolder:
    """Write a tiny model and its tokenizer as ``save_pretrained`` does."""
    model = copy.deepcopy(tiny_model(seed, family, vocab=vocab))
    model.config.eos_token_id = eos
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


def write_gguf(path: Path, seed: int = 0) -> Path:
    """``tiny_model(seed)`` with a byte-level tokenizer, as llama.cpp would write it."""
    model = tiny_model(seed)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, "Ġ", "w", *map(str, range(8)), *(f"w{digit}" for digit in range(8))])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([f"w {digit}" for digit in range(8)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        weight = tensor.float()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the rotary halves of a head
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(gguf_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives to a weight of a Llama."""
    layers = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    found = layers.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return str(found)


def tiny_prompts(count: int, *, turns: int = 1, longest: int = 6) -> list[Prompt]:
    """Prompts in the words of the tiny tokenizer."""
    rng = random.Random(count)
    return [
        Prompt(
            id=f"tiny/{number}",
            task=rng.choice(["qa", "coding"]),
            turns=[
                " ".join(f"w{rng.randrange(VOCAB - len(SPECIAL))}" for _ in range(rng.randint(1, longest)))
                for _ in range(rng.randint(1, turns))
            ],
        )
        for number in range(count)
    ]


def tiny_traces(verifier: TinyFolder, folder: Path, count: int, **settings: Any) -> Path:
    """Fill ``folder`` with the verifier's answers to ``count`` prompts, and what prompt lookup proposes along them."""
    prompts, chosen = tiny_prompts(count), CaptureSettings(**settings)
    capture_traces(load_verifier(str(verifier)), PromptLookup(), "prompt_lookup", prompts, folder, chosen)
    return folder


def tiny_texts(count: int, length: int = 40, model: RoutedModel | None = None) -> list[TraceText]:
    """Random texts after prompts of five tokens, with what ``model``, or else ``tiny_model()``, says along them."""
    model, nothing = model or RoutedModel(tiny_model()), torch.empty(0)
    found = []
    for index in range(count):
        ids = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(index))
        said = model.logits(read_text(model, ids[None, :-1])[0].last)[0, 4:].log_softmax(-1).topk(8)
        found.append(
            TraceText(
                index=index, prompt_id=str(index), prompt_sha256=f"{index:064x}", task="qa", turn=0,
                ids=ids, prompt_length=5,
                q_ids=said.indices, q_log_probs=said.values,
                p_token=nothing, p_depth=nothing, p_top_k=None, p_entropy=nothing, p_margin=nothing,
            )
        )  # fmt: skip
    return found


def even_costs(model: RoutedModel) -> SublayerCosts:
    """Every sublayer costs the same, on any machine."""
    count = len(model.full_sublayers)
    return SublayerCosts(torch.full((count,), 1 / (count + 1)), 1 / (count + 1))


def tiny_fit(verifier: TinyFolder, traces: Sequence[Path], out: Path, steps: int = 3) -> list[str]:
    """Words of a ``viasd fit`` that takes a second: few steps, a small adapter, every prompt of the traces."""
    return [
        "--out", str(out), "--model.verifier", str(verifier), "--model.target_cost", "0.7", "--model.adapter_rank", "2",
        "--model.max_run", "4", "--data.folders", json.dumps([str(folder) for folder in traces]), "--data.shares",
        '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}', "--data.validation_share", "0.3",
        "--data.max_batch_tokens", "128", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "1",
        "--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar",
        "false", "--trainer.default_root_dir", str(out),
    ]  # fmt: skip


def tiny_spec(verifier: TinyFolder, folder: Path, certificate: Certificate | None = None) -> Path:
    """A spec for a tiny verifier, in ``folder``, that needs no tensors."""
    path = folder / "routing.json"
    save_spec(
        RoutingSpec(
            verifier=load_verifier(str(verifier)).ref,
            draft=PromptLookupDraft(),
            route=Route(attention_skip=[1], mlp_skip=[2]),
            gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
            certificate=certificate,
            prompts=PromptHashes(fit=[]),
        ),
        path,
    )
    return path


def verifier_ref(**changes: Any) -> VerifierRef:
    """Identity of a verifier that exists nowhere."""
    entries: dict[str, Any] = {
        "name_or_path": "tiny",
        "architecture": "LlamaForCausalLM",
        "num_layers": LAYERS,
        "hidden_size": 16,
        "vocab_size": VOCAB,
        "config_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "dtype": "float32",
    }
    return VerifierRef(**{**entries, **changes})


def tiny_profile(settings: ProfileSettings, cost: Callable[[PassShape], float]) -> LatencyProfile:
    """A latency profile of that verifier, with made-up times."""
    measured = [
        Measured(**s._asdict(), seconds=cost(s), low=0.9 * cost(s), high=1.2 * cost(s)) for s in settings.shapes()
    ]
    return LatencyProfile(
        verifier=verifier_ref(),
        draft=PromptLookupDraft(),
        route=Route(attention_skip=[1]),
        backend="eager",
        dtype="float32",
        device="cpu",
        hardware={"device": "abacus"},
        settings=settings,
        measured=tuple(measured),
    )


def spoil(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose last norm is not a number, so that its logits are not either."""
    broken = copy.deepcopy(model)
    broken.get_decoder().norm.weight.fill_(float("nan"))
    return broken


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let the kernel refuse to grow any file beyond ``size`` bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
