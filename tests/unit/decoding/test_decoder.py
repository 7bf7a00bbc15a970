from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import TopKLogitsWarper

from tests.certificates import make_certificate
from tests.number_formats import default_dtype
from tests.tiny import (
    TinyFolder,
    random_gate,
    save_tiny,
    tiny_model,
    tiny_shallow,
    tiny_shape,
    transformers_text,
)
from viasd_calib.choices import StrategyName
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine, assemble, load_engine
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.slim_rules.calibrated import CalibratedRule
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import NEVER, ThreeTier
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.shallow import save_shallow
from viasd_calib.errors import CertificateWarning, MethodError, SamplingError, SpecError
from viasd_calib.models import Verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.lora_linear import LoRALinear
from viasd_calib.slim.parts.adapter import adapted_layers, adapter_ref, save_adapter
from viasd_calib.spec import (
    CausalLMDraft,
    Decoding,
    Gates,
    Route,
    RoutingSpec,
    ShallowDraft,
    save_spec,
    tensor_file,
)

PROMPT = [1, 4, 9, 7, 5]


def shipped(folder: Path, verifier: Verifier) -> Path:
    """A spec with its tensors: a shallow drafter, an adapter, gates, audit strict."""
    routed = RoutedModel(verifier.model)
    save_shallow(tiny_shallow(routed), folder / "draft.safetensors")
    layers = adapted_layers(verifier.model.get_decoder().layers, 2, 4, ["v_proj"])
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    route = Route(attention_skip=[1])
    save_adapter(layers, route, folder / "adapter.safetensors")
    adapter = adapter_ref(folder / "adapter.safetensors", folder, 2, 4, ["v_proj"])
    spec = RoutingSpec(
        verifier=verifier.ref,
        draft=ShallowDraft(**tiny_shape().model_dump(), tensors=tensor_file(folder / "draft.safetensors", folder)),
        route=route.model_copy(update={"adapter": adapter}),
        gates=Gates(
            draft=random_gate(DRAFT_FEATURES, 0),
            slim=random_gate(SLIM_FEATURES, 1),
            draft_stop_below=0.3,
            draft_accept_at=0.6,
            accept_at=0.5,
            regenerate_at=0.5,
        ),
        decoding=Decoding(draft_length=4, max_pending=9, tolerance=0.25),
    )
    save_spec(spec, folder / "routing.json")
    return folder / "routing.json"


@pytest.fixture
def engine(tmp_path: Path, tiny_verifier: Verifier) -> Engine:
    """The shipped spec, loaded as a user does; the verifier's place is the one the spec names."""
    return load_engine(shipped(tmp_path, tiny_verifier))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_number_format_changes_nothing(
    tmp_path: Path, tiny_verifier: Verifier, dtype: torch.dtype
) -> None:
    """Neither where a spec is loaded nor where it decodes."""
    path = shipped(tmp_path, tiny_verifier)

    def texts() -> list[Generation]:
        engine, sampling = load_engine(path), Sampling(temperature=0.9, top_p=0.95, seed=5)
        return [engine.decoder(name, sampling=sampling).generate(PROMPT, 16) for name in get_args(StrategyName)]

    expected = texts()
    with default_dtype(dtype):
        assert texts() == expected


def test_every_method_gives_the_verifiers_text(engine: Engine) -> None:
    expected = transformers_text(engine.verifier.model, PROMPT, 32, engine.verifier.eos_ids)
    texts = [
        engine.decoder(name).generate(PROMPT, 32).tokens for name in ("autoregressive", "speculative", "three_tier")
    ]
    assert texts == [expected] * 3
    assert engine.verifier.eos_ids


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_a_method_says_whether_it_asks_the_slim_verifier(engine: Engine, name: StrategyName) -> None:
    decoder = engine.decoder(name)
    assert decoder.strategy.asks_slim == (decoder.generate(PROMPT, 32).counts.slim_passes > 0)


def test_without_bounds_to_meet_the_slim_verifier_is_not_asked(engine: Engine) -> None:
    gates = engine.spec.gates.model_copy(update={"accept_at": NEVER, "regenerate_at": NEVER})
    assert not ThreeTier.from_spec(gates, engine.spec.decoding).asks_slim


def test_the_compiled_backend_gives_the_same_text(
    tmp_path: Path, tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a spec's widths and taps need is prepared ahead, of q and of q' with its adapter; decoding adds none."""
    asked: list[dict[str, object]] = []

    def compile_nothing(run: object, **options: object) -> object:
        asked.append(options)
        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    path = shipped(tmp_path, tiny_verifier)
    engine = load_engine(path, backend="compiled")
    engine.prepare_passes([len(PROMPT) + 32])
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}] * 2 * 4  # widths up to 16
    texts = [engine.decoder(name).generate(PROMPT, 32).tokens for name in ("autoregressive", "three_tier")]
    assert texts == [load_engine(path, backend="eager").decoder("autoregressive").generate(PROMPT, 32).tokens] * 2
    assert len(asked) == 2 * 4
    assert engine.backend == "compiled"


@pytest.mark.parametrize("name", ["nonsense", "Three_Tier", "", None, 3, ["speculative"]])
def test_another_method_is_refused(engine: Engine, name: Any) -> None:
    with pytest.raises(MethodError, match=r"there is no method .*; choose one of autoregressive, lenient, multi_level"):
        engine.decoder(name)


@pytest.mark.parametrize("name", get_args(StrategyName))
@pytest.mark.parametrize("audit", ["loose", "Strict", "", True, 0.5])
def test_another_audit_is_refused(engine: Engine, name: StrategyName, audit: Any) -> None:
    """By methods too that do not look at it."""
    with pytest.raises(MethodError, match=r"there is no audit .*; choose one of strict, tolerant, off$"):
        engine.decoder(name, audit=audit)


def test_what_is_shown_is_one_line(engine: Engine) -> None:
    place = engine.spec.verifier.name_or_path
    assert repr(engine) == f"Engine({place!r}, float32 on cpu, ShallowDrafter, audit='strict', backend='eager')"
    assert repr(engine.verifier) == f"Verifier({place!r}, LlamaForCausalLM, float32 on cpu)"
    assert repr(engine.decoder("three_tier", audit="off")) == "Decoder(three_tier, audit='off', greedy, ShallowDrafter)"
    sampled = engine.decoder("autoregressive", sampling=Sampling(temperature=1.0))
    assert repr(sampled) == "Decoder(autoregressive, audit='strict', sampling, no drafter)"


def test_settings_come_from_the_spec(engine: Engine) -> None:
    three = engine.decoder().strategy
    assert isinstance(three, ThreeTier)
    assert (three.draft_length, three.max_pending, three.audit, three.tolerance) == (4, 9, "strict", 0.25)
    gates = engine.spec.gates
    assert (three.draft_accept_at, three.draft_stop_below) == (gates.draft_accept_at, gates.draft_stop_below)
    assert three.draft_gate is not None
    assert isinstance(three.rule, CalibratedRule)
    assert (three.rule.accept_at, three.rule.regenerate_at) == (gates.accept_at, gates.regenerate_at)
    two = engine.decoder("speculative").strategy
    assert isinstance(two, Speculative)
    assert (two.draft_length, two.stop_below) == (4, 0.3)
    assert isinstance(engine.decoder("autoregressive").strategy, Autoregressive)
    assert engine.decoder("autoregressive").drafter is None


def test_the_audit_may_be_chosen(engine: Engine) -> None:
    assert engine.decoder("three_tier", audit="off").strategy.audit == "off"
    assert engine.decoder("three_tier").strategy.audit == "strict"


def test_the_adapter_is_on_the_slim_path(tmp_path: Path, tiny_verifier: Verifier) -> None:
    engine = load_engine(shipped(tmp_path, tiny_verifier))
    slim, full = (
        [part for sublayer in sublayers for part in sublayer.layer.modules() if isinstance(part, LoRALinear)]
        for sublayers in (engine.routed.slim_sublayers, engine.routed.full_sublayers)
    )
    assert slim
    assert not full


def test_another_verifier_is_refused(tmp_path: Path, tiny_verifier: Verifier) -> None:
    path = shipped(tmp_path, tiny_verifier)
    other = save_tiny(tmp_path / "other", vocab=32)
    with pytest.raises(SpecError, match=r"vocab_size 24\).*vocab_size 32\); load the verifier it was made for"):
        load_engine(path, verifier=str(other))


def test_another_tokenizer_is_refused(tmp_path: Path, tiny_verifier: Verifier) -> None:
    path = shipped(tmp_path, tiny_verifier)
    other = save_tiny(tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(SpecError, match="tokenizer_sha256"):
        load_engine(path, verifier=str(other))


def test_a_spec_with_foreign_tensors_is_refused(tmp_path: Path, tiny_verifier: Verifier) -> None:
    path = shipped(tmp_path, tiny_verifier)
    (tmp_path / "adapter.safetensors").write_bytes(b"another")
    with pytest.raises(SpecError, match=r"adapter\.safetensors is not the tensor file"):
        load_engine(path)


def test_a_causal_drafter_from_a_folder(tiny_folder: TinyFolder, tiny_verifier: Verifier, tmp_path: Path) -> None:
    spec = RoutingSpec(
        verifier=tiny_verifier.ref,
        draft=CausalLMDraft(name_or_path=str(tiny_folder)),
        route=Route(),
        gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    )
    engine = assemble(spec, tmp_path, tiny_verifier)
    assert isinstance(engine.drafter, CausalDrafter)
    out = engine.decoder().generate(PROMPT, 24)
    assert out.tokens == transformers_text(tiny_model(), PROMPT, 24, tiny_verifier.eos_ids)
    assert out.counts.rejected == 0


def test_a_certificate_is_not_stretched_to_other_settings(engine: Engine) -> None:
    lossy = dataclasses.replace(
        engine, spec=engine.spec.model_copy(update={"decoding": Decoding(audit="off", temperature_scope=[0.0, 0.7])})
    )
    for sampling in (None, Sampling(), Sampling(temperature=0.7, seed=3)):
        lossy.decoder(sampling=sampling)
    for sampling in (Sampling(temperature=1.0), Sampling(top_p=0.9), Sampling(temperature=0.7, top_k=4)):
        with pytest.raises(SamplingError, match=r"holds at temperature \[0.0, 0.7\]"):
            lossy.decoder(sampling=sampling)
        lossy.decoder(audit="strict", sampling=sampling)  # exact, whatever the settings
        lossy.decoder("speculative", sampling=sampling)
        engine.decoder(sampling=sampling)
    with pytest.raises(SamplingError, match="without other settings"):
        lossy.decoder(processors=[TopKLogitsWarper(3)])


@pytest.mark.parametrize("way", ["generate", "stream", "batch"])
def test_a_text_longer_than_the_certified_ones_is_said_once(engine: Engine, way: str) -> None:
    certified = make_certificate(max_new_tokens=4)
    spec = engine.spec.model_copy(update={"decoding": Decoding(audit="off"), "certificate": certified})
    lossy = dataclasses.replace(engine, spec=spec)

    def decode(decoder: Decoder, tokens: int) -> None:
        if way == "generate":
            decoder.generate(PROMPT, tokens)
        elif way == "stream":
            list(decoder.stream(PROMPT, tokens))
        else:
            decoder.generate_batch([PROMPT, PROMPT], tokens)

    decoder = lossy.decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(decoder, 4)
        for exact in (lossy.decoder(audit="strict"), lossy.decoder("speculative"), engine.decoder()):
            decode(exact, 5)
    with pytest.warns(CertificateWarning, match="of at most 4 new tokens, and 5 are asked for") as told:
        decode(decoder, 5)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(decoder, 6)
