"""Supports: halves disjoint by subject, slices picked by the area of the classes on them."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.geometry import Label, Orientation
from blosam_monai.data.supports import Case, class_areas, pick_slices, share, split_halves, survey


@pytest.mark.parametrize("count", range(2, 10))
def test_halves_are_equal_and_of_an_odd_number_d2_has_one_more(count):
    items = [{"image": str(i), "label": str(i), "subject": str(i)} for i in range(count)]
    for seed in range(20):
        lower, upper = split_halves(items, seed=seed)
        assert (len(lower), len(upper)) == (count // 2, count - count // 2)


def test_halves_are_disjoint_by_subject_and_lose_nothing():
    rng = np.random.default_rng(0)
    for seed in range(200):
        count = int(rng.integers(2, 9))
        subjects = ["first", "second", *rng.integers(0, 4, count).astype(str)]
        items = [{"image": str(i), "label": str(i), "subject": s} for i, s in enumerate(subjects)]
        lower, upper = split_halves(items, seed=seed)
        assert lower
        assert upper
        assert not {item["subject"] for item in lower} & {item["subject"] for item in upper}
        assert sorted(int(item["image"]) for item in lower + upper) == list(range(len(items)))


def test_halves_do_not_depend_on_the_order_of_the_items():
    items = [{"image": str(i), "label": str(i), "subject": str(i)} for i in range(6)]
    names = [{item["image"] for item in split_halves(order, seed=3)[0]} for order in (items, items[::-1])]
    assert names[0] == names[1]


# Areas


def brute_areas(values: np.ndarray, axis: int, numbers: list[int]) -> list[int]:
    return [sum(int((one == n).sum()) for n in numbers) for one in np.moveaxis(values, axis, 0)]


def test_areas_are_counted_slice_by_slice_of_the_upright_stack():
    values = np.random.default_rng(0).integers(0, 4, (3, 5, 7))
    wanted = {"a": [1], "union": [2, 3], "absent": [9]}
    areas = class_areas(Label("x", values), wanted, coding="index", orientation=Orientation((2, 0, 1), (True,) * 3))
    assert areas.shape == (7, 3)
    assert areas[:, 0].tolist() == brute_areas(values, 2, [1])[::-1]
    assert areas[:, 1].tolist() == brute_areas(values, 2, [2, 3])[::-1]
    assert not areas[:, 2].any()


def test_areas_of_overlapping_masks_count_a_pixel_once_in_a_union():
    first, second = np.zeros((2, 2, 4, 4), dtype=bool)
    first[0, :2], second[0, 1:] = True, True  # 8 and 12 pixels, 4 in both
    label = Label("x", {"a": first, "b": second})
    areas = class_areas(label, {"both": ["a", "b"], "b": ["b"]}, coding="segments")
    assert areas.tolist() == [[16, 12], [0, 0]]


def test_a_mask_of_the_coding_threshold_is_the_one_class_whatever_its_value():
    label = Label("x", np.eye(4, dtype=int)[None])
    assert class_areas(label, {"lung": [255]}, coding="threshold").tolist() == [[4]]


# Slices


def case(*columns: list[int]) -> Case:
    areas = np.array(columns).T
    return Case(areas, "axial", len(areas))


def picks(numbers, cases, n_seeds=200):
    return [pick_slices(numbers, cases, rng=np.random.default_rng(seed)) for seed in range(n_seeds)]


def test_slices_show_at_least_half_of_the_class_and_every_such_slice_is_picked():
    """Areas 0, 4, 10, 20, 9, 11: from 10 on."""
    found = {picked[0][1] for picked in picks([0], [case([0, 4, 10, 20, 9, 11])])}
    assert found == {2, 3, 5}


def test_larger_areas_are_likelier():
    """Weights 20 and 10: two of three."""
    share_of_larger = np.mean([picked[0][1] == 1 for picked in picks([0], [case([10, 20])], 600)])
    assert abs(share_of_larger - 2 / 3) < 4 * np.sqrt(2 / 9 / 600)


def test_classes_take_turns():
    """Each class has a slice of its own in each of three volumes: three picks show all three."""
    volume = case([9, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 2])
    for picked in picks([0, 1, 2], [volume] * 3, 50):
        assert sorted(place for _, place in picked) == [0, 2, 3]


def test_a_slice_with_a_trace_of_a_class_does_not_take_its_turn():
    """Slice 0 shows 1 of at most 50 pixels of the second class: slice 2 is still picked for it."""
    volume = case([50, 0, 0], [1, 0, 50])
    for picked in picks([0, 1], [volume] * 2, 50):
        assert {place for _, place in picked} == {0, 2}


def test_slices_of_one_volume_are_different_and_apart():
    """Three of 20 equal slices keep a sixth of the volume between them, wherever the first two are."""
    for picked in picks([0] * 3, [case([7] * 20)], 100):
        places = sorted(place for _, place in picked)
        assert min(np.diff(places)) >= 3


def test_all_slices_of_a_volume_can_be_picked():
    for picked in picks([0] * 5, [case([1, 9, 3, 1, 5])], 20):
        assert sorted(place for _, place in picked) == [0, 1, 2, 3, 4]


def test_a_picture_and_an_empty_volume_need_no_chance():
    cases = [Case(np.array([[3]])), case([0, 0, 0, 0])]
    rng = np.random.default_rng(0)
    assert pick_slices([0, 1], cases, rng=rng) == [(0, 0), (1, 2)]
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    ("shown", "count", "most", "expected"),
    [
        ([9, 9, 9, 9], 3, 1, [0, 1, 2]),
        ([9, 9, 9, 9], 4, 2, [0, 1, 0, 1]),
        ([9, 9], 5, 1, [0, 1, 0, 1, 0]),
        ([1, 2, 9], 6, 1, [0, 1, 2, 1, 2, 2]),
        ([1, 1, 1], 2, 4, [0, 1]),
    ],
)
def test_volumes_share_the_slices_evenly(shown, count, most, expected):
    cases = [case([1] * n) for n in shown]
    assert share(range(len(shown)), cases, count, most) == expected


def test_an_item_with_a_slice_is_that_slice(tmp_path):
    pages = [Image.fromarray(np.eye(4, dtype=np.uint8) * value) for value in (0, 1, 2)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    item = {"image": "x.tif", "label": "x.tif", "subject": "x", "slice": 2}
    found = survey(item, tmp_path, {"a": [1], "b": [2]}, coding="index")
    assert (found.areas.tolist(), found.size, found.slice_axis) == ([[0, 4]], 3, None)
    with pytest.raises(ValueError, match=r"x\.tif: slice 3 asked for, it has 3 \(0 to 2\)"):
        survey({**item, "slice": 3}, tmp_path, {"a": [1]}, coding="index")


def test_a_slice_of_a_volume_with_geometry_needs_its_axis(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.arange(64, dtype=np.uint8).reshape(4, 4, 4), np.eye(4)), tmp_path / "v.nii")
    item = {"image": "v.nii", "label": "v.nii", "subject": "x", "slice": 2}
    with pytest.raises(ValueError, match=r"v\.nii: has a slice, its slice_axis is None; write one of axial"):
        survey(item, tmp_path, {"a": [1]}, coding="index")


def test_halves_of_one_subject_are_disjoint_by_item_if_shared():
    items = [{"image": "v", "subject": "a", "slice": n} for n in range(5)]
    lower, upper = split_halves(items, seed=0, shared_subjects=True)
    assert (len(lower), len(upper)) == (2, 3)
    assert sorted(item["slice"] for item in lower + upper) == [0, 1, 2, 3, 4]
