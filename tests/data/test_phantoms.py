"""The generated images: labelled, all different, of different sides, and sound files of every kind."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from blosam_monai.data.geometry import Image, spacing, upright
from blosam_monai.data.phantoms import (
    CT_LABELS,
    CT_WINDOW,
    PHANTOM_LABELS,
    abdominal_ct,
    chest_film,
    write_chest_films,
    write_ct_series,
    write_ct_slices,
    write_ct_volume,
)
from blosam_monai.data.readers import list_cases, read_image, read_label
from blosam_monai.data.windows import display_stack

SEEDS = range(25)


@pytest.fixture(scope="module")
def films():
    return [chest_film(seed, 112, 144) for seed in SEEDS]


def test_a_seed_gives_the_same_film_again():
    for first, second in zip(chest_film(3), chest_film(3), strict=True):
        assert np.array_equal(first, second)


def test_every_seed_gives_another_film(films):
    assert len({film.tobytes() for film, _ in films}) == len(SEEDS)
    assert len({label.tobytes() for _, label in films}) == len(SEEDS)


def test_film_and_label_have_the_size_asked_for():
    film, label = chest_film(0, 48, 80)
    assert (film.shape, film.dtype) == ((48, 80), np.uint8)
    assert (label.shape, label.dtype) == ((48, 80), np.uint8)


def test_every_film_shows_both_classes(films):
    for _, label in films:
        assert set(np.unique(label)) == set(PHANTOM_LABELS.values())
        assert 0.10 < (label == 1).mean() < 0.30  # ellipses of half axes about 0.30 x 0.125, twice, less the heart
        assert 0.02 < (label == 2).mean() < 0.08  # about 0.15 x 0.105


def test_lungs_are_dark_and_the_heart_is_bright(films):
    for film, label in films:
        assert film[label == 1].mean() + 50 < film[label == 2].mean()


def test_the_heart_lies_right_of_the_lungs_middle_so_that_a_mirrored_film_is_told(films):
    for _, label in films:
        assert np.nonzero(label == 2)[1].mean() > np.nonzero(label == 1)[1].mean() + 3
        assert np.nonzero(label == 2)[0].mean() > np.nonzero(label == 1)[0].mean() + 3  # and lower down


def test_written_films_are_read_back(tmp_path):
    write_chest_films(tmp_path, 2, seed=5)
    names = ["phantom_000.png", "phantom_001.png"]
    assert [p.name for p in list_cases(tmp_path / "images")] == names
    assert [p.name for p in list_cases(tmp_path / "labels")] == names
    film, label = chest_film(50_001)
    assert np.array_equal(read_image(tmp_path / "images" / names[1]).values[0], film)
    assert np.array_equal(read_label(tmp_path / "labels" / names[1]).values[0], label)


# ---- CT of the abdomen ----------------------------------------------------------------------------------------------

MILLILITRES = 5 * 2.6 * 2.6 / 1000  # of a voxel


@pytest.fixture(scope="module")
def subjects() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [abdominal_ct(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    write_ct_series(folder / "series", folder / "label.nii.gz", seed=3)
    return folder


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def headers(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def test_a_seed_gives_the_same_ct_again(subjects):
    for first, second in zip(subjects[3], abdominal_ct(3), strict=True):
        assert np.array_equal(first, second)


def test_subjects_are_alike_but_not_the_same(subjects):
    for (_, first, _), (_, second, _) in combinations(subjects, 2):
        for value in (1, 2, 3):
            assert 0.2 < dice(first == value, second == value) < 0.9


def test_every_subject_has_another_intensity_in_each_organ(subjects):
    for value in (1, 2, 3):
        assert len({round(hu[label == value].mean(), 1) for hu, label, _ in subjects}) == len(subjects)


def test_organs_have_the_hu_of_the_portal_venous_phase(subjects):
    """Liver 100 to 120 HU and spleen 10 to 20 above it, as textbooks say, kidneys brighter; give or take a subject."""
    liver, spleen, kidneys = (np.mean([hu[label == value].mean() for hu, label, _ in subjects]) for value in (1, 2, 3))
    assert 100 < liver < 120
    assert liver + 8 < spleen < liver + 22
    assert spleen + 20 < kidneys
    for hu, label, _ in subjects:
        assert hu[:, 0].mean() == pytest.approx(-1000, abs=2)  # air before the patient
        assert not label[:, 0].any()


def test_liver_is_as_large_as_in_adults(subjects):
    volumes = [(label == 1).sum() * MILLILITRES for _, label, _ in subjects]
    assert min(volumes) > 900
    assert max(volumes) < 1800  # mL


def test_spleen_and_kidneys_are_a_little_smaller_than_their_ellipsoids(subjects):
    """Half axes 25, 43, 42 mm; twice 28, 25, 48 mm; the wall of the trunk, fat and the first slice take some of it."""
    for value, ellipsoids in ((2, 4 / 3 * np.pi * 2.5 * 4.3 * 4.2), (3, 2 * 4 / 3 * np.pi * 2.8 * 2.5 * 4.8)):
        mean = np.mean([(label == value).sum() * MILLILITRES for _, label, _ in subjects])
        assert 0.75 * ellipsoids < mean < ellipsoids


def test_a_finer_grid_shows_the_same_subject(subjects):
    _, label, _ = abdominal_ct(3, shape=(64, 192, 272), spacing=(2.5, 1.3, 1.3))
    for value in (1, 2, 3):
        coarse = (subjects[3][1] == value).sum()
        assert (label == value).sum() == pytest.approx(8 * coarse, rel=0.02)


def test_a_single_slice_is_that_of_the_volume(subjects):
    _, label, affine = abdominal_ct(3, shape=(1, 96, 136), level=22.5)  # (20 - 31 / 2) x 5 mm
    assert np.array_equal(label[0], subjects[3][1][20])
    np.testing.assert_allclose(affine[:, 3], subjects[3][2] @ [20, 0, 0, 1])


def test_the_liver_lies_on_the_right_and_the_spleen_on_the_left_of_the_spine(subjects):
    for hu, label, affine in subjects:
        x = (affine @ np.stack([*np.indices(hu.shape), np.ones(hu.shape)]).reshape(4, -1))[0].reshape(hu.shape)  # left
        spine = x[:, :, 40:96][hu[:, :, 40:96] > 300].mean()
        assert x[label == 1].mean() + 30 < spine < x[label == 2].mean() - 50
        kidneys = x[label == 3] - spine
        assert (kidneys < -20).mean() > 0.2
        assert (kidneys > 20).mean() > 0.2


def test_the_slices_lie_upright_as_they_are(subjects):
    """Rows to the back and columns to the left: what a radiologist sees, without turning anything."""
    image = Image("phantom", *subjects[0][::2])
    assert np.array_equal(upright(image, "axial").apply(image.values), image.values)


def test_a_nifti_volume_is_read_back(tmp_path, subjects):
    hu, label, affine = subjects[3]
    write_ct_volume(tmp_path / "volume.nii.gz", tmp_path / "label.nii.gz", seed=3)
    image = read_image(tmp_path / "volume.nii.gz")
    # NIfTI counts columns first: read as (d, h, w) again.
    assert np.array_equal(image.values, hu)
    np.testing.assert_allclose(image.affine, affine, atol=1e-3)
    assert spacing(image.affine) == pytest.approx((5, 2.6, 2.6))
    assert np.array_equal(read_label(tmp_path / "label.nii.gz", image=image).values, label)


def test_nibabel_sees_hu_and_the_axes_left_back_head(tmp_path, subjects):
    write_ct_volume(tmp_path / "volume.nii.gz", tmp_path / "label.nii.gz", seed=3)
    nifti = nibabel.load(tmp_path / "volume.nii.gz")
    assert nibabel.aff2axcodes(nifti.affine) == ("L", "P", "S")
    assert np.array_equal(np.asarray(nifti.dataobj).T, subjects[3][0])


def test_a_dicom_series_is_read_back(series, subjects):
    hu, label, affine = subjects[3]
    image = read_image(series / "series")
    assert np.array_equal(image.values, hu)
    np.testing.assert_allclose(image.affine, affine, atol=1e-3)
    assert image.notes == ()
    assert np.array_equal(read_label(series / "label.nii.gz", image=image).values, label)


def test_itk_reads_the_series_as_written(series, subjects):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series / "series")))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), subjects[3][0])
    np.testing.assert_allclose(image.GetSpacing(), (2.6, 2.6, 5))
    np.testing.assert_allclose(image.GetOrigin(), subjects[3][2][:3, 3], atol=1e-3)
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)


# DICOM PS3.3, modules of A.3 CT Image IOD (C.7.1.1 patient ... C.8.2.1 CT image, C.12.1 SOP common).
TYPE_1 = """StudyInstanceUID Modality SeriesInstanceUID FrameOfReferenceUID PixelSpacing ImageOrientationPatient
ImagePositionPatient SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit
PixelRepresentation PixelData ImageType RescaleIntercept RescaleSlope RescaleType SOPClassUID SOPInstanceUID"""
TYPE_2 = """PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID
AccessionNumber SeriesNumber PatientPosition PositionReferenceIndicator Manufacturer InstanceNumber SliceThickness KVP
AcquisitionNumber"""


def test_slices_have_what_dicom_requires_of_ct(series):
    for header in headers(series / "series"):
        assert [name for name in (*TYPE_1.split(), *TYPE_2.split()) if name not in header] == []
        assert [name for name in TYPE_1.split() if header[name].is_empty] == []
        assert header.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"  # CT Image Storage
        assert header.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID


def test_slices_are_of_one_series_and_each_has_a_valid_uid_of_its_own(series):
    found = headers(series / "series")
    assert len({header.SOPInstanceUID for header in found}) == len(found) == 32
    assert len({(h.StudyInstanceUID, h.SeriesInstanceUID, h.FrameOfReferenceUID) for h in found}) == 1
    assert all(uid.is_valid for h in found for uid in (h.SOPInstanceUID, h.StudyInstanceUID, h.SeriesInstanceUID))


def test_a_series_is_the_same_files_at_every_run(series, tmp_path):
    write_ct_series(tmp_path / "again", tmp_path / "label.nii.gz", seed=3)
    for first, second in zip(
        sorted((series / "series").iterdir()), sorted((tmp_path / "again").iterdir()), strict=True
    ):
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_is_another_patient(series, tmp_path):
    write_ct_series(tmp_path / "series", tmp_path / "label.nii.gz", seed=4)
    first, second = headers(series / "series")[0], headers(tmp_path / "series")[0]
    assert (first.PatientName, second.PatientName) == ("PHANTOM^03", "PHANTOM^04")
    for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        assert first[name].value != second[name].value


def test_slices_are_written_as_pictures_that_show_what_a_volume_shows(tmp_path):
    """The gray values of a picture are those that the window gives of HU, so that one model segments both."""
    write_ct_slices(tmp_path, 3, seed=5)
    assert [p.name for p in list_cases(tmp_path / "images")] == [f"phantom_{n:03d}.png" for n in range(3)]
    level = float(np.random.default_rng([50_001, 1]).uniform(-12, 22))
    hu, label, _ = abdominal_ct(50_001, shape=(1, 200, 280), spacing=(5, 1.25, 1.25), level=level)
    image = read_image(tmp_path / "images" / "phantom_001.png")
    as_stored = upright(image, "axial")
    shown = display_stack(image, as_stored, CT_WINDOW)
    assert np.array_equal(shown, display_stack(Image("hu", hu), as_stored, CT_WINDOW))
    assert np.array_equal(shown[0], hu.clip(0, 255))
    assert np.array_equal(read_label(tmp_path / "labels" / "phantom_001.png").values, label)


def test_nearly_all_slices_show_all_three_organs(tmp_path):
    write_ct_slices(tmp_path, 20)
    shown = [read_label(path).counts().keys() for path in sorted((tmp_path / "labels").iterdir())]
    assert sum(set(values) == set(CT_LABELS.values()) - {0} for values in shown) >= 18
