from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.tiny import small_disk, tiny_profile, verifier_ref
from viasd_calib.errors import PlanningError, SpecError, StorageError
from viasd_calib.profiling.profile import (
    LatencyProfile,
    PassShape,
    ProfileSettings,
    RoundTimes,
    TierName,
    check_profile,
    load_profile,
    save_profile,
)
from viasd_calib.spec import Gates, PromptLookupDraft, RelativeCost, Route, RoutingSpec, save_spec

TIERS: tuple[TierName, ...] = ("draft", "slim", "full", "head")
AXES = st.lists(st.integers(1, 4096), min_size=1, max_size=4, unique=True)
SECONDS = st.floats(1e-6, 1e3)


@st.composite
def profiles(draw: st.DrawFn) -> LatencyProfile:
    """Any axes, any times."""
    settings = ProfileSettings(
        widths=tuple(draw(AXES)), contexts=tuple(draw(AXES)), batches=tuple(draw(AXES)), repeats=5
    )
    shapes = list(settings.shapes())
    pool = draw(st.lists(SECONDS, min_size=1, max_size=30))
    times = dict(zip(shapes, itertools.cycle(pool), strict=False))
    return tiny_profile(settings, lambda shape: times[shape])


def seconds(profile: LatencyProfile, shape: PassShape) -> float:
    return profile.seconds(shape.tier, shape.width, shape.context or 0, shape.batch)


@given(profile=profiles())
def test_measured_points_are_given_back_exactly(profile: LatencyProfile) -> None:
    for entry in profile.measured:
        assert seconds(profile, entry.shape) == entry.seconds


def test_rounds_are_kept_and_a_profile_of_before_has_none(tmp_path: Path) -> None:
    settings = ProfileSettings(widths=(1,), contexts=(8,), batches=(1,), repeats=2)
    times = RoundTimes(
        method="three_tier", context=8, tokens=4, rounds=3, seconds={"full": 0.5, "rest": 0.5}, attention=0.1
    )
    profile = tiny_profile(settings, lambda _: 0.1).model_copy(update={"rounds": (times,)})
    save_profile(profile, tmp_path / "new.json")
    assert load_profile(tmp_path / "new.json") == profile
    document = json.loads((tmp_path / "new.json").read_text())
    del document["rounds"]
    (tmp_path / "old.json").write_text(json.dumps({**document, "schema_version": "1.0"}))
    assert load_profile(tmp_path / "old.json").rounds == ()


@given(profile=profiles(), tier=st.sampled_from(TIERS), data=st.data())
def test_between_two_points_time_goes_straight_from_one_to_the_other(
    profile: LatencyProfile, tier: TierName, data: st.DataObject
) -> None:
    shape = data.draw(st.sampled_from([shape for shape in profile.settings.shapes() if shape.tier == tier]))
    axes = profile.settings.axes(tier)
    longer = [name for name, points in zip(axes._fields, axes, strict=True) if points is not None and len(points) > 1]
    if not longer:
        return
    name = data.draw(st.sampled_from(longer))
    below, above = data.draw(st.sampled_from(list(itertools.pairwise(getattr(axes, name)))))
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=6)))
    ends = [seconds(profile, shape._replace(**{name: end})) for end in (below, above)]
    times = [seconds(profile, shape._replace(**{name: below + share * (above - below)})) for share in shares]
    for share, time in zip(shares, times, strict=True):
        assert time == pytest.approx(ends[0] + share * (ends[1] - ends[0]))
        assert min(ends) * (1 - 1e-9) <= time <= max(ends) * (1 + 1e-9)
    rising = times if ends[0] <= ends[1] else times[::-1]
    assert all(earlier <= later * (1 + 1e-9) for earlier, later in itertools.pairwise(rising))


@given(profile=profiles(), data=st.data())
def test_inside_all_axes_time_lies_between_its_corners(profile: LatencyProfile, data: st.DataObject) -> None:
    settings = profile.settings
    width, context, batch = (
        data.draw(st.floats(points[0], points[-1])) for points in (settings.widths, settings.contexts, settings.batches)
    )
    times = [entry.seconds for entry in profile.measured if entry.tier == "full"]
    assert min(times) * (1 - 1e-9) <= profile.seconds("full", width, context, batch) <= max(times) * (1 + 1e-9)


@given(profile=profiles(), tier=st.sampled_from(TIERS), data=st.data())
def test_outside_the_range_is_refused(profile: LatencyProfile, tier: TierName, data: st.DataObject) -> None:
    shape = next(shape for shape in profile.settings.shapes() if shape.tier == tier)
    axes = profile.settings.axes(tier)
    name = data.draw(st.sampled_from([name for name in axes._fields if getattr(axes, name) is not None]))
    points = getattr(axes, name)
    beyond = data.draw(st.floats(max_value=points[0], exclude_max=True) | st.floats(points[-1], exclude_min=True))
    with pytest.raises(PlanningError, match=name):
        seconds(profile, shape._replace(**{name: beyond}))


SETTINGS = ProfileSettings(widths=(1, 4), contexts=(16, 64), batches=(1, 2), repeats=5)


def sample(**changes: Any) -> LatencyProfile:
    """Times that are linear in width, context and batch."""
    return tiny_profile(
        SETTINGS, lambda shape: 0.01 + 0.001 * shape.width * (shape.context or 1) * shape.batch
    ).model_copy(update=changes)


def test_the_middle_of_all_axes_is_the_mean_of_the_corners() -> None:
    profile = sample()
    corners = [entry.seconds for entry in profile.measured if entry.tier == "slim"]
    assert len(corners) == 8
    assert profile.seconds("slim", 2.5, 40, 1.5) == pytest.approx(sum(corners) / 8)


def test_the_head_does_not_look_at_the_context() -> None:
    profile = sample()
    assert profile.seconds("head", 4, 1) == profile.seconds("head", 4, 10**6) == 0.014


@pytest.mark.parametrize(
    ("tier", "width", "context", "batch", "message"),
    [
        ("full", 5, 16, 1, "full was measured from width 1 to 4, not at width 5; .* with --widths"),
        ("full", 0, 16, 1, "not at width 0"),
        ("slim", 1, 65, 1, "slim was measured from context 16 to 64, not at context 65; .* with --contexts"),
        ("slim", 1, 16, 3, "not at batch 3; .* with --batches"),
        ("head", 5, 16, 1, "head was measured from width 1 to 4, not at width 5"),
        ("draft", 1, 15, 1, "draft was measured from context 16 to 64, not at context 15"),
        ("draft", 2, 16, 1, "a draft step is one token of one text: it has no width of 2; ask for width 1"),
        ("draft", 1, 16, 2, "it has no batch of 2; ask for batch 1"),
        ("full", float("nan"), 16, 1, "not at width nan"),
    ],
)
def test_an_error_names_the_mend(tier: TierName, width: float, context: float, batch: float, message: str) -> None:
    with pytest.raises(PlanningError, match=message):
        sample().seconds(tier, width, context, batch)


def test_an_axis_of_one_point_says_so() -> None:
    settings = SETTINGS.model_copy(update={"widths": (4,)})
    with pytest.raises(PlanningError, match="at width 4 alone, not at width 5"):
        tiny_profile(settings, lambda _: 0.1).seconds("full", 5, 16)


def test_settings_are_put_in_order() -> None:
    settings = ProfileSettings(widths=(4, 1, 4), contexts=(64,), batches=(2, 1), repeats=2)
    assert (settings.widths, settings.batches) == ((1, 4), (1, 2))
    shapes = list(settings.shapes())
    assert len(shapes) == len(set(shapes)) == 1 + 4 + 4 + 4
    assert [shape for shape in shapes if shape.tier == "draft"] == [("draft", 1, 64, 1)]


@pytest.mark.parametrize(
    "changes", [{"widths": ()}, {"contexts": (0,)}, {"batches": (-1, 1)}, {"repeats": 1}, {"depths": (1,)}]
)
def test_settings_without_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProfileSettings.model_validate({**SETTINGS.model_dump(), **changes})


@given(profile=profiles())
def test_a_profile_survives_the_disk(profile: LatencyProfile, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("profile") / "new" / "profile.json"
    save_profile(profile, path)
    assert load_profile(path) == profile


def test_a_full_disk_leaves_the_old_profile(tmp_path: Path) -> None:
    save_profile(sample(), tmp_path / "profile.json")
    before = (tmp_path / "profile.json").read_bytes()
    with small_disk(64), pytest.raises(StorageError):
        save_profile(sample(backend="other"), tmp_path / "profile.json")
    assert (tmp_path / "profile.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanningError, match=r"cannot read .*nowhere.json.*: No such file.*viasd profile"):
        load_profile(tmp_path / "nowhere.json")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    text = sample().model_dump_json()
    (tmp_path / "profile.json").write_text(text[: int(share * len(text))])
    with pytest.raises(PlanningError, match=r"not valid JSON.*truncated.*run viasd profile again"):
        load_profile(tmp_path / "profile.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 9, b"[" * 100_000])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "profile.json").write_bytes(content)
    with pytest.raises(PlanningError, match="not valid JSON"):
        load_profile(tmp_path / "profile.json")


@pytest.mark.parametrize("content", ["[]", "null", '{"hardware": {}, "methods": {}}', '{"schema_version": "1.0"}'])
def test_a_foreign_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(PlanningError, match="is not a latency profile"):
        load_profile(tmp_path / "profile.json")


def test_a_routing_spec_is_no_profile(tmp_path: Path) -> None:
    save_spec(spec(), tmp_path / "routing.json")
    with pytest.raises(PlanningError, match="is not a latency profile"):
        load_profile(tmp_path / "routing.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(schema_version="2.0"), "made by a newer version"),
        (lambda d: d.update(schema_version="1.9"), "made by a newer version"),
        (lambda d: d.update(schema_version="0.9"), "schema_version '0.9' is not one this release reads"),
        (lambda d: d.pop("schema_version"), "schema_version None"),
        (lambda d: d.update(speed=1), "speed: is no entry"),
        (lambda d: d.pop("hardware"), "hardware: Field required"),
        (lambda d: d["measured"].pop(), "measured does not hold what settings name"),
        (lambda d: d["measured"].append(d["measured"][0]), "measured does not hold"),
        (lambda d: d["measured"][0].update(width=9), "measured does not hold"),
        (lambda d: d["settings"].update(widths=[1, 2, 4]), "measured does not hold"),
        (lambda d: d["measured"][3].update(seconds=-1.0), r"measured\.3\.seconds: .*greater than 0"),
        (lambda d: d["measured"][3].update(high=1e-9), r"measured\.3: .*between low and high"),
        (lambda d: d["measured"][3].update(seconds=float("nan")), r"measured\.3\.seconds"),
        (lambda d: d["measured"][3].update(tier="fast"), r"measured\.3\.tier"),
        (lambda d: d["verifier"].update(config_sha256="x"), r"verifier\.config_sha256"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    document = sample().model_dump(mode="json")
    damage(document)
    (tmp_path / "profile.json").write_text(json.dumps(document))
    with pytest.raises(PlanningError, match=message):
        load_profile(tmp_path / "profile.json")


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        sample().backend = "other"  # type: ignore[misc]


def spec(**changes: Any) -> RoutingSpec:
    entries: dict[str, Any] = {
        "verifier": verifier_ref(),
        "draft": PromptLookupDraft(),
        "route": Route(attention_skip=[1]),
        "gates": Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    }
    return RoutingSpec(**{**entries, **changes})


def test_a_profile_fits_its_spec_whatever_cost_the_spec_records() -> None:
    cost = RelativeCost(measured={1: 0.5}, device="cpu", dtype="float32")
    check_profile(sample(), spec())
    check_profile(sample(), spec(route=Route(attention_skip=[1], relative_cost=cost)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"verifier": verifier_ref(config_sha256="c" * 64)}, SpecError, "config_sha256"),
        ({"route": Route(attention_skip=[2])}, PlanningError, "another route"),
        ({"draft": PromptLookupDraft(max_ngram=5)}, PlanningError, "another draft model"),
    ],
)
def test_a_profile_of_another_spec_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_profile(sample(), spec(**changes))
