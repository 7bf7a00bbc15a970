"""Engines that read q's layers for each pass: the logits and texts of the same spec in memory."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.offload_cases import (
    EXACT,
    LOW_BITS,
    cold,
    engine,
    logits,
    save_verifier,
    text,
    texts,
    with_adapter,
    with_bridges,
    write_spec,
)
from tests.tiny import tiny_shallow, tiny_shape
from viasd_calib.choices import Backend
from viasd_calib.decoding.engine import Engine, assemble, load_engine
from viasd_calib.draft.shallow import save_shallow
from viasd_calib.errors import MachineWarning, ModelError
from viasd_calib.models import load_verifier
from viasd_calib.models.offloaded import is_without_memory, layer_weights
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.offload.install import LeftOutLinear, StreamedLinear
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.onednn_linear import why_not_packed
from viasd_calib.slim.plan import MODULES
from viasd_calib.spec import DType, LowBitWeights, OffloadRef, Route, ShallowDraft, load_spec, tensor_file

NOT_PACKED = why_not_packed(torch.device("cpu"), torch.bfloat16)
PACKED = pytest.param(
    "packed", "bfloat16", marks=pytest.mark.skipif(NOT_PACKED is not None, reason=f"not packed: {NOT_PACKED}")
)
FAMILIES = ["llama", "mistral_sliding", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
METHODS = ["autoregressive", "speculative", "self_speculative", "three_tier"]

DISK = Offload()
Routes = Callable[[Path], Route]
SKIPS = Route(attention_skip=[1, 2], mlp_skip=[1, 3])
ROUTES: dict[str, Routes] = {
    "low bits": lambda _: LOW_BITS,
    "skips": lambda _: SKIPS,
    "skips with bridges": lambda folder: with_bridges(folder, SKIPS, carry=True),
    "skips and low bits": lambda _: SKIPS.model_copy(
        update={"low_bit": LowBitWeights(attention={"8": [0]}, mlp={"4": [0]})}
    ),
    "low bits and other norms": lambda folder: with_adapter(folder, LOW_BITS, "norms"),
    "one cold sublayer": lambda _: Route(mlp_skip=[2]),
    "two": lambda _: Route(attention_skip=[3], mlp_skip=[0]),
    "three": lambda _: Route(attention_skip=[0, 3], mlp_skip=[1]),
}
COUNTS = {"low bits": 8, "low bits and other norms": 8, "skips": 4, "skips with bridges": 4, "skips and low bits": 6}
COUNTS |= {"one cold sublayer": 1, "two": 2, "three": 3}

pytestmark = pytest.mark.usefixtures("empty_cache")


def both(spec: Path, dtype: DType, backend: Backend, offload: Offload = DISK) -> tuple[Engine, Engine]:
    """The same spec with its layers in memory, and read for each pass."""
    return engine(spec, None, dtype, backend), engine(spec, offload, dtype, backend)


def assert_same(kept: Engine, read: Engine, long: int = 150) -> None:
    """Logits of q and q', of narrow passes and of a wide one, bit for bit."""
    ids = text(0, long)
    for slim in (False, True):
        for width, some in ((5, ids[:23]), (long, ids)):
            found = logits(read, some, width, slim)
            assert found.isfinite().any()
            assert torch.equal(found, logits(kept, some, width, slim)), f"slim {slim}, passes of {width}"


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_texts_are_those_in_memory(tmp_path: Path, family: str, backend: Backend, dtype: DType) -> None:
    """Of families with tied and untied embeddings, biases, norms of heads, and layers that are one product."""
    kept, read = both(write_spec(save_verifier(tmp_path / "q", family), LOW_BITS), dtype, backend)
    assert_same(kept, read)
    prompts = [text(1, 7), text(2, 90)]
    for method in METHODS:
        assert texts(read, method, prompts) == texts(kept, method, prompts)


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("name", ROUTES)
def test_every_route(tmp_path: Path, name: str, backend: Backend, dtype: DType) -> None:
    """Few and many cold sublayers, an odd number of them and an even one, all of them or every few."""
    folder = save_verifier(tmp_path / "q", "qwen2")
    kept, read = both(write_spec(folder, ROUTES[name](folder)), dtype, backend)
    assert len(cold(read).positions) == COUNTS[name]
    assert_same(kept, read)
    for method in METHODS:
        assert texts(read, method, [text(1, 7)]) == texts(kept, method, [text(1, 7)])


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tmp_path: Path, tied: bool, backend: Backend, dtype: DType) -> None:
    kept, read = both(write_spec(save_verifier(tmp_path / "q", tie_word_embeddings=tied), LOW_BITS), dtype, backend)
    assert_same(kept, read)


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("method", ["autoregressive", "three_tier"])
def test_texts_together(tmp_path: Path, method: str, backend: Backend, dtype: DType) -> None:
    kept, read = both(write_spec(save_verifier(tmp_path / "q"), LOW_BITS), dtype, backend)
    prompts = [text(seed, length).tolist() for seed, length in ((1, 3), (2, 40), (3, 90), (4, 11), (5, 1))]
    wanted = kept.decoder(method).generate_batch(prompts, max_new_tokens=20, batch_size=3)
    found = read.decoder(method).generate_batch(prompts, max_new_tokens=20, batch_size=3)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_layers_in_the_memory_of_the_host(tmp_path: Path, backend: Backend, dtype: DType) -> None:
    """Kind ``cpu``, and a disk that is slowed down: only times differ."""
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    kept, read = both(spec, dtype, backend, Offload("cpu"))
    assert_same(kept, read)
    assert_same(kept, engine(spec, Offload("disk", bytes_per_second=1e9), dtype, backend), long=20)


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_some_layers_stay_in_memory(tmp_path: Path, resident: int, backend: Backend, dtype: DType) -> None:
    """As many as fit: with room for so many more layers than without them, so many layers are not read."""
    spec = write_spec(save_verifier(tmp_path / "q", num_hidden_layers=4), LOW_BITS)
    least = cold(engine(spec, Offload(), dtype, backend)).residency
    memory = least.resident_bytes + resident * least.cold_bytes // 4
    kept, read = both(spec, dtype, backend, Offload(memory=memory))
    assert len(cold(read).residency.cold) == 4 - resident
    assert cold(read).residency.resident_bytes <= memory
    assert_same(kept, read)


def test_what_low_bits_gain_where_layers_are_read(tmp_path: Path) -> None:
    """Without kernels for them they are no faster than others in memory, but are not waited for."""
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    with pytest.warns(MachineWarning, match="a slim pass gains nothing here"):
        engine(spec)
    with pytest.warns(MachineWarning, match="a slim pass gains here what is not read for it"):
        engine(spec, DISK)


def test_all_layers_stay_where_they_fit(tmp_path: Path) -> None:
    kept, read = both(write_spec(save_verifier(tmp_path / "q"), LOW_BITS), "float32", "eager", Offload(memory=10**9))
    assert read.routed.cold is None
    assert_same(kept, read)


@pytest.mark.parametrize(("backend", "dtype"), [PACKED])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_packed_is_as_near(tmp_path: Path, family: str, backend: Backend, dtype: DType) -> None:
    """Cold layers run as plain ones beside packed ones: both round to bfloat16, and sums differ in their order."""
    kept, read = both(write_spec(save_verifier(tmp_path / "q", family), LOW_BITS), dtype, backend)
    for slim in (False, True):
        wanted = logits(kept, text(0, 90), 90, slim).float()
        found = logits(read, text(0, 90), 90, slim).float()
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1 * float(wanted.std()))


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_a_shallow_drafter_copies_layers_that_are_not_in_memory(tmp_path: Path, backend: Backend, dtype: DType) -> None:
    folder = save_verifier(tmp_path / "q")
    drafter = tiny_shallow(RoutedModel(load_verifier(str(folder)).model))
    save_shallow(drafter, folder / "draft.safetensors")
    draft = ShallowDraft(**tiny_shape().model_dump(), tensors=tensor_file(folder / "draft.safetensors", folder))
    kept, read = both(write_spec(folder, LOW_BITS, draft=draft), dtype, backend)
    for method in ("speculative", "three_tier"):
        assert texts(read, method, [text(1, 7)]) == texts(kept, method, [text(1, 7)])


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_only_what_runs_takes_memory(tmp_path: Path, name: str, backend: Backend, dtype: DType) -> None:
    """After decoding: no plain or packed copy of a cold layer anywhere, and nothing of q twice."""
    folder = save_verifier(tmp_path / "q", "qwen2")
    read = engine(write_spec(folder, ROUTES[name](folder)), Offload(), dtype, backend)
    texts(read, "three_tier", [text(1, 7)])
    routed, streamed = read.routed, cold(read)
    buffers = {streamed.stream.buffer(number).untyped_storage().data_ptr() for number in (0, 1)}
    for kind, index in streamed.positions:
        for layer, inside in ((routed.layers[index], True), (routed.slim_layers[index], False)):
            for one in layer.get_submodule(MODULES[kind]).modules():
                if isinstance(one, NativeLinear) and one.packed.bits == 16:
                    assert one.packed.tiles.untyped_storage().data_ptr() in buffers
                if isinstance(one, nn.Linear):
                    assert one.weight.untyped_storage().data_ptr() in buffers
                if isinstance(one, LeftOutLinear):
                    assert not inside
                    with pytest.raises(ModelError, match="skips"):
                        one(torch.ones(1, 64))
    gc.collect()
    alive = [one for one in gc.get_objects() if issubclass(type(one), nn.Linear) and is_without_memory(one.weight)]
    assert not alive
    if backend == "native":  # plain weights of resident layers go once they are packed
        inner = [one for layer in routed.layers for one in layer.modules() if isinstance(one, nn.Linear)]
        assert not inner


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_it_cannot_be_saved(tmp_path: Path, backend: Backend, dtype: DType) -> None:
    read = engine(write_spec(save_verifier(tmp_path / "q"), LOW_BITS), Offload(), dtype, backend)
    with pytest.raises(ModelError, match=r"cannot be saved; load the model anew"):
        read.verifier.model.save_pretrained(tmp_path / "saved")
    assert not [*(tmp_path / "saved").glob("*.safetensors")]
    for layer in read.routed.layers:
        with pytest.raises(ModelError, match="cannot be saved"):
            layer.state_dict()


def test_a_failed_forward_gives_its_buffer_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors inside a cold sublayer, and an interrupt, which PyTorch's hooks do not see."""
    kept, read = both(write_spec(save_verifier(tmp_path / "q"), LOW_BITS), "float32", "eager")
    ids = text(0, 9)

    def fail(error: BaseException) -> None:
        def forward(self: nn.Module, _: torch.Tensor) -> torch.Tensor:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(StreamedLinear, "forward", forward)
            with pytest.raises(type(error)):
                logits(read, ids, 9)

    for error in (RuntimeError("no"), KeyboardInterrupt()):
        fail(error)
        assert torch.equal(logits(read, ids, 9), logits(kept, ids, 9))


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_threads_decode_with_one_engine(tmp_path: Path, backend: Backend, dtype: DType) -> None:
    kept, read = both(write_spec(save_verifier(tmp_path / "q"), LOW_BITS), dtype, backend)
    prompts = [text(seed, 9 + 40 * seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(texts, read, method, [one]) for one in prompts for method in METHODS]
        found = [job.result(120) for job in jobs]
    assert found == [texts(kept, method, [one]) for one in prompts for method in METHODS]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")
def test_files_and_thread_go_with_the_engine(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    others = {*threading.enumerate()}

    def ended() -> None:
        gc.collect()
        for thread in {*threading.enumerate()} - others:
            thread.join(20)
            assert not thread.is_alive()
        gc.collect()

    engine(spec, Offload())
    ended()
    before = open_files(empty_cache)
    read = engine(spec, Offload())
    texts(read, "three_tier", [text(1, 7)])
    assert open_files(empty_cache) == before + 8
    del read
    ended()
    assert open_files(empty_cache) == before


def open_files(folder: Path) -> int:
    """How many files in a folder this process holds open."""
    links = [Path("/proc/self/fd") / one for one in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(one).startswith(str(folder)) for one in links)


@pytest.mark.parametrize(
    ("offload", "device", "backend", "message"),
    [
        (Offload("disc"), "cpu", None, "offload is 'disc'; give one of disk, cpu"),  # type: ignore[arg-type]
        (Offload(memory=0), "cpu", None, "memory is 0; give a whole number, at least 1"),
        (Offload(bytes_per_second=0.0), "cpu", None, "bytes_per_second is 0.0; give a finite number above 0"),
        (Offload(), "cpu", "compiled", "backend compiled cannot read layers for each pass; choose another"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(
    tmp_path: Path, offload: Offload, device: str, backend: Backend | None, message: str
) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    with pytest.raises(ModelError, match=message):
        load_engine(spec, offload=offload, device=device, backend=backend, load=load)  # type: ignore[arg-type]


def test_too_little_memory_names_both_numbers(tmp_path: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    needed = cold(engine(spec, Offload())).residency.resident_bytes
    with pytest.raises(ModelError, match=f"takes {needed:,} bytes, and --memory allows {needed - 1:,}; allow more"):
        engine(spec, Offload(memory=needed - 1))


def test_a_route_that_runs_everything_leaves_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"runs all of the full one's own sublayers.*leave out --offload"):
        engine(write_spec(save_verifier(tmp_path / "q"), Route()), Offload())


def test_layers_and_offload_go_together(tmp_path: Path) -> None:
    """A verifier without its layers decodes in no engine that does not read them; one with them needs no reading."""
    path = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    spec = load_spec(path)
    without = load_verifier(str(tmp_path / "q"), layers=False)
    with pytest.raises(ModelError, match=r"loaded without its layers.*give load_engine an Offload"):
        assemble(spec, path.parent, without)
    with pytest.raises(ModelError, match="loaded with its layers; load it with layers=False"):
        assemble(spec, path.parent, load_verifier(str(tmp_path / "q")), offload=Offload())


def test_weights_without_a_hash_are_refused(tmp_path: Path) -> None:
    path = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    spec = load_spec(path)
    without = load_verifier(str(tmp_path / "q"), layers=False)
    weights = layer_weights(without.model)
    assert weights is not None
    weights.sha256 = None
    spec = spec.model_copy(update={"verifier": spec.verifier.model_copy(update={"weights_sha256": None})})
    with pytest.raises(ModelError, match="no hash to keep them under; give a folder"):
        assemble(spec, path.parent, without, offload=Offload())


def test_an_engine_reads_layers_as_its_spec_says_unless_told_otherwise(tmp_path: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "verifier"), LOW_BITS, offload=OffloadRef(kind="cpu", memory=10**9))
    followed = load_engine(spec, backend="eager")
    assert followed.routed.cold is None, "everything fits into what the spec allows"
    spec = write_spec(tmp_path / "verifier", LOW_BITS, offload=OffloadRef(kind="cpu"))
    assert cold(load_engine(spec, backend="eager")).offload == Offload("cpu")
    assert cold(load_engine(spec, backend="eager", offload=DISK)).offload == DISK
    assert load_engine(spec, backend="eager", offload="none").routed.cold is None


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
@pytest.mark.parametrize("folded", [False, True], ids=["beside", "folded"])
def test_an_adapter_stays_on_layers_in_memory(tmp_path: Path, folded: bool, backend: Backend, dtype: DType) -> None:
    """Sublayers that are skipped are read; their adapter is never run."""
    verifier = save_verifier(tmp_path / "q")
    route = with_adapter(verifier, SKIPS, "lora", folded, seed=2)
    kept, read = both(write_spec(verifier, route), dtype, backend)
    assert len(cold(read).positions) == COUNTS["skips"]
    assert_same(kept, read)
