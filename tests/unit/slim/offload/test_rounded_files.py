"""Low-bit copies on disk: what is read is what rounding gives, it is rounded once, and nothing damaged is believed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.offload_cases import (
    ALL,
    LOW_BITS,
    SIZES,
    engine,
    logits,
    save_verifier,
    started,
    text,
    with_adapter,
    write_spec,
)
from viasd_calib.errors import JobWarning, StorageError
from viasd_calib.models import load_verifier
from viasd_calib.models.offloaded import layer_weights, without_memory
from viasd_calib.slim.low_bit import Bits, round_weight
from viasd_calib.slim.offload import rounded_files
from viasd_calib.slim.offload.rounded_files import rounded_folder, rounded_weights
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.parts.head_vocab import save_head_ids
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, save_widths
from viasd_calib.spec import LowBitWeights, Route

pytestmark = pytest.mark.usefixtures("empty_cache")
FILES = 2 * len(ALL) + 1


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "low-bits").rglob("*.bin"))


def refuse(*_: Any) -> Any:
    raise AssertionError("a weight is rounded that is kept already")


@given(out=st.integers(1, 40), inputs=st.integers(1, 200), bits=st.sampled_from([8, 4]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_is_what_rounding_gives(
    tmp_path: Path, out: int, inputs: int, bits: Bits, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))
    linear = nn.Linear(inputs, out, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model = load_verifier(str(verifier(tmp_path)), layers=False).model
    name = f"{out}-{inputs}-{seed}"
    with monkeypatch.context() as patch:
        for _ in range(2):
            (found,) = rounded_weights(model, name, {"layer": linear}, bits)
            wanted = round_weight(weight, bits)
            assert found.bits == bits
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[1:], wanted[1:], strict=True))
            assert found.codes.is_contiguous()
            linear.weight = nn.Parameter(without_memory(weight), requires_grad=False)
            patch.setattr(rounded_files, "round_weight", refuse)


def verifier(folder: Path) -> Path:
    return folder / "q" if (folder / "q").is_dir() else save_verifier(folder / "q")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_verifier_is_rounded_once(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """Its slim passes are those of the same route in memory, bit for bit; a second load reads no plain weight."""
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    wanted = logits(engine(spec, None, dtype), text(0, 9), 9, slim=True)
    assert not kept(empty_cache), "of a verifier that is in memory nothing is kept"
    assert torch.equal(logits(engine(spec, Offload(), dtype), text(0, 9), 9, slim=True), wanted)
    assert len(kept(empty_cache)) == FILES
    times = [one.stat().st_mtime_ns for one in kept(empty_cache)]
    monkeypatch.setattr(rounded_files, "round_weight", refuse)
    assert torch.equal(logits(engine(spec, Offload(), dtype), text(0, 9), 9, slim=True), wanted)
    assert [one.stat().st_mtime_ns for one in kept(empty_cache)] == times


def test_bits_and_number_formats_have_files_of_their_own(tmp_path: Path, empty_cache: Path) -> None:
    for bits in ("8", "4"):
        entry = LowBitWeights(attention={bits: ALL}, mlp={bits: ALL})  # type: ignore[dict-item]
        spec = write_spec(verifier(tmp_path), Route(low_bit=entry))
        for dtype in ("float32", "bfloat16"):
            wanted = logits(engine(spec, None, dtype), text(0, 9), 9, slim=True)  # type: ignore[arg-type]
            found = logits(engine(spec, Offload(), dtype), text(0, 9), 9, slim=True)  # type: ignore[arg-type]
            assert torch.equal(found, wanted)
    assert len(kept(empty_cache)) == 4 * 2 * len(ALL)


def test_other_weights_of_the_same_shape_are_rounded_anew(tmp_path: Path) -> None:
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    before = logits(engine(spec, Offload()), text(0, 9), 9, slim=True)
    model = load_verifier(str(verifier(tmp_path))).model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)  # type: ignore[union-attr, index]
    model.save_pretrained(verifier(tmp_path))
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    found = logits(engine(spec, Offload()), text(0, 9), 9, slim=True)
    assert torch.equal(found, logits(engine(spec), text(0, 9), 9, slim=True))
    assert not torch.equal(found, before)


def test_a_head_of_fewer_tokens_is_not_taken_for_the_whole(tmp_path: Path, empty_cache: Path) -> None:
    folder = verifier(tmp_path)
    bits = LowBitWeights(attention={"8": ALL}, mlp={"8": ALL}, head=8)
    part = Route(head_vocab=save_head_ids(torch.arange(6, 20), folder / "head.safetensors", folder), low_bit=bits)
    spec = write_spec(folder, part)
    wanted = logits(engine(spec), text(0, 9), 9, slim=True)
    for _ in range(2):
        assert torch.equal(logits(engine(spec, Offload()), text(0, 9), 9, slim=True), wanted)
    assert len(kept(empty_cache)) == 2 * len(ALL)
    whole = write_spec(folder, Route(low_bit=bits))
    wanted = logits(engine(whole), text(0, 9), 9, slim=True)
    assert torch.equal(logits(engine(whole, Offload()), text(0, 9), 9, slim=True), wanted)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[70] ^= 0x55
    path.write_bytes(content)


SOME = LowBitWeights(attention={"8": ALL}, mlp={"8": ALL[:-1:2], "4": ALL[1:-1:2]}, head=8)
PARTS = Route(mlp_skip=ALL[-1:], low_bit=SOME)
"""Low bits beside a sublayer that is left out, which is cold whatever other parts there are."""


def narrow(folder: Path, seed: int) -> Route:
    """A route of low bits, two MLPs of which have half of their neurons, drawn from all."""
    count = SIZES["intermediate_size"]
    drawn = {
        layer: KeptNeurons(torch.randperm(count, generator=torch.Generator().manual_seed(seed + layer)), count // 2)
        for layer in (1, 2)
    }
    return PARTS.model_copy(update={"mlp_keep": save_widths(drawn, folder / "widths.safetensors", folder)})


OTHER_WEIGHTS: dict[str, Callable[[Path, int], Route]] = {
    "folded adapter": lambda folder, seed: with_adapter(folder, PARTS, "lora", True, seed),
    "dora": lambda folder, seed: with_adapter(folder, PARTS, "dora", True, seed),
    "adapter beside them": lambda folder, seed: with_adapter(folder, PARTS, "lora", False, seed),
    "norms": lambda folder, seed: with_adapter(folder, PARTS, "norms", False, seed),
    "narrow MLPs": narrow,
}


@pytest.mark.filterwarnings("error::viasd_calib.errors.JobWarning")
@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_codes_are_kept_of_the_verifiers_own_weights_alone(tmp_path: Path, name: str) -> None:
    """What other parts make of a layer has its shape and its place, and is another weight in each spec."""
    folder, seen = verifier(tmp_path), []
    for seed in (None, 1, 2, None):  # the tensors of both others lie in one file, one after the other
        spec = write_spec(folder, PARTS if seed is None else OTHER_WEIGHTS[name](folder, seed))
        seen.append(logits(engine(spec), text(0, 9), 9, slim=True))
        assert torch.equal(logits(engine(spec, Offload()), text(0, 9), 9, slim=True), seen[-1])
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    "fault",
    [change, lambda path: os.truncate(path, 100), lambda path: path.with_suffix(".json").write_text("{")],
    ids=["changed", "truncated", "description"],
)
def test_a_damaged_copy_is_made_anew(tmp_path: Path, empty_cache: Path, fault: Callable[[Path], Any]) -> None:
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    wanted = logits(engine(spec, Offload()), text(0, 9), 9, slim=True)
    files = kept(empty_cache)
    contents, times = [one.read_bytes() for one in files], [one.stat().st_mtime_ns for one in files]
    fault(files[3])
    with pytest.warns(JobWarning, match=f"{files[3]} is not what was written; it is made anew"):
        assert torch.equal(logits(engine(spec, Offload()), text(0, 9), 9, slim=True), wanted)
    assert [one.read_bytes() for one in kept(empty_cache)] == contents
    assert [one.stat().st_mtime_ns for one in files[:3]] == times[:3]


def test_what_vanishes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    made = rounded_files.sublayer_file

    def removed(*arguments: Any) -> Any:
        file = made(*arguments)
        file.path.unlink()
        return file

    with monkeypatch.context() as patch:
        patch.setattr(rounded_files, "sublayer_file", removed)
        with pytest.raises(StorageError, match=r"cannot read .*layer-000-attention-8\.bin: No such file.*run again"):
            engine(spec, Offload())
    engine(spec, Offload())


def test_a_model_without_a_hash_is_rounded_each_time(tmp_path: Path, empty_cache: Path) -> None:
    model = load_verifier(str(verifier(tmp_path)), layers=False).model
    weights = layer_weights(model)
    assert weights is not None
    weights.sha256 = None
    linear = weights.linears[0]
    (found,) = rounded_weights(model, "layer", {"q": linear}, 8)
    assert torch.equal(found.codes, round_weight(weights.read([linear.weight])[0], 8).codes)
    assert not kept(empty_cache)


LOAD = """
import os, signal, sys
from pathlib import Path
from viasd_calib import load_engine
from viasd_calib.slim.offload import rounded_files
from viasd_calib.slim.offload.settings import Offload

last, made = int(sys.argv[2]), rounded_files.sublayer_file
count = 0

def counted(path, shapes, make):
    global count
    count += 1
    if count == last:
        def make():
            os.kill(os.getpid(), signal.SIGKILL)
    return made(path, shapes, make)

rounded_files.sublayer_file = counted
engine = load_engine(Path(sys.argv[1]), dtype="float32", backend="eager", offload=Offload())
print(engine.decoder("self_speculative").generate([7, 8, 9], max_new_tokens=8).tokens)
"""


def test_rounding_that_was_killed_goes_on(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    process = started(LOAD, spec, 4)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    files = kept(empty_cache)
    assert len(files) == 3
    times = [one.stat().st_mtime_ns for one in files]
    engine(spec, Offload())
    assert [one.stat().st_mtime_ns for one in files] == times
    assert len(kept(empty_cache)) == FILES


def test_two_processes_round_at_once(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(verifier(tmp_path), LOW_BITS)
    processes = [started(LOAD, spec, -1), started(LOAD, spec, -1)]
    outputs = [one.communicate(timeout=120) for one in processes]
    assert [one.returncode for one in processes] == [0, 0], outputs
    wanted = [*engine(spec).decoder("self_speculative").generate([7, 8, 9], max_new_tokens=8).tokens]
    assert [output for output, _ in outputs] == [f"{wanted}\n"] * 2
    assert len(kept(empty_cache)) == FILES
    assert not [path for path in empty_cache.rglob("*") if path.name.endswith(".partial")]


def test_a_folder_is_of_one_model_and_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {rounded_folder(digest, dtype) for digest in "ab" for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(rounded_files, "ROUNDING", rounded_files.ROUNDING + 1)
    found.add(rounded_folder("a", torch.float32))
    assert len(found) == 5
