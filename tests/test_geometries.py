"""Files of every geometry, there and back: read, turned upright, decided, written, and looked at by other libraries.

A marker without any symmetry is bright in the image; the prediction is what is bright in the upright slices. So what is
written must be the marker: at the same indices of the file, and at the same millimetres of the patient, which the
tests find from the headers by the formulas of DICOM (PS3.3 C.7.6.2.1.1) and by nibabel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch

from blosam_monai.data.geometry import SLICE_AXES
from blosam_monai.data.readers import read_image, read_label
from blosam_monai.outputs import PlanOutputd, SavePredictiond
from blosam_monai.transforms import DecideTasksd, LoadCased
from tests.data.dicom_files import CORONAL, OBLIQUE, SAGITTAL, write_enhanced, write_series

SHAPE = (5, 6, 8)  # (D, H, W)
POSITION = (-31.5, 12.0, 40.25)  # mm LPS
LABELS = {"background": 0, "marker": 3}
UNTIDY = [f"{name}.dcm" for name in ("b", "e", "a", "d", "c")]
TO_LPS = np.array([-1, -1, 1])


class Given(NamedTuple):
    """A case on disk: where, how it is read, and where its marker is (N, 3) in mm LPS."""

    path: Path
    points: np.ndarray
    options: dict


def marker(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A third of the voxels, at random: no flip or turn leaves it as it is."""
    return np.random.default_rng(3).random(shape) < 1 / 3


def bright(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (marker(shape) * 900).astype(np.int16)


def points_of_slices(paths: list[Path]) -> np.ndarray:
    """Where bright pixels of DICOM slices are in the patient: position + row number and column number in mm."""
    points = []
    for path in paths:
        header = pydicom.dcmread(path)
        rows, columns = np.nonzero(header.pixel_array)
        points.append(
            place(header.ImagePositionPatient, header.ImageOrientationPatient, header.PixelSpacing, rows, columns)
        )
    return np.concatenate(points)


def place(position, orientation, spacing, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    return (
        np.array(position, float)
        + np.outer(columns * float(spacing[1]), along_row)
        + np.outer(rows * float(spacing[0]), along_column)
    )


def series(
    *, left_out: tuple[int, ...] = (), options: dict | None = None, shape=SHAPE, **how
) -> Callable[[Path], Given]:
    """A series of one file a slice; ``left_out`` are files that are read but, as said, not used."""

    def make(folder: Path) -> Given:
        paths = write_series(folder / "case", bright(shape), **{"position": POSITION, **how})
        used = [path for number, path in enumerate(paths) if number not in left_out]
        return Given(folder / "case", points_of_slices(used), options or {})

    return make


def two_series(folder: Path) -> Given:
    """The second holds the marker, the first its negative."""
    write_series(folder / "case", 900 - bright(), names=[f"a{d}" for d in range(5)], series_uid="1.2.3.1")
    paths = write_series(folder / "case", bright(), names=[f"b{d}" for d in range(5)], series_uid="1.2.3.2")
    return Given(folder / "case", points_of_slices(paths), {"series": "1.2.3.2"})


def enhanced(**how) -> Callable[[Path], Given]:
    """A multi-frame file; its frames may come in any order."""

    def make(folder: Path) -> Given:
        path = write_enhanced(folder / "case.dcm", bright(), position=POSITION, **how)
        header = pydicom.dcmread(path)
        return Given(path, points_of_frames(header), {})

    return make


def points_of_frames(header: pydicom.Dataset) -> np.ndarray:
    """Where the foreground of a multi-frame file, or the first segment of a SEG, is in the patient."""
    shared, points = header.SharedFunctionalGroupsSequence[0], []
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    frames = header.pixel_array.reshape(-1, header.Rows, header.Columns)
    for pixels, groups in zip(frames, header.PerFrameFunctionalGroupsSequence, strict=True):
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        points.append(place(position, orientation, spacing, *np.nonzero(pixels)))
    return np.concatenate(points)


def nifti(affine: np.ndarray, shape: tuple[int, ...] = SHAPE[::-1]) -> Callable[[Path], Given]:
    """A NIfTI file (X, Y[, Z]) with an affine to RAS."""

    def make(folder: Path) -> Given:
        nibabel.save(nibabel.Nifti1Image(bright(shape), affine), folder / "case.nii.gz")
        return Given(folder / "case.nii.gz", points_of_nifti(folder / "case.nii.gz"), {})

    return make


def points_of_nifti(path: Path) -> np.ndarray:
    image = nibabel.load(path)
    values = np.asarray(image.dataobj)
    indices = np.argwhere(values.reshape((*values.shape, 1, 1)[:3]))
    return nibabel.affines.apply_affine(image.affine, indices) * TO_LPS


def itk(suffix: str, direction: np.ndarray) -> Callable[[Path], Given]:
    """A file of ITK's own formats."""

    def make(folder: Path) -> Given:
        image = sitk.GetImageFromArray(bright())
        image.SetOrigin(POSITION)
        image.SetSpacing((0.5, 0.75, 2.5))
        image.SetDirection(direction.ravel().tolist())
        sitk.WriteImage(image, str(folder / f"case.{suffix}"))
        indices = np.argwhere(marker())[:, ::-1].tolist()
        points = np.array([image.TransformIndexToPhysicalPoint(index) for index in indices])
        return Given(folder / f"case.{suffix}", points, {})

    return make


def axes(columns: list[list[float]], sizes=(0.8, 0.9, 2.5)) -> np.ndarray:
    """Affine of the given directions of i, j and k, off the origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns, float).T * sizes
    affine[:3, 3] = POSITION
    return affine


X, Y, Z = np.eye(3)
TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])  # a rotation, of Pythagorean numbers

GEOMETRIES: dict[str, Callable[[Path], Given]] = {
    "DICOM axial": series(),
    "DICOM coronal": series(orientation=CORONAL),
    "DICOM sagittal": series(orientation=SAGITTAL),
    "DICOM oblique": series(orientation=OBLIQUE),
    "DICOM oblique to all axes": series(orientation=TURN[:, :2].T.ravel()),
    "DICOM axial, from head to foot": series(orientation=(1, 0, 0, 0, -1, 0)),
    "DICOM axial, right to left": series(orientation=(-1, 0, 0, 0, 1, 0)),
    "DICOM prone": series(orientation=(-1, 0, 0, 0, -1, 0)),
    "DICOM anisotropic": series(spacing=(5, 0.7, 1.3)),
    "DICOM negative direction": series(offsets=(8, 6, 4, 2, 0)),
    "DICOM single slice": series(shape=(1, 6, 8)),
    "DICOM single coronal slice": series(shape=(1, 6, 8), orientation=CORONAL),
    "DICOM shuffled names": series(names=UNTIDY),
    "DICOM names without suffix": series(names=[name[0] for name in UNTIDY]),
    "DICOM reversed numbers": series(numbers=(5, 4, 3, 2, 1)),
    "DICOM shuffled positions": series(offsets=(4, 0, 8, 2, 6)),
    "DICOM enhanced": enhanced(),
    "DICOM enhanced, oblique, frames shuffled": enhanced(orientation=OBLIQUE, offsets=(4, 0, 8, 2, 6)),
    "NIfTI RAS": nifti(axes([X, Y, Z])),
    "NIfTI LPS": nifti(axes([-X, -Y, Z])),
    "NIfTI LAS": nifti(axes([-X, Y, Z])),
    "NIfTI RAI": nifti(axes([X, Y, -Z])),
    "NIfTI LPI": nifti(axes([-X, -Y, -Z])),
    "NIfTI identity": nifti(np.eye(4)),
    "NIfTI anisotropic": nifti(axes([X, Y, Z], sizes=(0.4, 3, 1.1))),
    "NIfTI oblique": nifti(axes(list(TURN))),
    "NIfTI coronal": nifti(axes([X, -Z, Y])),
    "NIfTI sagittal": nifti(axes([-Y, -Z, X])),
    "NIfTI permuted": nifti(axes([Z, X, Y])),
    "NIfTI 2-D": nifti(axes([X, Y, Z]), (8, 6)),
    "NIfTI (X, Y, 1)": nifti(axes([-X, Y, Z]), (8, 6, 1)),
    "NIfTI (X, Y, Z, 1)": nifti(axes([-X, Y, Z]), (8, 6, 5, 1)),
    "NRRD oblique": itk("nrrd", TURN),
    "MetaImage flipped": itk("mha", np.diag([-1.0, 1, -1])),
}
# Said by name unless asked for; the number of the flaw's slices is known by construction.
FLAWED: dict[str, tuple[Callable[[Path], Given], str]] = {
    "two series in one folder": (two_series, r"holds 2 series.* choose one with series=UID"),
    "missing slice": (
        series(drop=[2], options={"allow": ["missing_slices"]}),
        r"1 of 5 slices are missing .* allowing missing_slices",
    ),
    "duplicate slice": (
        series(offsets=(0, 2, 2, 4, 6), left_out=(2,), options={"allow": ["duplicate_positions"]}),
        r"5 slices lie at 4 positions .* allowing duplicate_positions",
    ),
    "uneven slices": (
        series(offsets=(0, 2, 4.6, 6, 8), options={"allow": ["uneven_spacing"]}),
        r"slices are between 1\.40 and 2\.60 mm apart; .* allowing uneven_spacing",
    ),
    "tilted gantry": (
        series(tilt=0.5, options={"allow": ["gantry_tilt"]}),
        r"gantry tilt of 14\.0 degrees.* allowing gantry_tilt",  # atan(0.5 / 2)
    ),
}
ALL = GEOMETRIES | {name: make for name, (make, _) in FLAWED.items()}
MEAN_STEP = ("missing slice", "uneven slices")  # a NIfTI has one step: its slices are not where the scanner's were


class Written(NamedTuple):
    """A case and the folder of what was written of it."""

    name: str
    given: Given
    folder: Path


@pytest.fixture(
    scope="module", params=[(name, axis) for name in ALL for axis in SLICE_AXES], ids=lambda p: " - ".join(p)
)
def written(request, tmp_path_factory) -> Written:
    """A case, cut along an axis, whose bright voxels were written as its prediction."""
    name, slice_axis = request.param
    folder = tmp_path_factory.mktemp("geometry")
    given = ALL[name](folder)
    item = LoadCased(LABELS, slice_axis=slice_axis, **given.options)({"image": str(given.path)})
    item["pred"] = torch.where(item["image"] > 127, 4.0, -4.0)  # (T, D, H, W) logits of one task, in upright slices
    item = DecideTasksd("argmax")(PlanOutputd(folder / "out", ["marker"])(item))
    SavePredictiond(LABELS)(item)
    return Written(name, given, folder / "out")


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 2).T)]


def test_the_nifti_holds_the_marker_where_it_was_in_the_patient(written):
    """Float32 in the header of a NIfTI: a thousandth of a millimetre."""
    found = points_of_nifti(written.folder / "case.nii.gz")
    if written.name in MEAN_STEP:
        assert len(found) == len(written.given.points)
    else:
        np.testing.assert_allclose(in_order(found), in_order(written.given.points), atol=1e-3)


def test_the_seg_holds_the_marker_where_it_was_in_the_patient(written):
    segs = list(written.folder.glob("*.seg.dcm"))
    assert len(segs) == written.name.startswith(("DICOM", *FLAWED))
    for seg in segs:
        found = points_of_frames(pydicom.dcmread(seg))
        np.testing.assert_allclose(in_order(found), in_order(written.given.points), atol=1e-6)


def test_read_again_every_file_is_the_bright_voxels_of_the_image(written):
    image = read_image(written.given.path, **written.given.options)
    nifti = read_label(written.folder / "case.nii.gz", image=image)
    assert np.array_equal(nifti.values == 3, image.values > 450)
    assert not nifti.notes  # on the very grid
    for seg in written.folder.glob("*.seg.dcm"):
        label = read_label(seg, "segments", image=image)
        assert np.array_equal(label.mask(["marker"]), image.values > 450)


@pytest.mark.parametrize("name", FLAWED)
def test_what_is_wrong_with_a_series_is_refused_by_name(tmp_path, name):
    make, said = FLAWED[name]
    given = make(tmp_path)
    with pytest.raises(ValueError, match=said):
        LoadCased(LABELS)({"image": str(given.path)})
