"""Certification on a tiny verifier, on-policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.tiny import constant_gate, make_drafter, tiny_prompts
from viasd_calib.calibration.candidates import Candidate
from viasd_calib.calibration.certify import certify
from viasd_calib.calibration.losses import base
from viasd_calib.calibration.losses.base import CertificateLoss
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.errors import PromptError
from viasd_calib.ledger import Ledger
from viasd_calib.models import Verifier
from viasd_calib.prompt_copies import normalised_sha256, without_copies
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, Route, prompts_needed

Found = TypeVar("Found")
HASHES = {"fit": "a" * 64, "calibrate": "b" * 64, "test": "c" * 64}


def candidate(bound: float) -> Candidate:
    """Gates that give every token the score 0.5: a bound above trusts nothing, one below everything."""
    gates = Gates(
        draft=constant_gate("draft_margin", 0.0),
        slim=constant_gate("slim_margin", 0.0),
        draft_accept_at=bound,
        accept_at=bound,
        regenerate_at=bound,
    )
    return Candidate(gates, bound, replayed_loss=0.0, replayed_trust=0.0)


def prompts_of_two_turns(count: int) -> list[Prompt]:
    """Prompts no two of which ask the same."""
    return without_copies(tiny_prompts(2 * count, turns=2))[:count]


def run(
    verifier: Verifier,
    bounds: list[float],
    n_prompts: int,
    max_loss: float,
    ledger: Ledger | None = None,
    prompts: list[Prompt] | None = None,
    batch: int = 1,
) -> tuple[float | None, int, list[float]]:
    """Certify candidates; the chosen bound, candidates tested, and their observed losses."""
    routed = RoutedModel(verifier.model, Route(attention_skip=[1, 2], mlp_skip=[1]))
    drafter = make_drafter("near", routed)

    def decoder_for(chosen: Candidate) -> Decoder:
        method = ThreeTier.from_spec(chosen.gates, Decoding(audit="off"))
        return Decoder(routed, drafter, method, verifier.eos_ids)

    result = certify(
        [candidate(bound) for bound in bounds], decoder_for, verifier, routed,
        prompts or prompts_of_two_turns(n_prompts),
        max_loss=max_loss, confidence=0.8, max_new_tokens=12, split_sha256=HASHES,  # type: ignore[arg-type]
        ledger=ledger, batch=batch,
    )  # fmt: skip
    chosen = None if result.chosen is None else result.chosen.threshold
    assert (chosen is None) == (result.certificate.bound is None)
    return chosen, result.certificate.candidates_tested, [tested.observed_loss for tested in result.tested]


def test_the_fastest_sure_candidate_is_chosen(tiny_verifier: Verifier) -> None:
    """Trusting nothing is exact and passes; trusting everything diverges, fails and is given up."""
    chosen, tested, losses = run(tiny_verifier, [0.9, 0.8, 0.1], 40, max_loss=0.06)
    assert (chosen, tested) == (0.8, 3)
    assert losses[:2] == [0.0, 0.0]
    assert losses[2] > 0.06


def test_testing_stops_at_the_first_failure(tiny_verifier: Verifier) -> None:
    chosen, tested, losses = run(tiny_verifier, [0.1, 0.9], 40, max_loss=0.06)
    assert (chosen, tested) == (None, 1)
    assert losses[0] > 0.06


@pytest.mark.parametrize("max_loss", [0.02])
def test_too_few_prompts_are_said_at_once(tiny_verifier: Verifier, max_loss: float) -> None:
    assert run(tiny_verifier, [0.9], 20, max_loss) == (None, 0, [])


class Interrupted(Ledger):
    """A ledger whose job is stopped after so many steps."""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__(path)
        self.left = steps

    def recall(self, step: str, kind: type[Found], compute: Callable[[], Found]) -> Found:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().recall(step, kind, compute)


def test_a_certification_that_was_stopped_comes_to_the_same(tiny_verifier: Verifier, tmp_path: Path) -> None:
    bounds = [0.9, 0.8, 0.1]
    with pytest.raises(KeyboardInterrupt):
        run(tiny_verifier, bounds, 40, 0.06, Interrupted(tmp_path / "x.steps", 55))
    ledger = Ledger(tmp_path / "x.steps")
    assert ledger.steps_done == 55
    assert run(tiny_verifier, bounds, 40, 0.06, ledger) == run(tiny_verifier, bounds, 40, 0.06)
    assert ledger.steps_done > 70


@pytest.mark.parametrize("done", [0, 3, 55])
def test_prompts_that_are_decoded_together_come_to_the_same(tiny_verifier: Verifier, tmp_path: Path, done: int) -> None:
    """In float32; also where some of a batch are noted already, or noted in a form that is no longer read."""
    bounds, path = [0.9, 0.8, 0.1], tmp_path / "x.steps"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_verifier, bounds, 40, 0.06, Interrupted(path, done))
    path.write_text(path.read_text().replace('\\"tokens\\"', '\\"other\\"', 2))
    assert run(tiny_verifier, bounds, 40, 0.06, Ledger(path), batch=7) == run(tiny_verifier, bounds, 40, 0.06)


def test_a_candidate_passes_as_soon_as_its_p_value_does(tiny_verifier: Verifier, tmp_path: Path) -> None:
    """36 prompts without a loss suffice, and the first 36 in the order of their hashes are decoded."""
    needed, prompts, ledger = prompts_needed(0.06, 0.1), prompts_of_two_turns(40), Noting(tmp_path / "x.steps")
    assert run(tiny_verifier, [0.9], 40, 0.06, ledger, prompts) == (0.9, 1, [0.0])
    first = sorted(prompts, key=normalised_sha256)[:needed]
    assert ledger.computed == [f"candidate 0, prompt {prompt.sha256}" for prompt in first]
    assert needed < 40


class Noting(Ledger):
    """A ledger that notes which steps were not in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.computed: list[str] = []

    def recall(self, step: str, kind: type[Found], compute: Callable[[], Found]) -> Found:
        if not self.holds(step):
            self.computed.append(step)
        return super().recall(step, kind, compute)


def test_after_one_prompt_was_mended_the_others_are_not_decoded_again(tiny_verifier: Verifier, tmp_path: Path) -> None:
    run(tiny_verifier, [0.9], 40, 0.06, Ledger(tmp_path / "x.steps"))
    mended = Prompt(id="mended", turns=["w9 w8 w7 w6 w5 w4 w3"])
    ledger = Noting(tmp_path / "x.steps")
    prompts = [mended, *prompts_of_two_turns(40)[:-1]]
    assert run(tiny_verifier, [0.9], 40, 0.06, ledger, prompts)[1] == 1
    assert ledger.computed == [f"candidate 0, prompt {mended.sha256}"]


def test_all_prompts_are_checked_before_any_is_decoded(tiny_verifier: Verifier, tmp_path: Path) -> None:
    long = Prompt(id="long", turns=["w1 " * 300])
    ledger = Noting(tmp_path / "x.steps")
    with pytest.raises(PromptError, match="prompt 'long' has 303 tokens"):
        run(tiny_verifier, [0.9], 40, 0.06, ledger, [*prompts_of_two_turns(40), long])
    assert ledger.computed == []


def test_the_loss_that_is_named_is_certified(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another loss exact decoding is as wrong as can be."""
    worst = CertificateLoss(lambda _: 1.0, "always 1", "of everything")
    monkeypatch.setitem(base._losses, "token_divergence", worst)
    assert run(tiny_verifier, [0.9], 40, max_loss=0.06) == (None, 1, [1.0])
