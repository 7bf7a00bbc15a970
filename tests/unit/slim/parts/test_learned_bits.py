"""Low bits that were rounded by GPTQ: by what enters each layer where q wrote, and as a spec brings them along."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import LAYERS, VOCAB, make_model, small_spec, tiny_config, tiny_model, tiny_texts
from tests.tiny.bits import priced
from tests.unit.slim.parts.test_low_bit import NARROW, opened, slim_logits, stored_adapter
from tests.unit.slim.test_compiled import TEXT
from viasd_calib.digest import policy_digest
from viasd_calib.errors import ModelError, NumericsError, SpecError
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim import learned_rounding
from viasd_calib.slim.backends import open_model, prepare
from viasd_calib.slim.checking import tensor_misfits
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.gptq import gptq
from viasd_calib.slim.learned_bits import LearnedBits
from viasd_calib.slim.low_bit import LowBitLinear, RoundedWeight, round_weight, rounded_bytes
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.parts import low_bit
from viasd_calib.slim.parts.base import FitInputs, Sizes, load_parts, route_words, save_parts
from viasd_calib.slim.parts.low_bit import LowBit, LowBitOptions
from viasd_calib.slim.parts.mlp_keep import narrow_layers
from viasd_calib.slim.plan import KINDS
from viasd_calib.spec import AdapterRef, LowBitWeights, Route, TensorFile, load_spec, save_spec, tensor_file

CPU = torch.device("cpu")
EVERY = [*range(LAYERS)]
MIXED = LowBitOptions(bits=8, mlp=4, rounding="gptq")
FILE = TensorFile(path="low_bit.safetensors", sha256="0" * 64)


def learned(
    full: RoutedModel, options: LowBitOptions = MIXED, route: Route | None = None, texts: int = 6
) -> LearnedBits:
    """Of random texts, as long as q has anything to say of them."""
    inputs = FitInputs(full, route or Route(), tiny_texts(texts, model=RoutedModel(full.model)), read_residuals)
    held = LowBit().fit(inputs, options)
    assert isinstance(held, LearnedBits)
    return held


def kept(folder: Path, route: Route, held: dict[str, Any], model: Any) -> tuple[Route, dict[str, object]]:
    """The route as a spec in ``folder`` names it, and what is read from there."""
    saved = save_parts(route, held, {}, folder)
    return saved, load_parts(saved, folder, Sizes.of_config(model.config))


def inputs_of(model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """What enters modules in the model's own forward at the places where q wrote, all texts together: [places, in]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, to=found[name]: to.append(given[0][0, 4:]))
        for name in names
    ]
    for text in tiny_texts(6, model=RoutedModel(model)):
        model(text.ids[None, :-1])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@torch.no_grad()
def test_each_weight_is_rounded_by_what_enters_its_layer(family: str) -> None:
    """As the model's own forward has it, projections that a family has fused among them."""
    model = copy.deepcopy(tiny_model(family=family))
    held = learned(RoutedModel(model))
    assert held.entry == LowBitWeights(attention={"8": EVERY}, mlp={"4": EVERY}, head=8)
    kinds = {"self_attn": ("attention", 8), "mlp": ("mlp", 4)}
    places = {"lm_head": ("head", 8)}
    for name, module in model.named_modules():
        if ".layers." in f".{name}" and type(module) is nn.Linear:
            _, _, layer, inner, linear = name.split(".")
            places[name] = (f"layers.{layer}.{kinds[inner][0]}.{linear}", kinds[inner][1])
    entering = inputs_of(model, [*places])
    same = better = 0.0
    for name, (stored, bits) in places.items():
        weight, read = model.get_submodule(name).weight, entering[name]
        wanted = gptq(weight, read.T @ read, bits)  # type: ignore[arg-type]
        found = held.weight(stored, model.get_submodule(name), bits)  # type: ignore[arg-type]
        assert torch.equal(found.steps, wanted.steps)
        same += float((found.codes == wanted.codes).float().mean())
        plain = round_weight(weight, bits).plain()  # type: ignore[arg-type]
        better += bool(((weight - found.plain()) @ read.T).norm() <= ((weight - plain) @ read.T).norm())
    assert same > 0.99 * len(places)
    assert better > 0.9 * len(places)


@torch.no_grad()
def test_the_slim_verifier_agrees_more() -> None:
    model = copy.deepcopy(tiny_model(1))
    held = learned(RoutedModel(model), LowBitOptions(bits=4, rounding="gptq"), texts=40)
    ids = tiny_texts(50, model=RoutedModel(model))[-1].ids.tolist()
    wanted = slim_logits(RoutedModel(model), ids).log_softmax(-1)
    kl = [
        float(
            (
                wanted.exp() * (wanted - slim_logits(RoutedModel(model, held={"low_bit": one}), ids).log_softmax(-1))
            ).sum()
        )
        for one in (held, held.entry)
    ]
    assert kl[0] < 0.8 * kl[1]


def test_hessians_of_several_passes_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four inputs a layer have Hessians: three of a KiB each, and the last of four."""
    full, passes = opened({}), Counter[int]()

    def counted(model: RoutedModel, ids: Tensor, numbers: Sequence[int]) -> Tensor:
        passes[len(ids)] += 1
        return read_residuals(model, ids, numbers)

    found = []
    for limit in (2**30, 4096, 1):
        monkeypatch.setattr(learned_rounding, "HESSIAN_BYTES", limit)
        inputs = FitInputs(full, Route(), tiny_texts(2), counted)
        held = LowBit().fit(inputs, MIXED)
        assert isinstance(held, LearnedBits)
        found.append((held.tensors, passes.total()))
        passes.clear()
    assert [count for _, count in found] == [2, 2 * (2 * LAYERS + 1), 2 * (4 * LAYERS + 1)]
    for tensors, _ in found[1:]:
        assert tensors.keys() == found[0][0].keys()
        assert all(torch.equal(tensor, found[0][0][name]) for name, tensor in tensors.items())


def test_texts_are_drawn_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_rounding, "TEXTS", 3)
    seen: list[tuple[int, ...]] = []

    def noted(model: RoutedModel, ids: Tensor, numbers: Sequence[int]) -> Tensor:
        seen.append(tuple(ids[0].tolist()))
        return read_residuals(model, ids, numbers)

    texts = tiny_texts(40)
    for _ in range(2):
        LowBit().fit(FitInputs(opened({}), Route(), texts, noted), MIXED)
    assert seen[:3] == seen[3:]
    assert max(number for number, text in enumerate(texts) if tuple(text.ids[:-1].tolist()) in seen) > 20


CASES: dict[str, tuple[Route, dict[str, Any], LowBitOptions]] = {
    "bits 4": (Route(), {}, LowBitOptions(bits=4, rounding="gptq")),
    "bits 8": (Route(), {}, LowBitOptions(bits=8, rounding="gptq", input_bits=8)),
    "skips": (Route(attention_skip=[1, 2], mlp_skip=[2]), {}, MIXED),
    "some": (Route(), {}, LowBitOptions(bits=16, mlp={"4": [1]}, rounding="gptq")),
    "the head alone": (Route(), {}, LowBitOptions(bits=16, head=4, rounding="gptq")),
    "a narrow MLP": (Route(), {"mlp_keep": NARROW}, MIXED),
    "a head vocabulary": (Route(), {"head_vocab": torch.tensor([2, 3, 5, 11])}, LowBitOptions(bits=4, rounding="gptq")),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_a_spec_brings_along_gives_the_same_bits(case: str, tmp_path: Path) -> None:
    route, others, options = CASES[case]
    model = copy.deepcopy(tiny_model())
    narrowed = narrow_layers(model.get_decoder().layers, others.get("mlp_keep", {}))
    full = RoutedModel(model, held={"mlp_keep": narrowed} if "mlp_keep" in others else {})
    low = learned(full, options, route)
    held = {**others, "low_bit": low}
    saved, loaded = kept(tmp_path, route, held, model)
    assert saved.low_bit is not None
    assert (saved.low_bit.rule, saved.low_bit.tensors) == (
        "gptq",
        tensor_file(tmp_path / "low_bit.safetensors", tmp_path),
    )
    fitted, again = RoutedModel(model, route, held), RoutedModel(model, saved, loaded)
    assert torch.equal(slim_logits(again, TEXT), slim_logits(fitted, TEXT))
    nearest = RoutedModel(model, route, {**others, "low_bit": low.entry})
    assert not torch.equal(slim_logits(again, TEXT), slim_logits(nearest, TEXT))
    assert again.memory == nearest.memory
    spec = small_spec(route=saved)
    assert not tensor_misfits(spec, tmp_path)
    save_spec(spec, tmp_path / "routing.json")
    assert load_spec(tmp_path / "routing.json").route == saved
    size = (tmp_path / "low_bit.safetensors").stat().st_size
    integers = sum(
        rounded_bytes(one.out_features, one.in_features, one.bits)
        for one in nn.ModuleList(again.slim_networks).modules()
        if isinstance(one, LowBitLinear)
    )
    assert integers <= size < integers + 200 * (3 * 7 * LAYERS + 4), "integers, and the names of their tensors"


@torch.no_grad()
def test_an_adapter_sits_on_them() -> None:
    ref, stored = stored_adapter(folded=False)
    low = learned(opened({}))
    entry = low.entry.model_copy(update={"rule": "gptq", "tensors": FILE})
    routed = opened({"adapter": stored, "low_bit": low}, Route(adapter=ref, low_bit=entry))
    query: Any = routed.slim_layers[2].self_attn.q_proj  # type: ignore[union-attr]
    own: Any = opened({"low_bit": low}).slim_layers[2].self_attn.q_proj  # type: ignore[union-attr]
    assert isinstance(query.base, LowBitLinear)
    assert torch.equal(query.base.rounded.codes, own.rounded.codes)


@pytest.mark.skipif(why_no_kernels(CPU, torch.bfloat16) is not None, reason="the kernels do not run here")
@torch.inference_mode()
def test_kernels_give_what_pytorch_gives_for_the_same_integers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.08}
    model = make_model(tiny_config(**sizes, head_dim=32)).to(torch.bfloat16)
    low = learned(RoutedModel(copy.deepcopy(model)))
    reference = RoutedModel(copy.deepcopy(model), Route(), {"low_bit": low})
    native = open_model(model, Route(), {"low_bit": low}, "native")
    prepare((model, *native.slim_networks), "native", CPU, torch.bfloat16)
    assert not [one for module in native.slim_networks for one in module.modules() if isinstance(one, LowBitLinear)]
    torch.testing.assert_close(slim_logits(native, TEXT), slim_logits(reference, TEXT), atol=0.05, rtol=0.05)


def test_bits_are_chosen_by_nearest_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    texts = tiny_texts(2)

    def divergence(model: RoutedModel, _: int) -> float:
        wanted, found = (slim_logits(one, TEXT).log_softmax(-1) for one in (RoutedModel(model.model), model))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    inputs = FitInputs(opened({}), Route(), texts, read_residuals, torch.no_grad()(divergence), 0.4)
    nearest = LowBit().fit(inputs, LowBitOptions(bits="auto"))
    held = LowBit().fit(inputs, LowBitOptions(bits="auto", rounding="gptq"))
    assert isinstance(held, LearnedBits)
    assert nearest is not None
    assert held.entry.model_dump() == nearest.model_dump()
    assert held.entry.bits("mlp")
    places = {name.rpartition(".")[0].rpartition(".")[0] for name in held.tensors} - {""}
    assert places == {f"layers.{layer}.{kind}" for kind in KINDS for layer in held.entry.bits(kind)}


def test_it_has_words() -> None:
    entry = LowBitWeights(mlp={"4": [1]}, rule="gptq", tensors=FILE)
    assert route_words(Route(low_bit=entry), LAYERS).endswith("1 sublayer in 4 bits, rounded by GPTQ")


def test_a_policy_with_other_integers_is_another_one() -> None:
    entry = LowBitWeights(mlp={"4": [1]}, rule="gptq", tensors=FILE)
    others = [entry, entry.model_copy(update={"tensors": TensorFile(path="x.safetensors", sha256="1" * 64)})]
    nearest = LowBitWeights(mlp={"4": [1]})
    assert len({policy_digest(small_spec(route=Route(low_bit=one))) for one in (*others, nearest)}) == 3
    moved = entry.model_copy(update={"tensors": FILE.model_copy(update={"path": "elsewhere.safetensors"})})
    assert policy_digest(small_spec(route=Route(low_bit=moved))) == policy_digest(
        small_spec(route=Route(low_bit=entry))
    )


def test_an_earlier_entry_is_one_of_nearest_rounding() -> None:
    document = small_spec(route=Route(low_bit=LowBitWeights(mlp={"4": [1]}))).model_dump(mode="json")
    assert document["route"]["low_bit"].pop("tensors", "none") is None
    assert type(small_spec()).model_validate(document).route.low_bit == LowBitWeights(mlp={"4": [1]})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"head": 8, "rule": "gptq"}, "of rule gptq has no tensors, which hold its integers; export the spec again"),
        ({"head": 8, "tensors": FILE}, "of rule nearest has tensors, and rounds when it is loaded; leave them out"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LowBitWeights.model_validate(entry)


def test_an_adapter_folded_into_other_weights_is_refused() -> None:
    adapter = AdapterRef(rank=2, alpha=4, targets=["q_proj"], folded=True, tensors=FILE)
    with pytest.raises(
        ValidationError, match="has the integers of the verifier's own weights, and the adapter is fold"
    ):
        Route(adapter=adapter, low_bit=LowBitWeights(head=8, rule="gptq", tensors=FILE))


def test_an_entry_without_its_integers_is_not_rounded_to_nearest() -> None:
    entry = LowBitWeights(head=8, rule="gptq", tensors=FILE)
    with pytest.raises(ModelError, match="rounded by gptq, but not their integers; open it with load_routed"):
        opened({"low_bit": entry}, Route(low_bit=entry))


def test_texts_are_needed_before_bits_are_chosen() -> None:
    inputs = FitInputs(opened({}), Route(), [], read_residuals, lambda *_: pytest.fail("measured"))
    for bits in (8, "auto"):
        with pytest.raises(SpecError, match="rounding gptq needs texts that q wrote; give rounding nearest"):
            LowBit().fit(inputs, LowBitOptions.model_validate({"bits": bits, "rounding": "gptq"}))


def test_a_sublayer_whose_inputs_are_no_numbers_is_named() -> None:
    full = opened({})
    with torch.no_grad():
        full.layers[2].mlp.up_proj.weight[0] = torch.inf  # type: ignore[union-attr, operator]
    words = "what enters down_proj of layer 2 cannot be rounded by gptq: .*; give rounding nearest, or capture other"
    with pytest.raises(NumericsError, match=words):
        learned(full)


def changed(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """The same with one tensor otherwise, or left out."""
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    return others if change is None else {**others, name: change(tensors[name]).contiguous()}


UP, QUERY = "layers.2.mlp.up_proj", "layers.0.attention.q_proj"
DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor] | None, str]] = {
    "codes left out": (f"{UP}.codes", None, f"{UP}.codes is missing"),
    "lowest left out": (f"{UP}.lowest", None, f"{UP}.lowest is missing"),
    "head left out": ("head.steps", None, "head.steps is missing"),
    "cut steps": (
        f"{UP}.steps",
        lambda one: one[1:],
        rf"{UP}\.steps is float32 \[31, 1\], where float32 \[32, 1\] bel",
    ),
    "cut codes": (
        f"{QUERY}.codes",
        lambda one: one[1:],
        rf"{QUERY}\.steps is float32 \[16, 1\], where float32 \[15, 1\]",
    ),
    "of another format": (f"{UP}.codes", Tensor.int, rf"{UP}\.codes is int32 \[32, 8\], where uint8 \[32, 8\] belongs"),
    "flat": (f"{UP}.codes", Tensor.flatten, rf"{UP}\.codes is uint8 \[256\], where uint8 \[1, 1\] belongs"),
    "cut head": (
        "head.codes",
        lambda one: one[:, 1:],
        rf"head\.codes is int8 \[{VOCAB}, 15\], where int8 \[{VOCAB}, 16\]",
    ),
    "no number": (f"{UP}.steps", lambda one: one * torch.nan, rf"{UP}\.steps has numbers that are not finite"),
    "no code": ("head.codes", lambda one: torch.full_like(one, -128), r"head\.codes has codes below -127"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_the_tensor(damage: str, tmp_path: Path) -> None:
    name, change, words = DAMAGES[damage]
    saved, _ = kept(tmp_path, Route(), {"low_bit": learned(opened({}), texts=1)}, tiny_model())
    held = LowBit().load(saved, tmp_path, Sizes.of_config(tiny_model().config))
    assert isinstance(held, LearnedBits)
    save_file(changed({**held.tensors}, name, change), tmp_path / "low_bit.safetensors")
    (problem,) = tensor_misfits(small_spec(route=saved), tmp_path)
    with pytest.raises(SpecError, match=f"low_bit.safetensors: {words}.*export the spec again"):
        raise SpecError(problem)


def test_tensors_of_no_sublayer_are_refused(tmp_path: Path) -> None:
    low = learned(opened({}), LowBitOptions(bits=16, mlp={"4": [1]}, rounding="gptq"), texts=1)
    one = torch.zeros(1)
    for name in ("layers.1.attention.q_proj.codes", "layers.3.mlp.up_proj.codes", "head.codes", "layers.1.mlp.codes"):
        held = low._replace(tensors={**low.tensors, name: one})
        with pytest.raises(SpecError, match=f"{name} is of no sublayer that low_bit names"):
            kept(tmp_path, Route(), {"low_bit": held}, tiny_model())
    held = low._replace(tensors={**low.tensors, "layers.1.mlp.up_proj.scale": one})
    with pytest.raises(SpecError, match=r"up_proj\.scale is no tensor of a weight in 4 bits"):
        kept(tmp_path, Route(), {"low_bit": held}, tiny_model())
    with pytest.raises(SpecError, match=r"the tensors of layers\.1\.mlp are missing"):
        kept(tmp_path, Route(), {"low_bit": low._replace(tensors={})}, tiny_model())


def test_what_does_not_fit_the_verifier_is_refused_when_it_is_installed() -> None:
    """As where a tensor is missing in every layer, which shows with the verifier alone."""
    low = learned(opened({}), texts=1)
    without = {name: one for name, one in low.tensors.items() if ".up_proj." not in name}
    with pytest.raises(SpecError, match=r"low_bit\.safetensors: layers\.0\.mlp\.up_proj\.codes is missing; export"):
        opened({"low_bit": low._replace(tensors=without)})
    other = {name.replace("up_proj", "side_proj"): one for name, one in low.tensors.items()}
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.side_proj\.\w+ is of no linear layer of the verifier"):
        opened({"low_bit": low._replace(tensors=other)})
    words = r"layers\.0\.attention\.q_proj\.codes is int8 \[16, 16\], the verifier's is int8 \[64, 64\]"
    wide = RoutedModel(make_model(tiny_config(hidden_size=64)))
    with pytest.raises(SpecError, match=words):
        RoutedModel(wide.model, held={"low_bit": low})


@given(out=st.integers(1, 9), inputs=st.integers(1, 140), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_two_codes_to_a_byte_are_taken_apart_again(out: int, inputs: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight, read = torch.randn(out, inputs, generator=draw), torch.randn(20, inputs, generator=draw)
    for bits in (8, 4):
        rounded = gptq(weight, read.T @ read, bits)  # type: ignore[arg-type]
        layer = LowBitLinear(nn.Linear(inputs, out), rounded.bits, 16, rounded)
        again: RoundedWeight = layer.rounded
        assert all(torch.equal(one, other) for one, other in zip(again[1:], rounded[1:], strict=True))
