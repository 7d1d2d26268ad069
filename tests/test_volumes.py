"""Whole volumes: the network's grid against nibabel's and MONAI's, and predictions back on the image's voxels."""

import json
import logging

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from torch import nn

from blosam_monai.transforms import decide_plane
from blosam_monai.volumes import CaseToVolumed, LoadVolumed, VolumeInferer, load_volumes

LABELS = {"background": 0, "ball": 1, "cube": 2}
# Voxels to mm RAS: LPS-like with thick slices, and a sagittal series that runs to the right, 3 mm a slice.
AFFINES = {
    "axial": np.diag([-1.0, -1.0, 2.0, 1.0]),
    "sagittal": np.array([[0, 0, 3.0, 5], [0, 1.0, 0, -7], [-1.0, 0, 0, 9], [0, 0, 0, 1]]),
}


@pytest.fixture(params=AFFINES)
def volume(request, tmp_path):
    """A volume of random gray values with a label of two classes, in files; the item that names them."""
    rng = np.random.default_rng(0)
    affine, shape = AFFINES[request.param], (20, 24, 12)
    image = rng.integers(0, 256, shape).astype(np.int16)
    label = rng.choice([0, 1, 2], shape).astype(np.uint8)
    for name, values in (("image", image), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")
    return {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz"), "subject": "a"}


def loaded(volume):
    return LoadVolumed(LABELS, window=[0, 255])(volume)


def read(path):
    """A file as nibabel reads it, with its affine, in the world axes (RAS) that MONAI works in."""
    file = nibabel.load(path)
    return MetaTensor(torch.from_numpy(np.asarray(file.dataobj, np.float32))[None], affine=file.affine)


def test_a_case_lies_where_its_file_says(volume):
    item = CaseToVolumed()(loaded(volume))
    turned = Orientation(axcodes="RAS", labels=None)
    assert torch.equal((turned(item["image"]) * 255).round().as_tensor(), turned(read(volume["image"])).as_tensor())
    label = turned(read(volume["label"])).as_tensor()
    for task, value in ((0, 1), (1, 2)):
        assert torch.equal(turned(item["label"]).as_tensor()[task] > 0, label[0] == value)
    assert torch.equal(turned(item["foreground"]).as_tensor() > 0, label > 0)


def test_it_is_resampled_as_its_file_would_be(volume):
    spacing = Spacing(pixdim=(1.5, 1.5, 1.5))
    turned = Orientation(axcodes="RAS", labels=None)
    ours = spacing(turned(CaseToVolumed()(loaded(volume))["image"]))
    theirs = spacing(turned(read(volume["image"])))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.as_tensor() * 255, theirs.as_tensor(), atol=0.5, rtol=0)


class Threshold(nn.Module):
    """Two tasks: bright, and dark; logits linear in the intensity."""

    prompted = False

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        return torch.cat((x - 0.5, 0.5 - x), 1) * self.scale


def test_a_prediction_comes_back_to_the_voxels_of_the_image(volume):
    # Blocks larger than a voxel of the network's grid survive resampling; at 1 mm of 1 mm, all but the edges.
    smooth = np.zeros((20, 24, 12), np.int16)
    smooth[3:9, 5:17, 2:8] = 255
    file = nibabel.load(volume["image"])
    nibabel.save(nibabel.Nifti1Image(smooth, file.affine), volume["image"])
    item = loaded(volume)
    sizes = item["spacing"].tolist()
    pred = VolumeInferer(32, 1.0, decide=decide_plane)(item["image"], Threshold(), spacing=sizes)
    assert pred.shape == (2, *item["image"].shape[1:])
    assert pred.dtype == torch.uint8
    assert torch.equal(pred[0].bool(), item["image"][0] > 127)
    assert torch.equal(pred[1].bool(), item["image"][0] < 127)


def test_without_a_decision_logits_come_back_in_half_precision(volume):
    item = loaded(volume)
    sizes = item["spacing"].tolist()
    grid = VolumeInferer(32, 3.0)(item["image"], Threshold(), spacing=sizes)
    assert grid.shape == (2, *item["image"].shape[1:])
    assert grid.dtype == torch.float16
    torch.testing.assert_close(grid[0], -grid[1])


def test_slices_brought_back_in_blocks_are_those_brought_back_at_once(volume, monkeypatch):
    item = loaded(volume)
    arguments = {"spacing": item["spacing"].tolist()}
    blocks = VolumeInferer(32, 2.0)(item["image"], Threshold(), **arguments)
    monkeypatch.setattr("blosam_monai.volumes._PLANES", 1000)
    torch.testing.assert_close(
        VolumeInferer(32, 2.0)(item["image"], Threshold(), **arguments), blocks, atol=2e-2, rtol=0
    )


def test_a_volume_smaller_than_a_patch_is_segmented():
    image = torch.randint(0, 256, (1, 5, 6, 7), dtype=torch.uint8)
    assert VolumeInferer(32, 1.0, decide=decide_plane)(image, Threshold(), spacing=(1, 1, 1)).shape == (2, 5, 6, 7)


def test_what_is_no_volume_in_mm_is_refused(tmp_path):
    from PIL import Image

    for name in ("image", "label"):
        Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    item = {key: str(tmp_path / f"{key}.png") for key in ("image", "label")}
    with pytest.raises(ValueError, match="has 1 slice; give a volume"):
        LoadVolumed({"background": 0, "ball": 1})(item)


def test_three_windows_are_refused(volume):
    with pytest.raises(ValueError, match="gives 3 channels"):
        LoadVolumed(LABELS, window=[[0, 100], [100, 200], [0, 255]])(volume)


# --- the list


def write_list(folder, **sections):
    """A data list of volumes a, b, c, ..., whose files are there."""
    for items in sections.values():
        for item in items:
            for name in (item["image"], item["label"]):
                nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), folder / name)
    content = {"labels": LABELS, "slice_axis": "axial", **sections}
    (folder / "list.json").write_text(json.dumps(content))
    return load_volumes(folder / "list.json", folder)


def item_of(name, **more):
    return {"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz", "subject": name, **more}


def test_volumes_are_taken_whole_and_once_where_a_list_names_their_slices(tmp_path, caplog):
    lower = [item_of("a", slice=1), item_of("a", slice=2), item_of("b", slice=0)]
    with caplog.at_level(logging.WARNING):
        content = write_list(tmp_path, lower=lower, upper=[item_of("c", slice=3)])
    assert [len(content[section]) for section in ("lower", "upper", "validation")] == [2, 1, 0]
    assert not any("slice" in item for section in ("lower", "upper") for item in content[section])
    assert "names 4 slices; their 3 whole volumes" in caplog.text


def test_a_single_volume_is_a_shot(tmp_path):
    content = write_list(tmp_path, lower=[item_of("a")])
    assert len(content["lower"]) == 1
    assert content["upper"] == []


def test_paths_of_every_section_are_absolute(tmp_path):
    content = write_list(tmp_path, lower=[item_of("a")], upper=[item_of("b")], validation=[item_of("c")])
    for section in ("lower", "upper", "validation"):
        assert all((tmp_path / item["image"]).samefile(item["image"]) for item in content[section])


def test_a_missing_volume_is_named(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"labels": LABELS, "lower": [item_of("a")]}))
    with pytest.raises(FileNotFoundError, match=r"a\.nii\.gz"):
        load_volumes(tmp_path / "list.json", tmp_path)


def test_metatensors_know_where_they_lie(volume):
    # Slices to the head, rows to the back, columns to the left: a step of d adds to S, of h takes from A, of w from R.
    item = loaded(volume)
    d, h, w = item["spacing"].tolist()
    image = CaseToVolumed()(item)["image"]
    assert isinstance(image, MetaTensor)
    expected = torch.tensor([[0, 0, -w, 0], [0, -h, 0, 0], [d, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(image.affine, expected)
