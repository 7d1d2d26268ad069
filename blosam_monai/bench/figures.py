"""A finished grid as pictures, 1280 pixels wide: Dice against shots, methods as bars, training curves, cost.

A function draws one picture and returns None, or draws nothing and returns why. Black is the reference, gray
an oracle; the other colours are those of Okabe and Ito 2008, which colour-blind readers tell apart, but for yellow,
which is too pale on white.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blosam_monai.bench.runner import slug
from blosam_monai.bench.tables import ALL_SETS, NOT_RUN, RESEARCH, SCORE_NAMES, shown_names, weights_line
from blosam_monai.files import PathLike, atomic

DPI, WIDTH = 160, 8.0  # dots per inch, inches
TITLE = 9.5  # points
BLACK, GRAY = "#000000", "#777777"  # the reference; oracles
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STROKES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # of a second and a third round of colours
MARKERS = "osD^v<>PXp*h"
MAX_PANELS = 4  # in a row
INTERVALS = "Error bars: 95 % two-way bootstrap interval over draws and subjects."


def draw_figures(
    table: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    folder: PathLike,
) -> dict[str, str | None]:
    """Draw all that there is to draw; name of the file -> None, or why it was not drawn.

    Args:
        table: of ``summarise_grid``.
        rows, cells: what it was made from; ``cells`` with ``curve``.
        folder: for the pictures.
    """
    said = {"shots.png": draw_shots(table, Path(folder, "shots.png"))}
    names = shown_names([*cells, *rows])
    for n_shot in dict.fromkeys(row["n_shot"] for row in table):
        own = [row for row in table if row["n_shot"] == n_shot]
        for name, draw in (("methods", draw_ablation), ("cost", draw_cost)):
            file = f"{name}_{n_shot}shot.png"
            said[file] = draw(own, Path(folder, file))
    for data, n_shot in dict.fromkeys((row["data"], row["n_shot"]) for row in table if row["data"] != ALL_SETS):
        file = f"curves_{slug(data)}_{n_shot}shot.png"
        trained = [cell for cell in cells if (cell["data"], cell["n_shot"]) == (data, n_shot)]
        trained = [dict(cell) | {"method": names[cell["method"]]} for cell in trained]
        said[file] = draw_curves(trained, Path(folder, file))
    return said


def draw_shots(table: Sequence[Mapping[str, Any]], path: PathLike) -> str | None:
    """Score against the number of labelled images, a panel for each data set that has several.

    Args:
        table: of ``summarise_grid``.
        path: of the PNG.
    """
    run = [row for row in table if row["run"] and row["data"] != ALL_SETS]
    shots = {data: sorted({row["n_shot"] for row in run if row["data"] == data}) for data in _each(run, "data")}
    sets = [data for data, numbers in shots.items() if len(numbers) > 1]
    if not sets:
        return "No data set was run with more than one number of labelled images."
    looks = _looks(table)
    figure, panels = _panels(len(sets), height=3.6)
    for axes, data in zip(panels, sets, strict=True):
        for place, (method, look) in enumerate(looks.items()):
            own = sorted(
                (row for row in run if (row["data"], row["method"]) == (data, method)), key=lambda row: row["n_shot"]
            )
            beside = 2 ** (0.5 * ((place + 0.5) / len(looks) - 0.5))  # so that intervals do not cover each other
            _plot(axes, [row["n_shot"] * beside for row in own], own, look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots[data], [str(number) for number in shots[data]])
        axes.minorticks_off()
        axes.set_title(data, size=TITLE)
        axes.set_xlabel("labelled images")
    panels[0].set_ylabel(_score_label(table))
    _legend(figure, panels)
    _save(
        figure,
        path,
        f"Points of one number of images stand side by side. {INTERVALS}",
        weights_line(w for row in run for w in row["sam_weights"]),
    )
    return None


def draw_ablation(table: Sequence[Mapping[str, Any]], path: PathLike) -> str | None:
    """A bar for each method, a panel for each data set; the mean of the reference is a dashed line.

    Args:
        table: of ``summarise_grid``, of one ``n_shot``.
        path: of the PNG.
    """
    run = [row for row in table if row["run"]]
    if len(_each(run, "method")) < 2:
        return "Fewer than two methods were run."
    methods, sets = _each(table, "method"), _each(table, "data")
    most = max(row["mean"] if row["high"] is None else row["high"] for row in run)
    figure, panels = _panels(len(sets), height=0.8 + 0.26 * len(methods))
    for axes, data in zip(panels, sets, strict=True):
        found = {row["method"]: row for row in run if row["data"] == data}
        for place, method in enumerate(methods):
            row = found.get(method)
            if row is None:
                axes.text(0.02, place, NOT_RUN, va="center", transform=axes.get_yaxis_transform(), color="0.4", size=8)
                continue
            colour = "0.3" if method == row["reference"] else "0.7" if row["oracle"] else COLOURS[5]
            axes.barh(place, row["mean"], height=0.7, color=colour)
            axes.errorbar(row["mean"], place, xerr=_error([row]), color=BLACK, capsize=2, linewidth=1.2)
        if table[0]["reference"] in found:
            axes.axvline(found[table[0]["reference"]]["mean"], color=BLACK, linestyle=(0, (3, 2)), linewidth=1)
        axes.set_title(data, size=TITLE)
        axes.set(xlabel=_score_label(table), xlim=(0, 1.03 * most), ylim=(len(methods) - 0.4, -0.6))
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(axis="x", alpha=0.15, linewidth=0.8)
        axes.grid(visible=False, axis="y")
    said = f"{table[0]['n_shot']} labelled images. Dark and dashed: {table[0]['reference']}, the reference. {INTERVALS}"
    _save(figure, path, said, weights_line(w for row in run for w in row["sam_weights"]))
    return None


def draw_cost(table: Sequence[Mapping[str, Any]], path: PathLike) -> str | None:
    """Score against the seconds of a training and against the parameters trained, over all data sets.

    Args:
        table: of ``summarise_grid``, of one ``n_shot``; its last data set is drawn: all sets, where there are several.
        path: of the PNG.
    """
    data = table[-1]["data"]
    run = [row for row in table if row["run"] and row["data"] == data and row["seconds"] is not None]
    if len(run) < 2:
        return f"Fewer than two methods were run on {data}."
    looks = _looks(table)
    figure, panels = _panels(2, height=3.6)
    for axes, key in zip(panels, ("seconds", "trained_parameters"), strict=True):
        for row in run:
            _plot(axes, [row[key]], [row], looks[row["method"]])
        least = min((row[key] for row in run if row[key] > 0), default=1)
        decade = 10 ** math.floor(math.log10(least))
        # Below the first decade the axis is linear, so that 0 has a place, as far from it as a decade from the next.
        if any(row[key] == 0 for row in run):
            axes.set_xscale("symlog", linthresh=decade, linscale=1)
            axes.set_xlim(left=-0.3 * decade)
        else:
            axes.set_xscale("log")
        axes.set_title(data, size=TITLE)
    panels[0].set(xlabel="training of one draw (s)", ylabel=_score_label(table))
    panels[1].set(xlabel="trained parameters")
    _legend(figure, panels)
    said = f"{table[0]['n_shot']} labelled images. {INTERVALS}"
    _save(figure, path, said, weights_line(w for row in run for w in row["sam_weights"]))
    return None


def draw_curves(cells: Sequence[Mapping[str, Any]], path: PathLike) -> str | None:
    """Dice on training and on test images during training, a panel a method: each draw, and the mean of draws.

    Args:
        cells: of one data set and ``n_shot``: ``data n_shot method sam_weights curve``, methods named as to be shown;
            ``curve``: a list of ``epoch lower_dice test_dice``.
        path: of the PNG.
    """
    cells = [cell for cell in cells if cell["curve"]]
    if not cells:
        return "No cell has a curve; set test_curve in the grid."
    methods = _each(cells, "method")
    figure, panels = _panels(len(methods), height=1.9)
    for axes, method in zip(panels, methods, strict=True):
        curves = [cell["curve"] for cell in cells if cell["method"] == method]
        for key, name, colour, stroke in (
            ("lower_dice", "training images (D1)", COLOURS[0], STROKES[1]),
            ("test_dice", "test images", COLOURS[1], "-"),
        ):
            for curve in curves:
                axes.plot(*_points([curve], key), color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(*_points(curves, key), color=colour, linestyle=stroke, linewidth=2, label=name)
        axes.set_title(method, size=TITLE)
        axes.set_ylim(0, 1.02)
    figure.supylabel("Dice", size=10)
    for axes in panels[-MAX_PANELS:]:
        axes.set_xlabel("epoch")
    _legend(figure, panels[:1], beside=False)
    said = f"{cells[0]['data']}, {cells[0]['n_shot']} labelled images. Thin: each draw; thick: their mean."
    _save(figure, path, said, weights_line(cell["sam_weights"] for cell in cells))
    return None


def _points(curves: Sequence[Sequence[Mapping[str, float]]], key: str) -> tuple[list[float], list[float]]:
    """Epochs, and the mean over curves at those that all have."""
    values: dict[float, list[float]] = {}
    for point in (point for curve in curves for point in curve):
        values.setdefault(point["epoch"], []).append(point[key])
    epochs = sorted(epoch for epoch, found in values.items() if len(found) == len(curves))
    return epochs, [fmean(values[epoch]) for epoch in epochs]


def _plot(axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]], look: Mapping[str, Any]) -> None:
    """Means of rows with their intervals, named in the legend."""
    if rows:
        axes.errorbar(x, [row["mean"] for row in rows], yerr=_error(rows), label=rows[0]["method"], **look)


def _error(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the intervals reach below and above the means; nothing is drawn where there is none."""
    return [
        [math.nan if row[end] is None else max(0.0, sign * (row[end] - row["mean"])) for row in rows]
        for end, sign in (("low", -1), ("high", 1))
    ]


def _looks(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> how it is drawn, the same in all pictures of a table."""
    reference, looks, place = table[0]["reference"], {}, 0
    for method, oracle in dict.fromkeys((row["method"], row["oracle"]) for row in table):
        look: dict[str, Any] = {"linewidth": 1.3, "elinewidth": 1.0, "capsize": 2, "markersize": 5}
        if method == reference:
            look |= {"color": BLACK, "marker": MARKERS[0], "linestyle": "-", "linewidth": 2.0}
        elif oracle:
            look |= {"color": GRAY, "marker": "x", "linestyle": STROKES[2]}
        else:
            stroke, colour = divmod(place, len(COLOURS))
            marker = MARKERS[1 + place % (len(MARKERS) - 1)]
            look |= {"color": COLOURS[colour], "marker": marker, "linestyle": STROKES[stroke % len(STROKES)]}
            place += 1
        looks[method] = look
    return looks


def _each(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _score_label(table: Sequence[Mapping[str, Any]]) -> str:
    return SCORE_NAMES[table[0]["score"]]


def _panels(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, ``height`` inches a row."""
    columns = min(count, MAX_PANELS)
    lines = math.ceil(count / columns)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(WIDTH, 0.9 + height * lines), dpi=DPI, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    panels = list(grid.ravel())
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.15, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels[:count]


def _legend(figure: Figure, panels: Sequence[Axes], *, beside: bool = True) -> None:
    """One legend for all panels, each name once, outside of them."""
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: Any = "outside right upper" if beside else "outside upper center"
    figure.legend(
        entries.values(), entries, loc=place, frameon=False, fontsize=8.5, ncols=1 if beside else len(entries)
    )


def _save(figure: Figure, path: PathLike, *said: str) -> None:
    """Write the picture with what has to be said of it below."""
    text = textwrap.fill(" ".join([*said, RESEARCH]), 130)
    figure.supxlabel(text, size=7.5, color="0.35", x=0.01, ha="left")
    with atomic(path) as part:
        figure.savefig(part)
