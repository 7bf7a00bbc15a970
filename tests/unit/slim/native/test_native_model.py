"""Backend ``native``: the same model, passes whose width does not matter, and texts that are q's own in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY_FAMILIES, make_model, tiny_config
from viasd_calib.errors import ModelError
from viasd_calib.slim.backends import open_model, prepare
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import round_linears
from viasd_calib.slim.native import library, model
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.native.model import NativeModel
from viasd_calib.slim.native.stack import FAMILIES
from viasd_calib.spec import Route

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
LACKING = why_no_kernels(CPU, DTYPE)
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"the kernels do not run here: {LACKING}")
LENGTH = 40


def opened(family: str, backend: str, route: Route | None = None, bits: int | None = None) -> RoutedModel:
    """A tiny model in bfloat16 with heads that the kernels know."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny = make_model(tiny_config(family, **sizes, head_dim=32, initializer_range=0.08)).to(DTYPE)
    if bits is not None:
        round_linears(tiny.model.layers, bits)  # type: ignore[arg-type]
    found = open_model(tiny, route or Route(), {}, backend)  # type: ignore[arg-type]
    prepare((tiny, *found.slim_networks), backend, CPU, DTYPE)  # type: ignore[arg-type]
    return found


@torch.inference_mode()
def logits_of(routed: RoutedModel, ids: Tensor, width: int, slim: bool = False) -> Tensor:
    """Logits [length, vocabulary] of passes over so many tokens each, float32."""
    row = routed.new_cache(LENGTH).rows()[0]
    found = []
    for start in range(0, ids.shape[1], width):
        some = ids[:, start : start + width]
        window = row.window(start, some.shape[1])
        found.append(routed.logits((routed.slim if slim else routed.full)(some, window).last)[0])
    return torch.cat(found).float()


def text(routed: RoutedModel) -> Tensor:
    return torch.randint(3, routed.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if name.partition("_")[0] in FAMILIES])
def test_it_is_nearer_to_float32_than_pytorch_is(family: str) -> None:
    """It rounds less on the way: its error is at most PyTorch's own in bfloat16, with a quarter of room for chance."""
    native, eager = opened(family, "native"), opened(family, "eager")
    exact = RoutedModel(copy.deepcopy(opened(family, "eager").model).float())
    ids = text(native)
    wanted = logits_of(exact, ids, LENGTH)
    errors = {
        name: (logits_of(one, ids, 5) - wanted).square().mean().sqrt()
        for name, one in (("native", native), ("eager", eager))
    }
    assert errors["native"] <= 1.25 * errors["eager"]
    assert wanted.std() > 10 * errors["native"]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("width", [2, 4, 7, 16, 40])
def test_the_width_of_a_pass_does_not_matter(width: int, bits: int | None) -> None:
    native = opened("qwen2", "native", bits=bits)
    ids = text(native)
    assert torch.equal(logits_of(native, ids, width), logits_of(native, ids, 1))


def test_skipped_sublayers_are_left_out() -> None:
    route = Route(attention_skip=[1], mlp_skip=[1, 2])
    native, eager = opened("llama", "native", route), opened("llama", "eager", route)
    ids = text(native)
    found, wanted = logits_of(native, ids, 4, slim=True), logits_of(eager, ids, 4, slim=True)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.std()))
    assert not torch.allclose(found, logits_of(native, ids, 4), atol=0.05 * float(wanted.std()))


def test_taps_are_the_stream_between_layers() -> None:
    native, eager = opened("llama", "native"), opened("llama", "eager")
    ids, taps = text(native)[:, :6], (0, 2, 4)
    with torch.inference_mode():
        found, wanted = (one.full(ids, one.new_cache(6).rows()[0].window(0, 6), taps) for one in (native, eager))
    assert found.tapped.shape == wanted.tapped.shape == (1, 6, 3, 64)
    torch.testing.assert_close(found.tapped.float(), wanted.tapped.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_families_that_the_kernels_do_not_know_run_as_modules(family: str) -> None:
    native, eager = opened(family, "native"), opened(family, "eager")
    ids = text(native)
    wanted = logits_of(eager, ids, 4)
    torch.testing.assert_close(logits_of(native, ids, 4), wanted, rtol=0.1, atol=0.1 * float(wanted.std()))


@pytest.mark.parametrize(
    ("family", "backend", "bits", "same"),
    [("llama", "native", 8, True), ("qwen2", "native", None, True), ("llama", "eager", None, False),
     ("gemma2", "native", None, False)],
)  # fmt: skip
def test_a_batch_is_the_same_only_where_the_kernels_run_all(
    family: str, backend: str, bits: int | None, same: bool
) -> None:
    assert opened(family, backend, bits=bits).same_in_batches is same


def test_a_module_between_the_kernels_makes_a_batch_another() -> None:
    """Linear layers of PyTorch's own round otherwise for other numbers of rows."""
    native = opened("llama", "native")
    native.model.lm_head = torch.nn.Linear(64, native.config.vocab_size, bias=False).to(DTYPE)
    assert not native.same_in_batches


@pytest.mark.parametrize("taps", [(), (0, 3)])
def test_wide_passes_run_in_pieces(monkeypatch: pytest.MonkeyPatch, taps: tuple[int, ...]) -> None:
    """A prompt's pass gives, bit for bit, what passes of single tokens give."""
    native = opened("mistral_sliding", "native")
    ids = text(native)
    row = native.new_cache(LENGTH).rows()[0]
    with torch.inference_mode():
        whole = native.full(ids, row.window(0, LENGTH), taps)
        monkeypatch.setattr(model, "WIDEST", 7)
        pieces = native.full(ids, native.new_cache(LENGTH).rows()[0].window(0, LENGTH), taps)
    assert torch.equal(whole.last, pieces.last)
    assert torch.equal(whole.tapped, pieces.tapped)
    assert whole.tapped.shape == (1, LENGTH, len(taps), 64)


def test_rotary_embeddings_of_longer_texts_begin_as_those_of_shorter_ones() -> None:
    """The table grows with the texts, and is what it would have been at once."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 1024}
    short, long = (NativeModel(make_model(tiny_config(**sizes)).to(DTYPE)) for _ in range(2))
    whole = long.rotary_at("full_attention", 0, 1000)
    for start, width in ((0, 8), (250, 20), (990, 10)):
        for found, wanted in zip(short.rotary_at("full_attention", start, width), whole, strict=True):
            assert torch.equal(found, wanted[start : start + width])


@pytest.mark.parametrize(("family", "bits"), [("qwen2", None), ("qwen2", 8), ("qwen2", 4), ("mistral_sliding", 8)])
@pytest.mark.parametrize("widest", [64, 5])
def test_a_text_gives_the_same_alone_and_beside_others(
    family: str, bits: int | None, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: states, taps, and what is written into the cache; texts of a pass differ in place and in width."""
    monkeypatch.setattr(model, "WIDEST", widest)
    native = opened(family, "native", bits=bits)
    ids = torch.randint(3, native.config.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    starts, widths, width, taps = [12, 30, 0], [4, 1, 3], 4, (0, 2)
    cache = native.new_cache(LENGTH, batch=3)
    alone = [native.new_cache(LENGTH) for _ in range(3)]
    rows = torch.tensor([2, 0, 1])  # of the cache, for each text of the pass
    some = torch.stack([ids[n, s : s + width] for n, s in enumerate(starts)])
    for n, w in enumerate(widths):
        some[n, w:] = some[n, w - 1]
    with torch.inference_mode():
        native.full(ids[[1, 2, 0], :32], CacheWindow(cache, 0, 32, 32))
        window = CacheWindow(cache, torch.tensor(starts), width, LENGTH, torch.tensor(widths), rows)
        together = native.full(some, window, taps)
        for n, (start, w) in enumerate(zip(starts, widths, strict=True)):
            native.full(ids[n : n + 1, :32], alone[n].rows()[0].window(0, 32))
            single = native.full(some[n : n + 1, :w], alone[n].rows()[0].window(start, w), taps)
            assert torch.equal(together.last[n, :w], single.last[0])
            assert torch.equal(together.tapped[n, :w], single.tapped[0])
            assert torch.equal(together.last[n, w:], single.last[0, -1:].expand(width - w, -1))
            assert torch.equal(cache.keys[:, rows[n], :, :32], alone[n].keys[:, 0, :, :32])
            assert torch.equal(cache.values[:, rows[n], :, :32], alone[n].values[:, 0, :, :32])


def test_batches_of_models_that_the_kernels_do_not_know_run_as_modules() -> None:
    native = opened("gemma2", "native")
    ids = text(native)
    alone = logits_of(native, ids, LENGTH)
    with torch.inference_mode():
        window = CacheWindow(native.new_cache(LENGTH, batch=2), 0, LENGTH, LENGTH)
        both = native.logits(native.full(ids.expand(2, -1), window).last).float()
    torch.testing.assert_close(both[0], alone, rtol=0.1, atol=0.1 * float(alone.std()))
    assert torch.equal(both[0], both[1])


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(library, "compiler", lambda: None)
    assert "install g++" in str(why_no_kernels(CPU, DTYPE))
    with pytest.raises(ModelError, match=r"backend native cannot run here: there is no C\+\+ compiler: install g\+\+"):
        prepare([], "native", CPU, DTYPE)


def test_what_the_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "FLAGS", ("-fno-such-flag",))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot compile the kernels .*no-such-flag.*choose another backend"):
        library.kernels.__wrapped__()
    assert not list(tmp_path.rglob("*.so"))
