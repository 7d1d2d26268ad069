"""Scores by hand, by brute force, and what an empty mask is worth."""

import csv
import json

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import stats
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from blosam_monai.metrics import SCORES, case_scores, summarise, write_rows, write_table

NAN = float("nan")


def square(top: int, left: int, height: int, width: int, shape: tuple[int, int] = (24, 32)) -> torch.Tensor:
    mask = torch.zeros(1, *shape)
    mask[0, top : top + height, left : left + width] = 1
    return mask


def box(start: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...] = (16, 18, 20)) -> torch.Tensor:
    """A cuboid (1, D, H, W)."""
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[(0, *(slice(a, a + n) for a, n in zip(start, size, strict=True)))] = True
    return mask


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every surface voxel of each mask to the nearest of the other: all pairs."""
    edges = [np.argwhere(mask & ~binary_erosion(mask)) * (spacing or (1,) * mask.ndim) for mask in (first, second)]
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


SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.9, 1.3, 3.1)]


def speckles(seed: int, density: float = 0.02) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random masks (1, 9, 11, 13) of lumps and single voxels, some of them at the border."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(2):
        mask = rng.random((9, 11, 13)) < density
        corner = rng.integers(0, (6, 8, 10))
        mask[tuple(slice(c, c + 5) for c in corner)] = True
        masks.append(torch.from_numpy(mask)[None])
    return masks[0], masks[1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(5))
def test_hd95_of_volumes_is_that_of_all_pairs_of_surface_voxels_in_mm(seed, spacing):
    pred, label = speckles(seed)
    expected = max(np.percentile(d, 95) for d in surface_distances(pred[0].numpy(), label[0].numpy(), spacing))
    assert case_scores(pred, label, spacing=spacing)["hd95"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(5))
def test_nsd_of_volumes_is_that_of_all_pairs_of_surface_voxels_in_mm(seed, spacing):
    pred, label = speckles(seed)
    near = np.concatenate(surface_distances(pred[0].numpy(), label[0].numpy(), spacing)) <= 1.75
    assert case_scores(pred, label, spacing=spacing, nsd_tolerance=1.75)["nsd"][0] == pytest.approx(near.mean())


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_surface_scores_equal_those_of_monai_on_the_whole_volume():
    pred, label = speckles(7)
    pair, spacing = (pred[None].float(), label[None].float()), (5.0, 0.7, 0.7)
    scores = case_scores(pred, label, spacing=spacing, nsd_tolerance=1.0)
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    nsd = compute_surface_dice(*pair, [1.0], include_background=True, spacing=spacing)
    assert (scores["hd95"][0], scores["nsd"][0]) == pytest.approx((hd95.item(), nsd.item()))


@pytest.mark.parametrize(("axis", "size"), [(0, 5.0), (1, 0.7), (2, 1.5)])
@pytest.mark.parametrize("shift", [1, 3])
def test_two_voxels_are_as_far_apart_as_their_shift_times_the_spacing_of_its_axis(axis, size, shift):
    start = [4, 4, 4]
    first = box(tuple(start), (1, 1, 1))
    start[axis] += shift
    scores = case_scores(first, box(tuple(start), (1, 1, 1)), spacing=(5.0, 0.7, 1.5), nsd_tolerance=1.5)
    assert scores["hd95"][0] == pytest.approx(shift * size)
    assert scores["nsd"][0] == (shift * size < 1.6)


def test_hd95_and_nsd_of_a_shifted_cube_follow_from_its_faces():
    # 6 x 6 x 6 voxels of 4 x 1 x 1 mm, one slice apart; each has 216 - 64 = 152 on its surface. Of these, the outer
    # face (36) is 4 mm from the other cube; 20 of the inner face and 80 of the sides lie on the sides of the other;
    # the other 16 of the inner face lie inside the other cube, 12 of them 1 mm and 4 of them 2 mm from its sides.
    first, second = box((4, 4, 4), (6, 6, 6)), box((5, 4, 4), (6, 6, 6))
    scores = case_scores(first, second, spacing=(4.0, 1.0, 1.0), nsd_tolerance=1.0)
    assert scores["hd95"][0] == pytest.approx(4.0)  # 36 of 152
    assert scores["nsd"][0] == pytest.approx((152 - 36 - 4) / 152)


@pytest.mark.parametrize("size", [0.7, 0.1, 1 / 3])
def test_a_surface_just_at_the_tolerance_is_within_it_however_the_header_rounds(size):
    stored = float(np.float32(size))
    first, second = box((4, 4, 4), (1, 1, 1)), box((4, 4, 7), (1, 1, 1))
    assert case_scores(first, second, spacing=(1, 1, stored), nsd_tolerance=3 * size)["nsd"][0] == 1


@pytest.mark.parametrize("margin", [1, 7])
def test_more_background_around_the_masks_changes_no_score_between_them(margin):
    pred, label = speckles(3)  # touches the border, which is then far from it
    pads = [margin, 2, 0, margin, 3, 1]
    wide = [torch.nn.functional.pad(mask, pads) for mask in (pred, label)]
    narrow, wide = (case_scores(*pair, spacing=(5.0, 0.7, 0.7)) for pair in ((pred, label), wide))
    assert {name: values[0] for name, values in wide.items()} == {name: values[0] for name, values in narrow.items()}


def test_a_volume_filled_to_its_border_has_its_surface_there():
    whole = torch.ones(1, 5, 7, 9)
    inner = box((2, 3, 4), (1, 1, 1), (5, 7, 9))
    # the middle voxel is 2 slices of 2 mm, 3 rows and 4 columns of 1 mm from the nearest faces: 3 mm from the rows
    distances = surface_distances(inner[0].numpy(), whole[0].numpy() > 0, (2.0, 1.0, 1.0))
    assert distances[0].tolist() == [3.0]
    hd95 = case_scores(inner, whole, spacing=(2.0, 1.0, 1.0))["hd95"][0]
    assert hd95 == pytest.approx(np.percentile(distances[1], 95), rel=1e-6)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_volume_of_one_slice_has_the_surface_of_the_picture(axis):
    pred, label = blobs(2)
    flat = case_scores(pred, label, spacing=(0.7, 1.5))
    spacing = [0.7, 1.5]
    spacing.insert(axis - 1, 6.0)
    single = case_scores(pred.unsqueeze(axis), label.unsqueeze(axis), spacing=spacing)
    assert [single[name][0] for name in ("hd95", "nsd")] == [flat[name][0] for name in ("hd95", "nsd")]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_scores_do_not_depend_on_how_masks_are_stored(dtype):
    pred, label = speckles(4)
    expected = {name: values[0] for name, values in case_scores(pred, label).items() if name in SCORES[:4]}
    scores = case_scores(pred.to(dtype), label.to(dtype))
    assert {name: scores[name][0] for name in expected} == expected


def test_overlap_counts_every_voxel_beyond_what_float32_counts():
    # float32 has neither 2^24 + 1 nor 2^24 + 3
    pred, label = torch.zeros(2, 1, 4097, 4097, dtype=torch.bool)
    pred.view(-1)[: 2**24 + 3] = True
    label.view(-1)[: 2**24 + 1] = True
    scores = case_scores(pred, label)
    assert scores["dice"][0] == (2**25 + 2) / (2**25 + 4)
    assert scores["iou"][0] == (2**24 + 1) / (2**24 + 3)


@pytest.mark.parametrize("tolerance", [-1.0, NAN])
def test_a_tolerance_that_nothing_meets_is_refused(tolerance):
    mask = torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match=rf"nsd_tolerance: {tolerance}; give 0 or more mm\."):
        case_scores(mask, mask, nsd_tolerance=tolerance)


def test_volumes_are_voxels_times_their_size():
    pred, label = box((2, 2, 2), (10, 10, 12)), box((2, 2, 2), (10, 10, 10))  # 1200 and 1000 voxels
    scores = case_scores(torch.cat([pred, label]), torch.cat([label, pred]), spacing=(1.0, 1.0, 1.0))
    assert scores["volume_error_ml"].tolist() == pytest.approx([0.2, -0.2])
    assert scores["label_volume_ml"].tolist() == pytest.approx([1.0, 1.2])
    thick = case_scores(pred, label, spacing=(5.0, 0.5, 0.5))  # 1.25 mm3 each
    assert (thick["volume_error_ml"][0], thick["label_volume_ml"][0]) == pytest.approx((0.25, 1.25))


@pytest.mark.parametrize(("axes", "spacing"), [(2, (0.7, 0.7)), (2, None), (3, None)])
def test_what_has_no_volume_has_none_in_ml(axes, spacing):
    mask = torch.ones(2, *(4,) * axes)
    scores = case_scores(mask, mask, spacing=spacing)
    assert np.isnan([*scores["volume_error_ml"], *scores["label_volume_ml"]]).all()


@pytest.mark.parametrize(
    ("pred_empty", "label_empty", "expected"),
    [
        (True, True, {"dice": 1, "iou": 1, "hd95": 0, "nsd": 1, "volume_error_ml": 0, "label_volume_ml": 0}),
        (True, False, {"dice": 0, "iou": 0, "hd95": 130, "nsd": 0, "volume_error_ml": -0.12, "label_volume_ml": 0.12}),
        (False, True, {"dice": 0, "iou": 0, "hd95": 130, "nsd": 0, "volume_error_ml": 0.12, "label_volume_ml": 0}),
    ],
)
def test_an_empty_volume_scores_by_the_stated_rule(pred_empty, label_empty, expected):
    mask, empty = box((1, 1, 1), (1, 3, 1), (6, 10, 60)), torch.zeros(1, 6, 10, 60)
    # the image measures 30 x 40 x 120 mm: 130 mm across; 3 voxels of 5 x 4 x 2 mm are 0.12 mL
    scores = case_scores(*(empty if e else mask for e in (pred_empty, label_empty)), spacing=(5.0, 4.0, 2.0))
    assert {name: values.item() for name, values in scores.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [
        ((1, 4, 5, 6), None, r"pred: shape \(1, 4, 5, 6\), label \(1, 4, 5, 5\); score both on the same grid\."),
        ((1, 4, 5, 5), (1.0, 1.0), r"spacing: \(1\.0, 1\.0\); give 3 positive numbers"),
        ((1, 4, 5, 5), (1.0, 0.0, 1.0), r"spacing: \(1\.0, 0\.0, 1\.0\); give 3 positive numbers"),
        ((1, 4, 5, 5), (1.0, float("nan"), 1.0), r"spacing: \(1\.0, nan, 1\.0\); give 3 positive numbers"),
    ],
)
def test_grids_that_do_not_fit_are_refused(shape, spacing, message):
    with pytest.raises(ValueError, match=message):
        case_scores(torch.ones(shape), torch.ones(1, 4, 5, 5), spacing=spacing)


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
    assert {name: scores[name].item() for name in expected} == expected  # 40: diagonal of 24 x 32


def test_tasks_are_scored_on_their_own_whichever_of_them_is_empty():
    empty = torch.zeros(1, 24, 32)
    pairs = [(square(2, 2, 6, 6), square(2, 4, 6, 6)), (empty, square(0, 0, 3, 3)), (empty, empty), blobs(1)]
    together = case_scores(torch.cat([p for p, _ in pairs]), torch.cat([label for _, label in pairs]))
    for t, pair in enumerate(pairs):
        alone = case_scores(*pair)
        for name in ("dice", "iou", "hd95", "nsd"):
            assert together[name][t] == pytest.approx(alone[name][0])


def row(subject: str, task: str, dice: float, **other) -> dict:
    scores = {"dice": dice, "iou": dice / 2, "hd95": 10 * dice, "nsd": 1.0, "volume_error_ml": -dice}
    keys = {"case": subject, "subject": subject, "section": "testing", "task": task}
    return {**keys, **scores, "label_empty": 0, "pred_empty": 0, **other}


ROWS = [
    row("a", "lung", 0.2, label_empty=1),
    row("a", "heart", 0.6),
    row("b", "lung", 0.4, pred_empty=1),
    row("b", "heart", 0.8, volume_error_ml=NAN),
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


def test_cases_that_are_not_a_number_are_counted_and_left_out_of_the_mean():
    heart = summarise(ROWS)["testing"]["heart"]
    assert (heart["volume_error_ml_nan"], heart["dice_nan"], heart["cases"]) == (1, 0, 2)
    assert (heart["volume_error_ml_mean"], heart["volume_error_ml_sd"]) == (-0.6, 0.0)


def test_a_score_no_case_has_is_not_a_number_and_the_others_are():
    rows = [row(s, "lung", d, volume_error_ml=NAN) for s, d in (("a", 0.0), ("b", 1.0))]
    for numbers in summarise(rows)["testing"].values():
        assert np.isnan([numbers[f"volume_error_ml_{n}"] for n in ("mean", "low", "high")]).all()
        assert numbers["dice_mean"] == 0.5


def test_a_task_no_case_of_which_has_a_score_stays_out_of_its_mean_over_tasks():
    rows = [row(s, "lung", d) for s, d in (("a", 0.2), ("b", 0.4))]
    rows += [row(s, "heart", 0.9, volume_error_ml=NAN) for s in "ab"]
    whole = summarise(rows)["testing"]["all"]
    assert whole["volume_error_ml_mean"] == pytest.approx(-0.3)
    assert (whole["volume_error_ml_low"], whole["volume_error_ml_high"]) == pytest.approx((-0.4, -0.2))


def interval(rows: list[dict], task: str = "lung", **options) -> tuple[float, float]:
    numbers = summarise(rows, **options)["testing"][task]
    return numbers["dice_low"], numbers["dice_high"]


def test_two_subjects_at_0_and_1_leave_everything_open():
    assert interval([row("a", "lung", 0.0), row("b", "lung", 1.0)]) == (0, 1)  # each end in 1 of 4 draws


def test_the_interval_of_one_case_a_subject_is_that_of_scipy():
    dice = np.random.default_rng(5).beta(5, 2, 40)
    low, high = interval([row(str(n), "lung", d) for n, d in enumerate(dice)])
    theirs = stats.bootstrap((dice,), np.mean, n_resamples=20000, method="percentile", random_state=1)
    # The 2.5 % point of 2000 draws is within 0.35 % of rank (one sigma), 0.06 standard errors; four of these
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.24 * theirs.standard_error)


def test_equal_cases_of_a_subject_make_the_interval_no_narrower():
    dice = np.random.default_rng(6).random(12)
    once = [row(str(n), "lung", d) for n, d in enumerate(dice)]
    # resampled by case, 9 times the cases would give a third of the width
    assert interval(once * 9) == pytest.approx(interval(once))
    by_case = [{**r, "subject": n} for n, r in enumerate(once * 9)]
    width, width_by_case = np.diff(interval(once * 9)), np.diff(interval(by_case))
    assert width_by_case == pytest.approx(width / 3, rel=0.15)


def test_the_mean_of_a_draw_is_over_its_cases_not_over_its_subjects():
    rows = [row("a", "lung", 0.0), *[row("b", "lung", 1.0)] * 3, row("c", "lung", 0.0), *[row("d", "lung", 1.0)] * 3]
    numbers = summarise(rows)["testing"]["lung"]
    assert numbers["dice_mean"] == 0.75
    # of 4 drawn, none, 1, ... 4 are of b and d: 0, 3/6, 6/8, 9/10, 1 with 1, 4, 6, 4, 1 chances in 16
    assert (numbers["dice_low"], numbers["dice_high"]) == (0, 1)


def test_tasks_of_a_subject_are_drawn_together():
    # what one task gains the other loses in every subject: their mean is 0.5 in every draw
    rows = [row(s, "lung", d) for s, d in zip("abcd", (0.1, 0.3, 0.6, 0.9), strict=True)]
    rows += [row(r["subject"], "heart", 1 - r["dice"]) for r in rows]
    assert interval(rows, "all") == pytest.approx((0.5, 0.5))
    assert np.diff(interval(rows)) > 0.3


def test_draws_without_a_case_of_a_task_are_left_out_of_its_interval():
    rows = [row(s, "lung", 0.5) for s in "abcdefgh"] + [row("a", "heart", 0.2), row("b", "heart", 0.4)]
    assert interval(rows, "heart") == pytest.approx((0.2, 0.4))  # neither is drawn in (3/4)^8 = 10 %
    assert interval(rows, "all") == pytest.approx((0.35, 0.45))  # with lung at 0.5 in every draw


@pytest.mark.parametrize("task", ["heart", "all"])
def test_one_subject_gives_no_interval_however_many_its_cases(task):
    rows = [row(s, "lung", d) for s, d in (("a", 0.2), ("b", 0.4))]
    rows += [row("a", "heart", d) for d in (0.1, 0.5, 0.9)]
    assert np.isnan(interval(rows, task)).all()


def test_the_interval_is_that_of_its_seed():
    rows = [row(str(n), "lung", d) for n, d in enumerate(np.random.default_rng(7).random(15))]
    assert interval(rows, seed=3) == interval(rows, seed=3) != interval(rows, seed=4)


def test_the_table_has_a_row_for_each_case_and_task(tmp_path):
    write_table(tmp_path, ROWS, {"seed": 3})
    with open(tmp_path / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(r) for r in rows] == [list(ROWS[0])] * 6
    assert [float(r["dice"]) for r in rows] == [0.2, 0.6, 0.4, 0.8, 0.9, 1.0]
    assert np.isnan(float(rows[3]["volume_error_ml"]))


def strict_json(path) -> dict:
    """What a parser reads that knows no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{path}: {name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_cases_are_json_with_null_for_what_is_not_a_number(tmp_path):
    write_table(tmp_path, ROWS, {})
    rows = strict_json(tmp_path / "cases.json")
    assert rows[3].pop("volume_error_ml") is None
    assert rows == [{k: v for k, v in r.items() if r is not ROWS[3] or k != "volume_error_ml"} for r in ROWS]


def test_the_summary_is_json_with_null_for_what_is_not_a_number(tmp_path):
    returned = write_table(tmp_path, ROWS, {"seed": 3, "rates": (0.5, NAN)})
    summary = strict_json(tmp_path / "summary.json")
    assert summary["settings"] == {"seed": 3, "rates": [0.5, None]}
    assert summary["scores"]["upper"]["lung"]["dice_low"] is None  # a single subject
    assert np.isnan(returned["upper"]["lung"]["dice_low"])
    assert summary["scores"]["testing"]["lung"] == returned["testing"]["lung"]


def test_rows_are_written_with_names_that_need_quotes(tmp_path):
    write_rows(tmp_path / "x.csv", [{"case": 'a, "b"', "dice": 0.5}])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"case": 'a, "b"', "dice": "0.5"}]
