"""From files to the network and back to the picture's own grid."""

import math

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_dice
from PIL import Image
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from blosam_monai.networks.sam import PIXEL_STD, import_segment_anything
from blosam_monai.transforms import (
    CleanTasksd,
    DecideTasksd,
    LabelPromptd,
    LabelToGridd,
    LoadCased,
    PreprocessImaged,
    RestoreSized,
    SliceToPictured,
    binarise_tasks,
    input_size,
    label_to_input,
    merge_tasks,
)

LABELS = {"background": 0, "body": 1, "wheel": 2, "glass": [3, 4]}


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


def load(case: dict, *args, **options) -> dict:
    return SliceToPictured()(LoadCased(*args, **options)(case))


def test_a_label_map_becomes_one_channel_a_task_and_a_union_is_one_task(case):
    item = load(case, LABELS, ["glass", "wheel"])
    assert item["label"].shape == (2, 10, 16)
    assert item["label"].dtype == torch.float32
    expected = torch.zeros(2, 10, 16)
    expected[0, (6, 8), :8] = 1
    expected[1, 4, :8] = 1
    assert torch.equal(item["label"], expected)


def test_a_case_keeps_its_file_its_size_and_its_other_keys(case):
    item = load({**case, "subject": "s1"}, LABELS)
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
        assert np.array_equal(load(case, labels, label_coding="threshold")["label"][0], mask == 255)


def test_threshold_coding_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="threshold tells one class from background, the list names 2"):
        LoadCased({"lung": 1, "heart": 2}, label_coding="threshold")


@pytest.fixture
def volume(tmp_path) -> dict:
    """A NIfTI volume of (x, y, z) = (6, 5, 4) voxels of 1 x 1 x 3 mm, x to the left and y to the back, with label."""
    values = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
    for name, array in (("image", values), ("label", (values > 450).astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1, 3, 1])), tmp_path / f"{name}.nii.gz")
    return {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz"), "values": values}


def test_a_volume_is_a_stack_of_its_slices_with_their_spacing(volume):
    item = LoadCased({"bright": 1})(volume)
    assert (item["image"].shape, item["label"].shape) == ((1, 4, 5, 6), (1, 4, 5, 6))
    assert item["spacing"].tolist() == [3, 1, 1]
    assert np.array_equal(item["label"][0], (volume["values"] > 450).transpose(2, 1, 0))  # (z, y, x)


def test_a_slice_of_a_volume_is_a_picture(volume):
    whole = LoadCased({"bright": 1})(volume)
    item = load({**volume, "slice": 2}, {"bright": 1})
    assert item["image"].shape == (3, 5, 6)
    assert item["spacing"].tolist() == [1, 1]
    assert torch.equal(item["label"], whole["label"][:, 2].float())
    assert (item["image"][0] - whole["image"][0, 2]).abs().max() <= 0.5  # of a whole volume 8 bits are kept


def test_several_slices_are_no_picture(volume):
    with pytest.raises(ValueError, match=r'image\.nii\.gz: has 4 slices; name one by "slice" in the data list'):
        load(volume, {"bright": 1})


def test_slices_counted_along_one_axis_are_not_cut_along_another(volume):
    cut = LoadCased({"bright": 1}, slice_axis="coronal", counted_along="axial")
    with pytest.raises(ValueError, match="slice_axis: coronal asked for, the slices of the list are axial"):
        cut({**volume, "slice": 2})
    assert cut(volume)["image"].shape == (1, 5, 4, 6)  # a whole volume may be


def test_neighbours_beside_three_windows_are_refused():
    with pytest.raises(ValueError, match="neighbours: 1 asked for beside three windows"):
        LoadCased({"a": 1}, window=[[0, 1], [1, 2], [2, 3]], neighbours=1)


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
def test_preprocessing_is_that_of_segment_anything(small_sam, height, width):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0)).float()
    resize = import_segment_anything().utils.transforms.ResizeLongestSide(64)
    size = resize.get_preprocess_shape(height, width, 64)
    item = PreprocessImaged(64)({"image": image})
    assert item["image"].shape == (3, 64, 64)
    assert tuple(item["input_size"].tolist()) == size
    # As its apply_image_torch says, which itself takes batch and channels for height and width.
    resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)
    assert (item["image"] - small_sam.preprocess(resized)[0]).abs().max() < 1e-4
    # As SamPredictor does, through a PIL picture of whole numbers: up to one of 255 levels apart.
    picture = torch.from_numpy(resize.apply_image(image.permute(1, 2, 0).byte().numpy())).permute(2, 0, 1).float()
    one_level = 1 / min(PIXEL_STD)
    assert (item["image"] - small_sam.preprocess(picture)).abs().max() < 1.01 * one_level


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
    item = PreprocessImaged(64)(load({"image": tmp_path / "x.png"}, {"lung": 1}))
    bright = item["image"][0] > 0
    assert bright[2:8, 56:].all()  # of 32 x 64 pixels the picture fills, the upper right tenth
    assert not bright[14:].any()
    assert not bright[:, :50].any()
    assert (item["image"][:, 32:] == 0).all()  # padding


def test_a_label_reaches_the_grid_of_the_loss_pixel_by_pixel():
    """A picture 4 x 8 at S = 32: 16 x 32 pixels of the input, 4 x 8 of the grid 8 x 8, so nothing is resampled."""
    label = torch.randint(0, 2, (2, 4, 8), generator=torch.Generator().manual_seed(0)).float()
    item = LabelToGridd(32, 8)({"label": label, "input_size": torch.tensor([16, 32])})
    assert item["label"].shape == (2, 8, 8)
    assert torch.equal(item["label"][:, :4], label)
    assert not item["label"][:, 4:].any()


def test_a_label_is_taken_at_the_middle_of_each_cell_of_the_grid():
    """Pixels 16 x 16, S = 16, grid 4 x 4: cell i takes pixel 4 i + 2, the one right of its middle."""
    label = torch.zeros(1, 16, 16)
    label[0, 6, 10] = 1
    label[0, 5, 1] = 1
    grid = LabelToGridd(16, 4)({"label": label, "input_size": torch.tensor([16, 16])})["label"]
    assert grid.nonzero().tolist() == [[0, 1, 2]]


def test_a_label_on_the_input_is_scaled_with_the_picture_and_empty_below_it():
    """A picture 4 x 8 at S = 16: two pixels of the input for one, and 8 rows that hold nothing."""
    label = torch.randint(0, 2, (2, 4, 8), generator=torch.Generator().manual_seed(0)).float()
    found = label_to_input(label, (8, 16), 16)
    assert torch.equal(found[:, :8], label.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert found.shape == (2, 16, 16)
    assert not found[:, 8:].any()


def test_prompts_from_a_label_are_in_pixels_of_the_input():
    """The pixel at row 1, column 2 of 4 x 8 becomes, at S = 32, rows 4 to 7 and columns 8 to 11."""
    label = torch.zeros(2, 4, 8)
    label[0, 1, 2] = 1
    prompt = LabelPromptd(32, prompted=True)({"label": label, "input_size": torch.tensor([16, 32])})["prompt"]
    assert prompt.shape == (2, 8)
    assert prompt[0, :2].tolist() == [9, 5]  # the first of the four in the middle
    assert prompt[0, 4:].tolist() == [8, 4, 11, 7]
    assert prompt[1].isnan().all()


def test_a_network_without_prompts_gets_none():
    item = {"label": torch.ones(1, 4, 8), "input_size": torch.tensor([16, 32])}
    assert LabelPromptd(32, prompted=False)(item) == item


# And back


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (31, 17)])
def test_logits_come_back_as_sam_itself_brings_them(small_sam, height, width):
    low = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    size = input_size(height, width, 64)
    expected = small_sam.postprocess_masks(low, size, (height, width))[0]
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
    item = LabelToGridd(256, 64)(PreprocessImaged(256, mode)(item))
    logits = F.interpolate(item["label"][None] - 0.5, (256, 256), mode="bilinear", align_corners=False)[0]
    back = RestoreSized()({**item, "pred": logits})["pred"]
    assert compute_dice((back > 0)[None].float(), disc[None]).item() > 0.98


# Merging


def logits_of(probabilities) -> torch.Tensor:
    probabilities = torch.as_tensor(probabilities, dtype=torch.float64)
    return (probabilities / (1 - probabilities)).log()


def test_the_surest_task_above_the_threshold_gives_the_label():
    """One pixel a column, by hand."""
    probabilities = torch.tensor(
        [
            [0.9, 0.2, 0.2, 0.6, 0.5, 0.51, 0.1],
            [0.1, 0.8, 0.3, 0.7, 0.5, 0.20, 0.4],
            [0.2, 0.7, 0.9, 0.8, 0.5, 0.30, 0.2],
        ]
    )[:, None]
    assert merge_tasks(logits_of(probabilities)).tolist() == [[1, 2, 3, 3, 0, 1, 0]]


def test_of_equal_probabilities_the_earlier_task_wins():
    assert merge_tasks(torch.full((3, 4, 5), 0.75)).unique().tolist() == [1]


def test_the_threshold_itself_is_background():
    """The logit of 0.75 is ln 3."""
    logits = torch.tensor([[[math.log(3) - 1e-6, math.log(3) + 1e-6]]], dtype=torch.float64)
    assert merge_tasks(logits, threshold=0.75).tolist() == [[0, 1]]
    assert merge_tasks(torch.zeros(1, 1, 1)).item() == 0


@pytest.mark.parametrize("seed", range(5))
def test_merging_equals_a_loop_over_pixels(seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.integers(1, 6, (4, 6, 7)) / 6
    expected = np.zeros((6, 7), dtype=int)
    for y, x in np.ndindex(6, 7):
        for t in reversed(range(4)):
            if probabilities[t, y, x] > 0.4 and probabilities[t, y, x] == probabilities[:, y, x].max():
                expected[y, x] = t + 1
    assert np.array_equal(merge_tasks(logits_of(probabilities), 0.4), expected)


def test_slices_decided_one_by_one_equal_the_volume_decided_at_once():
    logits = torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(0)).half()
    for merge, expected in (("argmax", merge_tasks(logits.float(), 0.3)), ("separate", binarise_tasks(logits, 0.3))):
        item = DecideTasksd(merge, 0.3)({"pred": logits})
        assert torch.equal(item["pred"], expected)
        assert item["logits"] is logits
        assert torch.equal(DecideTasksd(merge)({"pred": expected})["pred"], expected)  # decided already


# Cleaning


def two_blobs() -> np.ndarray:
    """A shell of 5 x 5 x 5 around a hole of one voxel, and apart from it a single voxel; (7, 8, 12)."""
    mask = np.zeros((7, 8, 12), np.uint8)
    mask[1:6, 1:6, 1:6] = 1
    mask[3, 3, 3] = 0
    mask[3, 3, 9] = 1
    return mask


def test_the_hole_is_filled_and_the_smaller_component_goes():
    """By hand: 124 + 1 voxels; filled 125 + 1; the largest component alone 125."""
    masks = torch.from_numpy(np.stack([two_blobs()] * 3))
    CleanTasksd(["a", "b", "c"], largest_component=["a", "b"], fill_holes=["a", "c"])({"pred": masks})
    assert masks.sum(dim=(1, 2, 3)).tolist() == [125, 124, 126]


def test_a_slice_alone_has_holes_in_its_plane():
    mask = torch.from_numpy(two_blobs())[3][None, None].clone()  # (1, 1, 8, 12): a ring of 24 and a pixel
    CleanTasksd(["a"], fill_holes=True)({"pred": mask})
    assert mask.sum() == 26


def test_in_a_merged_map_a_filled_hole_takes_no_other_task():
    label = two_blobs()
    label[3, 3, 3] = 2
    label[2, 3, 3] = 0
    pred = torch.from_numpy(label)
    CleanTasksd(["a", "b"], largest_component=True, fill_holes=True)({"pred": pred})
    assert label[3, 3, 3] == 2
    assert (label == 1).sum() == 124  # the hole at (2, 3, 3) is filled, the single voxel gone


def test_components_agree_with_simpleitk():
    rng = np.random.default_rng(0)
    mask = (rng.random((9, 10, 11)) < 0.35).astype(np.uint8)
    components = sitk.RelabelComponent(sitk.ConnectedComponent(sitk.GetImageFromArray(mask)))
    expected = sitk.GetArrayFromImage(components) == 1
    masks = torch.from_numpy(mask[None].copy())
    CleanTasksd(["a"], largest_component=True)({"pred": masks})
    assert np.array_equal(masks[0].numpy() > 0, expected)


def test_an_empty_mask_stays_empty():
    masks = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
    CleanTasksd(["a"], largest_component=True, fill_holes=True)({"pred": masks})
    assert not masks.any()


def test_cleaning_a_task_that_is_none_is_refused():
    with pytest.raises(ValueError, match="fill_holes: 'lungs' is not one of the tasks lung, heart"):
        CleanTasksd(["lung", "heart"], fill_holes=["lungs"])
