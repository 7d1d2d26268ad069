"""Gray values that SAM sees."""

import numpy as np
import pytest

from blosam_monai.data.geometry import Image, Orientation
from blosam_monai.data.windows import channel_ranges, check_window, display_stack

PLAIN = Orientation((0, 1, 2), (False, False, False))


def volume(values, **known) -> Image:
    return Image("v.nii.gz", np.asarray(values), np.eye(4), **known)


def test_a_window_maps_its_ends_to_black_and_white():
    """By hand, for the abdominal window of -160 to 240 HU: 40 HU is in the middle."""
    values = np.array([-1000, -160, 40, 240, 3000], np.int16).reshape(1, 1, 5)
    shown = display_stack(volume(values), PLAIN, [-160, 240])
    assert shown.dtype == np.float32
    assert shown.ravel().tolist() == [0, 0, 127.5, 255, 255]


def test_three_windows_are_three_channels():
    values = np.array([0, 50, 100], np.int16).reshape(1, 1, 3)
    shown = display_stack(volume(values), PLAIN, [[0, 100], [50, 150], [-100, 0]])
    assert shown[:, 0, 0].tolist() == [[0, 127.5, 255], [0, 0, 127.5], [255, 255, 255]]


def test_eight_bits_are_shown_as_they_are():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert np.array_equal(display_stack(volume(values, full_range=(0, 255)), PLAIN)[0], values)


def test_percentiles_are_of_the_whole_volume_whatever_slice_is_wanted():
    """0 to 1000 in equal numbers: the percentiles 10 and 90 are 100 and 900."""
    values = np.arange(1001).reshape(7, 11, 13)
    for number in (None, 0, 6):
        shown = display_stack(volume(values), PLAIN, {"percentiles": [10, 90]}, number=number)
        expected = 255 * (np.clip(values if number is None else values[number : number + 1], 100, 900) - 100) / 800
        assert np.abs(shown[0] - expected).max() <= (0.51 if number is None else 1e-3)


def test_the_default_leaves_out_half_a_percent_at_each_end():
    assert channel_ranges(volume(np.arange(2001).reshape(3, 23, 29)), None) == [(10.0, 1990.0)]


def test_z_scores_are_deviations_from_the_mean():
    values = np.random.default_rng(0).normal(100, 20, (20, 30, 40)).astype(np.float32)
    ((low, high),) = channel_ranges(volume(values), {"zscore": 2})
    assert low == pytest.approx(values.mean() - 2 * values.std(), rel=1e-4)
    assert high == pytest.approx(values.mean() + 2 * values.std(), rel=1e-4)


def test_statistics_of_a_large_volume_are_those_of_a_sample():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, (200, 200, 200)).astype(np.int16)  # twice what is looked at
    ((low, high),) = channel_ranges(volume(values), {"percentiles": [25, 75]})
    assert (low, high) == pytest.approx((249.5, 749.5), abs=2)


def test_an_image_of_almost_one_value_is_shown_over_its_whole_range():
    values = np.zeros((10, 20, 20), np.int16)
    values[5, 5, 5] = 70
    assert channel_ranges(volume(values), None) == [(0.0, 70.0)]


def test_neighbours_are_the_channels_and_repeat_at_the_ends():
    values = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None] * 10, (5, 2, 2))
    shown = display_stack(volume(values, full_range=(0, 255)), PLAIN, neighbours=2)
    assert shown[:, :, 0, 0].tolist() == [[0, 0, 0, 10, 20], [0, 10, 20, 30, 40], [20, 30, 40, 40, 40]]
    alone = display_stack(volume(values, full_range=(0, 255)), PLAIN, neighbours=2, number=1)
    assert alone[:, 0, 0, 0].tolist() == [0, 10, 30]


def test_colours_are_channels_first():
    values = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    shown = display_stack(volume(values, full_range=(0, 255)), PLAIN)
    assert np.array_equal(shown, values.transpose(3, 0, 1, 2))


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"number": 2}, r"v\.nii\.gz: slice 2 asked for, it has 2 \(0 to 1\)"),
        ({"number": -1}, "slice -1 asked for"),
        ({"neighbours": 1, "window": [[0, 1], [1, 2], [2, 3]]}, "neighbours need gray slices and one window"),
    ],
)
def test_what_a_volume_cannot_show_is_refused(options, finding):
    with pytest.raises(ValueError, match=finding):
        display_stack(volume(np.zeros((2, 3, 3))), PLAIN, **options)


def test_a_window_for_a_picture_in_colour_is_refused():
    with pytest.raises(ValueError, match=r"v\.nii\.gz: is in colour, a window is for gray images"):
        display_stack(volume(np.zeros((1, 3, 3, 3), np.uint8)), PLAIN, [0, 100])


@pytest.mark.parametrize(
    "window",
    [
        "abdomen",
        [5],
        [3, 1],
        [0, 0],
        [[0, 1], [1, 2]],
        {"percentiles": [-1, 50]},
        {"percentiles": [99, 1]},
        {"zscore": 0},
        {"zscore": -1},
        {"zscore": float("inf")},
        [0, float("inf")],
        [float("nan"), 1],
        ["ab"],
        ["a", "b"],
        ["ab", "cd", "ef"],
        {"percentiles": "05"},
        {"median": 3},
        {},
        {"zscore": "3"},
        7,
        [],
    ],
)
def test_anything_else_is_no_window(window):
    with pytest.raises(ValueError, match=r"window: .* is not"):
        check_window(window)


@pytest.mark.parametrize("window", [None, [0, 1], (-160, 240), [[0, 1]], [[0, 1]] * 3, {"zscore": 2.5}])
def test_every_documented_form_is_a_window(window):
    assert check_window(window) is window
