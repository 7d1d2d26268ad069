"""Curves are where their numbers are, and look as the page says."""

import re

import numpy as np
import pytest

from blosam_monai.figures import LINES, MAX_CURVES, draw_curves

CURVES = [
    {"epoch": 0.0, "lower_dice/lung": 0.0, "upper_dice/lung": 0.5},
    {"epoch": 1.0, "loss": 0.8},
    {"epoch": 2.0, "loss": 0.4, "lower_dice/lung": 0.5, "upper_dice/lung": 0.5},
    {"epoch": 4.0, "loss": 0.2, "lower_dice/lung": 1.0, "upper_dice/lung": 0.5},
]


def points(svg: str, colour: str) -> np.ndarray:
    """Points (N, 2) of the line of a colour, in the picture's own units, y downwards."""
    path = next(
        d for d, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg) if f"stroke: {colour}" in style
    )
    return np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)])


def test_a_line_goes_through_what_was_measured():
    _, dice = draw_curves(CURVES, ["lung"], name="x")
    rising, level = (points(dice["svg"], LINES[section][1]) for section in ("lower", "upper"))
    steps = np.diff(rising, axis=0)  # epochs 0, 2, 4; Dice 0, 0.5, 1
    assert steps[0] == pytest.approx(steps[1], abs=1e-3)
    assert steps[0, 0] > 10
    assert steps[0, 1] < -10  # upwards
    assert level[:, 1] == pytest.approx(rising[1, 1], abs=1e-3)  # 0.5 is as high on both


def test_an_epoch_without_a_measurement_has_no_point():
    losses, dice = draw_curves(CURVES, ["lung"], name="x")
    assert len(points(losses["svg"], LINES["lower"][1])) == 3
    assert len(points(dice["svg"], LINES["lower"][1])) == 3


def test_only_what_was_measured_is_in_the_legend():
    losses, dice = draw_curves(CURVES, ["lung"], name="x")
    assert [name for name, _, _ in losses["legend"]] == ["lower loss"]  # joint training has no upper one
    assert [name for name, _, _ in dice["legend"]] == ["D1 (lower)", "D2 (upper)"]


def test_a_picture_has_no_colour_and_no_font_of_its_own():
    for figure in draw_curves(CURVES, ["lung"], name="x"):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", figure["svg"])) <= {
            *("none", "currentColor"),
            *(line[1] for line in LINES.values()),
        }
        assert "font-family" not in figure["svg"]


def test_the_first_tasks_have_a_picture():
    assert len(draw_curves(CURVES, ["lung"] * (MAX_CURVES + 3), name="x")) == 1 + MAX_CURVES


def test_without_curves_there_is_no_picture():
    assert draw_curves([], ["lung"], name="x") == []


VALIDATED = [line | {"validation_dice/lung": 0.25} if "upper_dice/lung" in line else line for line in CURVES]


@pytest.mark.parametrize(("curves", "shaded"), [(CURVES, False), (VALIDATED, True)])
def test_only_the_gap_to_held_out_images_is_shaded_and_said(curves, shaded):
    _, dice = draw_curves(curves, ["lung"], name="x")
    assert ("opacity: 0.07" in dice["svg"]) == shaded
    assert ("Gap from D1 (lower) to held-out: 0.750." in dice["said"]) == ("Gap" in dice["said"]) == shaded
