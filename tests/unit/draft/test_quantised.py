"""Draft models with integer weights: how far they diverge, what they leave alone, and that q's text stays q's."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.strategies import token_lists
from tests.tiny import make_model, propose, random_gate, tiny_config, tiny_shape, transformers_text
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft import quantised
from viasd_calib.draft.base import CachedDrafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.quantised import (
    GROUP,
    Int4Linear,
    Int8Linear,
    QuantisedLinear,
    RoundedLinear,
    check_device,
    quantise_linears,
    round_groups,
    round_rows,
    why_no_kernel,
)
from viasd_calib.draft.shallow import ShallowDrafter, ShallowModel
from viasd_calib.errors import MachineWarning, ModelError
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.onednn_linear import OneDNNLinear, can_pack
from viasd_calib.spec import Decoding, Gates, Route, WeightFormat

ROUNDING = 2**-8
"""Relative error of one rounding to bfloat16."""
KINDS: dict[WeightFormat, type[QuantisedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
FORMATS = pytest.mark.parametrize("weight_format", KINDS)
VOCAB = 32
"""Tokens of the models here: as all sizes, one that int4 takes."""
CONFIG = tiny_config(vocab=VOCAB, hidden_size=32)


def weights(rows: int, groups: int, seed: int, size: float, shift: float) -> Tensor:
    """[rows, groups * GROUP] around ``shift``; the first row is the same number everywhere."""
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(rows, groups * GROUP, generator=generator) + shift
    weight[0] = shift
    return weight


def any_weights() -> st.SearchStrategy[Tensor]:
    sizes, shifts = st.floats(1e-4, 10), st.sampled_from([0.0, 0.3, -5.0])
    return st.builds(weights, st.just(16), st.integers(1, 3), st.integers(0, 99), sizes, shifts)


def linear_of(weight: Tensor, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def bounds(weight: Tensor, weight_format: WeightFormat) -> Tensor:
    """The most that each entry may be off, by what the step sizes say: [out, in]."""
    if weight_format == "int8":
        _, steps = round_rows(weight)
        return 0.5 * steps.float()[:, None].expand_as(weight)
    _, steps, centres = round_groups(weight)
    each = 0.5 * steps.float() + ROUNDING * centres.float().abs()
    return each.repeat_interleave(GROUP, 1)


@FORMATS
@given(weight=any_weights())
def test_entries_are_off_by_half_a_step(weight_format: WeightFormat, weight: Tensor) -> None:
    """Unit vectors read the weights back from the kernel, which rounds each to bfloat16 once more."""
    layer = KINDS[weight_format](linear_of(weight))
    found = layer(torch.eye(weight.shape[1])).T  # [out, in]
    slack = ROUNDING * (weight.abs() + bounds(weight, weight_format)) + 1e-30
    assert ((found - weight).abs() <= bounds(weight, weight_format) + slack).all()


@FORMATS
@given(weight=any_weights())
def test_steps_are_as_fine_as_the_bits_allow(weight_format: WeightFormat, weight: Tensor) -> None:
    """Without this the bound above could be met by steps of any size."""
    if weight_format == "int8":
        steps, ideal = round_rows(weight)[1], weight.abs().amax(1) / 127
    else:
        groups = weight.unflatten(1, (-1, GROUP))
        steps, ideal = round_groups(weight)[1], (groups.amax(-1) - groups.amin(-1)) / 15
    assert (steps.float() <= ideal * (1 + ROUNDING) + 1e-37).all()
    assert (steps > 0).all(), "weights that are all alike are divided by their step too"


@FORMATS
@given(weight=any_weights(), rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_outputs_are_off_by_what_the_steps_say(
    weight_format: WeightFormat, weight: Tensor, rows: int, seed: int
) -> None:
    """|error| ≤ Σ |input| · bound of the entry, beside bfloat16's rounding of the inputs and of the output."""
    inputs = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    exact = inputs.double() @ weight.double().T
    size = inputs.abs() @ (weight.abs() + bounds(weight, weight_format)).T
    allowed = inputs.abs() @ bounds(weight, weight_format).T + 2 * ROUNDING * size
    found = KINDS[weight_format](linear_of(weight))(inputs)
    assert ((found.double() - exact).abs() <= allowed + 1e-30).all()


@FORMATS
def test_eight_bits_are_nearer_than_four_and_neither_is_exact(weight_format: WeightFormat) -> None:
    weight = torch.randn(64, 96)
    errors = {kind: (KINDS[kind](linear_of(weight))(torch.eye(96)).T - weight).square().mean() for kind in KINDS}
    assert 0 < errors["int8"] < 0.1 * errors["int4"]
    assert errors["int4"] < 0.01 * weight.square().mean()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_type_and_bias_are_a_linear_layers(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    linear = linear_of(torch.randn(16, 64) / 8, bias=True).to(dtype)
    layer = KINDS[weight_format](linear)
    for shape in ((64,), (3, 64), (2, 5, 64), (0, 64), (2, 0, 64)):
        inputs = torch.randn(shape, dtype=dtype)
        found = layer(inputs)
        assert (found.shape, found.dtype) == ((*shape[:-1], 16), dtype)
        torch.testing.assert_close(found, linear(inputs), atol=0.5, rtol=0)
    torch.testing.assert_close(layer(torch.zeros(64, dtype=dtype)), linear.bias.detach())


@FORMATS
def test_inputs_may_lie_anywhere_in_memory(weight_format: WeightFormat) -> None:
    """The kernels load whole vectors: parts of wider tensors, and rows that begin at an odd place."""
    layer = KINDS[weight_format](linear_of(torch.randn(16, 32)))
    wide = torch.randn(6, 70, dtype=torch.bfloat16)
    for view in (wide[:, 3:35], wide.flatten()[5:37][None], wide[::2, :32], wide[:, :64:2]):
        assert torch.equal(layer(view), layer(view.clone(memory_format=torch.contiguous_format)))


@FORMATS
def test_every_linear_layer_is_exchanged_and_freed(weight_format: WeightFormat) -> None:
    model = copy.deepcopy(make_model(CONFIG))
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    embedding, count = model.get_input_embeddings(), len(plain)
    held = weakref.ref(plain[0].weight)
    del plain
    quantise_linears([model], weight_format)
    gc.collect()
    assert held() is None
    assert sum(type(module) is KINDS[weight_format] for module in model.modules()) == count == 4 * 7 + 1
    assert model.get_input_embeddings() is embedding
    assert model.dtype == torch.float32


@FORMATS
def test_a_weight_that_is_the_embedding_too_stays_in_the_embedding(weight_format: WeightFormat) -> None:
    model = make_model(tiny_config(vocab=VOCAB, hidden_size=32, tie_word_embeddings=True))
    before = model.get_input_embeddings().weight.clone()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    quantise_linears([model], weight_format)
    assert type(model.get_output_embeddings()) is KINDS[weight_format]
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize(
    ("weight_format", "inputs", "outputs", "mend"),
    [
        ("int8", 24, 16, "a multiple of 16 inputs; leave quantize out"),
        ("int4", 48, 16, "a multiple of 32 inputs and of 16 outputs; quantize to int8"),
        ("int4", 32, 24, "a multiple of 32 inputs and of 16 outputs; quantize to int8"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused_by_name(
    weight_format: WeightFormat, inputs: int, outputs: int, mend: str
) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ModuleDict({"odd": nn.Linear(inputs, outputs)}))
    with pytest.raises(ModelError, match=rf"layer 1\.odd \({inputs} inputs, {outputs} outputs\).*{mend}"):
        quantise_linears([model], weight_format)
    assert type(model[0]) is nn.Linear, "a model that is refused is left whole"


@pytest.mark.parametrize("inputs", [32, 64, 96, 128])
def test_shapes_of_the_kernel_for_gpus(inputs: int) -> None:
    """As far as PyTorch says without a GPU: shapes and types of CUDA's packing and product, not their values."""
    layer = Int4Linear(nn.Linear(inputs, 16, device="meta", dtype=torch.float16))
    with FakeTensorMode(allow_non_fake_inputs=True):  # the product's own check asks a fake tensor for its device
        found = layer(torch.empty(2, 3, inputs, dtype=torch.float16, device="meta"))
    assert (found.shape, found.dtype) == ((2, 3, 16), torch.float16)


def test_on_a_gpu_int4_alone_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    with pytest.raises(ModelError, match="no fast kernel for int8 weights runs on device cuda:0; quantize to int4"):
        check_device(cuda, "int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_device(cuda, "int4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ModelError, match=r"compute capability 8\.0, device cuda:0 has less"):
        check_device(cuda, "int4")


@FORMATS
def test_without_a_kernel_the_rounded_weights_are_multiplied(
    weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    with_kernel, without = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
    quantise_linears([with_kernel], weight_format)
    monkeypatch.setattr(quantised, "why_no_kernel", lambda found: "no such operator")
    with pytest.warns(MachineWarning, match=rf"no kernel for {weight_format} weights on this CPU \(no such"):
        quantise_linears([without], weight_format)
    assert type(without[0]) is RoundedLinear
    inputs = torch.randn(2, 3, 64)
    torch.testing.assert_close(without(inputs), with_kernel(inputs), rtol=0.02, atol=0.02)


@FORMATS
def test_a_kernel_that_is_not_there_is_found(weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_arguments: object) -> None:
        raise RuntimeError("not implemented for this CPU\nmore of it")

    why_no_kernel.cache_clear()
    assert why_no_kernel(weight_format) is None
    why_no_kernel.cache_clear()
    monkeypatch.setattr(quantised._LAYERS[weight_format], "product", absent)
    assert why_no_kernel(weight_format) == "not implemented for this CPU"
    why_no_kernel.cache_clear()


@FORMATS
def test_other_devices_are_refused(weight_format: WeightFormat) -> None:
    with pytest.raises(ModelError, match=f"no kernel for {weight_format} weights runs on device meta"):
        quantise_linears([nn.Sequential(nn.Linear(32, 16, device="meta"))], weight_format)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
@FORMATS
def test_the_backend_packed_leaves_them_alone(weight_format: WeightFormat) -> None:
    drafter = make_drafter("causal", RoutedModel(make_model(CONFIG)), weight_format)
    before = drafted(drafter, [4, 7, 9])
    prepare(drafter.networks, "packed", torch.device("cpu"), torch.float32)
    kinds = {type(module) for module in drafter.networks[0].modules()}
    assert KINDS[weight_format] in kinds
    assert OneDNNLinear not in kinds
    assert drafted(drafter, [4, 7, 9]) == before


def make_drafter(kind: str, verifier: RoutedModel, weight_format: WeightFormat | None) -> CachedDrafter:
    """A drafter that is q itself, or a shallow one of all q's layers, with integer weights."""
    drafter: CachedDrafter
    if kind == "causal":
        drafter = CausalDrafter(RoutedModel(copy.deepcopy(verifier.model)), VOCAB)
    else:
        model = ShallowModel(verifier, tiny_shape(num_layers=4, head_vocab=VOCAB)).eval().requires_grad_(False)
        model.use_vocabulary(torch.arange(VOCAB))
        drafter = ShallowDrafter(model)
    if weight_format is not None:
        quantise_linears(drafter.networks, weight_format)
    return drafter


@torch.inference_mode()
def drafted(drafter: CachedDrafter, text: list[int], count: int = 1) -> list[int]:
    return propose(drafter.start(64), torch.tensor(text), count).tokens.tolist()


@pytest.mark.parametrize(("weight_format", "least"), [("int8", 0.9), ("int4", 0.4)])
@pytest.mark.parametrize("kind", ["causal", "shallow"])
def test_proposals_change_little(kind: str, weight_format: WeightFormat, least: float) -> None:
    """Of next tokens after random texts the share that stays, beside that of a model with other weights.

    These models have wide random weights, so that what is rounded off grows from layer to layer as it does in no
    trained one.
    """
    verifier, other = (RoutedModel(make_model(CONFIG)) for _ in range(2))
    plain = make_drafter(kind, verifier, None)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(VOCAB, (6,), generator=generator).tolist() for _ in range(120)]
    said = [drafted(plain, text) for text in texts]

    def same(drafter: CachedDrafter) -> float:
        return sum(drafted(drafter, text) == each for text, each in zip(texts, said, strict=True)) / len(texts)

    assert same(make_drafter(kind, verifier, weight_format)) >= least
    assert same(make_drafter(kind, other, weight_format)) < 0.2


@pytest.mark.parametrize("kind", ["causal", "shallow"])
@FORMATS
def test_the_verifier_is_not_touched(kind: str, weight_format: WeightFormat) -> None:
    model = make_model(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_drafter(kind, RoutedModel(model), weight_format)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@given(
    seed=st.integers(0, 3),
    kind=st.sampled_from(["causal", "shallow"]),
    weight_format=st.sampled_from(list(KINDS)),
    prompt=token_lists(1, 8, VOCAB),
    count=st.integers(1, 24),
    draft_length=st.integers(1, 6),
)
def test_strict_text_is_the_verifiers_own(
    seed: int, kind: str, weight_format: WeightFormat, prompt: list[int], count: int, draft_length: int
) -> None:
    """Gates that let q' and the drafter decide at random change when q runs, never what it says."""
    torch.manual_seed(seed)
    model = make_model(CONFIG)
    verifier = RoutedModel(model, Route(attention_skip=[1]))
    gates = Gates(
        draft=random_gate(DRAFT_FEATURES, seed),
        slim=random_gate(SLIM_FEATURES, seed),
        draft_accept_at=0.5,
        accept_at=0.5,
        regenerate_at=0.5,
    )
    method = ThreeTier.from_spec(gates, Decoding(draft_length=draft_length, max_pending=8))
    decoder = Decoder(verifier, make_drafter(kind, verifier, weight_format), method, frozenset())
    assert decoder.generate(prompt, count).tokens == transformers_text(model, prompt, count, ())
