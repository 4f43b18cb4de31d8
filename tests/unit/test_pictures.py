"""The pictures of the routing: what stands in a figure is what stands in the arrays, as PNG and in the browser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters.router_profile import RouterProfile
from studio.pictures import draw_preference, write_job_pictures
from studio.preference_view import preference_panels
from studio.progress import ROUTER_MEASURES, router_rows, warnings
from studio.routing_view import Heatmap, RoutingView, job_routing, reach
from studio.terminal import heat_strip, profile_view
from ui.heatmaps import as_plot, depth_colour, heatmap_figure, router_figure
from ui.html import el
from ui.preference_views import preference_figure
from ui.routing_panel import KINDS
from ui.routing_views import coverage_view, warnings_view

RANKS = [[0, 4, 8, 0], [4, 0, 0, 0], [0, 0, 0, 16]]
LAYERS = (1, 3, 5)
EVIL = "<img src=x onerror=alert(1)>$"


def make_profile(shift: int = 0, sources: tuple[str, ...] = ("tickets", "notes"), experts: int = 4) -> RouterProfile:
    """Three layers, top-1; the second source uses one expert alone."""
    routed = np.zeros((len(sources), 3, experts), np.int64)
    routed[0] = np.arange(1, experts + 1) * 10
    routed[1:, :, 2] = int(routed[0, 0].sum())
    routed[0] = np.roll(routed[0], shift, axis=-1)
    tokens = routed[:, 0].sum(-1)
    together = np.zeros((3, experts, experts), np.int64)
    return RouterProfile("b", "d", 0, 1000, LAYERS, 1, 1, sources, tokens, routed, routed * 0.5, together)


def rows(steps: int = 3) -> list[dict[str, Any]]:
    def row(step: int) -> dict[str, Any]:
        measures = {name: [step + i / 10 for i in range(3)] for name in ROUTER_MEASURES}
        return {"kind": "router", "step": step, "layers": list(LAYERS), **measures}

    return [{"kind": "train", "step": 1, "loss": 2.0}, *(row(step) for step in range(1, steps + 1))]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job directory with every file that pictures are drawn from."""
    make_profile().save(tmp_path / "profile.safetensors")
    make_profile(shift=1).save(tmp_path / "profile_after.safetensors")
    norms = {"layers": LAYERS, "gate_up_proj": [[3.0] * 4] * 3, "down_proj": [[4.0] * 4] * 3}
    (tmp_path / "delta_norms.json").write_text(json.dumps(norms))
    (tmp_path / "placement.json").write_text(json.dumps({"layers": LAYERS, "routed": RANKS}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return tmp_path


def view_of(job: Path) -> RoutingView:
    view = job_routing(job)
    assert view is not None
    return view


# -------------------------------------------------------------------- what is drawn


def test_a_job_shows_use_ranks_change_and_updates(job: Path) -> None:
    found = {heatmap.kind: heatmap for heatmap in view_of(job).heatmaps()}
    before, after = make_profile().share(), make_profile(shift=1).share()
    assert tuple(found) == KINDS
    np.testing.assert_array_equal(found["use"].values, before)
    np.testing.assert_array_equal(found["rank"].values, RANKS)
    np.testing.assert_allclose(found["change"].values, 100 * (after - before))
    np.testing.assert_allclose(found["delta"].values, np.full((3, 4), 5.0))  # of the two matrices together
    assert all(heatmap.layers == LAYERS for heatmap in found.values())


def test_a_source_of_its_own_shows_its_own_use(job: Path) -> None:
    use = view_of(job).heatmaps("notes")[0]
    np.testing.assert_array_equal(use.values, [[0, 0, 1, 0]] * 3)
    assert "notes" in use.title


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (("profile_after.safetensors",), {"use", "rank", "delta"}),
        (("profile.safetensors", "profile_after.safetensors"), {"rank", "delta"}),
        (("placement.json", "delta_norms.json", "profile_after.safetensors"), {"use"}),
    ],
)
def test_what_is_absent_is_left_out(job: Path, missing: tuple[str, ...], left: set[str]) -> None:
    for name in missing:
        (job / name).unlink()
    assert {heatmap.kind for heatmap in view_of(job).heatmaps()} == left
    assert {path.stem for path in write_job_pictures(job)} >= left


def test_nothing_to_see_in_an_older_job_or_in_damaged_files(tmp_path: Path) -> None:
    assert job_routing(tmp_path) is None and write_job_pictures(tmp_path) == []
    (tmp_path / "profile.safetensors").write_bytes(b"torn")
    (tmp_path / "placement.json").write_text("{")
    assert job_routing(tmp_path) is None


def test_coverage_is_the_share_of_the_tokens_that_meet_an_adapter(job: Path) -> None:
    tickets, notes = view_of(job).coverage()
    share = np.array([0.1, 0.2, 0.3, 0.4])
    assert tickets.covered_fraction == pytest.approx(np.mean([share[1] + share[2], share[0], share[3]]))
    assert notes.covered_fraction == pytest.approx(1 / 3)
    assert (tickets.tokens, notes.reached, tickets.reached) == (100, 1.0, 3.0)


@pytest.mark.parametrize(("share", "experts"), [([1.0, 0, 0], 1), ([0.5, 0.4, 0.1], 2), ([0.3, 0.3, 0.4], 3)])
def test_reach_counts_the_fewest_experts_with_nine_tenths_of_the_tokens(share: list[float], experts: int) -> None:
    assert reach(np.array([share])) == experts
    assert reach(np.array([share, [1.0, 0, 0]])) == (experts + 1) / 2


# -------------------------------------------------------------------- in the browser


def test_a_figure_holds_the_values_and_says_them_to_who_points_at_them(job: Path) -> None:
    for heatmap in view_of(job).heatmaps():
        cells = heatmap_figure(heatmap).data[0]
        shown = np.array([[math.nan if v is None else v for v in row] for row in cells.z], dtype=float)
        adapted = np.array(RANKS) > 0 if heatmap.kind == "rank" else np.ones((3, 4), bool)
        np.testing.assert_array_equal(shown[adapted], heatmap.values[adapted])
        assert np.isnan(shown[~adapted]).all()
    use, rank, change, delta = (heatmap_figure(heatmap).data[0].text for heatmap in view_of(job).heatmaps())
    assert use[0][1] == "<b>layer 1, expert 1</b><br>10.0 % of the layer's tokens<br>rank 4"
    assert rank[2][0] == "<b>layer 5, expert 0</b><br>5.0 % of the layer's tokens<br>no adapter"
    assert change[0][0].endswith("+15.00 points after training") and delta[0][0].endswith("update of norm 5")


def test_no_change_is_in_the_middle_of_the_colours(job: Path) -> None:
    cells = heatmap_figure(view_of(job).heatmaps()[2]).data[0]
    assert cells.zmin == -cells.zmax < 0
    flat = Heatmap("change", "", "", LAYERS, np.zeros((3, 4)))
    assert heatmap_figure(flat).data[0].zmax > 0  # nothing moved: a range all the same


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (4, 16), (48, 128)])
def test_axes_count_layers_from_the_top_and_stay_readable(layers: int, experts: int) -> None:
    heatmap = Heatmap("use", "Use", "share", tuple(range(layers)), np.full((layers, experts), 1 / experts))
    layout = heatmap_figure(heatmap).layout
    assert layout.yaxis.autorange == "reversed" and layout.yaxis.tickvals[0] == 0
    assert len(layout.yaxis.tickvals) == (1 if layers == 1 else min(layers, 12))
    assert experts / layout.xaxis.dtick <= 16 and 190 <= layout.height <= 560


def test_figures_stand_on_light_and_dark_and_load_nothing(job: Path) -> None:
    for figure in (heatmap_figure(view_of(job).heatmaps()[0]), router_figure(rows())):
        assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
        sent = as_plot(figure)
        assert sent.type == "plotly" and "http" not in sent.plot
        assert json.loads(sent.plot)["config"]["displayModeBar"] is False


def test_the_router_figure_has_a_line_for_each_layer_and_measure() -> None:
    lines = router_figure(rows()).data
    assert len(lines) == len(ROUTER_MEASURES) * len(LAYERS)
    assert list(lines[0].x) == [1, 2, 3] and list(lines[2].y) == [1.2, 2.2, 3.2]
    assert "layer 5" in lines[2].hovertemplate
    assert [line.name for line in lines if line.showlegend] == ["layer 1", "layer 3", "layer 5"]
    assert router_figure(rows(), 80).layout.xaxis.range == (0, 80)
    assert depth_colour(0) != depth_colour(0.5) != depth_colour(1)


def test_many_layers_have_a_colour_bar_in_place_of_names() -> None:
    many = [{"kind": "router", "step": 1, "layers": list(range(40)), **{m: [1.0] * 40 for m in ROUTER_MEASURES}}]
    *lines, bar = router_figure(many).data
    assert len(lines) == 160 and not any(line.showlegend for line in lines)
    assert (bar.marker.cmin, bar.marker.cmax, bar.marker.showscale) == (0, 39, True)


def test_a_measure_that_is_not_taken_leaves_its_panel_empty() -> None:
    without = [{name: value for name, value in row.items() if name != "kl"} for row in rows()]
    assert len(router_figure(without).data) == 3 * len(LAYERS)
    assert not router_figure([]).data


def test_a_long_training_is_thinned_and_keeps_its_last_step() -> None:
    line = router_figure(rows(steps=1000)).data[0]
    assert len(line.x) == 400 and line.x[-1] == 1000


def test_names_of_sources_are_shown_and_never_run() -> None:
    view = RoutingView(LAYERS, make_profile(sources=(EVIL, "b")), ranks=np.array(RANKS, float))
    assert "<img" not in str(coverage_view(view.coverage())) and "&lt;img" in str(coverage_view(view.coverage()))
    title = heatmap_figure(view.heatmaps(EVIL)[0]).layout.title.text
    assert "<img" not in title and "&lt;img" in title


def test_quotes_in_names_of_sources_are_shown_as_they_are() -> None:
    """plotly decodes &lt; &gt; and &amp;, and shows &quot; as these six characters."""
    view = RoutingView(LAYERS, make_profile(sources=('Ann\'s "best" & <b>', "b")), ranks=np.array(RANKS, float))
    title = heatmap_figure(view.heatmaps('Ann\'s "best" & <b>')[0]).layout.title.text
    assert 'Ann\'s "best" &amp; &lt;b&gt;' in title


def test_coverage_says_the_number_beside_its_bar(job: Path) -> None:
    shown = str(coverage_view(view_of(job).coverage()))
    assert "33.3 %" in shown and "width:33.3%" in shown and "1.0 of 4" in shown
    assert coverage_view(()) is None
    unplaced = str(coverage_view(RoutingView(LAYERS, make_profile()).coverage()))
    assert "Covered by" not in unplaced and "1.0 of 4" in unplaced


def test_warnings_are_shown_once_newest_last() -> None:
    said = [{"kind": "warning", "step": step, "message": f"at step {step % 8}: too busy"} for step in range(1, 17)]
    assert warnings(said) == [f"at step {step % 8}: too busy" for step in range(1, 9)]
    shown = str(warnings_view(said))
    assert shown.count("<li>At step") == 5 and "At step 0" in shown and "3 earlier ones" in shown
    assert warnings_view(rows()) is None
    assert str(el("li", EVIL)) in str(warnings_view([{"kind": "warning", "step": None, "message": EVIL}]))


# -------------------------------------------------------------------- as PNG and in the terminal


def test_pictures_are_written_whole_with_colours_in_them(job: Path) -> None:
    written = write_job_pictures(job)
    assert {path.name for path in written} == {*(f"{kind}.png" for kind in KINDS), "coverage.png", "router.png"}
    assert sorted(written) == sorted((job / "pictures").iterdir())  # nothing half-written beside them
    for path in written:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 150
            colours = picture.convert("RGB").getcolors(1 << 20)
            assert colours and len(colours) > 40, path.name


def test_a_cell_of_the_png_has_the_colour_of_its_value(tmp_path: Path) -> None:
    from studio.pictures import draw_heatmap

    def darkest(row: int, column: int) -> tuple[float, float]:
        """Where the darkest cell is, as fractions of width and height, for a picture with one busy expert."""
        values = np.zeros((4, 16))
        values[row, column] = 1.0
        path = draw_heatmap(tmp_path / "x.png", Heatmap("use", "", "", (0, 1, 2, 3), values))
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        dark = np.abs(pixels - [11, 95, 88]).sum(-1) < 12
        dark[:, dark.sum(0) < 15] = False  # of the colour bar only its end is as dark
        ys, xs = np.where(dark)
        return float(xs.mean() / pixels.shape[1]), float(ys.mean() / pixels.shape[0])

    left_top, right_bottom = darkest(0, 0), darkest(3, 15)
    assert left_top[0] < 0.2 < 0.6 < right_bottom[0] and left_top[1] < 0.35 < 0.5 < right_bottom[1]


def test_large_models_get_larger_pictures_within_bounds(tmp_path: Path) -> None:
    from studio.pictures import draw_heatmap

    sizes = {}
    for layers, experts in ((4, 16), (48, 128)):
        values = np.random.default_rng(0).random((layers, experts))
        path = draw_heatmap(tmp_path / f"{layers}.png", Heatmap("use", "Use", "share", tuple(range(layers)), values))
        sizes[layers] = Image.open(path).size
    assert sizes[4][0] < sizes[48][0] <= 13.2 * 130 and sizes[4][1] < sizes[48][1] <= 8.7 * 130


def test_a_strip_of_text_is_as_high_as_the_shares() -> None:
    assert heat_strip([0.0, 0.5, 1.0, 0.01]) == "·▅█▁"
    assert len(heat_strip([0.1] * 128)) == 48 and heat_strip([0.0] * 100 + [1.0])[-1] == "█"
    assert heat_strip([0.0, 0.0]) == "··"


def test_the_terminal_shows_each_layer_with_its_busiest_experts() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(profile_view(make_profile(sources=("tickets\x1b[31m", "notes"))))
    text = console.export_text()
    assert "\x1b" not in text and "200 tokens" in text and "top-1" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("3 "))
    assert "2: 65.0 %, 3: 20.0 %, 1: 10.0 %" in line and "▂▂█▃" in line


def test_rows_of_other_kinds_are_no_router_rows() -> None:
    assert [row["step"] for row in router_rows([*rows(), {"kind": "router", "step": 9}])] == [1, 2, 3]


def test_a_preference_job_has_a_panel_for_each_measure_that_it_logged(tmp_path: Path) -> None:
    logged = [
        {"kind": "train", "step": step, "loss": 0.6, "rewards_chosen": 0.1 * step, "rewards_rejected": -0.1 * step}
        | {"rewards_margins": 0.2 * step, "rewards_accuracies": 0.75}
        for step in (1, 2, 3)
    ] + [{"kind": "reference", "step": 2, "kl": 0.5}]
    panels = preference_panels(logged)
    assert [panel.title for panel in panels] == ["Rewards", "Margin", "Accuracy", "KL from the base"]
    assert panels[0].lines["rejected"] == ((1, -0.1), (2, -0.2), (3, pytest.approx(-0.3)))
    assert panels[3].lines == {"kl": ((2, 0.5),)}
    drawn = draw_preference(tmp_path / "preference.png", panels)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    figure = preference_figure(panels, 3)
    assert [list(trace.y) for trace in figure.data][-1] == [0.5] and len(figure.data) == 5
    reward = preference_panels([{"kind": "train", "step": 1, "accuracy": 0.5, "margin": 0.1, "mean_reward": 0.0}])
    assert [panel.title for panel in reward] == ["Rewards", "Margin", "Accuracy"]
    assert preference_panels([{"kind": "train", "step": 1, "loss": 1.0}]) == ()
