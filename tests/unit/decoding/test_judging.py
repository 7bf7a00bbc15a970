"""A decoder that judges finds by its catch-ups what one teacher-forced pass of q finds of the text afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from tests.cases import Case, cases, lively_case
from viasd_calib.calibration.judging import token_deficits
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.errors import MethodError, SamplingError
from viasd_calib.passes.requests import Read

AUDITS = ["off", "tolerant", "strict"]


def judging(case: Case, audit: str, **settings: Any) -> Decoder:
    return Decoder(case.verifier, case.drafter, case.named(audit), case.eos, judge=True, **settings)


def check(case: Case, judged: Generation) -> None:
    """The case's model computes in float64, so that passes of different widths agree but for 1e-6."""
    assert judged.deficits is not None
    expected = token_deficits(case.verifier, case.prompt, judged.tokens)
    torch.testing.assert_close(torch.tensor(judged.deficits), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("audit", AUDITS)
@given(case=cases())
def test_every_text_is_judged_as_calibration_judges_it(audit: str, case: Case) -> None:
    plain, judged = case.generate(case.named(audit)), judging(case, audit).generate(case.prompt, case.count)
    assert (judged.tokens, judged.tiers) == (plain.tokens, plain.tiers)
    assert plain.deficits is None
    check(case, judged)


@pytest.mark.parametrize("audit", AUDITS)
def test_lossy_texts_have_departures_and_exact_ones_none(audit: str) -> None:
    """The comparison above looks at something: of 20 texts, those that are not q's own."""
    departures = decided_by_q = 0
    for seed in range(20):
        case = lively_case(seed)
        judged = judging(case, audit).generate(case.prompt, case.count)
        check(case, judged)
        assert judged.deficits is not None
        departures += sum(one > 1e-6 for one in judged.deficits)
        found = [one for one, tier in zip(judged.deficits, judged.tiers, strict=True) if tier is Tier.ESCALATE]
        decided_by_q += len(found)
        assert not any(found)  # q's own tokens lie nowhere below its choice
    assert decided_by_q > 20
    assert (departures > 10) == (audit != "strict")
    assert departures == 0 or audit != "strict"


@pytest.mark.parametrize("audit", AUDITS)
def test_batches_and_streams_are_judged_too(audit: str) -> None:
    case = lively_case(3)
    decoder = judging(case, audit)
    alone = decoder.generate(case.prompt, case.count)
    for batched in decoder.generate_batch([case.prompt, case.prompt[:1]], case.count)[:1]:
        check(case, batched)
        assert batched.tokens == alone.tokens
    stream, streamed = decoder.stream(case.prompt, case.count), []
    while True:
        try:
            streamed.append(next(stream).token)
        except StopIteration as done:
            text = done.value
            break
    assert streamed == text.tokens == alone.tokens
    check(case, text)


def test_the_host_waits_as_often_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the last catch-up, which a text without an audit has only where it is judged."""
    case, waits = lively_case(1), 0
    run = Read.run

    def counted(read: Read) -> list[int]:
        nonlocal waits
        waits += 1
        return run(read)

    monkeypatch.setattr(Read, "run", counted)
    for audit, more in (("strict", 0), ("tolerant", 0), ("off", 1)):
        found = []
        for judge in (False, True):
            waits = 0
            text = Decoder(case.verifier, case.drafter, case.named(audit), judge=judge).generate(case.prompt, 31)
            found.append((waits, text.counts.full_passes))
        pending_at_the_end = found[1][1] - found[0][1]
        assert 0 <= pending_at_the_end <= more
        assert found[1][0] - found[0][0] == pending_at_the_end


def test_a_text_that_is_given_up_while_tokens_are_pending_is_not_judged() -> None:
    case = lively_case(1)

    def after(count: int) -> Any:
        asked = iter(range(count))
        return lambda: next(asked, None) is None

    seen = set()
    for rounds in range(1, 12):
        text = judging(case, "off").generate(case.prompt, case.count, cancelled=after(rounds))
        seen.add(text.deficits is None)
        if text.deficits is not None and text.tokens:
            check(case, text)
    assert seen == {True, False}


def test_what_cannot_be_judged_is_refused() -> None:
    case = lively_case(0)
    with pytest.raises(MethodError, match=r"texts of speculative cannot be judged .*; use three_tier"):
        Decoder(case.verifier, case.drafter, Speculative(4), judge=True)
    for sampling in (Sampling(temperature=0.5), Sampling(repetition_penalty=1.2)):
        with pytest.raises(SamplingError, match="choose temperature 0"):
            judging(case, "strict", sampling=sampling)
