"""From files to the network and back to the picture's own grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from PIL import Image
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from blosam_monai.data.readers import read_label
from blosam_monai.networks.sam import PIXEL_STD, import_segment_anything
from blosam_monai.transforms import (
    LabelToGridd,
    LoadCased,
    PreprocessImaged,
    RestoreSized,
    SavePredictiond,
    input_size,
    merge_tasks,
    task_values,
)

LABELS = {"background": 0, "body": 1, "wheel": 2, "glass": [3, 4]}


# Tasks


def test_every_label_but_background_is_a_task():
    assert task_values(LABELS) == {"body": [1], "wheel": [2], "glass": [3, 4]}


def test_tasks_keep_the_order_asked_for_and_one_name_is_one_task():
    assert task_values(LABELS, ["glass", "body"]) == {"glass": [3, 4], "body": [1]}
    assert list(task_values(LABELS, ["glass", "body"])) == ["glass", "body"]
    assert task_values(LABELS, "wheel") == {"wheel": [2]}


@pytest.mark.parametrize("tasks", [["liver"], "liver", [], ["body", "body"], ["background"]])
def test_tasks_that_are_not_labels_are_refused_naming_the_labels(tasks):
    with pytest.raises(ValueError, match="must be some of the labels body, wheel, glass, each once"):
        task_values(LABELS, tasks)


# Reading a case


@pytest.fixture
def case(tmp_path):
    """An image 10 x 16 and its label: rows 2, 4, 6, 8 hold the classes 1 to 4 in columns 0 to 7."""
    label = np.zeros((10, 16), dtype=np.uint8)
    for value in (1, 2, 3, 4):
        label[2 * value, :8] = value
    Image.fromarray(label * 50).save(tmp_path / "image.png")
    Image.fromarray(label).save(tmp_path / "label.png")
    return {"image": str(tmp_path / "image.png"), "label": str(tmp_path / "label.png")}


def test_a_label_map_becomes_one_channel_a_task_and_a_union_is_one_task(case):
    item = LoadCased(LABELS, ["glass", "wheel"])(case)
    assert item["label"].shape == (2, 10, 16)
    assert item["label"].dtype == torch.float32
    expected = torch.zeros(2, 10, 16)
    expected[0, (6, 8), :8] = 1
    expected[1, 4, :8] = 1
    assert torch.equal(item["label"], expected)


def test_a_case_keeps_its_file_its_size_and_its_other_keys(case):
    item = LoadCased(LABELS)({**case, "subject": "s1"})
    assert item["image"].shape == (3, 10, 16)
    assert item["native_size"].tolist() == [10, 16]
    assert (item["source"], item["subject"]) == (case["image"], "s1")


def test_an_image_without_label_is_read(case):
    assert "label" not in LoadCased(LABELS)({"image": case["image"]})


def test_a_label_of_another_size_is_refused_with_both_sizes(case):
    Image.new("L", (10, 16), 1).save(case["label"])  # PIL counts columns first: 16 rows, 10 columns
    with pytest.raises(ValueError, match=r"label\.png: label has shape \(16, 10\), its image \(10, 16\)"):
        LoadCased(LABELS)(case)


def test_a_value_that_is_not_in_the_list_is_refused_also_if_its_task_is_not_asked_for(case):
    with pytest.raises(ValueError, match=r"label\.png: label value 4 is not in the data list's labels \(\[1, 2, 3\]\)"):
        LoadCased({"body": 1, "wheel": 2, "glass": 3}, ["body"])(case)


def test_a_mask_of_0_and_255_is_the_one_class_of_the_list(case):
    mask = np.zeros((10, 16), dtype=np.uint8)
    mask[3:6, 2:9] = 255
    Image.fromarray(mask).save(case["label"])
    for labels in ({"lung": 255}, {"background": 0, "lung": 1}, {"lung": 7}):
        assert np.array_equal(LoadCased(labels, label_coding="threshold")(case)["label"][0], mask == 255)


def test_threshold_coding_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="threshold tells one class from background, the list names 2"):
        LoadCased({"lung": 1, "heart": 2}, label_coding="threshold")


# To the network


def test_the_size_at_the_input_is_sams_own():
    get_preprocess_shape = import_segment_anything().utils.transforms.ResizeLongestSide.get_preprocess_shape
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 3000), (3000, 2), (310, 700), *rng.integers(1, 3000, (2000, 2)).tolist()]
    for side in (64, 256, 1024):
        for height, width in sizes:
            expected = get_preprocess_shape(height, width, side)
            assert input_size(height, width, side) == tuple(max(1, n) for n in expected)


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (30, 20), (64, 64), (63, 17)])
def test_preprocessing_is_that_of_segment_anything(tiny_sam, height, width):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0)).float()
    resize = import_segment_anything().utils.transforms.ResizeLongestSide(64)
    size = resize.get_preprocess_shape(height, width, 64)
    item = PreprocessImaged(64)({"image": image})
    assert item["image"].shape == (3, 64, 64)
    assert tuple(item["input_size"].tolist()) == size
    # As its apply_image_torch says, which itself takes batch and channels for height and width.
    resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)
    assert (item["image"] - tiny_sam.preprocess(resized)[0]).abs().max() < 1e-4
    # As SamPredictor does, through a PIL picture of whole numbers: up to one of 255 levels apart.
    picture = torch.from_numpy(resize.apply_image(image.permute(1, 2, 0).byte().numpy())).permute(2, 0, 1).float()
    one_level = 1 / min(PIXEL_STD)
    assert (item["image"] - tiny_sam.preprocess(picture)).abs().max() < 1.01 * one_level


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (30, 20)])
def test_paper_preprocessing_is_a_cubic_spline_of_the_whole_picture_in_0_to_1(height, width):
    gray = np.random.default_rng(0).uniform(0, 255, (height, width)).astype(np.float32)
    image = np.stack([gray, gray / 2, 255 - gray])
    item = PreprocessImaged(32, "paper")({"image": torch.from_numpy(image)})
    grid = np.meshgrid(np.linspace(0, height - 1, 32), np.linspace(0, width - 1, 32), indexing="ij")
    expected = np.stack([map_coordinates(channel / 255.0, grid, order=3, mode="mirror") for channel in image])
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].dtype == torch.float32
    assert np.abs(item["image"].numpy() - expected).max() < 1e-4
    assert item["input_size"].tolist() == [32, 32]


def test_an_unknown_preprocessing_is_refused():
    with pytest.raises(ValueError, match="preprocess: 'squash' is not one of sam, paper"):
        PreprocessImaged(64, "squash")


def test_the_bright_corner_of_a_picture_is_the_bright_corner_of_the_input(tmp_path):
    gray = np.full((24, 48), 20, dtype=np.uint8)
    gray[:8, 40:] = 250  # top right
    Image.fromarray(gray).save(tmp_path / "x.png")
    item = PreprocessImaged(64)(LoadCased({"lung": 1})({"image": tmp_path / "x.png"}))
    bright = item["image"][0] > 0
    assert bright[2:8, 56:].all()  # of 32 x 64 pixels the picture fills, the upper right tenth
    assert not bright[14:].any()
    assert not bright[:, :50].any()
    assert (item["image"][:, 32:] == 0).all()  # padding


def test_a_label_reaches_the_grid_of_the_loss_pixel_by_pixel():
    """A picture 4 x 8 at S = 32: 16 x 32 pixels of the input, 4 x 8 of the grid 8 x 8, so nothing is resampled."""
    label = torch.randint(0, 2, (2, 4, 8), generator=torch.Generator().manual_seed(0)).float()
    item = LabelToGridd(32)({"label": label, "input_size": torch.tensor([16, 32])})
    assert item["label"].shape == (2, 8, 8)
    assert torch.equal(item["label"][:, :4], label)
    assert not item["label"][:, 4:].any()


def test_a_label_is_taken_at_the_middle_of_each_cell_of_the_grid():
    """Pixels 16 x 16, S = 16, grid 4 x 4: cell i takes pixel 4 i + 2, the one right of its middle."""
    label = torch.zeros(1, 16, 16)
    label[0, 6, 10] = 1
    label[0, 5, 1] = 1
    grid = LabelToGridd(16)({"label": label, "input_size": torch.tensor([16, 16])})["label"]
    assert grid.nonzero().tolist() == [[0, 1, 2]]


# And back


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (31, 17)])
def test_logits_come_back_as_sam_itself_brings_them(tiny_sam, height, width):
    low = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    size = input_size(height, width, 64)
    expected = tiny_sam.postprocess_masks(low, size, (height, width))[0]
    logits = F.interpolate(low, (64, 64), mode="bilinear", align_corners=False)[0]
    item = RestoreSized()(
        {"pred": logits, "input_size": torch.tensor(size), "native_size": torch.tensor((height, width))}
    )
    assert item["pred"].shape == (3, height, width)
    assert (item["pred"] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["sam", "paper"])
@pytest.mark.parametrize(("height", "width"), [(180, 300), (300, 180), (256, 256), (700, 450)])
def test_a_label_that_goes_to_the_grid_and_back_is_the_same_disc(mode, height, width):
    y, x = np.mgrid[:height, :width]
    radius = 0.35 * min(height, width)
    disc = torch.from_numpy(np.hypot(y - 0.45 * height, x - 0.6 * width) < radius)[None].float()
    item = {"image": disc.repeat(3, 1, 1) * 200, "label": disc, "native_size": torch.tensor((height, width))}
    item = LabelToGridd(256)(PreprocessImaged(256, mode)(item))
    logits = F.interpolate(item["label"][None] - 0.5, (256, 256), mode="bilinear", align_corners=False)[0]
    back = RestoreSized()({**item, "pred": logits})["pred"]
    assert compute_dice((back > 0)[None].float(), disc[None]).item() > 0.98


# Merging


def test_the_surest_task_above_the_threshold_gives_the_label():
    """One pixel a column: by hand for the values 1, 2 and the union 3, 4, written as 3."""
    probabilities = torch.tensor(
        [
            [0.9, 0.2, 0.2, 0.6, 0.5, 0.51, 0.1],
            [0.1, 0.8, 0.3, 0.7, 0.5, 0.20, 0.4],
            [0.2, 0.7, 0.9, 0.8, 0.5, 0.30, 0.2],
        ]
    )[:, None]
    assert merge_tasks(probabilities, [[1], [2], [3, 4]]).tolist() == [[1, 2, 3, 3, 0, 1, 0]]


def test_of_equal_probabilities_the_earlier_task_wins():
    assert merge_tasks(torch.full((3, 4, 5), 0.75), [[7], [2], [1]]).unique().tolist() == [7]


def test_the_threshold_itself_is_background():
    assert merge_tasks(torch.tensor([[[0.75, 0.7500001]]]), [[1]], threshold=0.75).tolist() == [[0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_merging_equals_a_loop_over_pixels(seed):
    rng = np.random.default_rng(seed)
    probabilities, values = rng.integers(0, 6, (4, 6, 7)) / 5, [[5], [9, 1], [2], [300]]
    expected = np.zeros((6, 7), dtype=int)
    for y, x in np.ndindex(6, 7):
        for t in reversed(range(4)):
            if probabilities[t, y, x] > 0.4 and probabilities[t, y, x] == probabilities[:, y, x].max():
                expected[y, x] = values[t][0]
    assert np.array_equal(merge_tasks(torch.from_numpy(probabilities), values, 0.4), expected)


# Saving


def prediction(folder: Path, name: str = "film_07.jpg") -> dict:
    """Logits (3, 6, 10) of tasks in columns 0 to 2, 2 to 5 and 7 to 8; the second is the surest where two meet."""
    image = np.zeros((6, 10), dtype=np.uint8)
    image[0] = 255
    Image.fromarray(image).save(folder / name)
    logits = torch.full((3, 6, 10), -4.0)
    logits[0, :, :3] = 1
    logits[1, :, 2:6] = 2
    logits[2, :, 7:9] = 3
    return {"pred": logits, "source": str(folder / name)}


def test_argmax_writes_one_map_of_the_lists_values_named_by_the_stem(tmp_path):
    SavePredictiond(tmp_path / "out", LABELS, overlays=False)(prediction(tmp_path))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["film_07.png"]
    assert read_label(tmp_path / "out" / "film_07.png").tolist() == [[1, 1, 2, 2, 2, 2, 0, 3, 3, 0]] * 6


def test_separate_writes_one_mask_a_task_that_may_overlap(tmp_path):
    SavePredictiond(tmp_path / "out", LABELS, merge="separate", overlays=False)(prediction(tmp_path))
    written = {p.name: read_label(p)[0].tolist() for p in (tmp_path / "out").iterdir()}
    assert written == {
        "film_07_body.png": [255] * 3 + [0] * 7,
        "film_07_wheel.png": [0] * 2 + [255] * 4 + [0] * 4,
        "film_07_glass.png": [0] * 7 + [255] * 2 + [0],
    }


def test_the_threshold_is_a_probability(tmp_path):
    """The logits 1, 2, 3 are probabilities of 0.73, 0.88, 0.95."""
    SavePredictiond(tmp_path / "out", LABELS, threshold=0.9, overlays=False)(prediction(tmp_path))
    assert read_label(tmp_path / "out" / "film_07.png").tolist() == [[0, 0, 0, 0, 0, 0, 0, 3, 3, 0]] * 6


def test_only_the_tasks_trained_are_written_with_their_values(tmp_path):
    item = prediction(tmp_path)
    item["pred"] = item["pred"][1:]
    SavePredictiond(tmp_path / "out", LABELS, ["glass", "wheel"], overlays=False)(item)
    assert set(np.unique(read_label(tmp_path / "out" / "film_07.png"))) == {0, 2, 3}


def test_an_overlay_of_the_pictures_own_size_is_written(tmp_path):
    SavePredictiond(tmp_path / "out", LABELS)(prediction(tmp_path))
    with Image.open(tmp_path / "out" / "overlays" / "film_07.png") as picture:
        assert picture.size == (10, 6)


def test_an_existing_mask_is_replaced_only_if_asked(tmp_path):
    item = prediction(tmp_path)
    (tmp_path / "film_07.png").write_bytes(b"someone's work")
    with pytest.raises(FileExistsError, match=r"film_07\.png: exists; choose another output_dir or add overwrite=true"):
        SavePredictiond(tmp_path, LABELS)(item)
    assert (tmp_path / "film_07.png").read_bytes() == b"someone's work"
    SavePredictiond(tmp_path, LABELS, overwrite=True)(item)
    assert read_label(tmp_path / "film_07.png").max() == 3


def test_an_existing_mask_of_a_later_task_stops_before_the_first_is_written(tmp_path):
    item = prediction(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "film_07_glass.png").write_bytes(b"someone's work")
    with pytest.raises(FileExistsError, match="film_07_glass"):
        SavePredictiond(tmp_path / "out", LABELS, merge="separate")(item)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["film_07_glass.png"]


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"merge": "vote"}, "merge: 'vote' is not one of argmax, separate"),
        ({"threshold": 0}, "threshold: 0 is not a probability between 0 and 1"),
        ({"threshold": 1.5}, "threshold: 1.5 is not a probability between 0 and 1"),
    ],
)
def test_options_of_saving_are_checked(tmp_path, options, finding):
    with pytest.raises(ValueError, match=finding):
        SavePredictiond(tmp_path, LABELS, **options)
