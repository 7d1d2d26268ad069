"""Writing what was meant."""

import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.writers.pictures import COLOURS, write_label, write_overlay, write_probability


@pytest.mark.parametrize(("greatest", "mode"), [(0, "L"), (1, "L"), (255, "L"), (256, "I;16"), (65535, "I;16")])
def test_label_values_survive_in_the_fewest_bits(tmp_path, greatest, mode):
    label = np.zeros((16, 24), dtype=np.int64)
    label[2:5, 7:20] = greatest
    write_label(tmp_path / "x.png", label)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == mode
        assert picture.size == (24, 16)
        assert np.array_equal(np.asarray(picture), label)


@pytest.mark.parametrize("value", [-1, 65536])
def test_a_label_value_that_a_png_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=rf"x\.png: .*{value}"):
        write_label(tmp_path / "x.png", np.full((4, 4), value))
    assert list(tmp_path.iterdir()) == []


def test_a_probability_survives_to_the_last_of_16_bits(tmp_path):
    probability = np.random.default_rng(0).random((16, 24), dtype=np.float32)
    probability[0, :2] = 0, 1
    write_probability(tmp_path / "x.png", probability)
    with Image.open(tmp_path / "x.png") as picture:
        stored = np.asarray(picture)
    assert stored.dtype == np.uint16
    assert stored[0, :2].tolist() == [0, 65535]
    assert np.abs(stored / 65535 - probability).max() <= 0.51 / 65535  # half a step, and float32


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan])
def test_what_is_no_probability_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"x\.png: probabilities are .*; give values from 0 to 1"):
        write_probability(tmp_path / "x.png", np.array([[0.5, value]]))
    assert list(tmp_path.iterdir()) == []


def test_an_overlay_tints_the_predicted_pixels_only(tmp_path):
    image = np.full((3, 16, 24), 100, dtype=np.float32)
    pred = np.zeros((2, 16, 24), dtype=bool)
    pred[0, 2:6, 3:9] = True
    pred[1, 10:14, 15:22] = True
    write_overlay(tmp_path / "x.png", image, pred)
    with Image.open(tmp_path / "x.png") as picture:
        shown = np.asarray(picture)
    assert shown.shape == (16, 24, 3)
    assert (shown[~pred.any(0)] == 100).all()
    for mask, colour in zip(pred, COLOURS, strict=False):
        assert np.abs(shown[mask] - (0.6 * 100 + 0.4 * colour)).max() <= 1  # 40 % of the task's colour
    assert len({tuple(shown[mask][0]) for mask in pred}) == 2


def outlines(pred: np.ndarray, label: np.ndarray, path) -> np.ndarray:
    """The overlay (H, W, 3) of masks (T, H, W) on even gray."""
    write_overlay(path, np.full((3, *label.shape[1:]), 100, dtype=np.float32), pred, label)
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_an_overlay_outlines_the_label_outside_of_it_dashed_in_black_and_white(tmp_path):
    label = np.zeros((1, 48, 48), dtype=bool)
    label[0, 6:40, 6:40] = True
    shown = outlines(np.zeros_like(label), label, tmp_path / "x.png")
    y, x = np.mgrid[:48, :48]
    distance = np.maximum(6 - y, y - 39).clip(0) + np.maximum(6 - x, x - 39).clip(0)  # city block, to the square
    line = (distance == 1) | (distance == 2)
    assert (shown[~line] == 100).all()
    dashes = shown[line]
    assert {tuple(pixel) for pixel in dashes.tolist()} == {(0, 0, 0), (255, 255, 255)}
    assert 0.4 < (dashes == 255).mean() < 0.6


def test_an_overlay_outlines_the_prediction_inside_of_it_in_the_colour_of_its_task(tmp_path):
    pred = np.zeros((2, 48, 48), dtype=bool)
    pred[0, 4:12, 4:12] = True
    pred[1, 20:40, 20:48] = True  # to the end of the picture, where there is no line
    shown = outlines(pred, np.zeros_like(pred), tmp_path / "x.png")
    inner = np.zeros_like(pred)
    inner[0, 6:10, 6:10] = True
    inner[1, 22:38, 22:48] = True
    for mask, inside, colour in zip(pred, inner, COLOURS, strict=False):
        line = mask & ~inside
        assert (shown[line] == colour).all()
        assert (shown[inside] == 100).all()
    assert (shown[~pred.any(0)] == 100).all()


def test_an_outline_is_as_wide_in_a_picture_made_small(tmp_path):
    label = np.zeros((1, 100, 1000), dtype=bool)
    label[0, :, 500:] = True
    shown = outlines(np.zeros_like(label), label, tmp_path / "x.png")
    assert np.flatnonzero((shown != 100).any((0, 2))).tolist() == [495, 496, 497, 498, 499]  # 1 / 200 of the side


def test_an_overlay_does_not_change_its_image(tmp_path):
    image = np.full((3, 8, 8), 100, dtype=np.float32)
    write_overlay(tmp_path / "x.png", image, np.ones((1, 8, 8)))
    assert (image == 100).all()


def test_more_tasks_than_colours_are_drawn(tmp_path):
    pred = np.zeros((9, 9, 9), dtype=bool)
    pred[np.arange(9), np.arange(9)] = True
    write_overlay(tmp_path / "x.png", np.zeros((3, 9, 9), dtype=np.float32), pred)
    with Image.open(tmp_path / "x.png") as picture:
        assert np.asarray(picture).any(-1).all()
