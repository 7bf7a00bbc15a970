"""Engines are shared by threads, loaded by processes, and never drop anything out."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_model, save_tiny, tiny_config, tiny_model, tiny_spec
from viasd_calib.choices import BACKENDS, Backend
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.quantised import quantise_linears
from viasd_calib.errors import ModelError
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.onednn_linear import can_pack, pack_linears
from viasd_calib.spec import DType

MEND = "each process loads its own; give it the path of the spec, and call load_engine there"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_is_neither_pickled_nor_copied(tmp_path: Path, backend: Backend) -> None:
    if backend == "packed" and not can_pack(torch.device("cpu"), torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    dtype: DType = "bfloat16" if backend == "native" else "float32"
    if backend == "native" and why_no_kernels(torch.device("cpu"), torch.bfloat16) is not None:
        pytest.skip("the kernels do not run here")
    save_tiny(tmp_path / "model")
    engine = load_engine(tiny_spec(tmp_path / "model", tmp_path), backend=backend, dtype=dtype)
    ways: list[Callable[[Any], object]] = [pickle.dumps, copy.deepcopy]
    for way in ways:
        for thing in (engine, engine.decoder(audit="strict")):
            with pytest.raises(ModelError, match=f"{type(thing).__name__} cannot be pickled or copied: .*{MEND}"):
                way(thing)
        if backend != "eager":
            with pytest.raises(ModelError, match="cannot be pickled or copied"):
                way(engine.routed)
    other: Engine = copy.copy(engine)
    assert other.routed is engine.routed
    assert dataclasses.replace(engine, backend="eager").routed is engine.routed


def test_weights_that_cannot_be_saved_are_not_left_out_silently() -> None:
    packed, quantised = (make_model(tiny_config(hidden_size=32)) for _ in range(2))
    pack_linears([packed])
    quantise_linears([quantised], "int8")
    for model in (packed, quantised):
        with pytest.raises(ModelError, match=r"weights of a \w+Linear cannot be saved; load the model anew"):
            model.state_dict()
    with pytest.raises(ModelError, match="OneDNNLinear cannot be pickled or copied"):
        copy.deepcopy(packed)


def test_a_shallow_copy_shares_graphs_and_memory() -> None:
    model = CompiledModel(tiny_model(), compiler=lambda run: run)
    assert copy.copy(model)._graphs is model._graphs


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_training_mode_is_refused_where_something_would_drop_out(family: str) -> None:
    """By attention itself, or by a module; of the verifier or of the draft model."""
    dropping = make_model(tiny_config(family, attention_dropout=0.1))
    plain = make_model(tiny_config())
    for verifier, drafter in ((dropping, plain), (plain, dropping)):
        decoder = Decoder(RoutedModel(verifier), CausalDrafter(RoutedModel(drafter), 24), Speculative(3))
        expected = decoder.generate([5, 6], 6)
        dropping.train()
        runs: list[Callable[[Decoder], object]] = [
            lambda one: one.generate([5, 6], 6),
            lambda one: next(one.stream([5, 6], 6)),
            lambda one: one.generate_batch([[5, 6]], 6),
        ]
        for run in runs:
            with pytest.raises(ModelError, match=r"ForCausalLM is in training mode, .* call eval\(\) on it before"):
                run(decoder)
        dropping.eval()
        plain.train()  # nothing drops out of it
        assert decoder.generate([5, 6], 6) == expected
        plain.eval()
