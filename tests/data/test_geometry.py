"""Where voxels are: slices the right way up, and labels on their image's grid."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from blosam_monai.data.geometry import SLICE_AXES, Image, Label, Orientation, choose_slice_axis, spacing, turn, upright
from blosam_monai.data.readers.volumes import read_label_volume

SHAPE = (5, 12, 16)
TOWARDS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}  # in LPS
# Where d, h and w lead to. NIfTI letters run the other way (i, j, k): its RAS is SAR here.
GRIDS = {
    "NIfTI RAS": "SAR",
    "NIfTI LPS, axial DICOM": "SPL",
    "NIfTI LAS": "SAL",
    "axial, from head to feet": "IPL",
    "coronal": "PIL",
    "coronal, from back to front": "AIL",
    "sagittal": "LIP",
    "sagittal, from left to right": "RIP",
    "sagittal, transposed": "RPI",
}


def affine_of(letters: str, sizes=(3, 0.8, 0.7), origin=(-90, 40, 12.5), angles=(0, 0, 0)) -> np.ndarray:
    """(d, h, w) -> mm LPS of a grid whose axes lead towards ``letters``, then turned about x, y, z by degrees."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([TOWARDS[letter] for letter in letters]).T * sizes
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


def end(letters: str, towards: str) -> np.ndarray:
    """(5, 12, 16) bool: the outermost voxels on one side of the patient."""
    opposite = dict(zip("LRPASI", "RLAPIS", strict=True))[towards]
    axis = next(n for n, letter in enumerate(letters) if letter in (towards, opposite))
    mask = np.zeros(SHAPE, bool)
    np.moveaxis(mask, axis, 0)[-1 if letters[axis] == towards else 0] = True
    return mask


@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -15, 30)], ids=["straight", "oblique"])
@pytest.mark.parametrize("letters", GRIDS.values(), ids=GRIDS)
def test_slices_are_shown_as_radiologists_look_at_them(letters, angles):
    image = Image("x", np.zeros(SHAPE), affine_of(letters, angles=angles))
    head, left, back = (end(letters, towards) for towards in "SLP")
    axial, coronal, sagittal = (upright(image, axis) for axis in SLICE_AXES)
    assert axial.apply(head)[-1].all()  # slices run to the head
    assert axial.apply(back)[:, -1].all()  # back down
    assert axial.apply(left)[:, :, -1].all()  # patient's left at the right
    assert coronal.apply(back)[-1].all()
    assert coronal.apply(head)[:, 0].all()  # head up
    assert coronal.apply(left)[:, :, -1].all()
    assert sagittal.apply(left)[-1].all()
    assert sagittal.apply(head)[:, 0].all()
    assert sagittal.apply(back)[:, :, -1].all()  # back at the right


def test_an_axial_dicom_series_is_upright_as_it_is():
    image = Image("x", np.zeros(SHAPE), affine_of("SPL"))
    assert upright(image, "axial") == Orientation((0, 1, 2), (False, False, False))


def test_a_nifti_in_ras_is_turned_by_half_in_its_plane():
    image = Image("x", np.arange(np.prod(SHAPE)).reshape(SHAPE), affine_of("SAR"))
    assert np.array_equal(upright(image, "axial").apply(image.values), image.values[:, ::-1, ::-1])


def test_a_picture_stays_as_it_is():
    image = Image("x.png", np.zeros((1, 12, 16, 3)))
    for axis in SLICE_AXES:
        assert upright(image, axis) == Orientation((0, 1, 2), (False, False, False))


@pytest.mark.parametrize("asked", SLICE_AXES)
def test_a_single_slice_is_cut_along_itself(asked):
    """A coronal slice of 12 x 16 whose rows run to the feet and columns to the left: as it is."""
    image = Image("x", np.zeros((1, 12, 16)), affine_of("PIL"))
    assert upright(image, asked).apply(image.values).shape == (1, 12, 16)
    assert upright(image, asked).flips == (False, False, False)


def test_another_slice_axis_is_refused():
    with pytest.raises(ValueError, match=r"slice_axis: 'transverse' is not one of axial, coronal, sagittal\.$"):
        upright(Image("x", np.zeros(SHAPE)), "transverse")


@pytest.mark.parametrize("axis", SLICE_AXES)
@pytest.mark.parametrize("letters", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_turning_upright_and_back_changes_nothing_and_copies_nothing(letters, axis, channels):
    values = np.arange(np.prod(SHAPE + channels)).reshape(SHAPE + channels)
    orientation = upright(Image("x", values, affine_of(letters)), axis)
    there = orientation.apply(values)
    back = orientation.invert(there)
    assert np.array_equal(back, values)
    assert np.shares_memory(there, values)
    assert np.shares_memory(back, values)


@pytest.mark.parametrize("other", SLICE_AXES)
@pytest.mark.parametrize("axis", SLICE_AXES)
@pytest.mark.parametrize("letters", GRIDS.values(), ids=GRIDS)
def test_slices_turned_from_one_axis_to_another_are_those_cut_along_the_other(letters, axis, other):
    image = Image("x", np.arange(np.prod(SHAPE)).reshape(SHAPE), affine_of(letters))
    turned = turn(axis, other).apply(upright(image, axis).apply(image.values))
    assert np.array_equal(turned, upright(image, other).apply(image.values))


def test_spacing_follows_the_array_axes():
    assert spacing(affine_of("PIL", (3, 0.8, 0.7), angles=(20, -15, 30))) == pytest.approx((3, 0.8, 0.7))
    assert spacing(None) == (1, 1, 1)


@pytest.mark.parametrize(
    ("letters", "sizes", "axis"),
    [
        ("SPL", (3, 0.8, 0.7), "axial"),
        ("PIL", (3, 0.8, 0.7), "coronal"),
        ("LIP", (3, 0.8, 0.7), "sagittal"),
        ("SPL", (0.8, 3, 0.7), "coronal"),
        ("PIL", (1, 1, 1), "axial"),
        ("PIL", (1.4, 1, 1), "axial"),
        ("PIL", (1.6, 1, 1), "coronal"),
        ("PIL", (3, 3, 0.7), "axial"),
    ],
)
def test_volumes_are_cut_along_the_axis_they_were_acquired_along(letters, sizes, axis):
    image = Image("x", np.zeros(SHAPE), affine_of(letters, sizes, angles=(10, -5, 15)))
    assert choose_slice_axis(image) == axis


def test_pictures_count_as_axial():
    assert choose_slice_axis(Image("x.png", np.zeros((1, 12, 16)))) == "axial"


def blobs(shape=SHAPE) -> np.ndarray:
    """An index map of two boxes that touch neither border nor each other's mirror image."""
    values = np.zeros(shape, np.uint8)
    values[1:3, 2:6, 3:9] = 1
    values[3, 7:11, 5:14] = 2
    return values


def test_a_label_on_its_image_s_grid_is_kept_as_it_is():
    label = Label("y", blobs(), affine_of("SPL"))
    assert label.on(Image("x", np.zeros(SHAPE), affine_of("SPL"))) is label


def test_headers_rounded_to_five_digits_are_the_same_grid():
    exact = affine_of("SPL", angles=(20, -15, 30))
    label = Label("y", blobs(), np.round(exact, 5))
    assert label.on(Image("x", np.zeros(SHAPE), exact)) is label


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_a_flipped_label_is_flipped_back_without_loss(axes):
    affine = affine_of("SPL", angles=(20, -15, 30))
    flipped = affine.copy()
    for axis in axes:
        flipped[:3, 3] += affine[:3, axis] * (SHAPE[axis] - 1)
        flipped[:3, axis] *= -1
    label = Label("y", np.flip(blobs(), axes), flipped).on(Image("x", np.zeros(SHAPE), affine))
    assert np.array_equal(label.values, blobs())
    assert np.array_equal(label.affine, affine)
    assert len(label.notes) == 1
    assert "(5, 12, 16) lies on another grid than its image of (5, 12, 16): axes reordered" in label.notes[0]


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_permuted_axes_are_put_back_without_loss(order):
    affine = affine_of("SPL", angles=(20, -15, 30))
    label = Label("y", blobs().transpose(order), affine[:, [*order, 3]])
    moved = label.on(Image("x", np.zeros(SHAPE), affine))
    assert np.array_equal(moved.values, blobs())
    assert moved.notes[0].endswith("axes reordered, voxel by voxel")


def test_a_cropped_label_is_padded_with_background():
    affine = affine_of("SPL", angles=(20, -15, 30))
    cropped = affine.copy()
    cropped[:3, 3] = (affine @ (1, 2, 3, 1))[:3]
    label = Label("y", blobs()[1:, 2:, 3:], cropped)
    assert np.array_equal(label.on(Image("x", np.zeros(SHAPE), affine)).values, blobs())


def test_masks_by_name_move_as_index_maps_do():
    affine = affine_of("SPL")
    label = Label(
        "y",
        {"liver": blobs().transpose(1, 0, 2) == 1, "spleen": blobs().transpose(1, 0, 2) == 2},
        affine[:, [1, 0, 2, 3]],
    )
    moved = label.on(Image("x", np.zeros(SHAPE), affine))
    assert moved.values["spleen"].dtype == bool
    assert np.array_equal(moved.values["liver"], blobs() == 1)
    assert np.array_equal(moved.values["spleen"], blobs() == 2)


def to_itk(values: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    matrix = affine[:3, [2, 1, 0]]  # columns for i, j, k
    sizes = np.linalg.norm(matrix, axis=0)
    image.SetSpacing(sizes)
    image.SetDirection((matrix / sizes).ravel())
    image.SetOrigin(affine[:3, 3])
    return image


@pytest.mark.parametrize("angles", [(0, 0, 0), (7, -5, 30)], ids=["straight", "oblique"])
def test_a_label_of_another_spacing_equals_itk_s_nearest_neighbour(angles):
    shape = (20, 40, 48)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    ball = (((z - 9) / 7) ** 2 + ((y - 18) / 13) ** 2 + ((x - 25) / 15) ** 2 < 1).astype(np.uint8)
    ball[8:12, 16:20, 20:30] = 2
    label = Label("y", ball, affine_of("SPL", (1.7, 1.1, 1.3), (-90.31, 40.17, 12.73), angles))
    image = Image("x", np.zeros((15, 50, 60)), affine_of("SPL", (3, 0.8, 0.7)))
    theirs = sitk.Resample(
        to_itk(label.values, label.affine),
        to_itk(image.values, image.affine),
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
    )
    moved = label.on(image)
    assert moved.counts().keys() == {1, 2}
    assert np.array_equal(moved.values, sitk.GetArrayFromImage(theirs))
    assert moved.notes[0].endswith(
        "(20, 40, 48) lies on another grid than its image of (15, 50, 60): resampled by nearest neighbour"
    )


@pytest.mark.parametrize(
    ("sizes", "origin"), [((3, 1, 1), (0.4, 0, 0)), ((3, 0.5, 0.5), (0, 0, 0))], ids=["shifted", "twice as fine"]
)
def test_a_label_between_the_voxels_is_called_resampled(sizes, origin):
    shape = (5, 64, 64)
    label = Label("y", np.ones(shape, np.uint8), affine_of("SPL", sizes, origin))
    moved = label.on(Image("x", np.zeros(shape), affine_of("SPL", (3, 1, 1), (0, 0, 0))))
    assert moved.notes[0].endswith("resampled by nearest neighbour")


def test_a_label_on_a_sheared_grid_is_found_voxel_by_voxel():
    """ITK refuses a tilted gantry's grid; every voxel of the image looks up its nearest voxel of the label."""
    tilted = affine_of("SPL", (3, 1.1, 0.9), (-3.3, -2.2, 0.1))
    tilted[1, 0] = 0.8
    image = Image("x", np.zeros((6, 10, 14)), affine_of("SPL", (2.9, 1, 1), (-2, -2, 0)))
    label = Label("y", np.arange(1, 961, dtype=np.int16).reshape(SHAPE), tilted)
    expected = np.zeros(image.shape, np.int16)
    for index in np.ndindex(image.shape):
        nearest = np.rint(np.linalg.solve(tilted, image.affine @ (*index, 1)))[:3].astype(int)
        if (nearest >= 0).all() and (nearest < SHAPE).all():
            expected[index] = label.values[tuple(nearest)]
    assert np.array_equal(label.on(image).values, expected)


def test_a_label_elsewhere_is_refused():
    label = Label("y.nii", blobs(), affine_of("SPL", origin=(500, 0, 0)))
    with pytest.raises(
        ValueError, match=r"^y\.nii: the label does not overlap its image x\.nii; check that they pair\.$"
    ):
        label.on(Image("x.nii", np.zeros(SHAPE), affine_of("SPL")))


def test_without_geometry_the_shape_decides():
    label = Label("y.png", blobs()[:1])
    assert label.on(Image("x.png", np.zeros((1, 12, 16, 3)))) is label
    assert label.on(Image("x.nii", np.zeros((1, 12, 16)), affine_of("SPL"))) is label
    with pytest.raises(ValueError, match=r"^y\.png: label has shape \(12, 16\), its image \(16, 12\); export"):
        label.on(Image("x.png", np.zeros((1, 16, 12, 3))))


def test_on_an_image_that_does_not_say_where_it_lies_the_shape_decides_too():
    image = Image("x.nii", np.zeros(SHAPE), affine_of("SPL", origin=(0, 0, 0)), placed=False)
    label = Label("y.nii", blobs(), affine_of("SAR", origin=(500, 40, 12))).on(image)
    assert np.array_equal(label.values, blobs())
    assert np.array_equal(label.affine, image.affine)
    assert label.notes == ("the image does not say where it lies: the label is laid on it by its shape",)
    with pytest.raises(ValueError, match=r"^y\.nii: label has shape \(4, 12, 16\), its image \(5, 12, 16\); export"):
        Label("y.nii", blobs()[1:], affine_of("SPL")).on(image)


@pytest.mark.parametrize("letters", ["SPL", "SAR", "PIL"])
@pytest.mark.parametrize("missing", [(7,), (3, 4, 5)])
def test_a_label_is_exact_on_every_slice_of_an_image_with_gaps(letters, missing):
    """Slices of 20 every 2 mm, some of which the image lacks; the label has all."""
    even = affine_of("SPL", (2, 1, 1))
    kept = [d for d in range(20) if d not in missing]
    origins = np.array([(even @ (d, 0, 0, 1))[:3] for d in kept])
    mean = even.copy()
    mean[:3, 0] = (origins[-1] - origins[0]) / (len(kept) - 1)
    image = Image("x", np.zeros((len(kept), 6, 7)), mean, origins=origins)
    whole = np.random.default_rng(0).integers(0, 3, (20, 6, 7)).astype(np.uint8)
    to_file = np.linalg.inv(affine_of(letters, (1, 1, 1), (0, 0, 0))) @ even  # the label in the order of another file
    order = [int(np.flatnonzero(row)[0]) for row in np.round(to_file[:3, :3])]
    flipped = [axis for axis in range(3) if to_file[axis, order[axis]] < 0]
    stored = np.flip(whole.transpose(order), flipped)
    affine = even[:, [*order, 3]].copy()
    for axis in flipped:
        affine[:3, 3] += affine[:3, axis] * (stored.shape[axis] - 1)
        affine[:3, axis] *= -1
    label = Label("y", stored, affine).on(image)
    assert np.array_equal(label.values, whole[kept])
    assert label.notes[0].endswith("resampled by nearest neighbour, slice by slice")
    assert len(label.notes) == 1


def test_masks_by_name_are_exact_on_slices_with_gaps_too():
    even = affine_of("SPL", (2, 1, 1), (0, 0, 0))
    masks = np.random.default_rng(1).random((4, 6, 7)) < 0.5
    mean = affine_of("SPL", (3, 1, 1), (0, 0, 0))
    image = Image("x", np.zeros((3, 6, 7)), mean, origins=np.array([(0, 0, z) for z in (0, 4, 6)], float))
    label = Label("y", {"a": masks}, even, parts={"a_1": masks}).on(image)
    assert np.array_equal(label.mask(["a"]), masks[[0, 2, 3]])
    assert np.array_equal(label.mask(["a_1"]), masks[[0, 2, 3]])


def test_a_label_drawn_on_the_evenly_stacked_image_follows_its_slices():
    """As of a series with gaps that another program converted to NIfTI: slices of the mean step, rows reversed."""
    mean = affine_of("SPL", (3, 1, 1), (0, 0, 0))
    image = Image("x", np.zeros((3, 6, 7)), mean, origins=np.array([(0, 0, z) for z in (0, 4, 6)], float))
    drawn = np.random.default_rng(1).integers(0, 3, (3, 6, 7)).astype(np.uint8)
    label = Label("y", drawn[:, ::-1], affine_of("SAL", (3, 1, 1), (0, 5, 0))).on(image)
    assert np.array_equal(label.values, drawn)
    assert label.notes[0].endswith("axes reordered, voxel by voxel")


def test_what_is_cut_off_and_what_vanishes_is_said():
    """Of 4 slices of 1 mm with 10 voxels each, an image of two slices of 2 mm holds 0 and 2, one of 1 mm 0 and 1."""
    values = np.zeros((4, 6, 7), np.uint8)
    values[:, 1, :5] = values[:, 2, :5] = 1
    values[1, 4, 4] = 2  # between the slices of the image
    image = Image("x", np.zeros((2, 6, 7)), affine_of("SPL", (2, 1, 1), (0, 0, 0)))
    label = Label("y", values, affine_of("SPL", (1, 1, 1), (0, 0, 0))).on(image)
    assert label.counts() == {1: 20}
    assert label.notes[1:] == ("nothing of 2 in the label lands on the image's voxels",)
    cut = Image("x", np.zeros((2, 6, 7)), affine_of("SPL", (1, 1, 1), (0, 0, 0)))
    moved = Label("y", values, affine_of("SPL", (1, 1, 1), (0, 0, 0))).on(cut)
    assert moved.counts() == {1: 20, 2: 1}
    assert moved.notes[1:] == ("49% of the label lie outside its image: cut off",)  # 20 of 41 voxels


def test_a_label_that_falls_between_coarse_voxels_is_refused_for_that():
    values = np.zeros((9, 6, 7), np.uint8)
    values[2, 3, 3] = 1  # 2 mm; the image has slices at 0 and 5 mm
    label = Label("y", values, affine_of("SPL", (1, 1, 1), (0, 0, 0)))
    with pytest.raises(ValueError, match=r"^y: nothing of the label lands on the coarser grid of its image x; draw it"):
        label.on(Image("x", np.zeros((2, 6, 7)), affine_of("SPL", (5, 1, 1), (0, 0, 0))))


@pytest.mark.parametrize("angles", [(0, 0, 0), (0, 0, 30)])
def test_an_empty_label_must_lie_on_its_image_as_well(angles):
    image = Image("x", np.zeros(SHAPE), affine_of("SPL"))
    empty = Label("y", np.zeros((4, 9, 9), np.uint8), affine_of("SPL", angles=angles))
    assert empty.on(image).counts() == {}
    far = Label("y", np.zeros((4, 9, 9), np.uint8), affine_of("SPL", origin=(-90, 40, 200), angles=angles))
    with pytest.raises(ValueError, match="the label does not overlap its image x; check that they pair"):
        far.on(image)


def test_labels_count_and_select_by_value_or_name():
    index, named = (
        Label("y", blobs()),
        Label("y", {"liver": blobs() == 1, "spleen": blobs() == 2, "none": blobs() == 9}),
    )
    assert index.counts() == {1: 2 * 4 * 6, 2: 4 * 9}
    assert named.counts() == {"liver": 2 * 4 * 6, "spleen": 4 * 9}
    assert np.array_equal(index.mask([2, 7]), blobs() == 2)
    assert np.array_equal(named.mask(["spleen", "kidney"]), blobs() == 2)
    assert not named.mask(["kidney"]).any()
    assert np.array_equal(named.mask(["liver", "spleen"]), blobs() > 0)


def test_a_real_nifti_label_with_flipped_rows_lies_on_its_dicom_series_as_itk_puts_it(real_data):
    files = sorted(str(p) for p in (real_data / "dicom_totalseg_ct" / "image").iterdir())
    files.sort(key=lambda file: float(sitk_position(file)))
    ct = sitk.ReadImage(files)
    path = real_data / "dicom_totalseg_ct" / "label" / "example_seg_dicom.nii.gz"
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(ct.GetDirection()).reshape(3, 3) * ct.GetSpacing()
    matrix[:3, 3] = ct.GetOrigin()
    image = Image("ct", sitk.GetArrayFromImage(ct), matrix[:, [2, 1, 0, 3]])
    label = read_label_volume(path, "index")
    moved = label.on(image)
    theirs = sitk.Resample(sitk.ReadImage(str(path)), ct, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert np.array_equal(moved.values, sitk.GetArrayFromImage(theirs))
    assert moved.counts() == label.counts()
    assert moved.notes[0].endswith("axes reordered, voxel by voxel")


def sitk_position(file: str) -> str:
    """z of ImagePositionPatient; the series is axial."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader.GetMetaData("0020|0032").split("\\")[2]
