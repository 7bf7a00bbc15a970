from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.tiny import small_disk, tiny_profile
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.errors import StorageError
from viasd_calib.evaluation import plots
from viasd_calib.evaluation.pictures import picture_format
from viasd_calib.evaluation.plots import inline_svg, latency_profile, write_figure
from viasd_calib.profiling.profile import LatencyProfile, PassShape, ProfileSettings, RoundTimes
from viasd_calib.spec import BridgesRef, Route, TensorFile

TIERS = [[Tier.ACCEPT, Tier.REGENERATE, Tier.ESCALATE] * 4, [Tier.ESCALATE]]
TENSORS = TensorFile(path="bridges/bridges.safetensors", sha256="0" * 64)


def cost(shape: PassShape) -> float:
    base = {"draft": 0.004, "slim": 0.02, "full": 0.04, "head": 0.005}[shape.tier]
    return base + 0.001 * shape.width + 1e-6 * (shape.context or 0)


def profile(
    widths: tuple[int, ...] = (1, 4, 8), contexts: tuple[int, ...] = (128, 256, 512), batches: tuple[int, ...] = (1, 2)
) -> LatencyProfile:
    return tiny_profile(ProfileSettings(widths=widths, contexts=contexts, batches=batches, repeats=5), cost)


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points by label."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axes.get_lines()
    }


def test_a_latency_profile_is_drawn_by_width_and_by_context() -> None:
    by_width, by_context = latency_profile(profile()).axes
    left, right = lines(by_width), lines(by_context)
    assert left["full pass"] == [pytest.approx((w, 40 + w + 0.128)) for w in (1, 4, 8)]
    assert left["slim pass"] == [pytest.approx((w, 20 + w + 0.128)) for w in (1, 4, 8)]
    assert left["draft step"] == [pytest.approx((1, 5.128))]
    assert left["full, token by token"][-1] == pytest.approx((8, 8 * 41.128))
    assert right["full pass"] == [pytest.approx((c, 41 + c / 1000)) for c in (128, 256, 512)]
    assert right["full, in a straight line"][-1] == pytest.approx(right["full pass"][-1])


def test_milliseconds_begin_at_zero_and_hold_every_line() -> None:
    for axes in latency_profile(profile()).axes:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 48.2


@pytest.mark.parametrize("points", [(1,), (1, 9)])
def test_a_small_profile_is_drawn_too(points: tuple[int, ...]) -> None:
    by_width, by_context = latency_profile(profile(points, points, (4,))).axes
    assert "4 texts (drafted: one)" in by_width.get_title(loc="left")
    assert "full, in a straight line" not in lines(by_context)


def test_growth_is_drawn_beside_that_of_attention_alone() -> None:
    times = [
        RoundTimes(method=method, context=context, tokens=8, rounds=4, attention=context * 1e-6,
                   seconds={"full": 0.03 + context * 2e-6, "rest": 0.002})
        for method in ("autoregressive", "three_tier") for context in (100, 600)
    ]  # fmt: skip
    figure = latency_profile(profile().model_copy(update={"rounds": tuple(times)}))
    *_, autoregressive, three_tier = figure.axes
    assert len(figure.axes) == 4
    for axes, name in ((autoregressive, "autoregressive"), (three_tier, "three-tier")):
        assert axes.get_title(loc="left") == name
        drawn = lines(axes)
        assert drawn["measured"] == [pytest.approx((100, 32.2)), pytest.approx((600, 33.2))]
        assert drawn["if attention alone grew"] == [pytest.approx((100, 32.2)), pytest.approx((600, 32.7))]
        assert drawn["gates, policy, host"] == [pytest.approx((100, 2)), pytest.approx((600, 2))]
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 33.2


def test_its_colours_follow_a_page() -> None:
    assert "var(--accept)" in inline_svg(latency_profile(profile()), "latency", "latencies")


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("b.SVG", b"<?xml"), ("c.pdf", b"%PDF")])
def test_a_figure_is_written_in_the_format_of_its_ending(tmp_path: Path, name: str, begin: bytes) -> None:
    write_figure(latency_profile(profile()), tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(begin)


@pytest.mark.parametrize("name", ["profile", "profile.bmp", "png", "profile.png.txt"])
def test_an_ending_that_names_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match=r"choose one of \.png, \.svg, \.pdf"):
        picture_format(tmp_path / name)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with small_disk(64), pytest.raises(StorageError):
        write_figure(latency_profile(profile()), tmp_path / "profile.png")
    assert not list(tmp_path.iterdir())


def test_the_route_map_shows_every_sublayer() -> None:
    figure = plots.route_map(Route(attention_skip=[0], mlp_skip=[0, 2]), num_layers=5)
    cells = figure.axes[0].patches
    assert len(cells) == 10
    assert sorted(cell.get_xy() for cell in cells if cell.get_hatch()) == [(-0.42, 0), (-0.42, 1), (1.58, 0)]


def test_the_route_map_shows_each_bridge_over_its_run() -> None:
    route = Route(attention_skip=[1, 2, 4], mlp_skip=[1], bridges=BridgesRef(tensors=TENSORS))
    bars = [patch for patch in plots.route_map(route, num_layers=5).axes[0].patches if patch.get_y() > 2]
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [
        (pytest.approx(0.58), pytest.approx(1.84)),  # layer 1 and the attention of layer 2
        (pytest.approx(3.58), pytest.approx(0.84)),
    ]


def test_shares_by_place_count_only_texts_that_reach_a_place() -> None:
    placed = plots.shares_by_place(TIERS, width=8)
    assert placed.tokens.tolist() == [9, 4]
    assert placed.shares[1].tolist() == [0.25, 0.25, 0.5]


def test_colours_of_a_picture_follow_the_page() -> None:
    svg = plots.inline_svg(plots.route_map(Route(attention_skip=[0]), 3), "route", 'a "route"')
    assert 'aria-label="a &quot;route&quot;"' in svg
    assert "var(--accept)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg.replace("#ffffff", ""))


def test_plots_make_figures_of_their_own() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    assert isinstance(plots.tier_shares(TIERS), Figure)
    assert pyplot.get_fignums() == before
