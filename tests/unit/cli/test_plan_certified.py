"""``viasd plan --certified``: a candidate that was certified elsewhere is taken where it is shown to be faster here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import bind_candidates
from tests.tiny import TinyFolder, drafted_spec, save_tiny, tiny_traces
from viasd_calib.calibration import policy_search
from viasd_calib.calibration.paired import Spent
from viasd_calib.cli import main
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import load_engine
from viasd_calib.decoding.slim_rules.calibrated import CalibratedRule
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.digest import policy_digest
from viasd_calib.draft.build import with_weights
from viasd_calib.errors import PlanningError
from viasd_calib.pipeline import plan as job
from viasd_calib.pipeline import plan_certified
from viasd_calib.planning import search as planning_search
from viasd_calib.planning.search import PolicyGrid
from viasd_calib.prompts import Prompt
from viasd_calib.spec import CertifiedCandidate, RoutingSpec, load_spec, save_spec

GRID = PolicyGrid(draft_lengths=(2,), stops=(0.0,), draft_bounds=(1.01,), thresholds=(0.4,), pending=(6,))
THRESHOLDS = (0.9, 0.6, 0.4)


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 6, max_new_tokens=12)


@pytest.fixture
def place(tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec that lists three candidates and decodes exactly, and a small grid."""
    path = drafted_spec(tiny_folder, tmp_path)
    spec = load_spec(path)
    bind_candidates(
        spec.model_copy(update={"draft": with_weights(spec.draft, tmp_path)}), path, THRESHOLDS, active=None
    )
    import_module("viasd_calib.pipeline.replayed")  # which else would keep the small grid for the tests after this one
    monkeypatch.setattr(planning_search, "PolicyGrid", lambda: GRID)
    monkeypatch.setattr(job, "WIDTHS", (1, 2, 4, 9))
    monkeypatch.setattr(job, "COST_REPEATS", 2)
    (tmp_path / "traces").symlink_to(traces)
    return tmp_path


def run(place: Path, *more: str, spec: str = "routing.json", out: str = "planned.json") -> int:
    return main(
        ["plan", "--spec", str(place / spec), "--traces", str(place / "traces"), "--out", str(place / out),
         "--contexts", "[16]", "--max-new-tokens", "8", "--limit", "6", *more]
    )  # fmt: skip


class Turns:
    """In place of the clock: exact policies take a second a token, candidates what is said of their thresholds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[float, float]) -> None:
        self.seconds = seconds
        self.decoded: list[float | None] = []
        self.words: list[set[int]] = []
        monkeypatch.setattr(policy_search, "decode_in_turns", self)

    def __call__(
        self, _: str, decoders: Sequence[Decoder], verifier: Any, prompts: Sequence[Prompt], *__: Any, **___: Any
    ) -> list[Spent]:
        strategies = [decoder.strategy for decoder in decoders]
        self.words.append({len(prompt.turns[0].split()) for prompt in prompts})
        self.decoded = [_threshold(one) if one.audit == "off" else None for one in strategies]
        return [
            Spent([8] * len(prompts), [8.0 if one is None else 8 * self.seconds[one]] * len(prompts))
            for one in self.decoded
        ]


def _threshold(strategy: Any) -> float:
    assert isinstance(strategy, ThreeTier)
    assert isinstance(strategy.rule, CalibratedRule)
    return strategy.rule.accept_at


def candidates_of(spec: RoutingSpec) -> list[CertifiedCandidate]:
    assert spec.certificate is not None
    assert spec.certificate.candidates is not None
    return spec.certificate.candidates


def test_the_fastest_that_is_faster_is_written_with_its_certificate(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = Turns(monkeypatch, {0.9: 1.1, 0.6: 0.5, 0.4: 0.7})
    before = load_spec(place / "routing.json")
    assert run(place, "--certified", "true", "--debug") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert [one for one in turns.decoded if one is not None] == pytest.approx(THRESHOLDS)
    assert turns.decoded[:2] == [None, None], "beside exact policies"
    spec, second = load_spec(place / "planned.json"), candidates_of(before)[1]
    assert policy_digest(spec) == second.digest
    assert (spec.plan, spec.decoding, spec.gates.accept_at) == (None, second.decoding, 0.6)
    certificate = spec.certificate
    assert certificate is not None
    assert (certificate.bound, certificate.digest, certificate.losses) == (0.1, second.digest, second.losses)
    assert candidates_of(spec) == candidates_of(before)
    assert f"Certified {second.name}: 500.00 ms a token where it was decoded, exact decoding 1000.00" in printed
    assert "2.00 [2.00, 2.00] times its speed on 6 prompts" in printed
    assert f"The spec decodes by {second.name} with audit off, without a plan: a loss of 0.1 at most" in printed
    assert "in answers of up to 8 tokens" in printed
    assert main(["validate", str(place / "planned.json")]) == 0
    assert load_engine(place / "planned.json").decoder().strategy.audit == "off"


def test_candidates_decode_prompts_of_every_length_together(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no plan, so that contexts are no groups; without them each of these is decoded by itself."""
    turns = Turns(monkeypatch, dict.fromkeys(THRESHOLDS, 0.5))
    path = place / "prompts.jsonl"
    every = [Prompt(id=f"{long}/{n}", turns=[f"w{n}" + " w3" * long]) for long in (2, 40) for n in range(9)]
    path.write_text("".join(prompt.model_dump_json() + "\n" for prompt in every))
    source = ["--prompts", str(path), "--shares", '{"fit": 0, "calibrate": 1, "test": 0}', "--contexts", "[16,48]"]
    assert run(place, "--certified", *source, "--limit", "18") == 0
    assert turns.words == [{3, 41}] * 3, "it is looked at three times"
    assert run(place, *source) == 0
    assert turns.words[3:] == [{3}, {41}]


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        (1.1, "none is shown to be faster than exact decoding, so that the spec decodes exactly, by the plan"),
        (0.97, "the fastest saves less than 5 % of the time of exact decoding"),
    ],
)
def test_without_a_faster_one_the_plan_is_exact_and_the_list_stays(
    place: Path, seconds: float, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Turns(monkeypatch, dict.fromkeys(THRESHOLDS, seconds))
    before = load_spec(place / "routing.json")
    assert run(place, "--certified") == 0
    assert why in " ".join(capsys.readouterr().out.split())
    spec = load_spec(place / "planned.json")
    assert spec.plan is not None
    assert (spec.decoding.audit, spec.certified_bound) == ("strict", None)
    assert candidates_of(spec) == candidates_of(before)
    assert main(["validate", str(place / "planned.json")]) == 0


def test_another_plan_may_choose_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a spec with a plan, and from one that decodes by a candidate; without the option it is exact as ever."""
    Turns(monkeypatch, dict.fromkeys(THRESHOLDS, 1.1))
    assert run(place, out="exact.json") == 0
    turns = Turns(monkeypatch, {0.9: 0.8, 0.6: 0.6, 0.4: 0.4})
    assert run(place, "--certified", spec="exact.json", out="third.json") == 0
    third, digests = (
        load_spec(place / "third.json"),
        [one.digest for one in candidates_of(load_spec(place / "exact.json"))],
    )
    assert policy_digest(third) == digests[2]
    turns.seconds = {0.9: 0.2, 0.6: 0.6, 0.4: 0.4}
    assert run(place, "--certified", spec="third.json", out="first.json") == 0
    assert policy_digest(load_spec(place / "first.json")) == digests[0]
    assert run(place, spec="first.json", out="again.json") == 0
    assert turns.decoded[-1] is None, "no candidate is decoded unasked"
    again = load_spec(place / "again.json")
    assert (again.decoding.audit, again.certified_bound) == ("strict", None)
    assert again.plan is not None
    assert [one.digest for one in candidates_of(again)] == digests
    assert main(["validate", str(place / "again.json")]) == 0


def test_too_few_prompts_show_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Turns(monkeypatch, dict.fromkeys(THRESHOLDS, 0.1))
    assert run(place, "--certified", "--limit", "5") == 0
    assert load_spec(place / "planned.json").decoding.audit == "strict"


def test_candidates_are_decoded_on_the_clock_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--certified", "--limit", "2", "--debug") == 0
    assert " ".join(capsys.readouterr().out.split()).count("where it was decoded, exact decoding") == 3


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_another_number_format_is_refused_before_a_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "open_engine", lambda *_: pytest.fail("loaded"))
    assert run(place, "--certified", "--dtype", "bfloat16") == 1
    said = refused(capsys)
    assert "these differ from what was certified: the number format (bfloat16 here, certified float32)" in said
    assert "leave out --certified, or calibrate here" in said
    assert not (place / "planned.json").exists()


def test_other_kernels_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("viasd_calib.slim.backends.kernel_family", lambda *_: "cpu native")
    assert run(place, "--certified") == 1
    assert "the kernels (cpu native here, certified cpu torch)" in refused(capsys)


@pytest.mark.parametrize("option", ["--verifier", "--draft-model"])
@pytest.mark.filterwarnings("ignore::viasd_calib.errors.WeightsWarning")
def test_other_weights_are_refused(place: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny(place / "other", seed=7)
    assert run(place, "--certified", option, str(other)) == 1
    assert "are not those the spec was made for" in refused(capsys)


def test_candidates_that_do_not_hold_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = candidates_of(load_spec(place / "routing.json"))[1]
    (place / second.losses.path).unlink()
    assert run(place, "--certified") == 1
    said = refused(capsys)
    assert f"not all certified candidates of {place / 'routing.json'} hold" in said
    assert second.name in said


def test_a_spec_that_lists_none_is_refused(
    tiny_folder: TinyFolder, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted_spec(tiny_folder, place)
    assert run(place, "--certified") == 1
    assert "lists no certified candidates to choose among" in refused(capsys)


def test_a_spec_of_another_policy_is_never_written(place: Path) -> None:
    spec = load_spec(place / "routing.json")
    wrong = candidates_of(spec)[0].model_copy(update={"digest": "0" * 64})
    with pytest.raises(PlanningError, match="is not of this spec's policy"):
        plan_certified.with_certified(spec, wrong, None)
    save_spec(plan_certified.with_certified(spec, candidates_of(spec)[0], None), place / "first.json")
    assert policy_digest(load_spec(place / "first.json")) == candidates_of(spec)[0].digest
