"""Tiny verifiers on disk, of sizes that every backend runs, with engines that read their layers for each pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import EOS, LAYERS, constant_gate, make_model, tiny_config, tiny_tokenizer
from viasd_calib.choices import Backend
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.models import load_verifier
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.offload.install import ColdSublayers
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.parts.adapter import adapted_layers, adapter_ref, adapter_tensors, save_adapter
from viasd_calib.slim.parts.bridges import bridges_ref, new_bridges, save_bridges
from viasd_calib.spec import (
    AdapterKind,
    Decoding,
    DType,
    Gates,
    LowBitWeights,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    save_spec,
)

NO_KERNELS = why_no_kernels(torch.device("cpu"), torch.bfloat16)
NATIVE = pytest.param(
    "native", "bfloat16", marks=pytest.mark.skipif(NO_KERNELS is not None, reason=f"no kernels: {NO_KERNELS}")
)
EXACT = [("eager", "float32"), NATIVE]
"""Backends and number formats in which layers that are read give the very bits of those in memory."""

ALL = [*range(LAYERS)]
LOW_BITS = Route(low_bit=LowBitWeights(attention={"8": ALL}, mlp={"8": ALL[::2], "4": ALL[1::2]}, head=8))
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.12}


def save_verifier(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny verifier with its tokenizer, as ``save_pretrained`` writes it."""
    torch.manual_seed(3)
    model = make_model(tiny_config(family, **{**SIZES, "eos_token_id": EOS, **changes}))
    model.to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_spec(verifier: Path, route: Route, **entries: Any) -> Path:
    """A spec in the verifier's folder whose gates trust q' part of the time."""
    path = verifier / "routing.json"
    document: dict[str, Any] = {
        "verifier": load_verifier(str(verifier), layers=False).ref,
        "draft": PromptLookupDraft(),
        "route": route,
        "decoding": Decoding(max_pending=16, draft_length=3, audit="strict"),
        "gates": Gates(slim=constant_gate("slim_margin", 0.0), accept_at=0.4, regenerate_at=0.4),
    }
    save_spec(RoutingSpec(**{**document, **entries}), path)
    return path


def with_bridges(folder: Path, route: Route, carry: bool = False) -> Route:
    """The same route with random bridges, whose tensors are written to ``folder``."""
    bridges = new_bridges(route, SIZES["hidden_size"], None, carry)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in bridges.state_dict().values():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    save_bridges(bridges, folder / "bridges.safetensors")
    entry = bridges_ref(folder / "bridges.safetensors", folder, None, carry)
    return route.model_copy(update={"bridges": entry})


def with_adapter(
    folder: Path,
    route: Route,
    kind: AdapterKind,
    folded: bool = False,
    seed: int = 1,
    products: Sequence[str] = ("q_proj", "down_proj"),
) -> Route:
    """The same route with an adapter whose products, or norms, are random; its tensors are written to ``folder``."""
    rank, targets = (None, ["input_layernorm"]) if kind == "norms" else (2, [*products])
    alpha = None if rank is None else 2 * rank
    layers = adapted_layers(load_verifier(str(folder)).model.get_decoder().layers, rank, alpha, targets, kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(layers).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator).to(torch.bfloat16))
    path = folder / "adapter.safetensors"
    save_adapter(layers, route, path)
    entry = adapter_ref(path, folder, rank, alpha, targets, kind=kind, folded=folded)
    return route.model_copy(update={"adapter": entry})


def engine(spec: Path, offload: Offload | None = None, dtype: DType = "float32", backend: Backend = "eager") -> Engine:
    return load_engine(spec, dtype=dtype, backend=backend, offload=offload)


def cold(found: Engine) -> ColdSublayers:
    """What is read for each pass of an engine that has such sublayers."""
    assert found.routed.cold is not None
    return found.routed.cold


def text(seed: int, length: int) -> Tensor:
    """Token ids [length], none of them special."""
    return torch.randint(6, 24, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(found: Engine, ids: Tensor, width: int, slim: bool = False) -> Tensor:
    """Logits [length, vocabulary] of passes over so many tokens each."""
    routed = found.routed
    row, rows = routed.new_cache(len(ids)).rows()[0], []
    for start in range(0, len(ids), width):
        some = ids[None, start : start + width]
        window = row.window(start, some.shape[1])
        last = (routed.slim if slim else routed.full)(some, window).last
        rows.append((routed.slim_logits if slim else routed.logits)(last)[0])
    return torch.cat(rows)


def texts(found: Engine, method: str, prompts: list[Tensor], count: int = 24) -> list[list[int]]:
    """What a method decodes after each prompt, alone."""
    return [list(found.decoder(method).generate(one.tolist(), max_new_tokens=count).tokens) for one in prompts]


def started(code: str, spec: Path, last: int) -> subprocess.Popen[str]:
    """A process of its own that runs some code, with a spec and a number as its words."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(spec), str(last)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
