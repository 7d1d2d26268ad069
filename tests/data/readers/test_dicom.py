from __future__ import annotations

import locale
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import uid
from pydicom.pixels import convert_color_space

from blosam_monai.data.geometry import Image
from blosam_monai.data.readers.dicom import (
    FLAWS,
    is_dicom,
    list_folders,
    list_series,
    read_dicom,
    read_headers,
)
from tests.data.dicom_files import AXIAL, CORONAL, OBLIQUE, SAGITTAL, write_enhanced, write_frames, write_series

SECRET = "Verylongname^Nobody"


def make_values(shape=(4, 6, 5), dtype=np.int16, highest=1000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, highest, shape).astype(dtype)


def read_with_itk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def get_itk_affine(image: sitk.Image) -> np.ndarray:
    """(d, h, w) -> mm LPS, from ITK's (x, y, z)."""
    affine = np.eye(4)
    affine[:3, :3] = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return affine


# ---- geometry: against hand-derived affines and ITK's series reader -------------------------------------------------


def test_affine_of_an_axial_series_is_as_derived_by_hand(tmp_path):
    write_series(tmp_path, make_values(), position=(-10, 20, 30), spacing=(2.5, 0.5, 0.75))
    expected = [[0, 0, 0.75, -10], [0, 0.5, 0, 20], [2.5, 0, 0, 30], [0, 0, 0, 1]]
    np.testing.assert_allclose(read_dicom(tmp_path).affine, expected)


def test_affine_of_a_coronal_series_is_as_derived_by_hand(tmp_path):
    write_series(tmp_path, make_values(), orientation=CORONAL, position=(-10, 20, 30), spacing=(2.5, 0.5, 0.75))
    expected = [[0, 0, 0.75, -10], [2.5, 0, 0, 20], [0, -0.5, 0, 30], [0, 0, 0, 1]]  # x cross -z is y
    np.testing.assert_allclose(read_dicom(tmp_path).affine, expected)


@pytest.mark.parametrize(
    "orientation",
    [AXIAL, CORONAL, SAGITTAL, OBLIQUE, (-1, 0, 0, 0, 1, 0), (0, 1, 0, 1, 0, 0), (0.6, 0.8, 0, 0.8, -0.6, 0)],
    ids=["axial", "coronal", "sagittal", "oblique", "rows_to_the_right", "transposed", "oblique_head_first"],
)
def test_series_in_every_direction_lies_where_itk_puts_it(tmp_path, orientation):
    write_series(tmp_path, make_values(), orientation=orientation, position=(-7, 3, 9), spacing=(3, 0.5, 0.75))
    image, reference = read_dicom(tmp_path), read_with_itk(tmp_path)
    np.testing.assert_array_equal(image.values, sitk.GetArrayFromImage(reference))
    np.testing.assert_allclose(image.affine, get_itk_affine(reference), atol=1e-6)


SHUFFLED = ["f.dcm", "b", "z.ima", "a.dcm"]


@pytest.mark.parametrize(
    "how",
    [
        {"names": SHUFFLED},
        {"numbers": [4, 3, 2, 1]},
        {"numbers": [1, 1, 1, 1]},
        {"elements": {"InstanceNumber": None}},
        {"offsets": [0, 2.02, 3.98, 6]},  # rounded positions
        {"elements": {"SliceThickness": None}},
        {"elements": {"SOPClassUID": ""}},  # removed by anonymisers
    ],
    ids=["shuffled_names", "reversed_numbers", "same_number", "no_number", "rounded", "no_thickness", "anonymised"],
)
def test_slices_are_ordered_by_position_alone(tmp_path, how):
    values = make_values()
    write_series(tmp_path, values, **how)
    np.testing.assert_array_equal(read_dicom(tmp_path).values, values)


def test_series_written_from_head_to_foot_is_turned_to_run_along_its_normal(tmp_path):
    values = make_values()
    write_series(tmp_path, values, position=(0, 0, 50), offsets=[0, -2, -4, -6])
    image = read_dicom(tmp_path)
    np.testing.assert_array_equal(image.values, values[::-1])
    np.testing.assert_allclose(image.affine[:3, [0, 3]], [[0, 0], [0, 0], [2, 44]])


def test_files_are_those_of_the_slices_in_order(tmp_path):
    write_series(tmp_path, make_values(), names=SHUFFLED, offsets=[6, 4, 2, 0])
    assert [Path(file).name for file in read_dicom(tmp_path).files] == SHUFFLED[::-1]


def test_headers_follow_the_slices_and_hold_no_pixels(tmp_path):
    write_series(tmp_path, make_values(), names=SHUFFLED, offsets=[6, 4, 2, 0])
    headers = read_headers(read_dicom(tmp_path))
    assert [header.InstanceNumber for header in headers] == [4, 3, 2, 1]
    assert not any("PixelData" in header for header in headers)


def test_single_slice_is_as_thick_as_it_says(tmp_path):
    (file,) = write_series(tmp_path, make_values((1, 6, 5)), spacing=(4, 1, 1), position=(1, 2, 3))
    np.testing.assert_allclose(read_dicom(file).affine[:3, [0, 3]], [[0, 1], [0, 2], [4, 3]])


def test_single_slice_without_thickness_is_taken_as_one_millimetre_and_said(tmp_path):
    (file,) = write_series(tmp_path, make_values((1, 6, 5)), spacing=(4, 1, 1), elements={"SliceThickness": None})
    image = read_dicom(file)
    assert image.affine[2, 0] == 1
    assert image.notes == ("a single slice without thickness: taken as 1 mm",)


# ---- flaws ----------------------------------------------------------------------------------------------------------

# name: (flaw, arguments of write_series, what is said, slices read when allowed, their column of d)
FLAWED = {
    "one_missing": ("missing_slices", {"drop": [2]}, "1 of 6 slices are missing", [0, 1, 3, 4, 5], (0, 0, 2.5)),
    "several_missing": ("missing_slices", {"drop": [1, 2]}, "2 of 6 slices are missing", [0, 3, 4, 5], (0, 0, 10 / 3)),
    "one_doubled": (
        "duplicate_positions",
        {"offsets": [0, 2, 4, 4, 6, 8]},
        "6 slices lie at 5 positions",
        [0, 1, 2, 4, 5],
        (0, 0, 2),
    ),
    "doubled_later_number_first": (
        "duplicate_positions",
        {"offsets": [0, 2, 4, 4, 6, 8], "numbers": [1, 2, 9, 3, 4, 5]},
        "6 slices lie at 5 positions",
        [0, 1, 3, 4, 5],
        (0, 0, 2),
    ),
    "two_acquisitions": (
        "duplicate_positions",
        {"offsets": [0, 2, 4, 0, 2, 4]},
        "6 slices lie at 3 positions",
        [0, 1, 2],
        (0, 0, 2),
    ),
    "uneven": (
        "uneven_spacing",
        {"offsets": [0, 2, 4, 7, 9, 11]},
        "slices are between 2.00 and 3.00 mm apart",
        [0, 1, 2, 3, 4, 5],
        (0, 0, 2.2),
    ),
    "slowly_wider": (
        "uneven_spacing",
        {"offsets": [0, 2, 4.1, 6.3, 8.6, 11]},
        "slices are between 2.00 and 2.40 mm apart",
        [0, 1, 2, 3, 4, 5],
        (0, 0, 2.2),
    ),
    "tilted": (
        "gantry_tilt",
        {"tilt": 0.5},
        "gantry tilt of 14.0 degrees",  # atan(0.5 / 2)
        [0, 1, 2, 3, 4, 5],
        (0, 0.5, 2),
    ),
}
flawed = pytest.mark.parametrize(("flaw", "how", "said", "kept", "step"), FLAWED.values(), ids=FLAWED)


@flawed
def test_flaw_is_refused_with_its_name(tmp_path, flaw, how, said, kept, step):
    write_series(tmp_path, make_values((6, 6, 5)), patient_name=SECRET, **how)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}: ')}.*{said}.*allowing {flaw}\\.$") as caught:
        read_dicom(tmp_path, allow=set(FLAWS) - {flaw})
    assert "\n" not in str(caught.value)


@flawed
def test_flaw_that_is_allowed_is_noted_and_read(tmp_path, flaw, how, said, kept, step):
    values = make_values((6, 6, 5))
    write_series(tmp_path, values, **how)
    image = read_dicom(tmp_path, allow=[flaw])
    np.testing.assert_array_equal(image.values, values[kept])
    assert len(image.notes) == 1
    assert said in image.notes[0]
    np.testing.assert_allclose(image.affine[:3, 0], step, atol=1e-6)


def test_series_without_a_flaw_has_no_note(tmp_path):
    write_series(tmp_path, make_values())
    assert read_dicom(tmp_path, allow=FLAWS).notes == ()


def test_affine_of_a_tilted_series_puts_every_slice_where_its_header_says(tmp_path):
    files = write_series(tmp_path, make_values(), orientation=OBLIQUE, tilt=-0.7, position=(5, 6, 7))
    image = read_dicom(tmp_path, allow=["gantry_tilt"])
    for d, file in enumerate(files):
        np.testing.assert_allclose(
            (image.affine @ [d, 0, 0, 1])[:3], pydicom.dcmread(file).ImagePositionPatient, atol=1e-5
        )


def test_rounding_of_headers_is_no_flaw(tmp_path):
    angle = np.radians(33)
    files = write_series(
        tmp_path,
        make_values((30, 4, 4)),
        orientation=(np.cos(angle), np.sin(angle), 0, 0, 0, -1),
        spacing=(1, 0.5, 0.5),
    )
    for file in files:
        header = pydicom.dcmread(file)
        header.ImagePositionPatient = [round(float(x), 1) for x in header.ImagePositionPatient]
        header.ImageOrientationPatient = [round(float(x), 4) for x in header.ImageOrientationPatient]
        header.save_as(file)
    assert read_dicom(tmp_path).notes == ()


def test_slices_off_their_common_line_are_refused_as_uneven(tmp_path):
    files = write_series(tmp_path, make_values())
    stray = pydicom.dcmread(files[2])
    stray.ImagePositionPatient = [0, 3, 4]
    stray.save_as(files[2])
    with pytest.raises(ValueError, match=r"up to 3\.00 mm off the line .* allowing uneven_spacing"):
        read_dicom(tmp_path)


def test_unknown_flaw_in_allow_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^allow: 'tilt' is not one of missing_slices, duplicate_positions"):
        read_dicom(tmp_path, allow=["tilt"])


# ---- what does not belong together ----------------------------------------------------------------------------------


def write_two_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    first, second = make_values((4, 6, 5)), make_values((3, 7, 8))
    for name, values, number in (("arterial", first, "1.2.3"), ("venous", second, "1.2.4")):
        names = [f"{name}_{d}" for d in range(len(values))]
        write_series(folder, values, names=names, series_uid=number, description=f"{name} phase", patient_name=SECRET)
    return first, second


def test_several_series_are_listed_and_none_is_taken(tmp_path):
    write_two_series(tmp_path)
    listed = "holds 2 series: 'arterial phase' 6 x 5 x 4 UID 1.2.3; 'venous phase' 7 x 8 x 3"
    with pytest.raises(ValueError, match=listed) as caught:
        read_dicom(tmp_path)
    assert "Verylongname" not in str(caught.value)


def test_series_is_chosen_by_its_uid(tmp_path):
    _, second = write_two_series(tmp_path)
    np.testing.assert_array_equal(read_dicom(tmp_path, series="1.2.4").values, second)


def test_series_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write_two_series(tmp_path)
    with pytest.raises(ValueError, match=r"holds no series 9\.9 , but 'arterial phase' 6 x 5 x 4 UID 1\.2\.3; 'venous"):
        read_dicom(tmp_path, series="9.9")


def test_one_file_among_several_series_needs_no_uid(tmp_path):
    first, _ = write_two_series(tmp_path)
    np.testing.assert_array_equal(read_dicom(tmp_path / "arterial_2").values, first[2:3])


def test_listed_series_say_what_they_hold(tmp_path):
    write_two_series(tmp_path)
    listed = [(s.uid, s.description, s.modality, s.rows, s.columns, s.frames) for s in list_series(tmp_path)]
    assert listed == [("1.2.3", "arterial phase", "CT", 6, 5, 4), ("1.2.4", "venous phase", "CT", 7, 8, 3)]
    assert [file.name for file in list_series(tmp_path)[1].files] == ["venous_0", "venous_1", "venous_2"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"values": make_values((1, 9, 9))}, r"x_scout has rows x columns \(9, 9\), slice_000.dcm \(6, 5\)"),
        ({"orientation": CORONAL}, r"x_scout has directions .*-1\.0\], slice_000.dcm .* 1\.0, 0\.0\]"),
        ({"spacing": (2, 1, 0.9)}, r"x_scout has pixel spacing \[1\.0, 0\.9\], slice_000.dcm \[1\.0, 1\.0\]"),
        (
            {"elements": {"ImagePositionPatient": None}},
            "x_scout has ImagePositionPatient missing, slice_000.dcm present",
        ),
        ({"values": make_values((1, 6, 5, 3), np.uint8, 255)}, "x_scout has samples a pixel 3, slice_000.dcm 1"),
    ],
    ids=["size", "orientation", "spacing", "position", "colour"],
)
def test_localiser_in_a_series_is_refused(tmp_path, how, said):
    write_series(tmp_path, make_values(), series_uid="1.2.3")
    scout = {"values": make_values((1, 6, 5)), "names": ["x_scout"], "series_uid": "1.2.3", "offsets": [8]} | how
    write_series(tmp_path, **scout)
    with pytest.raises(ValueError, match=f"{said}; move localisers") as caught:
        read_dicom(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_image_of_the_series_is_passed_over(tmp_path):
    values = make_values()
    (first, *_) = write_series(tmp_path, values, series_uid="1.2.3")
    (tmp_path / "readme.txt").write_text("text")
    shutil.copy(first, tmp_path / "._slice_000.dcm")
    shutil.copy(first, tmp_path / "DICOMDIR")
    shutil.copy(first, tmp_path.parent / "elsewhere.dcm")
    write_series(tmp_path / "below", values, series_uid="1.2.4")
    write_series(tmp_path, values, names=list("abcd"), elements={"SOPClassUID": uid.SegmentationStorage})
    report = pydicom.dcmread(first)
    del report.Rows, report.Columns, report.PixelData
    report.SOPClassUID = uid.BasicTextSRStorage
    report.save_as(tmp_path / "report")
    np.testing.assert_array_equal(read_dicom(tmp_path).values, values)


def test_segmentation_is_refused_as_an_image(tmp_path):
    (file,) = write_series(tmp_path, make_values((1, 6, 5)), elements={"SOPClassUID": uid.SegmentationStorage})
    with pytest.raises(ValueError, match="holds Segmentation Storage and no image"):
        read_dicom(file)


def test_folder_without_dicom_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no DICOM image"):
        read_dicom(tmp_path)


# ---- which files are DICOM ------------------------------------------------------------------------------------------


def strip_preamble(file: Path) -> Path:
    """Write the data set alone, as before 1993: no preamble, no file meta information."""
    dataset = pydicom.dcmread(file)
    del dataset.file_meta
    dataset.preamble = None
    dataset.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert file.read_bytes()[128:132] != b"DICM"
    return file


def test_dicom_is_known_by_its_content(tmp_path):
    first, second, third = write_series(tmp_path, make_values((3, 6, 5)), names=["a", "b.png", "DICOMDIR"])
    strip_preamble(second)
    text = tmp_path / "c.dcm"
    text.write_bytes(b"\x08\x00" + b"no DICOM at all " * 20)
    assert [is_dicom(p) for p in (first, second, third, text, tmp_path, tmp_path / "none")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_file_without_preamble_is_read(tmp_path):
    values = make_values((1, 6, 5))
    (file,) = write_series(tmp_path, values)
    np.testing.assert_array_equal(read_dicom(strip_preamble(file)).values, values)


def test_folders_of_images_are_found_at_any_depth(tmp_path):
    values = make_values((1, 6, 5))
    for name in ("p2/ct", "p1/ct", "p1/ct/deeper", ".hidden/ct"):
        write_series(tmp_path / name, values)
    write_series(tmp_path / "p1" / "seg", values, elements={"SOPClassUID": uid.SegmentationStorage})
    write_series(tmp_path, values)
    (tmp_path / "p3").mkdir()
    (tmp_path / "p3" / "note.txt").write_text("nothing")
    assert list_folders(tmp_path) == [tmp_path / name for name in ("p1/ct", "p1/ct/deeper", "p2/ct")]


def test_a_folder_whose_first_files_are_no_images_is_found(tmp_path):
    for number in range(20):
        (tmp_path / "ct" / f"a_{number:02d}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "ct" / f"a_{number:02d}.txt").write_text("note")
    write_series(tmp_path / "ct", make_values((1, 6, 5)))
    assert list_folders(tmp_path) == [tmp_path / "ct"]


def test_linked_folders_are_followed_once(tmp_path):
    write_series(tmp_path / "disk" / "ct", make_values((1, 6, 5)))
    root = tmp_path / "study"
    (root / "p1").mkdir(parents=True)
    (root / "p1" / "ct").symlink_to(tmp_path / "disk" / "ct")
    (root / "p1" / "back").symlink_to(root)
    write_series(root / "p2", make_values((1, 6, 5)))
    (root / "a_link_to_p2").symlink_to(root / "p2")
    assert list_folders(root) == [root / "p1" / "ct", root / "p2"]


@pytest.mark.parametrize("how", [{"drop": [2]}, {"offsets": [0, 2, 4, 7, 9, 11]}], ids=["missing", "uneven"])
def test_slices_that_the_affine_misses_are_given_where_they_lie(tmp_path, how):
    files = write_series(tmp_path, make_values((6, 6, 5)), orientation=OBLIQUE, position=(5, 6, 7), **how)
    positions = [pydicom.dcmread(file).ImagePositionPatient for file in files]
    np.testing.assert_allclose(read_dicom(tmp_path, allow=FLAWS).origins, positions)


def test_slices_on_the_affine_are_not_given_one_by_one(tmp_path):
    write_series(tmp_path, make_values(), tilt=0.5)
    assert read_dicom(tmp_path, allow=FLAWS).origins is None


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_rescaled_integers_are_hounsfield_units_in_int16(tmp_path):
    write_series(tmp_path, np.array([[[0, 24], [1024, 4095]]], np.uint16), intercept=-1024)
    values = read_dicom(tmp_path).values
    assert values.dtype == np.int16
    assert values.tolist() == [[[-1024, -1000], [0, 3071]]]


def test_integers_beyond_int16_are_kept_in_int32(tmp_path):
    write_series(tmp_path, np.array([[[0, 65535]], [[1, 2]]], np.uint16), intercept=-5)
    values = read_dicom(tmp_path).values
    assert values.dtype == np.int32
    assert values.tolist() == [[[-5, 65530]], [[-4, -3]]]


def test_each_slice_has_its_own_rescale(tmp_path):
    write_series(tmp_path, np.full((3, 2, 2), 10, np.uint16), slope=[0.5, 2, 0.25], intercept=[0, 1, -1], modality="PT")
    values = read_dicom(tmp_path).values
    assert values.dtype == np.float32
    assert values[:, 0, 0].tolist() == [5, 21, 1.5]


def test_fractional_intercept_is_kept(tmp_path):
    write_series(tmp_path, np.array([[[1, 2]]], np.int16), intercept=0.5)
    assert read_dicom(tmp_path).values.tolist() == [[[1.5, 2.5]]]


def test_bits_above_those_stored_are_no_part_of_a_number(tmp_path):
    stored = np.array([[[0x0FFF, 0x7123]]], np.uint16)  # the upper four bits held overlays
    write_series(tmp_path, stored, elements={"BitsStored": 12, "HighBit": 11})
    assert read_dicom(tmp_path).values.tolist() == [[[0x0FFF, 0x0123]]]


@pytest.mark.parametrize(
    ("values", "bits", "expected"),
    [
        (np.array([[[0, 4095, 100]]], np.uint16), 12, [4095, 0, 3995]),
        (np.array([[[0, 255, 100]]], np.uint8), 8, [255, 0, 155]),
        (np.array([[[-100, 2047, 0]]], np.int16), 12, [99, -2048, -1]),
    ],
    ids=["12_bits", "8_bits", "signed"],
)
def test_monochrome1_is_inverted_within_the_stored_range(tmp_path, values, bits, expected):
    elements = {"BitsStored": bits, "HighBit": bits - 1}
    write_series(tmp_path, values, photometric="MONOCHROME1", elements=elements)
    assert read_dicom(tmp_path).values[0, 0].tolist() == expected


def test_rescaled_monochrome1_equals_what_itk_reads(tmp_path):
    (file,) = write_series(
        tmp_path, make_values((1, 6, 5), np.uint16, 60000), photometric="MONOCHROME1", slope=0.5, intercept=-10
    )
    np.testing.assert_array_equal(read_dicom(file).values, sitk.GetArrayFromImage(sitk.ReadImage(str(file))))


def test_modality_table_is_applied(tmp_path):
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [3, 0, 16])
    table.add_new("LUTData", "US", [500, 20, 7])
    table.ModalityLUTType = "US"
    elements = {"RescaleSlope": None, "RescaleIntercept": None, "ModalityLUTSequence": [table]}
    (file,) = write_series(tmp_path, np.array([[[0, 1], [2, 0]]], np.uint16), elements=elements)
    assert read_dicom(file).values.tolist() == [[[500, 20], [7, 500]]]


# ---- compression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("syntax", "shape", "needs"),
    [
        (uid.DeflatedExplicitVRLittleEndian, (2, 7, 5), None),
        (uid.RLELossless, (2, 7, 5), None),
        (uid.JPEG2000Lossless, (2, 32, 34), "openjpeg"),
        (uid.JPEGLSLossless, (2, 32, 34), "jpeg_ls"),
    ],
    ids=["deflated", "run_length", "jpeg_2000", "jpeg_ls"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_compressed_series_has_the_numbers_of_the_uncompressed_one(tmp_path, syntax, shape, needs, dtype):
    if needs:
        pytest.importorskip(needs)
    values = make_values(shape, dtype, 250) - dtype(50 if dtype == np.int16 else 0)
    write_series(tmp_path, values, compression=syntax, intercept=-1024)
    np.testing.assert_array_equal(read_dicom(tmp_path).values, values.astype(int) - 1024)


def test_lossless_jpeg_has_the_numbers_of_the_uncompressed_one(tmp_path):
    values = make_values((1, 16, 16), np.uint16, 4000)
    (plain,) = write_series(tmp_path, values)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "lossless.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    before = locale.setlocale(locale.LC_ALL)
    writer.Execute(sitk.ReadImage(str(plain), sitk.sitkUInt16))
    locale.setlocale(locale.LC_ALL, before)  # ITK's writer leaves the process with ASCII files
    assert pydicom.dcmread(tmp_path / "lossless.dcm").file_meta.TransferSyntaxUID == uid.JPEGLosslessSV1
    np.testing.assert_array_equal(read_dicom(tmp_path / "lossless.dcm").values, values)


def test_jpeg_baseline_differs_by_its_loss_only(tmp_path):
    ramp = (np.arange(16)[:, None] * 8 + np.arange(16)).astype(np.uint8)[None]
    write_series(tmp_path, ramp, compression=uid.JPEGBaseline8Bit, photometric="MONOCHROME1")
    np.testing.assert_allclose(read_dicom(tmp_path).values, 255 - ramp.astype(int), atol=3)


# ---- colours, films, frames -----------------------------------------------------------------------------------------

COLOURS = np.array([[[200, 30, 60]] * 8, [[10, 220, 90]] * 8] * 4, np.uint8)[None]  # (1, 8, 8, 3)


@pytest.mark.parametrize(
    "compression", [None, uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.JPEGLSLossless]
)
@pytest.mark.parametrize("frames", [1, 3])
def test_ultrasound_is_rgb(tmp_path, compression, frames):
    if compression in (uid.JPEG2000Lossless, uid.JPEGLSLossless):
        pytest.importorskip("openjpeg")
        pytest.importorskip("jpeg_ls")
    wide = COLOURS.repeat(8, 1).repeat(4, 2)  # rows of one colour 8 high: JPEG's blocks
    values = np.concatenate([wide[:, ::-1], wide, wide])[:frames]
    image = read_dicom(write_frames(tmp_path / "us.dcm", values, compression=compression))
    assert image.values.dtype == np.uint8
    assert image.full_range == (0, 255)
    np.testing.assert_allclose(image.values.astype(int), values, atol=3 if compression == uid.JPEGBaseline8Bit else 0)


def test_jpeg_that_calls_itself_rgb_but_is_not_is_shown_in_its_colours(tmp_path):
    values = COLOURS.repeat(8, 1).repeat(2, 2)
    file = write_frames(tmp_path / "us.dcm", values, compression=uid.JPEGBaseline8Bit)
    dataset = pydicom.dcmread(file)
    dataset.PhotometricInterpretation = "RGB"
    dataset.save_as(file)
    np.testing.assert_allclose(read_dicom(file).values.astype(int), values, atol=3)


@pytest.mark.parametrize("compression", [None, uid.RLELossless])
def test_ybr_is_converted_to_rgb(tmp_path, compression):
    ybr = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    assert abs(int(ybr[0, 0, 0, 0]) - 84) <= 1  # 0.299 * 200 + 0.587 * 30 + 0.114 * 60 = 84.25
    image = read_dicom(write_frames(tmp_path / "us.dcm", ybr, photometric="YBR_FULL", compression=compression))
    np.testing.assert_allclose(image.values.astype(int), COLOURS, atol=2)


def test_palette_is_shown_in_its_colours(tmp_path):
    tables = {"Red": [0, 0xFF00, 0x1200], "Green": [0, 0x8000, 0x3400], "Blue": [0, 0, 0x5600]}
    elements: dict[str, object] = {}
    for name, table in tables.items():
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = np.array(table, "<u2").tobytes()
    indices = np.array([[[0, 1], [2, 1]]], np.uint8)
    image = read_dicom(write_frames(tmp_path / "us.dcm", indices, photometric="PALETTE COLOR", elements=elements))
    assert image.values.tolist() == [[[[0, 0, 0], [255, 128, 0]], [[0x12, 0x34, 0x56], [255, 128, 0]]]]
    assert image.full_range == (0, 255)


def test_file_without_position_has_its_spacing_only(tmp_path):
    file = write_frames(
        tmp_path / "film.dcm", make_values((1, 6, 5)), modality="CR", elements={"PixelSpacing": [0.2, 0.1]}
    )
    image = read_dicom(file)
    np.testing.assert_allclose(image.affine, [[0, 0, 0.1, 0], [0, 0.2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert image.notes == ("no position: placed at the origin, slices 1 mm apart",)


def test_file_without_position_or_spacing_has_no_affine(tmp_path):
    image = read_dicom(write_frames(tmp_path / "film.dcm", make_values((1, 6, 5)), modality="CR"))
    assert image.affine is None
    assert image.full_range is None


def test_several_files_without_position_are_refused(tmp_path):
    write_series(tmp_path, make_values(), elements={"ImagePositionPatient": None})
    with pytest.raises(ValueError, match="no ImagePositionPatient to stack them by; name a single file"):
        read_dicom(tmp_path)


def test_enhanced_file_is_sorted_placed_and_rescaled_frame_by_frame(tmp_path):
    stored = make_values((4, 6, 5))
    slopes, intercepts = [1, 2, 3, 0.5], [-1024, 0, 5, 1]
    file = write_enhanced(
        tmp_path / "enhanced.dcm",
        stored,
        orientation=CORONAL,
        position=(1, 2, 3),
        offsets=[9, 3, 6, 0],
        spacing=(3, 0.5, 0.75),
        slope=slopes,
        intercept=intercepts,
    )
    image = read_dicom(file)
    np.testing.assert_array_equal(image.values, [stored[k] * slopes[k] + intercepts[k] for k in (3, 1, 2, 0)])
    np.testing.assert_allclose(image.affine, [[0, 0, 0.75, 1], [3, 0, 0, 2], [0, -0.5, 0, 3], [0, 0, 0, 1]])
    assert image.files == (str(file),)


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEG2000Lossless])
def test_compressed_enhanced_file_equals_the_uncompressed_one(tmp_path, syntax):
    pytest.importorskip("openjpeg")
    values = make_values((3, 32, 34))
    write_enhanced(tmp_path / "enhanced.dcm", values, modality="MR", compression=syntax, offsets=[4, 2, 0])
    np.testing.assert_array_equal(read_dicom(tmp_path).values, values[::-1])


def test_flaws_are_found_between_the_frames_of_a_file(tmp_path):
    file = write_enhanced(tmp_path / "enhanced.dcm", make_values(), offsets=[0, 2, 6, 8])
    with pytest.raises(ValueError, match="1 of 5 slices are missing"):
        read_dicom(file)


def test_frames_without_position_keep_their_order(tmp_path):
    values = make_values((3, 6, 5), np.uint8, 255)
    image = read_dicom(write_frames(tmp_path / "us.dcm", values))
    np.testing.assert_array_equal(image.values, values)
    assert image.affine is None


# ---- broken files ---------------------------------------------------------------------------------------------------


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "syntax", [None, uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGBaseline8Bit]
)
def test_truncated_file_is_refused_by_name(tmp_path, syntax, capfd):
    if syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless):
        pytest.importorskip("openjpeg")
        pytest.importorskip("jpeg_ls")
    files = write_series(tmp_path, make_values((3, 64, 64), np.uint8, 250), compression=syntax, patient_name=SECRET)
    cut(files[1], 0.75)
    with pytest.raises(ValueError, match=r"slice_001\.dcm: .*(truncated|decoded|cannot be read).*; copy") as caught:
        read_dicom(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("elements", "said"),
    [
        ({"PixelData": None}, "slice_001.dcm: holds no pixels"),
        ({"PixelData": b"\0" * 10}, "slice_001.dcm: pixels cannot be decoded"),
        ({"PixelSpacing": [0, 1]}, r"slice_001.dcm has pixel spacing \[0\.0, 1\.0\]"),
        ({"PixelSpacing": None}, "pixel spacing missing"),
        ({"ImageOrientationPatient": None}, "directions missing"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "slice_001.dcm: ImageOrientationPatient is .* not 6 finite numbers"),
        ({"RescaleSlope": float("nan")}, "slice_001.dcm: RescaleSlope is nan, not 1 finite numbers"),
    ],
)
def test_slice_that_lacks_something_is_refused(tmp_path, elements, said):
    files = write_series(tmp_path, make_values(), series_uid="1.2.3")
    dataset = pydicom.dcmread(files[1])
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(files[1])
    with pytest.raises(ValueError, match=said) as caught:
        read_dicom(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0)])
def test_impossible_orientation_is_refused(tmp_path, orientation):
    write_series(tmp_path, make_values((1, 6, 5)), elements={"ImageOrientationPatient": list(map(float, orientation))})
    with pytest.raises(ValueError, match=r"ImageOrientationPatient is .*; repair the header"):
        read_dicom(tmp_path)


def test_position_without_orientation_is_refused(tmp_path):
    write_series(tmp_path, make_values(), elements={"ImageOrientationPatient": None})
    with pytest.raises(ValueError, match="has a position but no orientation or PixelSpacing"):
        read_dicom(tmp_path)


def test_image_of_one_value_is_refused(tmp_path):
    write_series(tmp_path, np.full((3, 6, 5), 7, np.int16))
    with pytest.raises(ValueError, match="every pixel has the same value; repair or leave out"):
        read_dicom(tmp_path)


@pytest.mark.parametrize("keyword", ["PixelSpacing", "InstanceNumber"])
def test_text_for_a_number_is_refused(tmp_path, keyword):
    values = {"PixelSpacing": [1.25, 1.25], "InstanceNumber": 1234}
    (file,) = write_series(tmp_path, make_values((1, 6, 5)), elements=values)
    written = b"1.25\\1.25" if keyword == "PixelSpacing" else b"1234"
    assert file.read_bytes().count(written) == 1
    file.write_bytes(file.read_bytes().replace(written, b"wide".ljust(len(written))))
    with pytest.raises(ValueError, match=f"slice_000.dcm: {keyword} is no number") as caught:
        read_dicom(tmp_path)
    assert "\n" not in str(caught.value)


def test_odd_headers_are_read_without_a_word(tmp_path, capfd, caplog):
    (file,) = write_series(tmp_path, make_values((1, 6, 5)), series_uid="1.2.31234", patient_name=SECRET)
    assert file.read_bytes().count(b"1.2.31234") == 1
    file.write_bytes(file.read_bytes().replace(b"1.2.31234", b"a.b.c0123"))
    with caplog.at_level("DEBUG"):
        image = read_dicom(file)
        assert list_series(tmp_path)[0].uid == "a.b.c0123"
        assert len(read_headers(image)) == 1
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def test_headers_of_a_picture_are_refused(tmp_path):
    (tmp_path / "film.png").write_bytes(b"picture")
    image = Image("film.png", np.zeros((1, 2, 2)), files=(str(tmp_path / "film.png"),))
    with pytest.raises(ValueError, match=r"film\.png: is no DICOM file"):
        read_headers(image)


# ---- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dicom_totalseg_ct/image", "msd_hippocampus/dicom_unlabelled/13_HCropVolume", "dicom_seg_dcmqi_ct3/image"]
)
def test_real_series_equals_what_itk_reads(real_data, name):
    image = read_dicom(real_data / name)
    reference = sitk.ReadImage(list(image.files))
    np.testing.assert_array_equal(image.values, sitk.GetArrayFromImage(reference))
    np.testing.assert_allclose(image.affine, get_itk_affine(reference), atol=1e-3)
    assert isinstance(image, Image)
    assert image.notes == ()


def test_real_folders_are_found(real_data):
    (found,) = list_folders(real_data / "msd_hippocampus")
    assert found.name == "13_HCropVolume"
    assert [series.frames for series in list_series(found)] == [32]


@pytest.mark.parametrize("bytes_left", [0, 140, 400])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_slice_at_the_end_of_a_series_that_is_cut_short_is_not_passed_over(tmp_path, place, bytes_left):
    file = write_series(tmp_path, make_values())[place]
    file.write_bytes(file.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=rf"{file.name}: is cut short after {bytes_left} bytes; copy the file again"):
        read_dicom(tmp_path)


def test_reports_and_segmentations_beside_a_series_are_no_damage(tmp_path):
    files = write_series(tmp_path, make_values())
    report = pydicom.dcmread(files[0])
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = uid.BasicTextSRStorage
    del report.Rows, report.Columns, report.PixelData
    report.save_as(tmp_path / "report.dcm")
    (tmp_path / "notes.txt").write_text("x")
    assert read_dicom(tmp_path).shape[0] == len(files)
