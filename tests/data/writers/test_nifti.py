"""NIfTI out: the header that came in, bit by bit, and nothing about the patient."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from blosam_monai.data.geometry import Image
from blosam_monai.data.readers.volumes import read_label_volume, read_volume
from blosam_monai.data.writers.nifti import write_nifti

SIZE = (16, 12, 5)  # i, j, k
# Header fields that say what grid the voxels lie on; NIfTI-1 and NIfTI-2 have them all.
GRID_FIELDS = ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x")
GRID_FIELDS += ("qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units", "dim_info", "slice_code")


def turned(scale, angles=(0, 0, 0), origin=(-90, 40, 12.5)) -> np.ndarray:
    """Affine (i, j, k) -> RAS: scaled, then turned about x, y, z by degrees, then moved."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scale
    affine[:3, 3] = origin
    return affine


def permuted(order, signs=(1, 1, 1)) -> np.ndarray:
    return (
        (np.diag([*(np.array([0.7, 0.8, 3]) * signs), 1]))[:, [*order, 3]] + turned((0, 0, 0)) - np.diag([0, 0, 0, 1])
    )


def sheared(tilt=0.3) -> np.ndarray:
    """A tilted gantry: rows slip backwards from slice to slice."""
    affine = turned((0.7, 0.8, 3))
    affine[1, 2] = 3 * tilt
    return affine


# name -> affine, codes of (qform, sform), shape, version, byte order, units
GEOMETRIES = {
    "identity": {"affine": np.eye(4)},
    "flipped i": {"affine": turned((-0.7, 0.8, 3))},
    "flipped j": {"affine": turned((0.7, -0.8, 3))},
    "flipped k": {"affine": turned((0.7, 0.8, -3))},
    "flipped i, j": {"affine": turned((-0.7, -0.8, 3))},
    "flipped j, k": {"affine": turned((0.7, -0.8, -3))},
    "flipped i, j, k": {"affine": turned((-0.7, -0.8, -3))},
    "coronal": {"affine": permuted((0, 2, 1))},
    "sagittal": {"affine": permuted((1, 2, 0))},
    "sagittal, flipped": {"affine": permuted((2, 0, 1), (-1, 1, -1))},
    "oblique": {"affine": turned((1, 1, 1), (20, -15, 30))},
    "oblique, anisotropic": {"affine": turned((0.4, 0.5, 6), (-35, 10, 160))},
    "oblique, negative determinant": {"affine": turned((-0.4, 0.5, 6), (-35, 10, 80))},
    "nearly half a turn": {"affine": turned((1, 1, 2), (179.9, 0.1, -179.9))},
    "single slice": {"shape": (16, 12, 1)},
    "single slice, sagittal": {"affine": permuted((2, 0, 1)), "shape": (1, 16, 12)},
    "2-D": {"shape": (16, 12)},
    "single volume in 4-D": {"shape": (16, 12, 5, 1)},
    "5-D": {"shape": (16, 12, 5, 1, 1)},
    "NIfTI-2": {"kind": nibabel.Nifti2Image},
    "NIfTI-2, big-endian": {"kind": nibabel.Nifti2Image, "endianness": ">"},
    "big-endian": {"endianness": ">"},
    "sform only": {"codes": (0, 2)},
    "qform only": {"codes": (1, 0)},
    "both, of other codes": {"codes": (1, 4)},
    "neither": {"codes": (0, 0)},
    "sheared": {"affine": sheared(), "codes": (0, 1)},
    "micrometres and seconds": {"units": ("micron", "sec")},
    "units unknown": {"units": ("unknown", "unknown")},
}


def save(path, *, affine=None, codes=(1, 1), shape=SIZE, kind=nibabel.Nifti1Image, endianness="<", units=("mm", "sec")):
    """A NIfTI file of noise; and its voxels. The qform lies apart from the sform where both have codes."""
    header = kind.header_class(endianness=endianness)
    values = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    affine = turned((0.7, 0.8, 3)) if affine is None else affine
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(affine, codes[1])
    header.set_qform(affine + (np.eye(4, k=3) if all(codes) else 0), codes[0])  # 1 mm apart
    header.set_xyzt_units(*units)
    header.set_dim_info(freq=0, phase=1, slice=2) if len(shape) > 2 else None
    kind(values, None, header).to_filename(path)
    return values


def raw_header(path, kind=nibabel.Nifti1Image):
    """The header as it lies in the file, which nibabel.load changes."""
    opener = gzip.open if str(path).endswith("gz") else open
    with opener(path, "rb") as file:
        return kind.header_class.from_fileobj(file, check=False)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_a_label_comes_out_on_the_grid_that_came_in(tmp_path, name, suffix):
    geometry = GEOMETRIES[name]
    source, target, kind = tmp_path / f"x.{suffix}", tmp_path / "pred.nii.gz", geometry.get("kind", nibabel.Nifti1Image)
    values = save(source, **geometry)
    image = read_volume(source)
    write_nifti(target, image.values > 500, image)
    before, after = nibabel.load(source), nibabel.load(target)
    assert type(after) is kind
    assert after.shape == values.shape
    assert after.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(after.dataobj), values > 500)
    assert after.affine.tobytes() == before.affine.tobytes()
    old, new = raw_header(source, kind), raw_header(target, kind)
    assert new.endianness == old.endianness
    changed = [field for field in GRID_FIELDS if old[field].tobytes() != new[field].tobytes()]
    assert changed == []


def test_nothing_about_the_patient_or_the_intensities_is_copied(tmp_path):
    save(tmp_path / "x.nii.gz")
    nifti = nibabel.load(tmp_path / "x.nii.gz")
    for field in ("descrip", "db_name", "aux_file", "intent_name", "data_type"):
        nifti.header[field] = b"DOE^JANE"
    nifti.header["cal_max"], nifti.header["cal_min"], nifti.header["intent_code"] = 300, -100, 5
    nifti.header.set_slope_inter(2, -1024)
    nifti.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"DOE^JANE born 1960"))
    nifti.to_filename(tmp_path / "x.nii.gz")
    assert gzip.decompress((tmp_path / "x.nii.gz").read_bytes()).count(b"DOE^JANE") == 6

    image = read_volume(tmp_path / "x.nii.gz")
    write_nifti(tmp_path / "pred.nii.gz", image.values > 0, image)
    written = gzip.decompress((tmp_path / "pred.nii.gz").read_bytes())
    assert b"DOE" not in written
    assert len(written) == 352 + 16 * 12 * 5  # NIfTI-1 without extensions: 348 bytes, 4 that say so, voxels
    header = raw_header(tmp_path / "pred.nii.gz")
    assert header["descrip"] == b"blosam_monai"
    assert [float(header[f]) for f in ("cal_max", "cal_min", "intent_code", "scl_slope", "scl_inter")] == [
        0,
        0,
        0,
        1,
        0,
    ]


def test_the_same_result_gives_the_same_bytes_and_names_no_file(tmp_path):
    save(tmp_path / "x.nii")
    image = read_volume(tmp_path / "x.nii")
    for name in ("DOE_JANE.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, image.values > 500, image)
    written = (tmp_path / "DOE_JANE.nii.gz").read_bytes()
    assert (tmp_path / "b.nii.gz").read_bytes() == written
    assert b"DOE" not in written
    assert written[4:8] == bytes(4)  # RFC 1952: the time of writing
    assert sorted(p.name for p in tmp_path.iterdir()) == ["DOE_JANE.nii.gz", "b.nii.gz", "x.nii"]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 1], "uint8"),
        ([0, 255], "uint8"),
        ([0, 256], "uint16"),
        ([0, 65536], "uint32"),
        ([-1, 127], "int8"),
        ([-1, 200], "int16"),
        ([False, True], "uint8"),
        ([0.25, 0.75], "float32"),
    ],
)
def test_the_smallest_type_that_holds_the_values_is_taken(tmp_path, values, dtype):
    save(tmp_path / "x.nii")
    image = read_volume(tmp_path / "x.nii")
    written = np.resize(np.array(values), image.shape)  # int64, bool, float64
    write_nifti(tmp_path / "pred.nii", written, image)
    nifti = nibabel.load(tmp_path / "pred.nii")
    assert nifti.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(nifti.dataobj).T, written)


def test_a_type_that_is_asked_for_is_taken_or_refused(tmp_path):
    save(tmp_path / "x.nii")
    image = read_volume(tmp_path / "x.nii")
    write_nifti(tmp_path / "pred.nii", image.values > 500, image, dtype=np.int16)
    assert nibabel.load(tmp_path / "pred.nii").get_data_dtype() == np.int16
    for values in (image.values, image.values / np.float32(1000)):
        with pytest.raises(ValueError, match=r"^dtype: uint8 does not hold values of .*; use (uint16|float32)\.$"):
            write_nifti(tmp_path / "pred2.nii", values, image, dtype="uint8")
    assert not (tmp_path / "pred2.nii").exists()


def test_values_of_another_shape_are_refused(tmp_path):
    save(tmp_path / "x.nii")
    image = read_volume(tmp_path / "x.nii")
    with pytest.raises(ValueError, match=r"values: have shape \(16, 12, 5\), their image \S+x\.nii has \(5, 12, 16\)"):
        write_nifti(tmp_path / "pred.nii", image.values.T > 500, image)


def test_an_image_file_that_changed_meanwhile_is_refused(tmp_path):
    save(tmp_path / "x.nii")
    image = read_volume(tmp_path / "x.nii")
    save(tmp_path / "x.nii", shape=(12, 16, 5))
    with pytest.raises(ValueError, match=r"x\.nii: has changed since it was read; run again\.$"):
        write_nifti(tmp_path / "pred.nii", image.values > 500, image)


def test_other_suffixes_and_pictures_are_refused(tmp_path):
    picture = Image("x.png", np.zeros((1, 12, 16)))
    with pytest.raises(ValueError, match=r"pred\.png: a NIfTI file ends in \.nii or \.nii\.gz; name it so\.$"):
        write_nifti(tmp_path / "pred.png", picture.values, picture)
    with pytest.raises(ValueError, match=r"^x\.png: has no geometry, a picture; write its result as PNG\.$"):
        write_nifti(tmp_path / "pred.nii", picture.values, picture)


def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path / "x.nii")
    image = read_volume(tmp_path / "x.nii")
    (tmp_path / "pred.nii.gz").write_bytes(b"older")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(gzip.GzipFile, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_nifti(tmp_path / "pred.nii.gz", image.values > 500, image)
    assert (tmp_path / "pred.nii.gz").read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
@pytest.mark.parametrize("size", [(5, 12, 16), (12, 16)])
def test_a_label_of_another_format_lies_where_itk_sees_its_image(tmp_path, suffix, size):
    theirs = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 1000, size).astype(np.int16))
    n = theirs.GetDimension()
    turn = Rotation.from_euler("xyz", (20, -15, 30) if n == 3 else (0, 0, 30), degrees=True).as_matrix()
    theirs.SetDirection(turn[:n, :n].ravel())
    theirs.SetSpacing((0.7, 0.8, 3)[:n])
    theirs.SetOrigin((-90, 40, 12.5)[:n])
    sitk.WriteImage(theirs, str(tmp_path / f"x.{suffix}"))
    image = read_volume(tmp_path / f"x.{suffix}")
    write_nifti(tmp_path / "pred.nii.gz", image.values > 500, image)

    pred = sitk.ReadImage(str(tmp_path / "pred.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(pred).reshape(size), sitk.GetArrayFromImage(theirs) > 500)
    there = pred.TransformIndexToPhysicalPoint((15, 11, 0))
    assert np.allclose(there[:n], theirs.TransformIndexToPhysicalPoint((15, 11, 0)[:n]), atol=1e-4)
    header = raw_header(tmp_path / "pred.nii.gz")
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"


def test_directions_rounded_to_five_digits_keep_the_qform(tmp_path):
    lps = turned((0.7, 0.8, 3), (20, -15, 30))
    lps[:3, :3] = np.round(lps[:3, :3] / (0.7, 0.8, 3), 5) * (0.7, 0.8, 3)
    image = Image("series", np.zeros((5, 12, 16)), lps[:, [2, 1, 0, 3]])
    write_nifti(tmp_path / "pred.nii", image.values, image)
    assert int(raw_header(tmp_path / "pred.nii")["qform_code"]) == 1


def test_a_sheared_grid_has_the_sform_only(tmp_path):
    lps = np.diag([-1, -1, 1, 1]) @ sheared()
    image = Image("series", np.zeros((5, 12, 16)), lps[:, [2, 1, 0, 3]])
    write_nifti(tmp_path / "pred.nii", image.values, image)
    nifti = nibabel.load(tmp_path / "pred.nii")
    assert (int(nifti.header["qform_code"]), int(nifti.header["sform_code"])) == (0, 1)
    assert np.allclose(nifti.affine, sheared(), atol=1e-5)
    assert np.allclose(nifti.header.get_zooms(), (0.7, 0.8, np.hypot(3, 0.9)))


def test_real_volumes_come_out_on_their_grid(tmp_path, real_data):
    for name in (
        "msd_hippocampus/imagesTr/hippocampus_014.nii.gz",
        "totalseg_ct_mr_nifti/imagesTr/example_mr_sm.nii.gz",
    ):
        path = real_data / name
        image, label = read_volume(path), read_label_volume(str(path).replace("images", "labels"), "index")
        write_nifti(tmp_path / "pred.nii.gz", label.values, image)
        old, new = raw_header(path), raw_header(tmp_path / "pred.nii.gz")
        assert [field for field in GRID_FIELDS if old[field].tobytes() != new[field].tobytes()] == []
        theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "pred.nii.gz")))
        assert np.array_equal(theirs, sitk.GetArrayFromImage(sitk.ReadImage(str(path).replace("images", "labels"))))
