"""Scores by hand, by brute force, and what an empty mask is worth."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from blosam_monai.metrics import SCORES, case_scores, summarise, write_rows, write_table


def square(top: int, left: int, height: int, width: int, shape: tuple[int, int] = (24, 32)) -> torch.Tensor:
    mask = torch.zeros(1, *shape)
    mask[0, top : top + height, left : left + width] = 1
    return mask


def surface_distances(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every surface pixel of each mask to the nearest of the other: all pairs."""
    edges = [np.argwhere(mask & ~binary_erosion(mask)) for mask in (first, second)]
    pairs = cdist(*edges)
    return pairs.min(1), pairs.min(0)


def blobs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two overlapping random masks (1, 24, 32)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :32]
    masks = []
    for _ in range(2):
        centre, radius = rng.uniform((8, 10), (16, 22)), rng.uniform(3, 7, 2)
        disc = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        masks.append(torch.from_numpy(disc | (rng.random((24, 32)) < 0.01))[None])
    return masks[0], masks[1]


def test_overlap_scores_are_those_of_counting():
    scores = case_scores(square(2, 2, 4, 10), square(2, 7, 4, 10))  # 40 pixels each, 4 x 5 = 20 in common
    assert scores["dice"].tolist() == pytest.approx([2 * 20 / 80])
    assert scores["iou"].tolist() == pytest.approx([20 / 60])


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_hd95_of_a_shifted_square_is_at_most_the_shift_and_reached_by_its_far_side(shift):
    scores = case_scores(square(4, 4, 12, 12), square(4, 4 + shift, 12, 12))
    assert scores["hd95"].tolist() == [shift]  # the far side is 12 of 44 surface pixels, more than 5 %


@pytest.mark.parametrize("seed", range(10))
def test_hd95_is_the_larger_95th_percentile_of_all_surface_distances(seed):
    pred, label = blobs(seed)
    expected = max(np.percentile(d, 95) for d in surface_distances(pred[0].numpy(), label[0].numpy()))
    assert case_scores(pred, label)["hd95"][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("tolerance", [1.0, 2.5])
def test_nsd_is_the_share_of_both_surfaces_within_the_tolerance(seed, tolerance):
    pred, label = blobs(seed)
    near = np.concatenate(surface_distances(pred[0].numpy(), label[0].numpy())) <= tolerance
    assert case_scores(pred, label, nsd_tolerance=tolerance)["nsd"][0] == pytest.approx(near.mean(), abs=1e-6)


def test_a_mask_at_the_border_has_its_surface_there():
    whole, inner = torch.ones(1, 12, 16), square(3, 3, 6, 10, (12, 16))
    # 3 pixels from side to side; the corners, 3 down and 3 across, are 4 of 52 pixels of the border, more than 5 %.
    assert case_scores(inner, whole)["hd95"][0] == pytest.approx(np.hypot(3, 3), abs=1e-4)


@pytest.mark.parametrize(
    ("pred_empty", "label_empty", "expected"),
    [
        (True, True, {"dice": 1, "iou": 1, "hd95": 0, "nsd": 1}),
        (True, False, {"dice": 0, "iou": 0, "hd95": 40, "nsd": 0}),
        (False, True, {"dice": 0, "iou": 0, "hd95": 40, "nsd": 0}),
        (False, False, {"dice": 1, "iou": 1, "hd95": 0, "nsd": 1}),
    ],
)
def test_an_empty_mask_scores_by_the_stated_rule(pred_empty, label_empty, expected):
    mask, empty = square(2, 2, 5, 5), torch.zeros(1, 24, 32)
    scores = case_scores(empty if pred_empty else mask, empty if label_empty else mask)
    assert {name: values.item() for name, values in scores.items()} == expected  # 40: diagonal of 24 x 32


def test_tasks_are_scored_on_their_own_whichever_of_them_is_empty():
    empty = torch.zeros(1, 24, 32)
    pairs = [(square(2, 2, 6, 6), square(2, 4, 6, 6)), (empty, square(0, 0, 3, 3)), (empty, empty), blobs(1)]
    together = case_scores(torch.cat([p for p, _ in pairs]), torch.cat([label for _, label in pairs]))
    for t, pair in enumerate(pairs):
        alone = case_scores(*pair)
        for name in SCORES:
            assert together[name][t] == pytest.approx(alone[name][0])


def row(case: str, task: str, dice: float, **other) -> dict:
    scores = {"dice": dice, "iou": dice / 2, "hd95": 10 * dice, "nsd": 1.0}
    return {"case": case, "section": "testing", "task": task, **scores, "label_empty": 0, "pred_empty": 0, **other}


ROWS = [
    row("a", "lung", 0.2, label_empty=1),
    row("a", "heart", 0.6),
    row("b", "lung", 0.4, pred_empty=1),
    row("b", "heart", 0.8),
    row("c", "lung", 0.9),
    row("d", "lung", 1.0, section="upper"),
]


def test_the_summary_holds_means_deviations_and_counts():
    summary = summarise(ROWS)
    lung = summary["testing"]["lung"]
    assert lung["dice_mean"] == pytest.approx(0.5)
    assert lung["dice_sd"] == pytest.approx(np.sqrt((0.09 + 0.01 + 0.16) / 2))  # of a sample: n - 1
    assert lung["hd95_mean"] == pytest.approx(5.0)
    assert (lung["cases"], lung["empty_labels"], lung["empty_predictions"]) == (3, 1, 1)


def test_the_mean_over_tasks_weighs_every_task_alike():
    assert summarise(ROWS)["testing"]["all"]["dice_mean"] == pytest.approx((0.5 + 0.7) / 2)


def test_sections_are_summarised_apart_and_one_case_has_no_deviation():
    upper = summarise(ROWS)["upper"]
    assert upper["lung"]["dice_mean"] == 1.0
    assert upper["lung"]["dice_sd"] == 0.0


def test_the_table_has_a_row_for_each_case_and_task(tmp_path):
    returned = write_table(tmp_path, ROWS, {"seed": 3})
    with open(tmp_path / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ["case", "section", "task", "dice", "iou", "hd95", "nsd", "label_empty", "pred_empty"]
    assert [list(r) for r in rows] == [names] * 6
    assert [float(r["dice"]) for r in rows] == [0.2, 0.6, 0.4, 0.8, 0.9, 1.0]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary == {"scores": returned, "settings": {"seed": 3}}


def test_rows_are_written_with_names_that_need_quotes(tmp_path):
    write_rows(tmp_path / "x.csv", [{"case": 'a, "b"', "dice": 0.5}])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"case": 'a, "b"', "dice": "0.5"}]
