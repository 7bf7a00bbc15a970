"""Draft models with the verifier's tokenizer and other padding, and with another tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AddedToken

from tests.packing import skip_where_not_packed
from tests.tiny import make_model, propose, tiny_config, tiny_tokenizer, transformers_logits
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.verification import make_sampler
from viasd_calib.draft.base import Drafter, never_stop
from viasd_calib.draft.build import build_drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.errors import DraftWarning, ModelError
from viasd_calib.models import load_verifier
from viasd_calib.passes.requests import finish
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import (
    CausalLMDraft,
    CombinedDraft,
    DraftSpec,
    Gates,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    save_spec,
)

TOKENS, ROWS = 24, 48
"""Tokens of the tokenizer, and rows of the verifier that they are padded to."""
FEWER, MORE = 32, 64
PROMPT = [7, 8, 9, 45]
"""The last one is no token: padding of the verifier, which the narrower draft model does not have."""


def save_model(folder: Path, seed: int, rows: int) -> Path:
    torch.manual_seed(seed)
    model = make_model(tiny_config(vocab=rows, hidden_size=32))
    model.save_pretrained(folder)
    tiny_tokenizer(TOKENS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The verifier, and draft models by their rows."""
    place = tmp_path_factory.mktemp("models")
    return {rows: save_model(place / str(rows), seed, rows) for seed, rows in enumerate([ROWS, FEWER, MORE])}


def engine_with(folders: dict[int, Path], draft: DraftSpec, place: Path, **options: Any) -> Engine:
    spec = RoutingSpec(
        verifier=load_verifier(str(folders[ROWS])).ref,
        draft=draft,
        route=Route(attention_skip=[1], mlp_skip=[2]),
        gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    )
    save_spec(spec, place / "routing.json")
    return load_engine(place / "routing.json", **options)


def narrowed(drafter: Drafter) -> CausalDrafter:
    model = drafter.model if isinstance(drafter, CombinedDrafter) else drafter
    assert isinstance(model, CausalDrafter)
    return model


@pytest.mark.parametrize(
    ("rows", "combined", "quantize", "dtype", "backend"),
    [
        (FEWER, False, None, "float32", "eager"),
        (MORE, False, None, "float32", "packed"),
        (FEWER, True, None, "float32", "packed"),
        (MORE, True, "int4", "float32", "eager"),
        (FEWER, False, "int4", "float32", "eager"),
        (MORE, False, "int8", "bfloat16", "packed"),
        (FEWER, True, "int8", "bfloat16", "packed"),
    ],
)
def test_other_padding_decodes_exactly(
    folders: dict[int, Path], tmp_path: Path, rows: int, combined: bool, quantize: Any, dtype: Any, backend: Any
) -> None:
    skip_where_not_packed(backend, dtype)
    model = CausalLMDraft(name_or_path=str(folders[rows]), quantize=quantize)
    draft: DraftSpec = CombinedDraft(lookup=PromptLookupDraft(min_ngram=2), model=model) if combined else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = engine_with(folders, draft, tmp_path, dtype=dtype, backend=backend)
    for method in ("speculative", "three_tier", "static_ensemble"):
        found = engine.decoder(method).generate(PROMPT, 20)
        assert found.counts.draft_steps > 0
        if dtype == "float32" and method != "static_ensemble":
            assert found.tokens == engine.decoder("autoregressive").generate(PROMPT, 20).tokens
    decoder = engine.decoder("speculative", sampling=Sampling(temperature=1.0, seed=1))
    assert all(token < ROWS for token in decoder.generate(PROMPT, 20).tokens)
    if dtype == "float32":
        prompts = [PROMPT, [3, 40, 5], [11]]
        batched = engine.decoder("three_tier").generate_batch(prompts, 12)
        alone = [engine.decoder("autoregressive").generate(prompt, 12).tokens for prompt in prompts]
        assert [one.tokens for one in batched] == alone


@pytest.mark.parametrize("rows", [FEWER, MORE])
def test_what_is_proposed_is_the_draft_models_own(folders: dict[int, Path], rows: int) -> None:
    """Its logits where the verifier has them, -inf elsewhere, in a proposal, a draw and a score alike."""
    verifier = RoutedModel(load_verifier(str(folders[ROWS])).model)
    drafter = build_drafter(
        CausalLMDraft(name_or_path=str(folders[rows])), Path(), verifier, load_verifier(str(folders[ROWS])).tokenizer
    )
    text = torch.tensor(PROMPT)
    read = [min(token, rows - 1) for token in PROMPT]
    logits = transformers_logits(load_verifier(str(folders[rows])).model, read)[:, :ROWS]  # [length, shared]
    shared = logits.shape[1]

    begun = drafter.start(32)
    proposal = propose(begun, text, 1)
    assert proposal.logits is not None
    torch.testing.assert_close(proposal.logits, logits[-1:], rtol=1e-4, atol=1e-4)
    assert int(proposal.tokens) == int(logits[-1].argmax()) < ROWS

    pick = make_sampler(Sampling(temperature=1.0)).picker(text, ROWS)
    drawn = finish(begun.propose(text, 1, never_stop, pick))
    proposal = pick.proposal_probs(drawn.tokens)
    assert proposal is not None
    expected = torch.zeros(1, ROWS)
    expected[:, :shared] = logits[-1:].softmax(-1)
    torch.testing.assert_close(proposal, expected, rtol=1e-4, atol=1e-5)

    tokens, scored = drafter.score(text, torch.empty(len(text), 0, 32), torch.zeros_like(text))
    assert scored is not None
    torch.testing.assert_close(scored, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, logits.argmax(-1))
    assert (drafter.vocabulary is None) == (rows == MORE)


def test_the_vocabulary_of_fewer_rows_is_their_own_ids(folders: dict[int, Path]) -> None:
    model = RoutedModel(load_verifier(str(folders[FEWER])).model)
    vocabulary: Tensor | None = CausalDrafter(model, ROWS).vocabulary
    assert vocabulary is not None
    assert vocabulary.tolist() == list(range(FEWER))


def build(folder: Path, folders: dict[int, Path]) -> Drafter:
    verifier = load_verifier(str(folders[ROWS]))
    return build_drafter(
        CausalLMDraft(name_or_path=str(folder)), Path(), RoutedModel(verifier.model), verifier.tokenizer
    )


def _rename(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"v3"'))


def _swap(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    words = document["model"]["vocab"]
    words["w3"], words["w7"] = words["w7"], words["w3"]
    path.write_text(json.dumps(document))


def _add(folder: Path) -> None:
    tokenizer = tiny_tokenizer(TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>", special=True)]})
    tokenizer.save_pretrained(folder)


def _lack(folder: Path) -> None:
    tiny_tokenizer(TOKENS - 1).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "id 9 is 'v3' there and 'w3' here"),
        (_swap, "id 9 is 'w7' there and 'w3' here"),
        (_add, "id 24 is '<tool>' there and no token here"),
        (_lack, "id 23 is no token there and 'w17' here"),
    ],
)
def test_another_tokenizer_is_refused(folders: dict[int, Path], tmp_path: Path, change: Any, message: str) -> None:
    folder = save_model(tmp_path / "draft", 1, ROWS)
    change(folder)
    with pytest.raises(ModelError, match=rf"draft has another tokenizer than the verifier: {message}; choose a draft"):
        build(folder, folders)


def test_names_of_padding_rows_are_no_tokens(folders: dict[int, Path], tmp_path: Path) -> None:
    """As converters to GGUF write them."""
    folder = save_model(tmp_path / "draft", 1, ROWS)
    tokenizer = tiny_tokenizer(TOKENS)
    tokenizer.add_tokens([f"[PAD{number}]" for number in range(TOKENS, ROWS)])
    tokenizer.save_pretrained(folder)
    assert isinstance(build(folder, folders), CausalDrafter)


def _without_tokenizer(folder: Path) -> Path:
    for path in folder.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    return folder


def test_a_draft_model_without_a_tokenizer_is_taken_at_its_height(folders: dict[int, Path], tmp_path: Path) -> None:
    folder = _without_tokenizer(save_model(tmp_path / "draft", 1, ROWS))
    with pytest.warns(
        DraftWarning, match=r"has no tokenizer: as both have 48 output rows, their tokens are taken to be"
    ):
        assert isinstance(build(folder, folders), CausalDrafter)
    folder = _without_tokenizer(save_model(tmp_path / "other", 1, MORE))
    with pytest.raises(ModelError, match=r"has no tokenizer, and .*other has 64 output rows beside the verifier's 48"):
        build(folder, folders)


def test_a_verifier_without_a_tokenizer_is_taken_at_its_height(folders: dict[int, Path]) -> None:
    verifier = RoutedModel(load_verifier(str(folders[ROWS])).model)
    with pytest.warns(DraftWarning, match="the verifier comes without a tokenizer: as both have 48 output rows"):
        build_drafter(CausalLMDraft(name_or_path=str(folders[ROWS])), Path(), verifier)
    with pytest.raises(ModelError, match=r"the verifier comes without a tokenizer, and .* has 64 output rows"):
        build_drafter(CausalLMDraft(name_or_path=str(folders[MORE])), Path(), verifier)
