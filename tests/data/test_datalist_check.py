"""The check of a data list: what it finds in each pair, and that one bad pair does not stop it."""

import json
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.datalist import make_datalist
from blosam_monai.data.datalist_check import check_datalist, format_table
from blosam_monai.data.pairing import pair_folders

LABELS = {"background": 0, "lung": 1, "heart": 2}


def save_volume(path, values, spacing=(0.5, 2.0, 3.0)):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), path)


@pytest.fixture
def mixed(tmp_path):
    """A slice of a volume and the volume itself, and pictures: fine, of another size, truncated, with value 7."""
    image = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    label = np.zeros((6, 8, 10), dtype=np.uint8)
    label[1:4, 2:6, 3:5], label[0, 0, 3] = 1, 2  # 12 pixels of lung on two slices, one of heart on the first
    save_volume(tmp_path / "images" / "v.nii.gz", image)
    save_volume(tmp_path / "labels" / "v.nii.gz", label)
    pixels = np.arange(96, dtype=np.uint8).reshape(8, 12)
    for name, values in (
        ("fine", (pixels > 90) * 2),
        ("size", np.eye(8)),
        ("cut", pixels * 0),
        ("seven", (pixels > 90) * 7),
        ("empty", pixels * 0),
    ):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / "cut.png").read_bytes()[:45])
    volume = {"image": "images/v.nii.gz", "label": "labels/v.nii.gz", "subject": "v"}
    names = ("fine", "size", "cut", "seven", "empty")
    pictures = [{"image": f"images/{n}.png", "label": f"labels/{n}.png", "subject": n} for n in names]
    return {
        "labels": LABELS,
        "label_coding": "index",
        "slice_axis": "axial",
        "lower": [{**volume, "slice": 3}],
        "testing": [volume, *pictures],
    }


def test_a_slice_has_its_area_in_square_millimetres(mixed, tmp_path):
    """12 pixels of 0.5 x 2 mm, and one."""
    row = check_datalist(mixed, tmp_path)[0]
    assert (row.number, row.section, row.case, row.slice) == (1, "lower", "v", 3)
    assert (row.size, row.spacing, row.slice_axis) == ((8, 6), (2.0, 0.5), "axial")
    assert (row.areas, row.unit) == ({"lung": 12.0, "heart": 1.0}, "mm2")
    assert (row.warnings, row.error) == ((), None)


def test_a_volume_has_its_volume_in_millilitres(mixed, tmp_path):
    """24 voxels of 3 mm3, and one."""
    row = check_datalist(mixed, tmp_path)[1]
    assert (row.size, row.spacing, row.slice) == ((10, 8, 6), (3.0, 2.0, 0.5), None)
    assert row.areas == pytest.approx({"lung": 0.072, "heart": 0.003})
    assert row.unit == "mL"


def test_a_picture_has_its_area_in_pixels(mixed, tmp_path):
    row = check_datalist(mixed, tmp_path)[2]
    assert (row.size, row.spacing, row.slice_axis, row.intensities) == ((8, 12), (), None, (0.0, 95.0))
    assert (row.areas, row.unit) == ({"heart": 5.0}, "px")


def test_what_is_wrong_with_a_pair_is_in_its_row_and_the_others_are_read(mixed, tmp_path):
    rows = check_datalist(mixed, tmp_path)
    assert [row.case for row in rows] == ["v", "v", "fine", "size", "cut", "seven", "empty"]
    assert [row.error is None for row in rows] == [True, True, True, False, False, False, True]
    assert "label has shape (8, 8), its image (8, 12)" in rows[3].error
    assert "cut.png: cannot be read as a picture" in rows[4].error
    assert "label value 7 is not in the data list's labels" in rows[5].error
    assert rows[6].warnings == ("the label shows no class of the list",)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"slice": 0}, r"labels/v\.nii\.gz: the label is empty; replace this image \(lower set\)"),
        ({"slice": 10}, r"v\.nii\.gz: slice 10 asked for, it has 10 \(0 to 9\)"),
        ({"slice": None}, r"v\.nii\.gz: is a volume of 10 slices, name one"),
        ({"image": "images/gone.nii.gz"}, r"gone\.nii\.gz: no such file"),
    ],
)
def test_supports_that_training_would_refuse_are_errors(mixed, tmp_path, change, finding):
    mixed["lower"][0] |= change
    row = check_datalist(mixed, tmp_path)[0]
    assert re.search(finding, row.error)


def test_a_list_is_checked_from_its_file_too(mixed, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(mixed), encoding="utf-8")
    assert check_datalist(tmp_path / "list.json", tmp_path) == check_datalist(mixed, tmp_path)


def test_names_that_the_list_does_not_know_are_a_warning(tmp_path):
    mask = np.zeros((4, 4, 4), dtype=np.uint8)
    mask[1] = 1
    save_volume(tmp_path / "image.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    for name in ("liver", "spleen"):
        save_volume(tmp_path / "masks" / f"{name}.nii.gz", mask)
    item = {"image": "image.nii.gz", "label": "masks", "subject": "x"}
    (row,) = check_datalist({"labels": {"liver": "liver"}, "label_coding": "files", "testing": [item]}, tmp_path)
    assert (row.error, row.warnings) == (None, ("not in the data list's labels: spleen",))


def test_the_table_has_a_line_a_case_and_says_warnings_once(mixed, tmp_path):
    mixed["testing"] += [mixed["testing"][-1]]
    table = format_table(check_datalist(mixed, tmp_path))
    lines = table.splitlines()
    assert len(lines) == 1 + 8 + 1 + 3 + 1
    assert lines[1].split()[:11] == ["1", "v", "lower", "3", "8", "x", "6", "2.00", "x", "0.50", "axial"]
    assert lines[1].endswith("lung 12 mm2, heart 1 mm2")
    assert "warning (6-8): the label shows no class of the list" in lines
    assert lines[-1] == "8 checked: 3 with errors, 3 with warnings"
    start = lines[0].index("classes")
    assert lines[5][start:] == "ERROR"


def test_a_long_name_is_cut_and_many_classes_are_counted(tmp_path):
    values = np.arange(8, dtype=np.uint8).reshape(2, 4)
    Image.fromarray(values).save(tmp_path / f"{'x' * 60}.png")
    item = {"image": f"{'x' * 60}.png", "label": f"{'x' * 60}.png", "subject": "x"}
    content = {"labels": {f"c{n}": n for n in range(1, 8)}, "label_coding": "index", "testing": [item]}
    line = format_table(check_datalist(content, tmp_path)).splitlines()[1]
    assert "x" * 25 + "..." in line
    assert line.endswith("c1 1 px, c2 1 px, c3 1 px, c4 1 px, 3 more")


def test_a_flipped_label_of_a_real_series_is_said_and_its_volume_kept(real_data):
    """The liver's volume is that of nibabel's own count."""
    root = real_data / "dicom_totalseg_ct"
    items = pair_folders(root / "image", root / "label", root)
    stored = nibabel.load(root / items[0]["label"])
    voxels = np.asarray(stored.dataobj)
    labels = {f"class_{int(n)}": int(n) for n in np.unique(voxels) if n}
    (row,) = check_datalist({"labels": labels, "label_coding": "index", "testing": items}, root)
    millilitres = (voxels == 5).sum() * np.prod(stored.header.get_zooms()[:3]) / 1000
    assert row.areas["class_5"] == pytest.approx(float(millilitres), rel=1e-3)
    assert any("lies on another grid" in warning for warning in row.warnings)
    assert (row.error, row.size) == (None, (20, 512, 512))


def test_real_volumes_and_pictures_pass(real_data):
    root = real_data / "drive_vessels"
    items = pair_folders(root / "images", root / "labels", root, image_suffix="_training", label_suffix="_manual1")
    labels = {"background": 0, "vessel": 255}
    content = make_datalist(items, labels, dataset_dir=root, n_shot=2, seed=0, label_coding="threshold")
    rows = check_datalist(content, root)
    assert [(row.error, row.warnings, row.size) for row in rows] == [(None, (), (584, 565))] * 2
    with Image.open(root / "labels" / "21_manual1.gif") as picture:
        expected = int((np.asarray(picture.convert("L")) > 127).sum())
    assert {row.case: row.areas["vessel"] for row in rows}["21_training"] == expected


def test_a_name_spelt_otherwise_is_an_error_and_patients_are_named_by_their_folders(tmp_path):
    mask = np.zeros((4, 4, 4), dtype=np.uint8)
    mask[1] = 1
    for patient, name in (("P0", "Liver"), ("P1", "liver")):
        (tmp_path / patient).mkdir()
        save_volume(tmp_path / patient / "ct.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
        save_volume(tmp_path / patient / "masks" / f"{name}.nii.gz", mask)
    items = [{"image": f"{p}/ct.nii.gz", "label": f"{p}/masks", "subject": p} for p in ("P0", "P1")]
    rows = check_datalist({"labels": {"liver": "liver"}, "label_coding": "files", "testing": items}, tmp_path)
    assert [row.case for row in rows] == ["P0", "P1"]
    assert "has 'Liver' and no 'liver'; write both names alike" in rows[0].error
    assert rows[1].error is None
