"""Volumes: the voxels and places that the file means, or one line that says why not."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from blosam_monai.data.readers.volumes import is_volume, read_label_volume, read_volume

SIZE = (16, 12, 5)  # i, j, k


def voxels(dtype="int16", size=SIZE) -> np.ndarray:
    """(16, 12, 5) where i, j, k are told by the digits: 1 + i + 100 j + 1000 k, up to 5116."""
    i, j, k = np.ogrid[: size[0], : size[1], : size[2]]
    return (1 + i + 100 * j + 1000 * k).astype(dtype)


def save_nifti(path: Path, values: np.ndarray, affine=None, *, header=None, kind=nibabel.Nifti1Image) -> Path:
    kind(values, np.diag([1.5, 2, 4, 1]) if affine is None else affine, header).to_filename(path)
    return path


def oblique(scale=(0.7, 0.8, 3), angles=(20, -15, 30)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scale
    affine[:3, 3] = (-90, 40, 12.5)
    return affine


def edit_header(path: Path, **fields) -> Path:
    """Overwrite fields of an uncompressed NIfTI-1 file, as it lies on disk."""
    raw = bytearray(path.read_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.NII.GZ", "a.nrrd", "a.nhdr", "a.mha", "a.b.mhd"])
def test_volumes_are_told_by_their_suffix(name):
    assert is_volume(name)
    assert not is_volume(name + ".png")


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "NII.GZ"])
def test_a_nifti_array_is_indexed_k_j_i(tmp_path, suffix):
    image = read_volume(save_nifti(tmp_path / f"x.{suffix}", voxels()))
    assert image.shape == (5, 12, 16)
    assert image.values[3, 11, 7] == 1 + 7 + 1100 + 3000
    assert image.files == ()


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 1, 1, 1]),
        np.diag([-1.5, -2, 4, 1]),
        np.diag([-1.5, 2, 4, 1]),
        np.diag([1.5, 2, -4, 1])[:, [1, 2, 0, 3]],
        oblique(),
        oblique((-0.7, 0.8, 3)),
    ],
    ids=["RAS", "LPS", "LAS", "permuted", "oblique", "oblique, negative determinant"],
)
def test_a_nifti_voxel_lies_where_itk_sees_it(tmp_path, affine):
    path = save_nifti(tmp_path / "x.nii", voxels(), affine)
    theirs = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint((7, 11, 3))
    assert np.allclose(read_volume(path).affine @ (3, 11, 7, 1), (*theirs, 1), atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_integers_that_no_slope_scales_stay_as_stored(tmp_path, dtype):
    values = (voxels("int64") % 100).astype(dtype)
    image = read_volume(save_nifti(tmp_path / "x.nii", values))
    assert image.values.dtype == dtype
    assert np.array_equal(image.values, values.T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_come_out_in_single_precision(tmp_path, dtype):
    image = read_volume(save_nifti(tmp_path / "x.nii", voxels(dtype) / 8))
    assert image.values.dtype == np.float32
    assert image.values[3, 11, 7] == 4108 / 8


@pytest.mark.parametrize(("slope", "inter"), [(2.0, -1024.0), (1.0, -1024.0), (0.5, 0.0)])
def test_slope_and_intercept_are_applied_once(tmp_path, slope, inter):
    path = edit_header(save_nifti(tmp_path / "x.nii", voxels()), scl_slope=slope, scl_inter=inter)
    image = read_volume(path)
    assert image.values.dtype == np.float32
    assert image.values[3, 11, 7] == 4108 * slope + inter


def test_values_do_not_change_with_the_file(tmp_path):
    """A map of the file into memory would, and crash where a network drive goes away."""
    path = save_nifti(tmp_path / "x.nii", voxels())
    image = read_volume(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert np.array_equal(image.values, voxels().T)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_a_slope_of_0_or_nan_scales_nothing(tmp_path, slope):
    """NIfTI-1 standard, scl_slope: "if nonzero"; files in the wild say NaN."""
    path = edit_header(save_nifti(tmp_path / "x.nii", voxels()), scl_slope=slope, scl_inter=7)
    assert read_volume(path).values[3, 11, 7] == 4108


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_byte_orders_and_versions_read_alike(tmp_path, endian, kind):
    header = kind.header_class(endianness=endian)
    header.set_data_dtype("int16")
    image = read_volume(save_nifti(tmp_path / "x.nii.gz", voxels(), header=header, kind=kind))
    assert image.values.dtype == np.dtype("=i2")
    assert image.values.dtype.isnative
    assert np.array_equal(image.values, voxels().T)


@pytest.mark.parametrize("size", [(16, 12), (16, 12, 1), (16, 12, 1, 1), (16, 12, 5, 1), (16, 12, 5, 1, 1)])
def test_axes_of_length_1_do_not_matter(tmp_path, size):
    values = np.arange(1, np.prod(size) + 1, dtype=np.int16).reshape(size)
    image = read_volume(save_nifti(tmp_path / "x.nii", values))
    assert image.shape == ((*size, 1)[2], 12, 16)
    assert image.values[0, 11, 7] == values[(7, 11, *[0] * (len(size) - 2))]


def test_the_sform_beats_the_qform(tmp_path):
    """nibabel's rule, and FSL's: the sform where it has a code."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(SIZE)
    header.set_qform(np.diag([1.0, 1, 1, 1]), 1)
    header.set_sform(np.diag([3.0, 3, 3, 1]), 2)
    path = save_nifti(tmp_path / "x.nii", voxels(), np.diag([3.0, 3, 3, 1]), header=header)
    assert read_volume(path).affine[0, 2] == -3
    edit_header(path, sform_code=0)
    assert read_volume(path).affine[0, 2] == -1


def test_a_file_without_orientation_gives_voxel_sizes_and_says_so(tmp_path):
    path = edit_header(save_nifti(tmp_path / "x.nii", voxels()), qform_code=0, sform_code=0)
    image = read_volume(path)
    assert np.allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (4, 2, 1.5))
    assert image.notes == ("no geometry: voxel sizes only",)


def test_only_an_image_with_orientation_says_where_it_lies(tmp_path):
    path = save_nifti(tmp_path / "x.nii", voxels())
    assert read_volume(path).placed
    assert not read_volume(edit_header(path, qform_code=0, sform_code=0)).placed


def test_a_real_label_fits_its_image_also_without_the_image_s_orientation(real_data, tmp_path):
    root = real_data / "msd_hippocampus"
    stored = nibabel.load(root / "imagesTr" / "hippocampus_001.nii.gz")
    path = tmp_path / "image.nii"
    nibabel.save(stored, path)
    image = read_volume(edit_header(path, qform_code=0, sform_code=0))
    label = read_label_volume(root / "labelsTr" / "hippocampus_001.nii.gz", "index").on(image)
    expected = np.asarray(nibabel.load(root / "labelsTr" / "hippocampus_001.nii.gz").dataobj).T
    assert np.array_equal(label.values, expected)


def test_a_label_without_orientation_has_no_affine(tmp_path):
    path = edit_header(save_nifti(tmp_path / "x.nii", voxels()), qform_code=0, sform_code=0)
    assert read_label_volume(path, "index").affine is None


@pytest.mark.parametrize(("code", "mm"), [(0, 1), (1, 1000), (2, 1), (10, 1), (3, 0.001)])
def test_lengths_are_in_mm_whatever_the_units_of_the_file(tmp_path, code, mm):
    image = read_volume(edit_header(save_nifti(tmp_path / "x.nii", voxels()), xyzt_units=code))
    assert np.allclose(np.linalg.norm(image.affine[:3, :3], axis=0), np.array([4, 2, 1.5]) * mm)
    assert bool(image.notes) == (mm != 1)


def test_nan_and_infinity_become_the_minimum_and_are_counted(tmp_path):
    values = voxels("float32")
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    image = read_volume(save_nifti(tmp_path / "x.nii", values))
    assert image.values[:3, 0, 0].tolist() == [2, 2, 2]  # 1 was at (0, 0, 0)
    assert image.notes == ("3 voxels are NaN or infinite: read as the minimum, 2",)


@pytest.mark.parametrize("value", [7.0, np.nan])
def test_an_image_of_one_value_is_refused(tmp_path, value):
    path = save_nifti(tmp_path / "x.nii", np.full(SIZE, value, np.float32))
    with pytest.raises(ValueError, match=r"x\.nii: every voxel has the same value; repair or leave out the image\.$"):
        read_volume(path)


RGB24 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
RGBA32 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros(SIZE, RGB24), "is an RGB24 NIfTI, one colour a voxel; export scalar images"),
        (np.zeros(SIZE, RGBA32), "is an RGBA32 NIfTI, one colour a voxel; export scalar images"),
        (np.zeros(SIZE, np.complex64), "holds complex numbers; export the magnitude"),
        (np.zeros((16, 12, 5, 3), np.int16), r"has shape \(16, 12, 5, 3\), a series of volumes"),
        (np.zeros((16, 12, 5, 1, 3), np.int16), r"has shape \(16, 12, 5, 1, 3\), a series of volumes"),
        (np.zeros(16, np.int16), r"has shape \(16,\), no picture or volume"),
    ],
    ids=["RGB", "RGBA", "complex", "time", "vectors", "one dimension"],
)
def test_what_is_not_one_volume_of_numbers_is_refused_by_name(tmp_path, values, said):
    path = save_nifti(tmp_path / "x.nii.gz", values)
    with pytest.raises(ValueError, match=rf"^\S*x\.nii\.gz: {said}"):
        read_volume(path)


def damaged(folder: Path, kind: str) -> Path:
    """A file that cannot be read."""
    path = folder / f"x{kind.split(' ')[-1]}"
    noise = np.random.default_rng(0).integers(0, 1000, SIZE).astype(np.int16)
    if kind.startswith("folder"):
        path.mkdir()
    elif kind.startswith("empty"):
        path.touch()
    elif kind.startswith("text"):
        path.write_bytes(b"no volume here\n" * 100)
    elif kind.startswith("not gzip"):
        path.write_bytes(b"plain" * 100)
    elif "nii" in kind:
        save_nifti(path, noise)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(noise), str(path))
    if kind.startswith("truncated"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind.startswith("header only"):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:352]))
    if kind.startswith("flat"):
        edit_header(path, sform_code=1, srow_x=0)
    return path


KINDS = [f"{what} {suffix}" for what in ("folder", "empty", "text") for suffix in (".nii", ".nii.gz", ".nrrd", ".mha")]
KINDS += ["truncated .nii", "truncated .nii.gz", "truncated .nrrd", "truncated .mha"]
KINDS += ["not gzip .nii.gz", "header only .nii.gz", "flat .nii"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_volume, lambda path: read_label_volume(path, "index")], ids=["image", "label"])
def test_a_damaged_file_gives_one_line_that_names_it(tmp_path, capfd, read, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"^{path}: .*\.$") as error:
        read(path)
    assert not any(word in str(error.value) for word in ("\n", "Success", "0x"))
    assert len(str(error.value)) < 250 + len(str(path))


def save_itk(path: Path, values: np.ndarray, *, is_vector=False) -> sitk.Image:
    """Oblique, anisotropic, off the origin; (k, j, i) or (j, i)."""
    image = sitk.GetImageFromArray(values, isVector=is_vector)
    n = image.GetDimension()
    turn = Rotation.from_euler("xyz", (20, -15, 30) if n == 3 else (0, 0, 30), degrees=True).as_matrix()
    image.SetDirection(turn[:n, :n].ravel())
    image.SetSpacing((0.7, 0.8, 3, 1)[:n])
    image.SetOrigin((-90, 40, 12.5, 0)[:n])
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_nrrd_and_metaimage_lie_where_itk_sees_them(tmp_path, suffix):
    theirs = save_itk(tmp_path / f"x.{suffix}", voxels().T)
    image = read_volume(tmp_path / f"x.{suffix}")
    assert image.values.dtype == np.int16
    assert image.values[3, 11, 7] == 4108
    assert np.allclose(image.affine @ (3, 11, 7, 1), (*theirs.TransformIndexToPhysicalPoint((7, 11, 3)), 1))


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_a_picture_in_nrrd_or_metaimage_is_one_slice(tmp_path, suffix):
    theirs = save_itk(tmp_path / f"x.{suffix}", voxels()[..., 3].T)
    image = read_volume(tmp_path / f"x.{suffix}")
    assert image.shape == (1, 12, 16)
    assert np.allclose((image.affine @ (0, 11, 7, 1))[:2], theirs.TransformIndexToPhysicalPoint((7, 11)))


def test_a_nrrd_in_ras_is_turned_to_lps(tmp_path):
    """NRRD, "space: RAS": the first two world axes point the other way."""
    head = "NRRD0004\ntype: uint8\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 2 2\nencoding: raw\n"
    head += "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + bytes(range(8)))
    image = read_volume(tmp_path / "x.nrrd")
    assert np.allclose(image.affine @ (1, 1, 1, 1), (-12, -23, 34, 1))
    assert image.notes == ()


def test_a_nrrd_without_a_space_is_known_to_have_voxel_sizes_only(tmp_path):
    head = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nspacings: 1 2 3\nencoding: raw\n\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + bytes(range(8)))
    image = read_volume(tmp_path / "x.nrrd")
    assert np.allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (3, 2, 1))
    assert image.notes == ("no geometry: voxel sizes only",)
    assert read_label_volume(tmp_path / "x.nrrd", "index").affine is None


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_three_channels_of_8_bits_are_colours(tmp_path, suffix):
    colours = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3)).astype(np.uint8)
    save_itk(tmp_path / f"x.{suffix}", colours, is_vector=True)
    image = read_volume(tmp_path / f"x.{suffix}")
    assert image.shape == (5, 12, 16)
    assert image.full_range == (0, 255)
    assert np.array_equal(image.values, colours)


@pytest.mark.parametrize(
    ("values", "is_vector", "said"),
    [
        (np.zeros((5, 12, 16, 2), np.uint8), True, "has 2 channels .*export one volume a file"),
        (np.zeros((5, 12, 16, 3), np.int16), True, "has 3 channels .*export one volume a file"),
        (np.zeros((2, 5, 12, 16), np.int16), False, r"has size \(16, 12, 5, 2\), a series of volumes"),
        (np.zeros((5, 12, 16), np.complex64), False, "holds complex numbers; export the magnitude"),
    ],
    ids=["two channels", "displacements", "time", "complex"],
)
def test_other_channels_and_dimensions_are_refused(tmp_path, values, is_vector, said):
    image = sitk.GetImageFromArray(values, isVector=is_vector)
    sitk.WriteImage(image, str(tmp_path / "x.nrrd"))
    with pytest.raises(ValueError, match=rf"x\.nrrd: {said}"):
        read_volume(tmp_path / "x.nrrd")


@pytest.mark.parametrize("layers", [1, 2])
def test_a_slicer_segmentation_is_read_unless_it_has_layers(tmp_path, layers):
    image = sitk.GetImageFromArray(np.ones((5, 12, 16, layers), np.uint8), isVector=True)
    image = image if layers > 1 else sitk.VectorIndexSelectionCast(image, 0)
    image.SetMetaData("Segment0_ID", "Segment_1")
    sitk.WriteImage(image, str(tmp_path / "x.seg.nrrd"))
    if layers == 1:
        assert read_label_volume(tmp_path / "x.seg.nrrd", "index").counts() == {1: 5 * 12 * 16}
    else:
        with pytest.raises(ValueError, match="overlapping segments in layers; export it from 3D Slicer as a label map"):
            read_label_volume(tmp_path / "x.seg.nrrd", "index")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_an_index_label_holds_whole_numbers_whatever_the_type(tmp_path, dtype):
    values = (voxels("int64") % 7).astype(dtype)
    noise = 9e-4 * (values > 3) if np.issubdtype(dtype, np.floating) else 0
    label = read_label_volume(save_nifti(tmp_path / "x.nii.gz", (values - noise).astype(dtype)), "index")
    assert np.issubdtype(label.values.dtype, np.integer)
    assert np.array_equal(label.values, values.T)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, r"has fractional values \(up to 0\.5 from a whole number\); .*label_coding to threshold\.$"),
        (1.002, r"has fractional values \(up to 0\.002 "),
        (np.nan, "holds NaN or infinite values; export"),
        (1e10, r"has values up to 1e\+10; export"),
    ],
)
def test_a_label_without_whole_numbers_is_refused(tmp_path, value, said):
    values = np.zeros(SIZE, np.float32)
    values[3, 4, 2] = value
    with pytest.raises(ValueError, match=rf"x\.nii: the label {said}"):
        read_label_volume(save_nifti(tmp_path / "x.nii", values), "index")


@pytest.mark.parametrize(("dtype", "top"), [("uint8", 255), ("uint8", 1), ("float32", 0.9), ("int16", 1000)])
def test_threshold_takes_what_is_above_half_of_the_maximum(tmp_path, dtype, top):
    values = np.zeros(SIZE, dtype)
    values[2:5, 3:7, 1] = top
    values[8, 8, 2] = np.dtype(dtype).type(top / 3)
    label = read_label_volume(save_nifti(tmp_path / "x.nii", values), "threshold")
    assert label.values.dtype == np.uint8
    assert label.counts() == {1: 12}


def test_an_empty_mask_stays_empty_at_the_threshold(tmp_path):
    assert read_label_volume(save_nifti(tmp_path / "x.nii", np.zeros(SIZE, np.uint8)), "threshold").counts() == {}


def test_colours_are_refused_in_label_volumes(tmp_path):
    path = save_nifti(tmp_path / "x.nii", voxels())
    with pytest.raises(ValueError, match=r"label_coding 'colour' does not fit a volume; use 'index' or 'threshold'\.$"):
        read_label_volume(path, "colour")
    save_itk(tmp_path / "x.mha", np.zeros((5, 12, 16, 3), np.uint8), is_vector=True)
    with pytest.raises(ValueError, match="the label has colours; export a map of class numbers"):
        read_label_volume(tmp_path / "x.mha", "index")


def test_real_volumes_equal_what_itk_reads(real_data):
    for name in ("imagesTr/example_ct_sm.nii.gz", "imagesTr/example_mr_sm.nii.gz"):
        path = real_data / "totalseg_ct_mr_nifti" / name
        image, theirs = read_volume(path), sitk.ReadImage(str(path))
        assert np.array_equal(image.values, sitk.GetArrayFromImage(theirs))
        assert np.allclose(
            (image.affine @ (9, 8, 7, 1))[:3], theirs.TransformIndexToPhysicalPoint((7, 8, 9)), atol=1e-3
        )


def test_a_real_float_label_is_read_as_whole_numbers(real_data):
    path = real_data / "msd_hippocampus" / "labelsTr" / "hippocampus_243.nii.gz"
    counts = read_label_volume(path, "index").counts()
    stored = np.asarray(nibabel.load(path).dataobj)
    assert stored.dtype.kind == "f"
    assert counts == {1: int((stored == 1).sum()), 2: int((stored == 2).sum())}


def test_the_real_rgb_nifti_is_refused_by_name(real_data):
    with pytest.raises(ValueError, match=r"rgb_test_file\.nii\.gz: is an RGB24 NIfTI"):
        read_volume(real_data / "format_png_tif_variants" / "rgb_test_file.nii.gz")
