"""Texts of a policy, and what q says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import token_lists
from tests.tiny import tiny_model, tiny_prompts, transformers_logits, trusting_gates
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.decoding.top_k import stack_top_k
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.errors import TraceError
from viasd_calib.models import Verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, RelativeCost, Route
from viasd_calib.traces.capture import capture_again, capture_traces
from viasd_calib.traces.folder import CaptureSettings, read_manifest
from viasd_calib.traces.on_policy import Policy, policy_name, read_answer
from viasd_calib.traces.texts import read_texts

ROUTE = Route(attention_skip=[1, 2], mlp_skip=[1, 2])
SETTINGS = CaptureSettings(max_new_tokens=10, batch_size=4, top_k=4)
TAPS = (1, 3)
TRUSTING = trusting_gates()


def policy(name: str = "slim", audit: str = "off") -> Policy:
    routed = RoutedModel(tiny_model(), ROUTE)
    method = ThreeTier.from_spec(TRUSTING, Decoding.model_validate({"audit": audit}))
    return Policy(name, Decoder(routed, PromptLookup(), method))


@given(prompt=token_lists(1, 8), tokens=token_lists(1, 8))
def test_an_answer_is_read_in_one_pass(prompt: list[int], tokens: list[int]) -> None:
    model = tiny_model()
    logits, tapped = read_answer(RoutedModel(model), prompt, tokens, TAPS)
    text = [*prompt, *tokens]
    wanted = transformers_logits(model, text)[len(prompt) - 1 : -1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        states = model.get_decoder()(input_ids=torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tapped, torch.stack([states[tap][0] for tap in TAPS], 1), atol=1e-4, rtol=1e-4)


@given(prompts=st.lists(token_lists(1, 6), min_size=1, max_size=4))
def test_the_policy_writes_and_q_reads(prompts: list[list[int]]) -> None:
    writer = policy()
    answers = writer.answer(prompts, max_new_tokens=6, top_k_size=3, taps=TAPS)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == writer.decoder.generate(prompt, 6).tokens
        logits = transformers_logits(tiny_model(), [*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        assert stack_top_k(answer.top_k).ids[:, 0].tolist() == logits.argmax(-1).tolist()
        assert torch.cat(answer.tapped).shape[:2] == (len(prompt) + len(answer.tokens) - 1, len(TAPS))


def test_traces_of_a_policy_hold_its_text_and_what_q_would_have_said(tiny_verifier: Verifier, tmp_path: Path) -> None:
    prompts = tiny_prompts(8, turns=2)
    capture_traces(tiny_verifier, PromptLookup(), "prompt_lookup", prompts, tmp_path, SETTINGS, policy())
    assert read_manifest(tmp_path).policy == "slim"
    texts = read_texts(tmp_path)
    assert len(texts) == sum(len(prompt.turns) for prompt in prompts)
    assert any((text.generated != text.q_ids[:, 0]).any() for text in texts)
    for text in texts:
        logits = transformers_logits(tiny_verifier.model, text.ids.tolist())[text.prompt_length - 1 : -1]
        assert torch.equal(text.q_ids[:, 0], logits.argmax(-1))
        assert len(text.p_token) == len(text.generated)


def test_texts_of_a_policy_are_not_mistaken_for_q_s(tiny_verifier: Verifier, tmp_path: Path) -> None:
    prompts = tiny_prompts(3)
    capture_traces(tiny_verifier, None, "none", prompts, tmp_path, SETTINGS, policy())
    for other in (None, policy("another")):
        with pytest.raises(TraceError, match="made with another policy"):
            capture_traces(tiny_verifier, None, "none", prompts, tmp_path, SETTINGS, other)


def test_with_audit_strict_a_policy_writes_q_s_own_traces(tiny_verifier: Verifier, tmp_path: Path) -> None:
    prompts = tiny_prompts(6, turns=2)
    for name, writer in (("q", None), ("strict", policy(audit="strict"))):
        strict = None if writer is None else Policy("strict", _with_end(writer.decoder, tiny_verifier))
        capture_traces(tiny_verifier, PromptLookup(), "prompt_lookup", prompts, tmp_path / name, SETTINGS, strict)
    for own, found in zip(read_texts(tmp_path / "q"), read_texts(tmp_path / "strict"), strict=True):
        assert found.asked == own.asked
        assert torch.equal(found.ids, own.ids)
        assert torch.equal(found.q_ids[:, 0], own.q_ids[:, 0])
        assert torch.equal(found.p_token, own.p_token)


def _with_end(decoder: Decoder, verifier: Verifier) -> Decoder:
    return Decoder(decoder.verifier, decoder.drafter, decoder.strategy, verifier.eos_ids)


def test_what_was_asked_is_asked_again(tiny_verifier: Verifier, tmp_path: Path) -> None:
    """A later turn follows the answers that q gave, whatever the policy says."""
    capture_traces(tiny_verifier, None, "none", tiny_prompts(8, turns=2), tmp_path / "q", SETTINGS)
    asked = [text.asked for text in read_texts(tmp_path / "q")]
    assert any(one.turn == 1 for one in asked)
    arguments = (tiny_verifier, PromptLookup(), "prompt_lookup", asked, tmp_path / "again", SETTINGS, policy())
    report = capture_again(*arguments)
    found = [text.asked for text in read_texts(tmp_path / "again")]
    assert sorted(map(str, found)) == sorted(map(str, asked))
    assert report.texts == len(asked)
    assert (capture_again(*arguments).asked, capture_again(*arguments).kept) == (len(asked), len(asked))
    fewer = (*arguments[:3], asked[1:], *arguments[4:])
    assert capture_again(*fewer).kept == len(asked) - 1
    assert sorted(str(text.asked) for text in read_texts(tmp_path / "again")) == sorted(map(str, asked[1:]))


def test_a_drawn_text_hangs_on_no_other(tiny_verifier: Verifier, tmp_path: Path) -> None:
    routed = RoutedModel(tiny_model(), ROUTE)
    method = ThreeTier.from_spec(TRUSTING, Decoding.model_validate({"audit": "off"}))
    drawing = Policy("drawing", Decoder(routed, PromptLookup(), method, sampling=Sampling(temperature=1.0, seed=5)))
    prompts = tiny_prompts(8, turns=2)
    for name, some in (("whole", prompts), ("some", prompts[::2])):
        capture_traces(tiny_verifier, None, "none", some, tmp_path / name, SETTINGS, drawing)
    whole = {(text.prompt_id, text.turn): text.ids.tolist() for text in read_texts(tmp_path / "whole")}
    for text in read_texts(tmp_path / "some"):
        assert text.ids.tolist() == whole[text.prompt_id, text.turn]


def test_a_name_hangs_on_all_that_decides_the_text_and_on_no_measured_cost() -> None:
    name = policy_name("three_tier", "prompt_lookup", ROUTE, TRUSTING, Decoding())
    cost = RelativeCost(measured={1: 0.5}, device="cpu", dtype="float32")
    timed = ROUTE.model_copy(update={"relative_cost": cost})
    assert policy_name("three_tier", "prompt_lookup", timed, TRUSTING, Decoding()) == name
    others = [
        policy_name("sprinter", "prompt_lookup", ROUTE, TRUSTING, Decoding()),
        policy_name("three_tier", "other", ROUTE, TRUSTING, Decoding()),
        policy_name("three_tier", "prompt_lookup", Route(), TRUSTING, Decoding()),
        policy_name("three_tier", "prompt_lookup", ROUTE, TRUSTING.model_copy(update={"accept_at": 1.0}), Decoding()),
        policy_name("three_tier", "prompt_lookup", ROUTE, TRUSTING, Decoding(max_pending=3)),
    ]
    assert len({name, *others}) == 6
