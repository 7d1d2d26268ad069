"""The door: which cases there are, what they are called, and what is refused before a file is opened."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from blosam_monai.data.readers import list_cases, read_image, read_label
from tests.data.dicom_files import write_series

VALUES = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)


def save_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(path)
    return path


def save_volume(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(VALUES, np.eye(4)), path)
    return path


def test_pictures_volumes_and_series_of_a_folder_are_its_cases(tmp_path):
    save_picture(tmp_path / "film.png")
    save_volume(tmp_path / "ct.nii.gz")
    write_series(tmp_path / "series_1", VALUES)
    (tmp_path / "notes.txt").write_text("x")
    save_picture(tmp_path / "._film.png")
    assert list_cases(tmp_path) == {
        tmp_path / "ct.nii.gz": "ct",
        tmp_path / "film.png": "film",
        tmp_path / "series_1": "series_1",
    }


def test_a_file_and_the_folder_of_a_series_are_one_case_each(tmp_path):
    path = save_volume(tmp_path / "a" / "ct.nii")
    write_series(tmp_path / "b", VALUES)
    assert list_cases(path) == {path: "ct"}
    assert list_cases(tmp_path / "b") == {tmp_path / "b": "b"}


def test_series_in_folders_of_one_name_are_named_by_their_way(tmp_path):
    for patient in ("p1", "p2"):
        write_series(tmp_path / patient / "CT", VALUES)
    assert list(list_cases(tmp_path).values()) == ["p1_CT", "p2_CT"]


def test_x_rays_in_one_folder_are_a_case_each(tmp_path):
    for number in range(3):
        (file,) = write_series(tmp_path / str(number), VALUES[:1], modality="CR")
        (tmp_path / "all").mkdir(exist_ok=True)
        file.rename(tmp_path / "all" / f"film_{number}.dcm")
    assert list(list_cases(tmp_path / "all").values()) == ["film_0", "film_1", "film_2"]


@pytest.mark.parametrize("singles", [0, 6])
def test_films_of_one_series_without_positions_are_a_case_each(tmp_path, singles):
    nowhere = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    for number in range(singles):
        write_series(tmp_path, VALUES[:1], modality="CR", names=[f"film_{number}.dcm"])
    write_series(tmp_path, VALUES[:2], modality="CR", names=["pa.dcm", "lateral.dcm"], elements=nowhere)
    expected = [*(f"film_{number}" for number in range(singles)), "lateral", "pa"]
    assert list(list_cases(tmp_path).values()) == expected


def test_slices_whose_positions_were_removed_stay_one_case(tmp_path):
    """Reading it says what is missing."""
    write_series(tmp_path, VALUES, elements={"ImagePositionPatient": None, "ImageOrientationPatient": None})
    assert list(list_cases(tmp_path)) == [tmp_path]


def test_images_above_other_series_are_refused_naming_both(tmp_path):
    write_series(tmp_path, VALUES)
    write_series(tmp_path / "p1" / "ct", VALUES)
    with pytest.raises(
        ValueError, match=r"holds DICOM images itself, as slice_000\.dcm, and .* folders, as p1.ct; give"
    ):
        list_cases(tmp_path)


def test_two_cases_of_one_name_are_refused(tmp_path):
    save_volume(tmp_path / "a.nii.gz")
    save_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: has the same stem as a\.nii\.gz; rename or remove one of them"):
        list_cases(tmp_path)


def test_a_folder_without_images_is_refused_naming_what_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no image \(\.png .*\.nii .*DICOM\)"):
        list_cases(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    for read in (read_image, read_label, list_cases):
        with pytest.raises(FileNotFoundError, match="gone: no such file or folder; check dataset_dir"):
            read(tmp_path / "gone")


def test_a_series_asked_for_of_a_file_that_has_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"series: 1\.2\.3 asked for, but .*x\.png is no DICOM; leave series out"):
        read_image(save_picture(tmp_path / "x.png"), series="1.2.3")


def test_a_label_coding_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'onehot' is not one of index, threshold, colour, segments, files"):
        read_label(save_picture(tmp_path / "x.png"), "onehot")


@pytest.mark.parametrize("coding", ["index", "threshold", "colour", "files"])
@pytest.mark.parametrize("kind", [SegmentationStorage, RTStructureSetStorage], ids=["SEG", "RTSTRUCT"])
def test_segments_of_dicom_read_with_another_coding_name_theirs(tmp_path, kind, coding):
    (file,) = write_series(tmp_path, VALUES[:1], elements={"SOPClassUID": kind})
    with pytest.raises(ValueError, match=r'is a DICOM SEG or RTSTRUCT, not .*; write "label_coding": "segments"'):
        read_label(file, coding)


def test_a_file_is_no_folder_of_masks(tmp_path):
    with pytest.raises(ValueError, match=r"x\.png: is a file; label_coding files reads a folder of masks"):
        read_label(save_picture(tmp_path / "x.png"), "files")


def test_a_text_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: ") as caught:
        read_image(tmp_path / "notes.txt")
    assert "\n" not in str(caught.value)
