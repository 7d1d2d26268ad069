"""Labelled images found: by stems whatever the format, in nnU-Net's folders, by BIDS names, in existing lists."""

import itertools
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from blosam_monai.data.pairing import (
    case_names,
    find_subject,
    items_of_list,
    list_labels,
    pair_folders,
    parse_item,
)
from tests.data.dicom_files import write_series


@pytest.fixture
def folders(tmp_path):
    """Makes the folders ``images`` and ``labels`` with pictures of these names."""

    def make(images: list[str], labels: list[str]) -> Path:
        for name, files in (("images", images), ("labels", labels)):
            (tmp_path / name).mkdir()
            for file in files:
                Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / name / file)
        return tmp_path

    return make


def test_folders_are_paired_by_stem_whatever_the_suffix(folders):
    root = folders(["b.jpg", "a.png"], ["a.gif", "b.png"])
    assert pair_folders(root / "images", root / "labels", root) == [
        {"image": "images/a.png", "label": "labels/a.gif", "subject": "a"},
        {"image": "images/b.jpg", "label": "labels/b.png", "subject": "b"},
    ]


def test_suffixes_are_cut_off_and_subjects_found(folders):
    root = folders(["21_1_training.tif", "21_2_training.tif"], ["21_1_manual1.gif", "21_2_manual1.gif"])
    items = pair_folders(
        root / "images", root / "labels", root, image_suffix="_training", label_suffix="_manual1", subject="^([0-9]+)_"
    )
    assert [(item["image"], item["label"], item["subject"]) for item in items] == [
        ("images/21_1_training.tif", "labels/21_1_manual1.gif", "21"),
        ("images/21_2_training.tif", "labels/21_2_manual1.gif", "21"),
    ]


def test_the_folders_of_nnunet_are_paired(folders):
    root = folders(["lung_001_0000.png"], ["lung_001.png"])
    (item,) = pair_folders(root / "images", root / "labels", root, image_suffix="_0000")
    assert item == {"image": "images/lung_001_0000.png", "label": "labels/lung_001.png", "subject": "lung_001"}


@pytest.mark.parametrize(
    ("images", "labels", "alone"),
    [(["a.png", "b.png"], ["a.png"], "images/b"), (["a.png"], ["a.png", "c.png"], "labels/c")],
)
def test_a_file_without_partner_is_named(folders, images, labels, alone):
    root = folders(images, labels)
    with pytest.raises(ValueError, match=rf"{alone}\.png: has no partner of stem"):
        pair_folders(root / "images", root / "labels", root)


def test_two_files_of_one_stem_are_named(folders):
    root = folders(["a.png", "a.jpg"], ["a.png"])
    with pytest.raises(ValueError, match=r"a\.png: has the same stem as a\.jpg"):
        pair_folders(root / "images", root / "labels", root)


def test_two_files_that_a_suffix_makes_equal_are_named(folders):
    root = folders(["a.png", "a_0000.png"], ["a.png"])
    with pytest.raises(ValueError, match=r"a_0000\.png: has the same stem as a\.png"):
        pair_folders(root / "images", root / "labels", root, image_suffix="_0000")


def test_a_subject_expression_that_matches_nothing_is_refused(folders):
    root = folders(["a.png"], ["a.png"])
    with pytest.raises(ValueError, match=r"subject: '\[0-9\]\+' matches nothing in 'a'"):
        pair_folders(root / "images", root / "labels", root, subject="[0-9]+")


def touch(root: Path, *names: str) -> Path:
    """Empty files: pairing looks at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def pairs(root: Path, **options) -> list[tuple[str, str, str]]:
    items = pair_folders(root / "images", root / "labels", root, **options)
    return [(item["image"], item["label"], item["subject"]) for item in items]


def test_volumes_are_paired_whatever_their_format(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.mha", "labels/a.nrrd", "labels/b.nii", "images/._a.nii.gz")
    assert pairs(tmp_path) == [
        ("images/a.nii.gz", "labels/a.nrrd", "a"),
        ("images/b.mha", "labels/b.nii", "b"),
    ]


def test_folders_of_masks_are_labels_of_their_own(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/a/liver.nii.gz", "labels/a/spleen.nii.gz")
    touch(tmp_path, "labels/b/liver.nii.gz", "labels/notes/readme.txt", "labels/.cache/x.png")
    assert pairs(tmp_path) == [("images/a.nii.gz", "labels/a", "a"), ("images/b.nii.gz", "labels/b", "b")]


def test_the_one_channel_of_nnunet_is_cut_without_being_told(tmp_path):
    touch(tmp_path, "images/a1_0000.nii.gz", "images/a2_0000.nii.gz", "labels/a1.nii.gz", "labels/a2.nii.gz")
    assert pairs(tmp_path) == [
        ("images/a1_0000.nii.gz", "labels/a1.nii.gz", "a1"),
        ("images/a2_0000.nii.gz", "labels/a2.nii.gz", "a2"),
    ]


def test_numbers_that_the_labels_have_too_are_no_channels(tmp_path):
    touch(tmp_path, "images/scan_0001.png", "images/scan_0002.png", "labels/scan_0001.png", "labels/scan_0002.png")
    assert [subject for _, _, subject in pairs(tmp_path)] == ["scan_0001", "scan_0002"]


def test_one_of_several_channels_must_be_chosen(tmp_path):
    touch(tmp_path, "images/a_0000.nii.gz", "images/a_0001.nii.gz", "labels/a.nii.gz")
    with pytest.raises(ValueError, match=r"images: the images have the channels 0, 1; give channel\."):
        pairs(tmp_path)
    assert pairs(tmp_path, channel=1) == [("images/a_0001.nii.gz", "labels/a.nii.gz", "a")]
    with pytest.raises(ValueError, match=r"have the channels 0, 1; channel 2 asked for"):
        pairs(tmp_path, channel=2)


def test_a_channel_of_images_without_channels_is_refused(tmp_path):
    touch(tmp_path, "images/a.png", "labels/a.png")
    with pytest.raises(ValueError, match=r"channel: 0 asked for, .*images have no channel number, as _0000"):
        pairs(tmp_path, channel=0)


@pytest.mark.parametrize("label", ["dseg", "mask", "label-lesion_mask", "space-T1w_label-lesion_desc-x_mask"])
def test_bids_names_pair_without_their_endings(tmp_path, label):
    images = [f"images/sub-{n}_ses-1_T1w.nii.gz" for n in ("01", "02")]
    labels = [f"labels/sub-{n}_ses-1_{label}.nii.gz" for n in ("01", "02")]
    touch(tmp_path, *images, *labels)
    assert pairs(tmp_path) == [(images[0], labels[0], "sub-01"), (images[1], labels[1], "sub-02")]


def test_endings_of_other_names_are_not_cut(tmp_path):
    touch(tmp_path, "images/p1_T1w.nii.gz", "labels/p1_dseg.nii.gz")
    with pytest.raises(ValueError, match="has no partner of stem 'p1_T1w'"):
        pairs(tmp_path)


def test_two_images_of_a_bids_session_need_a_suffix(tmp_path):
    touch(tmp_path, "images/sub-01_FLAIR.nii.gz", "images/sub-01_T1w.nii.gz", "labels/sub-01_dseg.nii.gz")
    with pytest.raises(ValueError, match=r"sub-01_T1w\.nii\.gz: has the same stem as sub-01_FLAIR\.nii\.gz"):
        pairs(tmp_path)


@pytest.mark.parametrize(
    ("stem", "pattern", "subject"),
    [
        ("sub-A1_ses-2_T1w", None, "sub-A1"),
        ("sub-A1", None, "sub-A1"),
        ("sub-png_x", "(x)", "x"),
        ("subject-1_x", None, "subject-1_x"),
    ],
)
def test_subjects_of_bids_names_are_found_unless_told_otherwise(stem, pattern, subject):
    assert find_subject(stem, pattern) == subject


def test_a_dicom_series_and_its_only_label_pair_whatever_their_names(real_data):
    root = real_data / "dicom_totalseg_ct"
    (item,) = pair_folders(root / "image", root / "label", root)
    assert item == {"image": "image", "label": "label/example_seg_dicom.nii.gz", "subject": "image"}


def test_a_dicom_seg_is_a_label(real_data):
    root = real_data / "dicom_seg_dcmqi_ct3"
    (item,) = pair_folders(root / "image", root / "seg" / "liver.dcm", root)
    assert (item["image"], item["label"]) == ("image", "seg/liver.dcm")
    assert [stem for path, stem in list_labels(root / "seg").items() if path.suffix == ".dcm"] == [
        "liver",
        "partial_overlaps",
    ]


def test_patients_with_studies_pair_with_the_segmentations_among_their_series(real_data, tmp_path):
    """One folder for both, every series named alike: p1/study/{CT,SEG} and p2/study/{CT,SEG}."""
    root = real_data / "dicom_seg_dcmqi_ct3"
    for name, series in itertools.product(("p1", "p2"), ("image", "seg")):
        (tmp_path / name / "study" / series).mkdir(parents=True)
        file = root / ("image/01.dcm" if series == "image" else "seg/liver.dcm")
        (tmp_path / name / "study" / series / "1").symlink_to(file)
    items = pair_folders(tmp_path, tmp_path, tmp_path)
    assert [(item["image"], item["label"], item["subject"]) for item in items] == [
        ("p1/study/image", "p1/study/seg", "p1"),
        ("p2/study/image", "p2/study/seg", "p2"),
    ]


def test_labels_in_two_folders_of_a_case_are_refused(tmp_path):
    touch(tmp_path, "labels/p1/reader_a/liver.png", "labels/p1/reader_b/liver.png")
    with pytest.raises(ValueError, match="labels/p1: holds labels in 2 places, as reader_b; keep one"):
        list_labels(tmp_path / "labels")


def test_dicom_files_with_a_label_each_are_films_of_their_own(real_data, tmp_path):
    (tmp_path / "images").mkdir()
    for name, uid in (("b.dcm", "1.2.3"), ("a", "1.2.4")):
        film = pydicom.dcmread(real_data / "dicom_seg_dcmqi_ct3" / "image" / "01.dcm")
        film.SeriesInstanceUID = uid
        film.save_as(tmp_path / "images" / name)
    touch(tmp_path, "labels/a.png", "labels/b.png")
    assert pairs(tmp_path) == [("images/a", "labels/a.png", "a"), ("images/b.dcm", "labels/b.png", "b")]


def test_dicom_series_are_paired_by_the_names_of_their_folders(real_data, tmp_path):
    for name in ("p2", "p1"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1").symlink_to(real_data / "dicom_seg_dcmqi_ct3" / "image" / "01.dcm")
    touch(tmp_path, "labels/p1.nii.gz", "labels/p2.nii.gz")
    assert pairs(tmp_path) == [("images/p1", "labels/p1.nii.gz", "p1"), ("images/p2", "labels/p2.nii.gz", "p2")]


@pytest.mark.parametrize(
    ("make", "error", "finding"),
    [
        (lambda root: None, FileNotFoundError, "labels: no such file or folder"),
        (lambda root: touch(root, "labels/readme.txt"), ValueError, "labels: holds no label"),
    ],
)
def test_a_folder_without_labels_is_named(tmp_path, make, error, finding):
    make(tmp_path)
    with pytest.raises(error, match=finding):
        list_labels(tmp_path / "labels")


# nnU-Net raw folders


@pytest.fixture
def raw(tmp_path):
    """Makes an nnU-Net raw folder of two cases with these channels; returns its ``dataset.json``."""

    def make(channels: dict[str, str], **content) -> Path:
        for case in ("a2", "a1"):
            touch(tmp_path, f"labelsTr/{case}.nii.gz", *(f"imagesTr/{case}_{int(c):04d}.nii.gz" for c in channels))
        content = {
            "channel_names": channels,
            "labels": {"background": 0, "tumour": [1, 2], "core": 2},
            "numTraining": 2,
            "file_ending": ".nii.gz",
            **content,
        }
        (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / "dataset.json"

    return make


def test_an_nnunet_raw_folder_is_read_from_its_list(raw):
    items, content = items_of_list(raw({"0": "CT"}))
    assert items == [
        {"image": "imagesTr/a1_0000.nii.gz", "label": "labelsTr/a1.nii.gz", "subject": "a1"},
        {"image": "imagesTr/a2_0000.nii.gz", "label": "labelsTr/a2.nii.gz", "subject": "a2"},
    ]
    assert content["labels"] == {"background": 0, "tumour": [1, 2], "core": 2}


def test_one_of_nnunets_channels_must_be_chosen_by_number(raw):
    path = raw({"0": "T1", "1": "FLAIR"})
    with pytest.raises(ValueError, match=r"2 image files; one file an item is read: give channel \(0: T1, 1: FLAIR\)"):
        items_of_list(path)
    items, _ = items_of_list(path, channel=1)
    assert [(item["image"], item["subject"]) for item in items] == [
        ("imagesTr/a1_0001.nii.gz", "a1"),
        ("imagesTr/a2_0001.nii.gz", "a2"),
    ]
    with pytest.raises(ValueError, match=r"channel: 2 asked for, an item of .*dataset\.json has 2 image files"):
        items_of_list(path, channel=2)


def test_a_case_of_nnunet_without_image_is_named(raw):
    path = raw({"0": "CT"})
    (path.parent / "imagesTr" / "a1_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"imagesTr/a1_0000\.nii\.gz: missing; its label is there"):
        items_of_list(path)


def test_labels_with_voxels_to_ignore_are_refused(raw):
    path = raw({"0": "CT"}, labels={"background": 0, "tumour": 1, "ignore": 2})
    with pytest.raises(ValueError, match=r'the label "ignore" marks voxels that nobody labelled'):
        items_of_list(path)


def test_the_files_of_an_nnunet_list_are_taken_where_it_names_them(raw):
    named = {"b": {"images": ["x/b.png"], "label": "y/b.png"}, "a": {"images": ["x/a.png"], "label": "y/a.png"}}
    items, _ = items_of_list(raw({"0": "CT"}, dataset=named))
    assert items == [
        {"image": "x/a.png", "label": "y/a.png", "subject": "a"},
        {"image": "x/b.png", "label": "y/b.png", "subject": "b"},
    ]


# Items


def test_an_item_keeps_its_slice_and_series():
    item = {"image": "sub-01_T1w.nii.gz", "label": "l.nii.gz", "slice": 0, "series": "1.2.3", "fold": 3}
    assert parse_item(item, "lower", "x.json") == {
        "image": "sub-01_T1w.nii.gz",
        "label": "l.nii.gz",
        "subject": "sub-01",
        "slice": 0,
        "series": "1.2.3",
    }


@pytest.mark.parametrize("number", [-1, "3", 1.5, True])
def test_a_slice_that_is_no_number_is_refused(number):
    with pytest.raises(ValueError, match=r"x\.json: lower has the slice .*; slices are numbers, counted from 0"):
        parse_item({"image": "a", "label": "b", "slice": number}, "lower", "x.json")


# Trees of patients


def write_plan(path: Path, sop_class: str, modality: str) -> None:
    """A DICOM file without pixels: what a planning system exports beside its CT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = sop_class, pydicom.uid.generate_uid(), modality
    dataset.file_meta = pydicom.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)


PLANNING = {
    "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
    "RTPLAN": "1.2.840.10008.5.1.4.1.1.481.5",
    "RTDOSE": "1.2.840.10008.5.1.4.1.1.481.2",
}


def test_of_a_planning_export_the_structures_are_the_label(tmp_path):
    for patient in ("P0", "P1"):
        write_series(tmp_path / patient / "CT", np.arange(8, dtype=np.int16).reshape(2, 2, 2))
        for modality, sop_class in PLANNING.items():
            write_plan(tmp_path / patient / modality / "1.dcm", sop_class, modality)
    items = pair_folders(tmp_path, tmp_path, tmp_path)
    assert [(item["image"], item["label"], item["subject"]) for item in items] == [
        ("P0/CT", "P0/RTSTRUCT", "P0"),
        ("P1/CT", "P1/RTSTRUCT", "P1"),
    ]


def test_of_a_planning_export_in_one_folder_the_structures_are_the_label(tmp_path):
    for patient in ("P0", "P1"):
        write_series(tmp_path / patient, np.arange(8, dtype=np.int16).reshape(2, 2, 2))
        for modality, sop_class in PLANNING.items():
            write_plan(tmp_path / patient / f"{modality}.dcm", sop_class, modality)
    items = pair_folders(tmp_path, tmp_path, tmp_path)
    assert [(item["image"], item["label"]) for item in items] == [
        ("P0", "P0/RTSTRUCT.dcm"),
        ("P1", "P1/RTSTRUCT.dcm"),
    ]
    (alone,) = pair_folders(tmp_path / "P0", tmp_path / "P0", tmp_path)
    assert (alone["image"], alone["label"]) == ("P0", "P0/RTSTRUCT.dcm")


def test_two_series_of_a_patient_are_named(tmp_path):
    for patient, series in itertools.product(("P0", "P1"), ("ct", "mr")):
        write_series(tmp_path / "images" / patient / series, np.arange(8, dtype=np.int16).reshape(2, 2, 2))
    touch(tmp_path, "labels/P0.nii.gz", "labels/P1.nii.gz")
    with pytest.raises(ValueError, match="images/P0: holds several image series, P0/ct and P0/mr; keep the labelled"):
        pairs(tmp_path)


def test_patients_with_a_volume_and_a_folder_of_masks_are_paired(tmp_path):
    """As TotalSegmentator's data set is stored."""
    for case in ("s0", "s1"):
        touch(
            tmp_path, f"{case}/ct.nii.gz", f"{case}/segmentations/liver.nii.gz", f"{case}/segmentations/spleen.nii.gz"
        )
    items = pair_folders(tmp_path, tmp_path, tmp_path)
    assert [(item["image"], item["label"], item["subject"]) for item in items] == [
        ("s0/ct.nii.gz", "s0/segmentations", "s0"),
        ("s1/ct.nii.gz", "s1/segmentations", "s1"),
    ]
    touch(tmp_path, "s1/pet.nii.gz")
    with pytest.raises(ValueError, match=r"s1: holds 2 volumes, as pet\.nii\.gz; keep one image a folder"):
        pair_folders(tmp_path, tmp_path, tmp_path)


def test_hidden_folders_hold_no_labels(tmp_path):
    touch(tmp_path, "labels/p1/liver.png", "labels/p1/.ipynb_checkpoints/liver-checkpoint.png")
    assert list_labels(tmp_path / "labels") == {tmp_path / "labels" / "p1": "p1"}


def test_numbers_without_which_there_is_no_label_are_no_channels(tmp_path):
    touch(tmp_path, "images/img_0001.png", "images/img_0002.png")
    touch(tmp_path, "labels/img_0001_mask.png", "labels/img_0002_mask.png")
    with pytest.raises(ValueError, match=r"has no partner of stem 'img_0001'.*; rename it, or cut off what differs"):
        pairs(tmp_path)
    assert [subject for _, _, subject in pairs(tmp_path, label_suffix="_mask")] == ["img_0001", "img_0002"]


def test_a_group_that_matches_nothing_is_no_subject():
    with pytest.raises(ValueError, match=r"subject: '\(x\)\?case' matches nothing in 'case'"):
        find_subject("case", "(x)?case")


def test_the_folder_tells_images_of_one_name_apart():
    assert case_names(["/d/P00/study/ct", "/d/./P01/study/ct", "/d/P01/study/mr"]) == ["P00", "P01", "mr"]
    assert case_names(["P00/ct", "P00/mr", "P01/ct", "P01/mr"]) == ["P00", "P00", "P01", "P01"]
    assert case_names(["ct"]) == ["ct"]


def test_series_in_trees_have_the_patient_as_subject_where_a_list_names_none(tmp_path):
    items = [{"image": f"P{n}/ct", "label": f"P{n}/seg"} for n in range(3)]
    content = {"labels": {"liver": "Liver"}, "label_coding": "segments", "lower": items[:1], "upper": items[1:]}
    (tmp_path / "list.json").write_text(json.dumps(content), encoding="utf-8")
    found, _ = items_of_list(tmp_path / "list.json")
    assert [item["subject"] for item in found] == ["P0", "P1", "P2"]
