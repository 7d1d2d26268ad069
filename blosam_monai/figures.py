"""What the report shows: curves as SVG that take the page's colours and font, and pictures made small."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

PICTURE_SIDE = 320  # pixels
MAX_CURVES = 6  # tasks with a picture of their own
LINES = {  # section -> name in the legend, colour in the style sheet, stroke
    "lower": ("D1 (lower)", "var(--d1)", "-"),
    "upper": ("D2 (upper)", "var(--d2)", (0, (5, 2))),
    "validation": ("held-out", "var(--held-out)", (0, (1.5, 1.5))),
}


def draw_curves(curves: Sequence[Mapping[str, float]], tasks: Sequence[str], *, name: str) -> list[dict[str, Any]]:
    """The pictures of a training's curves: the losses, then the Dice of each of the first ``MAX_CURVES`` tasks.

    Each has a ``title``, a ``legend`` of (name, colour, dashed), the ``svg``, and what its last points say, ``said``.

    Args:
        curves: lines of ``curves.csv``: an epoch, and what was measured at it.
        tasks: names of the tasks.
        name: of the training, by which the pictures of a page have different ids.
    """
    if not curves:
        return []
    losses = {"loss": ("lower loss", *LINES["lower"][1:]), "upper_loss": ("upper loss", *LINES["upper"][1:])}
    figures = [_figure(curves, losses, "Losses", name, of_dice=False)]
    for task in tasks[:MAX_CURVES]:
        dice = {f"{section}_dice/{task}": line for section, line in LINES.items()}
        figures.append(_figure(curves, dice, f"Dice, {task}", name, of_dice=True))
    return figures


def _figure(
    curves: Sequence[Mapping[str, float]], lines: Mapping[str, Any], title: str, name: str, *, of_dice: bool
) -> dict[str, Any]:
    series = {
        key: ([row["epoch"] for row in curves if key in row], [row[key] for row in curves if key in row])
        for key in lines
    }
    series = {key: points for key, points in series.items() if points[0]}
    legend = [(lines[key][0], lines[key][1], lines[key][2] != "-") for key in series]
    last = {lines[key][0]: points[1][-1] for key, points in series.items()}
    said = f"Last epoch: {', '.join(f'{key} {value:.3f}' for key, value in last.items())}."
    ends = [key for key in series if of_dice and key.startswith(("lower", "validation"))]
    gap = ends if len(ends) == 2 else []  # the upper set is trained on too
    if gap:
        first, other = (lines[key][0] for key in gap)
        said += f" Gap from {first} to {other}: {last[first] - last[other]:.3f}."
    svg = _svg(series, lines, gap, salt=f"{name} {title}", of_dice=of_dice)
    return {"title": title, "legend": legend, "said": said, "svg": svg}


def _svg(
    series: Mapping[str, Any], lines: Mapping[str, Any], gap: Sequence[str], *, salt: str, of_dice: bool
) -> Markup:
    """An SVG without a colour or a font of its own: the style sheet gives them, in light and in dark.

    ``gap``: the two series between which it is shaded, if any.
    """
    stand_in = {"currentColor": "#0a0a01", **{line[1]: f"#0a0b{i:02x}" for i, line in enumerate(lines.values())}}
    text = stand_in["currentColor"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10.5, "text.color": text}):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for key, (epochs, values) in series.items():
            axes.plot(epochs, values, color=stand_in[lines[key][1]], linestyle=lines[key][2], linewidth=1.8)
        if gap:
            (epochs, first), (_, other) = (series[key] for key in gap)
            axes.fill_between(epochs, first, other, color=text, alpha=0.07, linewidth=0)
        axes.set_xlabel("epoch", color=text)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set(color=text, alpha=0.5)
        axes.tick_params(colors=text, length=0)
        axes.grid(axis="y", color=text, alpha=0.15, linewidth=0.8)
        axes.margins(x=0.02)
        axes.set_ylim(0, 1.02 if of_dice else None)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9]+(\.axis)?_\d+"', "", svg)  # two pictures of a page may not share them
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', svg)
    for colour, hexadecimal in stand_in.items():
        svg = svg.replace(hexadecimal, colour)
    return Markup(svg)  # of numbers only


def shrink(path: Path) -> dict[str, Any]:
    """A picture of at most ``PICTURE_SIDE`` pixels as a data URI, ``uri``, with its ``width`` and ``height``."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=85, subsampling=0)  # coloured lines stay sharp
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return {"uri": f"data:image/jpeg;base64,{data}", "width": small.width, "height": small.height}
