from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.timings import make_policy, make_timing
from tests.tiny import constant_gate, verifier_ref
from viasd_calib.calibration.certify import TestedCandidate
from viasd_calib.calibration.paired import Interval
from viasd_calib.calibration.reliability import Reliability
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation import plots
from viasd_calib.evaluation.bench import BenchResult, BenchSettings, GroupResult
from viasd_calib.evaluation.metrics import MethodResult
from viasd_calib.evaluation.report import ReportInputs, SampleText, render_report, write_report
from viasd_calib.profiling.recording import RecordedRound, Span, TypicalRound
from viasd_calib.slim.parts.base import route_words
from viasd_calib.spec import (
    BridgesRef,
    CausalLMDraft,
    Certificate,
    Decoding,
    Gates,
    PromptLookupDraft,
    RelativeCost,
    Route,
    RoutingSpec,
    TensorFile,
    WeightFormat,
)

TIERS = [[Tier.ACCEPT, Tier.REGENERATE, Tier.ESCALATE] * 4, [Tier.ESCALATE]]
RELIABILITY = {
    "draft": Reliability(
        expected_calibration_error=0.0123, auroc=0.81,
        confidence=[0.1, 0.5, 0.97], accuracy=[0.12, 0.41, 0.96], count=[10, 20, 900],
    ),
    "slim": Reliability(
        expected_calibration_error=0.0456, auroc=0.92, confidence=[0.2, 0.9], accuracy=[0.25, 0.88], count=[30, 400]
    ),
}  # fmt: skip


def candidate(bound: float, loss: float, full_passes: float, p_value: float, n_prompts: int) -> TestedCandidate:
    return TestedCandidate(
        bound=bound, replayed_loss=loss, replayed_trust=0.5, observed_loss=loss,
        full_passes_per_token=full_passes, p_value=p_value, n_prompts=n_prompts,
    )  # fmt: skip


CANDIDATES = [candidate(0.99, 0.004, 0.52, 0.001, 150), candidate(0.91, 0.031, 0.31, 1.0, 60)]
SAMPLE = SampleText(
    prompt="What is it?",
    pieces=["It", " is", "\n", "so"],
    tiers=[*Tier, Tier.ESCALATE],
    drafted=[True, False, False, True],
)
DRAFTED = tuple(Span("draft", "forward", 0.01 * place, 0.01 * place + 0.008, 1) for place in range(2))
VERIFIED = (Span("full", "full", 0.021, 0.061, 3), Span("head", "logits", 0.061, 0.067, 0))
SLIM = (Span("slim", "slim", 0.021, 0.041, 3), Span("head", "logits", 0.041, 0.047, 0))
ROUNDS = {
    "speculative": TypicalRound(RecordedRound((*DRAFTED, *VERIFIED), 0.07), 21, 30, 0.0876),
    "three_tier": TypicalRound(RecordedRound((*DRAFTED, *SLIM), 0.05), 7, 11, 0.1234),
}
TENSORS = TensorFile(path="bridges/bridges.safetensors", sha256="0" * 64)
PICTURES = ("route", "reliability", "tiers", "speed", "candidates", "rounds", "break_even", "predicted")
COSTED = Route(
    attention_skip=[1],
    mlp_skip=[1, 2],
    relative_cost=RelativeCost(measured={1: 0.3, 8: 0.4}, device="cpu", dtype="float32"),
)
PLAIN = make_policy(False, 0.02, drafter="none", draft_length=0, stop_below=0.0)
TIMING = make_timing(0.01, 0.016, policies=[make_policy(True, 0.01), make_policy(False, 0.016), PLAIN])


def certificate(**changes: Any) -> Certificate:
    entries: dict[str, Any] = {
        "bound": 0.02,
        "confidence": 0.95,
        "procedure": "fixed sequence",
        "candidates_tested": 2,
        "n_prompts": 350,
        "max_new_tokens": 64,
        "split_sha256": {"fit": "1" * 64, "calibrate": "2" * 64, "test": "3" * 64},
        "observed": 0.004,
        "p_value": 0.001,
    }
    return Certificate(**{**entries, **changes})


def spec(**changes: Any) -> RoutingSpec:
    entries: dict[str, Any] = {
        "verifier": verifier_ref(),
        "draft": PromptLookupDraft(),
        "route": Route(attention_skip=[1], mlp_skip=[1, 2]),
        "gates": Gates(slim=constant_gate("slim_entropy", 0.0), accept_at=0.9, regenerate_at=0.8),
        "decoding": Decoding(audit="off"),
        "certificate": certificate(),
    }
    return RoutingSpec(**{**entries, **changes})


def method(speed: float, against_speculative: Interval | None = None, **changes: Any) -> MethodResult:
    entries: dict[str, Any] = {
        "tokens": 1234,
        "seconds": 1234 / speed,
        "tokens_per_second": speed,
        "speedup_vs_autoregressive": Interval(median=speed / 20, low=speed / 25, high=speed / 18, n=40),
        "speedup_vs_speculative": against_speculative,
        "identical_to_autoregressive": 0.85,
        "divergence": 0.0067,
        "rejection_rate": 0.231,
        "full_passes_per_token": 0.417,
        "slim_passes_per_token": 0.298,
        "draft_steps_per_token": 1.352,
        "acceptance_length": 2.398,
        "tier_shares": {"accept": 0.52, "regenerate": 0.13, "escalate": 0.35},
        "differences": [],
        "decode_speedup_vs_speculative": Interval(median=1.31, low=1.22, high=1.4, n=40),
    }
    return MethodResult(**{**entries, **changes})


def bench(methods: dict[str, MethodResult], *, audit: str = "off", max_new_tokens: int = 64) -> BenchResult:
    settings = BenchSettings.model_validate(
        {"methods": ["three_tier"], "max_new_tokens": max_new_tokens, "dtype": "float32", "audit": audit, "seed": 0}
    )
    return BenchResult(
        hardware={"device": "abacus", "cores": 2},
        settings=settings,
        n_prompts=40,
        methods=methods,
        by_task={
            "coding": GroupResult(n_prompts=40, methods={name: method(10.0 + i) for i, name in enumerate(methods)})
        },
    )


def full(**changes: Any) -> ReportInputs:
    methods = {
        "autoregressive": method(20.0, rejection_rate=None, divergence=0.0),
        "speculative": method(27.5),
        "three_tier": method(31.25, Interval(median=1.14, low=0.97, high=1.31, n=40)),
    }
    entries: dict[str, Any] = {
        "spec": spec(route=COSTED),
        "bench": bench(methods),
        "reliability": RELIABILITY,
        "tiers": TIERS,
        "sample": SAMPLE,
        "candidates": CANDIDATES,
        "rounds": ROUNDS,
        "timing": TIMING,
    }
    return ReportInputs(**{**entries, **changes})


def minimal() -> ReportInputs:
    alone = bench({"autoregressive": method(20.0)}).model_copy(update={"by_task": {}})
    return ReportInputs(spec(certificate=None, decoding=Decoding()), alone, {}, [], None, [], {})


class Page(HTMLParser):
    """The elements of a page with their attributes, its tables and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.cell = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.cell = tag in ("td", "th") or self.cell

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_report(full()))


def test_every_picture_is_there_and_has_an_alt_text(page: Page) -> None:
    svgs = page.all("svg")
    assert len(svgs) == len(PICTURES)
    assert {f"{name}-figure_1" for name in PICTURES} <= {group.get("id") for group in page.all("g")}
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    alts = " ".join(svg["aria-label"] or "" for svg in svgs)
    assert "Map of the route: 3 of 4 attention and 2 of 4 MLP sublayers kept." in alts
    assert "draft gate, calibration error 0.012, AUROC 0.81, 930 candidates" in alts
    assert "Tier shares by place in 2 texts" in alts
    assert "three-tier 31.2 tokens per second" in alts
    assert "candidates 2, certified 1" in alts
    assert "three-tier 50.0 milliseconds: draft model 16.0, slim pass 20.0, output head 6.0, gates" in alts


def test_every_figure_has_a_caption(page: Page) -> None:
    assert len(page.all("figure")) == len(page.all("figcaption")) == 7


def test_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("inputs", [full(), minimal()], ids=["full", "minimal"])
def test_the_file_refers_to_nothing_outside(inputs: ReportInputs) -> None:
    html = render_report(inputs)
    page = Page(html)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert not page.all("script")


@pytest.mark.parametrize("inputs", [full(), minimal()], ids=["full", "minimal"])
def test_every_reference_inside_has_its_target(inputs: ReportInputs) -> None:
    html = render_report(inputs)
    targets = {attributes["id"] for _, attributes in Page(html).elements if "id" in attributes}
    wanted = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html))
    assert {one or other for one, other in wanted} <= targets


def test_the_table_holds_the_numbers_of_the_bench(page: Page) -> None:
    heading, *rows = page.tables[0]
    table = {row[0]: dict(zip(heading[1:], row[1:], strict=True)) for row in rows}
    assert set(table) == {"autoregressive", "speculative", "three-tier"}
    assert table["three-tier"] == {
        "tokens/s": "31.2",
        "vs autoregressive": "1.56× [1.25, 1.74]",
        "vs speculative": "1.14× [0.97, 1.31]",
        "decode only, vs speculative": "1.31× [1.22, 1.40]",
        "identical": "85 %",
        "divergence": "0.67 %",
        "rejection rate": "23.1 %",
        "full per token": "0.42",
        "slim per token": "0.30",
        "draft per token": "1.35",
        "acceptance length": "2.40",
        "tiers 1 / 2 / 3, %": "52 / 13 / 35",
        "tokens": "1,234",
    }
    assert table["autoregressive"]["rejection rate"] == "–"
    assert table["speculative"]["vs speculative"] == "–"


def test_each_task_has_a_table(page: Page) -> None:
    speeds = [[row[1] for row in table[1:]] for table in page.tables]
    assert ["10.0", "11.0", "12.0"] in speeds


def test_the_headline_tells_speed_interval_and_certificate(page: Page) -> None:
    text = " ".join(page.text.replace("\xa0", " ").split())
    assert "1.56× the speed of autoregressive decoding 95 % interval 1.25 to 1.74: faster" in text
    assert "1.14× the speed of speculative decoding 95 % interval 0.97 to 1.31: no difference shown" in text
    assert "Certified with 95 % confidence" in text
    assert "at most 2.0 % of a text's tokens" in text


def test_the_certificate_section_is_complete(page: Page) -> None:
    for part in ("fixed sequence", "1" * 64, "2" * 64, "3" * 64, "350, at most 64 new tokens"):
        assert part in page.text
    candidates = next(table for table in page.tables if table[0][0] == "candidate")
    assert [row[-1] for row in candidates[1:]] == ["yes", "no"]


def test_nothing_certified_is_said() -> None:
    note = "nothing certified: too few prompts"
    refused = certificate(bound=None, observed=None, p_value=None, note=note)
    strict = spec(certificate=refused, decoding=Decoding(audit="strict"))
    page = Page(render_report(full(spec=strict, candidates=CANDIDATES[1:])))
    assert "No bound certified for this policy, audit strict" in page.text
    assert note in page.text
    assert [row[-1] for row in next(table for table in page.tables if table[0][0] == "candidate")[1:]] == ["no"]


def test_a_certified_candidate_is_shown_where_exact_decoding_was_faster() -> None:
    note = "exact: diverges from nothing"
    exact = certificate(bound=None, observed=None, p_value=None, note=note)
    page = Page(render_report(full(spec=spec(certificate=exact, decoding=Decoding(audit="strict")))))
    assert note in page.text
    assert [row[-1] for row in next(table for table in page.tables if table[0][0] == "candidate")[1:]] == ["yes", "no"]


def test_a_candidate_behind_a_failed_one_is_not_certified() -> None:
    page = Page(render_report(full(candidates=[*CANDIDATES, candidate(0.9, 0.0, 0.2, 0.001, 150)])))
    assert [row[-1] for row in next(table for table in page.tables if table[0][0] == "candidate")[1:]] == [
        "yes",
        "no",
        "no",
    ]


def test_differences_between_bench_and_certificate_are_said() -> None:
    measured = bench({"three_tier": method(30.0, divergence=0.05)}, audit="tolerant", max_new_tokens=32)
    text = Page(render_report(full(bench=measured))).text
    assert "ran with audit tolerant; the spec decodes with audit off" in text
    assert "at most 64 new tokens a turn; this benchmark asked for 32" in text
    assert "lies above the certified bound" in text


def test_a_run_without_differences_has_no_notes(page: Page) -> None:
    assert not [one for one in page.all("p") if one.get("class") == "note"]


def test_a_slower_method_is_called_slower() -> None:
    slow = method(30.0, Interval(median=0.8, low=0.7, high=0.9, n=40))
    assert "0.70 to\xa00.90: slower" in Page(render_report(full(bench=bench({"three_tier": slow})))).text


def test_of_too_few_prompts_nothing_is_called_faster() -> None:
    few = method(30.0, Interval(median=1.8, low=None, high=None, n=5))
    text = Page(render_report(full(bench=bench({"three_tier": few})))).text
    assert (
        "1.80× the speed of speculative decoding 5 of the 6 prompts that an interval takes, so nothing is shown" in text
    )
    assert "1.80× [–]" in text


def test_minimal_inputs_make_a_report_that_says_what_is_missing() -> None:
    page = Page(render_report(minimal()))
    assert "The gates were not assessed" in page.text
    assert "No tiers by place" in page.text
    assert "No certificate, audit strict: every token is the full verifier's choice." in page.text
    assert len(page.all("svg")) == 2  # route, and speed against loss


def test_one_gate_texts_without_tokens_and_an_unassessed_gate_are_drawn() -> None:
    page = Page(render_report(full(reliability={"slim": RELIABILITY["slim"]}, tiers=[[]])))
    assert "slim gate: ECE 0.046, AUROC 0.92" in page.text
    assert "draft gate: ECE" not in page.text
    assert "No tiers by place" in page.text


def test_a_rounds_caption_says_which_round_it_is(page: Page) -> None:
    text = " ".join(page.text.replace("\xa0", " ").split())
    assert "speculative, 21 of 30 rounds; three-tier, 7 of 11 rounds." in text
    assert "8.8 % of the time of all speculative rounds and 12.3 % of the time of all three-tier rounds." in text
    assert "One round" not in render_report(minimal())


def test_predicted_speed_is_held_against_decoded(page: Page) -> None:
    text = " ".join(page.text.replace("\xa0", " ").split())
    assert "of 2 of 2 policies within 10 % of what was decoded on 8 prompts" in text
    assert "which is a simulation" in text
    rows = next(table for table in page.tables if table[0][0] == "kind")[1:]
    assert [(row[0], row[4], row[5], row[6]) for row in rows] == [
        ("three tiers", "2.00", "2.00", "+0.0 %"),
        ("speculative", "1.25", "1.25", "+0.0 %"),
        ("no drafting", "1.00", "1.00", "–"),
    ]


def test_without_a_calibrate_folder_or_no_drafting_there_is_no_picture_of_predictions() -> None:
    assert "Predicted and decoded speed" not in render_report(full(timing=None))
    page = Page(render_report(full(timing=make_timing(0.01, 0.016))))
    assert "there is no speed-up to hold the replay" in page.text
    assert [row[4:] for row in page.tables[-2][1:]] == [["–"] * 3] * 2
    assert len(page.all("svg")) == len(PICTURES) - 1


def test_the_break_even_tells_where_the_spec_lies(page: Page) -> None:
    text = " ".join(page.text.split())
    assert (
        "costs 0.30 to 0.40 of a full one and 1.40 full passes follow it, together 1.70 to 1.80: not below 1." in text
    )
    assert "measured on cpu, float32" in text
    assert "on 40 prompts (abacus, float32)" in text
    without = Page(render_report(full(spec=spec())))
    assert "What a slim pass costs was not measured for this spec" in without.text
    assert len(without.all("svg")) == len(PICTURES) - 1
    assert "Break-even" not in render_report(minimal())


def test_tokens_are_coloured_and_titled(page: Page) -> None:
    spans = [one for one in page.all("span") if "title" in one]
    assert [one["title"] for one in spans] == [
        "tier 1 accept, drafted",
        "tier 2 regenerate, not drafted",
        "tier 3 escalate, not drafted",
        "tier 3 escalate, drafted",
    ]
    assert [one["class"] for one in spans] == ["t1 drafted", "t2", "t3", "t3 drafted"]
    assert "It is↵\nso" in page.text


def test_hostile_text_is_escaped() -> None:
    bad = "--><script>alert('$x$')</script>\"><img src=x onerror=1>"
    hostile = spec(
        verifier=verifier_ref(name_or_path=bad),
        certificate=certificate(note=bad, procedure=bad),
        route=Route(relative_cost=RelativeCost(measured={1: 0.5}, device=bad, dtype="float32")),
    )
    measured = bench({"three_tier": method(30.0), bad: method(20.0)})
    measured = measured.model_copy(update={"hardware": {bad: bad}, "by_task": {bad: measured.by_task["coding"]}})
    sample = SampleText(bad, [bad, "</div>"], [Tier.ACCEPT, Tier.ESCALATE], [True, False])
    page = Page(render_report(full(spec=hostile, bench=measured, sample=sample)))
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count(bad) >= 8


@pytest.mark.parametrize(
    ("quantize", "words"),
    [(None, "draft (causal language model)"), ("int4", "draft (causal language model, int4 weights)")],
)
def test_integer_weights_of_the_draft_model_are_named(quantize: WeightFormat | None, words: str) -> None:
    draft = CausalLMDraft(name_or_path="draft", quantize=quantize)
    assert words in Page(render_report(full(spec=spec(draft=draft)))).text


def test_unequal_sample_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        render_report(full(sample=SampleText("", ["a", "b"], [Tier.ACCEPT], [True])))


def test_the_report_is_the_same_each_time() -> None:
    assert render_report(full()) == render_report(full())


def test_write_report_writes_the_page(tmp_path: Path) -> None:
    write_report(minimal(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == render_report(minimal())


@pytest.mark.parametrize(
    ("skipped", "words"), [([1, 2], "a bridge for the run skipped"), ([1, 3], "bridges for the 2 runs skipped")]
)
def test_bridges_are_named(skipped: list[int], words: str) -> None:
    route = Route(attention_skip=skipped, mlp_skip=skipped, bridges=BridgesRef(tensors=TENSORS))
    spec = full().spec
    assert words in render_report(full(spec=spec.model_copy(update={"route": route})))
    assert "bridge" not in route_words(Route(attention_skip=[1]), 5)


def test_a_round_is_drawn_on_one_axis_of_milliseconds() -> None:
    figure = plots.round_timelines({name: typical.recorded for name, typical in ROUNDS.items()})
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim() == (0, pytest.approx(75.6))
    names = [label.get_text() for label in above.get_yticklabels()]
    bars = {
        names[round((box.y0 + box.y1) / 2)]: [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in paths]
        for row in above.collections
        for paths in [row.get_paths()]
        for box in [paths[0].get_extents()]
    }
    assert bars["draft model"] == [pytest.approx((0, 8)), pytest.approx((10, 18))]
    assert bars["full pass"] == [pytest.approx((21, 61))]
    assert bars["output head"] == [pytest.approx((61, 67))]
    assert bars["gates, policy, host"] == [pytest.approx(gap) for gap in [(8, 10), (18, 21), (67, 70)]]
    assert "slim pass" not in bars
    assert "three-tier: 50.0 ms" in below.get_title(loc="left")
