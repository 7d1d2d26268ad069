"""Pictures of a grid show its numbers, and say why they are not drawn."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from blosam_monai.bench import figures
from blosam_monai.bench.figures import (
    draw_ablation,
    draw_cost,
    draw_curves,
    draw_figures,
    draw_shots,
)
from blosam_monai.bench.tables import summarise_grid

CURVE = [{"epoch": 0, "lower_dice": 0.0, "test_dice": 0.0}, {"epoch": 10, "lower_dice": 0.9, "test_dice": 0.6}]
MEANS = {"joint": 0.6, "blosam": 0.7, "sam": 0.8}


def grid(shots=(2, 4), data=("lungs", "teeth")) -> tuple[list[dict], list[dict]]:
    rows, cells = [], []
    for name, n_shot, (method, mean) in ((d, k, m) for d in data for k in shots for m in MEANS.items()):
        for draw in range(2):
            cell = {"data": name, "n_shot": n_shot, "method": method, "draw": draw}
            known = {"seconds": 0.0 if method == "sam" else 3.0, "trained_parameters": 0 if method == "sam" else 65_792}
            curve = [] if method == "sam" else [p | {"test_dice": p["test_dice"] + draw * 0.1} for p in CURVE]
            cells.append(cell | known | {"total_parameters": 1, "sam_weights": "random", "curve": curve})
            for case in range(3):
                of_case = {
                    "task": "t",
                    "case": f"{name} {case}",
                    "subject": f"{name} {case}",
                    "oracle": method == "sam",
                }
                rows.append(cell | of_case | {"dice": mean + 0.01 * n_shot + 0.02 * (draw + case - 1.5)})
    return rows, cells


def table_of(rows, cells, **options) -> list[dict]:
    return summarise_grid(rows, cells, "joint", resamples=200, **options)


ROWS, CELLS = grid()
TABLE = table_of(ROWS, CELLS)
OF_FOUR = [row for row in TABLE if row["n_shot"] == 4]


def width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, *said: kept.append(figure))
    return kept


def test_a_grid_gives_pictures_1280_pixels_wide(tmp_path):
    said = draw_figures(TABLE, ROWS, CELLS, tmp_path)
    assert not any(said.values())
    assert {name: width(tmp_path / name) for name in said} == dict.fromkeys(
        [
            *("shots.png", "methods_2shot.png", "cost_2shot.png", "methods_4shot.png", "cost_4shot.png"),
            *("curves_lungs_2shot.png", "curves_lungs_4shot.png", "curves_teeth_2shot.png", "curves_teeth_4shot.png"),
        ],
        1280,
    )


def test_shots_are_drawn_at_their_means_with_their_intervals(drawn, tmp_path):
    assert draw_shots(TABLE, tmp_path / "x.png") is None
    panel = drawn[0].axes[0]
    bars = next(c for c in panel.containers if c.get_label() == "blosam")
    assert bars[0].get_ydata() == pytest.approx([0.72, 0.74])  # 0.7 + 0.01 a shot; draws and cases add up to 0
    ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
    wanted = [[r["low"], r["high"]] for r in TABLE if (r["data"], r["method"]) == ("lungs", "blosam")]
    assert ends == [pytest.approx(pair) for pair in wanted]


def test_a_bar_is_as_long_as_the_mean(drawn, tmp_path):
    assert draw_ablation(OF_FOUR, tmp_path / "x.png") is None
    assert [panel.get_title() for panel in drawn[0].axes] == ["lungs", "teeth", "all sets"]
    assert [bar.get_width() for bar in drawn[0].axes[0].patches] == pytest.approx([0.64, 0.74, 0.84])


def test_a_method_that_was_not_run_says_so_in_place_of_its_bar(drawn, tmp_path):
    planned = [{"data": "lungs", "n_shot": 4, "method": method} for method in (*MEANS, "later")]
    draw_ablation([r for r in table_of(ROWS, CELLS, planned=planned) if r["n_shot"] == 4], tmp_path / "x.png")
    assert [[text.get_text() for text in panel.texts] for panel in drawn[0].axes] == [["not run"]] * 3


def test_oracles_are_marked_in_every_picture(drawn, tmp_path):
    draw_shots(TABLE, tmp_path / "x.png")
    draw_ablation(OF_FOUR, tmp_path / "x.png")
    draw_cost(OF_FOUR, tmp_path / "x.png")
    shots, ablation, cost = drawn
    assert [text.get_text() for text in ablation.axes[0].get_yticklabels()] == ["joint", "blosam", "sam (oracle)"]
    for figure in (shots, cost):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["joint", "blosam", "sam (oracle)"]


def test_a_method_without_training_stands_at_no_cost(drawn, tmp_path):
    assert draw_cost(OF_FOUR, tmp_path / "x.png") is None
    seconds, parameters = drawn[0].axes
    for panel, cost in ((seconds, 3.0), (parameters, 65_792)):
        assert [bars[0].get_xdata().tolist() for bars in panel.containers] == [[cost], [cost], [0]]
        assert panel.get_xlim()[0] < 0


def test_the_numbers_below_a_cost_axis_keep_apart_beside_a_long_legend(drawn, tmp_path):
    costs = {"joint": 93_735_472, "blosam": 129, "sam (oracle)": 0}
    names = {"joint": "a method with a name that is of some more length"}
    rows = [row | {"trained_parameters": costs[row["method"]], "seconds": costs[row["method"]]} for row in OF_FOUR]
    draw_cost([row | {"method": names.get(row["method"], row["method"])} for row in rows], tmp_path / "x.png")
    FigureCanvasAgg(drawn[0]).draw()
    for panel in drawn[0].axes:
        boxes = [tick.get_window_extent() for tick in panel.get_xticklabels() if tick.get_position()[0] >= 0]
        assert len(boxes) > 6
        assert all(box.x1 < right.x0 for box, right in pairwise(boxes))


def test_curves_are_the_mean_of_draws(drawn, tmp_path):
    cells = [cell for cell in CELLS if (cell["data"], cell["n_shot"]) == ("lungs", 4)]
    assert draw_curves(cells, tmp_path / "x.png") is None
    assert [panel.get_title() for panel in drawn[0].axes] == ["joint", "blosam"]  # the oracle has no curve
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].lines}
    assert list(lines["training images (D1)"]) == pytest.approx([0.0, 0.9])
    assert list(lines["test images"]) == pytest.approx([0.05, 0.65])


def test_without_several_numbers_of_images_there_are_no_shots(tmp_path):
    table = table_of(*grid(shots=(4,)))
    assert "more than one number" in draw_shots(table, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_what_was_not_run_is_not_drawn_and_why_is_said(tmp_path):
    planned = [{"data": "lungs", "n_shot": 4, "method": method} for method in MEANS]
    said = draw_figures(summarise_grid([], [], "joint", planned=planned), [], [], tmp_path)
    assert all(said.values())
    assert not list(tmp_path.iterdir())


def test_without_an_interval_there_is_a_mean(drawn, tmp_path):
    rows = [row for row in ROWS if row["draw"] == 0]
    assert draw_shots(table_of(rows, CELLS), tmp_path / "x.png") is None
    assert len(drawn[0].axes[0].containers) == len(MEANS)
