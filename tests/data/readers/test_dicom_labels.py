from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.uid import (
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    SegmentationStorage,
    generate_uid,
)

from blosam_monai.data.readers import read_image, read_label
from blosam_monai.data.readers.dicom_labels import LABEL_MAP, read_segments
from tests.data.dicom_files import AXIAL, CORONAL, OBLIQUE, SAGITTAL, write_enhanced, write_frames, write_series

H, W = 5, 7  # 35 pixels: frames of a bit-packed file do not begin with a byte
REVERSED = (1, 0, 0, 0, -1, 0)  # axial, columns run to the front: the normal points to the feet


def item(**elements) -> Dataset:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def save(path: Path, dataset: Dataset, sop_class: str, elements: dict) -> Path:
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_seg(
    path: Path,
    frames,  # (segment, position or None, (H, W) stored values) of each
    *,
    labels=("liver",),
    kind="BINARY",
    orientation=AXIAL,
    pixel=(1.0, 1.0),
    measures=None,
    largest=255,
    **elements,
) -> Path:
    """A SEG written by pydicom alone, so that the reader is not tested with its own writer."""
    dataset = item(SegmentationType=kind, Modality="SEG", SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")
    dataset.SegmentSequence = [item(SegmentNumber=n, SegmentLabel=label) for n, label in enumerate(labels, start=1)]
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=list(map(float, orientation)))],
        PixelMeasuresSequence=[item(PixelSpacing=list(pixel), **(measures or {}))],
    )
    dataset.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for segment, position, _ in frames:
        group = Dataset()
        if segment:
            group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=segment)]
        if position is not None:
            group.PlanePositionSequence = [item(ImagePositionPatient=[round(float(x), 6) for x in position])]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    pixels = np.array([values for *_, values in frames], np.uint8)
    dataset.NumberOfFrames = len(frames)
    dataset.Rows, dataset.Columns = pixels.shape[1:] if frames else (H, W)
    dataset.PixelRepresentation = 0
    dataset.BitsAllocated = dataset.BitsStored = 1 if kind == "BINARY" else 8
    dataset.HighBit = dataset.BitsStored - 1
    if kind == "FRACTIONAL":
        dataset.MaximumFractionalValue, dataset.SegmentationFractionalType = largest, "PROBABILITY"
    packed = np.packbits(pixels.ravel(), bitorder="little") if kind == "BINARY" else pixels
    dataset.PixelData = packed.tobytes() + b"\0" * (packed.size % 2)
    dataset["PixelData"].VR = "OB"
    return save(path, dataset, LABEL_MAP if kind == "LABELMAP" else SegmentationStorage, elements)


def write_structures(path: Path, rois: dict, **elements) -> Path:
    """An RTSTRUCT; rois: name -> contours, each (N, 3) mm, or (type, (N, 3) mm)."""
    dataset = item(Modality="RTSTRUCT", StructureSetROISequence=[], ROIContourSequence=[])
    for number, (name, contours) in enumerate(rois.items(), start=1):
        dataset.StructureSetROISequence.append(item(ROINumber=number, ROIName=name))
        sequence = []
        for contour in contours:
            kind, points = contour if isinstance(contour, tuple) else ("CLOSED_PLANAR", contour)
            data = [f"{x:.6f}" for x in np.ravel(points)]
            sequence.append(item(ContourGeometricType=kind, NumberOfContourPoints=len(points), ContourData=data))
        roi = item(ReferencedROINumber=number)
        if sequence:
            roi.ContourSequence = sequence
        dataset.ROIContourSequence.append(roi)
    return save(path, dataset, RTStructureSetStorage, elements)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)


def make_image(folder: Path, shape=(4, H, W), **how):
    write_series(folder, noise(*shape).astype(np.int16), **how)
    return read_image(folder, allow=("missing_slices", "uneven_spacing", "gantry_tilt"))


def stack(masks, *, gap=2.0, segment=1, direction=(0, 0, 1)):
    """Frames of one segment, from the origin on."""
    return [(segment, d * gap * np.array(direction, float), mask) for d, mask in enumerate(masks)]


# ---- DICOM SEG


def itk_mask(path: Path, value: int, on: np.ndarray, shape) -> np.ndarray:
    """A value of an NRRD, resampled by SimpleITK on the grid of an affine."""
    grid = sitk.Image(shape[::-1], sitk.sitkUInt8)
    spacings = np.linalg.norm(on[:3, [2, 1, 0]], axis=0)
    grid.SetSpacing(spacings.tolist())
    grid.SetOrigin(on[:3, 3].tolist())
    grid.SetDirection((on[:3, [2, 1, 0]] / spacings).ravel().tolist())
    moved = sitk.Resample(sitk.ReadImage(str(path)), grid, sitk.Transform(), sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(moved) == value


@pytest.mark.parametrize("with_image", [False, True])
def test_a_real_seg_equals_its_nrrd(real_data, with_image):
    folder = real_data / "dicom_seg_dcmqi_ct3"
    image = read_image(folder / "image") if with_image else None
    label = read_label(folder / "seg" / "liver.dcm", "segments", image=image)
    expected = itk_mask(folder / "seg" / "liver_seg.nrrd", 1, label.affine, label.shape)
    assert expected.sum() == 107098
    assert np.array_equal(label.values["Liver"], expected)


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(
    ("name", "file", "value"),
    [("GREEN", 1, 1), ("ORANGE", 2, 2), ("PURPLE", 3, 3), ("LIGHT_BLUE", 1, 4), ("DARK_BLUE", 1, 5)],
)
def test_overlapping_segments_of_a_real_seg_equal_their_nrrds(real_data, with_image, name, file, value):
    folder = real_data / "dicom_seg_dcmqi_ct3"
    image = read_image(folder / "image") if with_image else None
    label = read_label(folder / "seg" / "partial_overlaps.dcm", "segments", image=image)
    expected = itk_mask(folder / "seg" / f"partial_overlaps-{file}.nrrd", value, label.affine, label.shape)
    assert expected.any()
    assert np.array_equal(label.values[name], expected)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("with_image", [False, True])
def test_frames_are_placed_by_position_whatever_their_order(tmp_path, order, with_image):
    masks = noise(4, H, W, seed=1)
    image = make_image(tmp_path / "ct") if with_image else None
    frames = stack(masks)
    path = write_seg(tmp_path / "seg.dcm", [frames[n] for n in order])
    assert np.array_equal(read_segments(path, image=image).values["liver"], masks)


@pytest.mark.parametrize("orientation", [AXIAL, REVERSED, CORONAL, SAGITTAL, OBLIQUE])
def test_a_marked_voxel_lies_where_it_was_marked_in_the_patient(tmp_path, orientation):
    image = make_image(tmp_path / "ct", orientation=orientation, position=(10, -20, 30), spacing=(2, 1.5, 0.5))
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    frame = np.zeros((H, W), bool)
    frame[1, 6] = True
    origin = np.array((10, -20, 30)) + 3 * 2 * normal
    path = write_seg(tmp_path / "seg.dcm", [(1, origin, frame)], orientation=orientation, pixel=(1.5, 0.5))
    label = read_segments(path, image=image)
    (index,) = np.argwhere(label.values["liver"])
    place = label.affine @ (*index, 1)
    assert np.allclose(place[:3], origin + 1 * 1.5 * column + 6 * 0.5 * row, atol=1e-5)


def test_gaps_between_frames_are_empty_slices_without_an_image(tmp_path):
    masks = np.ones((3, H, W), bool)
    frames = [(1, (1, 2, z), mask) for z, mask in zip((30, 24, 22), masks, strict=True)]
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames))
    assert label.values["liver"].any(axis=(1, 2)).tolist() == [True, True, False, False, True]
    expected = [[0, 0, 1, 1], [0, 1, 0, 2], [2, 0, 0, 22], [0, 0, 0, 1]]
    assert np.allclose(label.affine, expected)


def test_a_declared_spacing_tells_the_grid_of_sparse_frames(tmp_path):
    frames = [(1, (0, 0, z), np.ones((H, W))) for z in (0, 6)]
    path = write_seg(tmp_path / "seg.dcm", frames, measures={"SpacingBetweenSlices": 2.0})
    assert read_segments(path).shape == (4, H, W)


@pytest.mark.parametrize("declared", [1.25, 40.0])
def test_a_declared_spacing_that_fits_no_position_is_not_used(tmp_path, declared):
    frames = [(1, (0, 0, z), np.ones((H, W))) for z in (0, 2, 4)]
    path = write_seg(tmp_path / "seg.dcm", frames, measures={"SpacingBetweenSlices": declared})
    assert read_segments(path).shape == (3, H, W)


@pytest.mark.parametrize("measures", [{}, {"SpacingBetweenSlices": 1.2}, {"SpacingBetweenSlices": 1.25}])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path, measures):
    frames = [(1, (0, 0, round(1.25 * d, 1)), np.ones((H, W))) for d in range(41)]
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames, measures=measures))
    assert label.values["liver"].any(axis=(1, 2)).tolist() == [True] * 41
    assert np.allclose(label.affine[:3, 0], [0, 0, 1.25])


def test_a_single_frame_is_as_thick_as_it_says(tmp_path):
    path = write_seg(tmp_path / "seg.dcm", stack(np.ones((1, H, W))), measures={"SliceThickness": 2.5})
    assert read_segments(path).affine[:3, 0].tolist() == [0, 0, 2.5]


def test_frames_of_a_tilted_stack_have_a_leaning_grid(tmp_path):
    frames = stack(np.ones((3, H, W)), direction=(0, 0.25, 1))
    assert read_segments(write_seg(tmp_path / "seg.dcm", frames)).affine[:3, 0].tolist() == [0, 0.5, 2]


def test_frames_on_a_coarser_grid_are_resampled_in_physical_space(tmp_path):
    image = make_image(tmp_path / "ct", (2, 4, 6))
    coarse = noise(2, 2, 3)
    frames = [(1, (0.5, 0.5, 2 * d), mask) for d, mask in enumerate(coarse)]
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames, pixel=(2, 2)), image=image)
    assert np.array_equal(label.values["liver"], coarse.repeat(2, axis=1).repeat(2, axis=2))
    assert "resampled by nearest neighbour" in label.notes[-1]


def test_frames_of_the_same_shape_but_larger_pixels_are_resampled(tmp_path):
    image = make_image(tmp_path / "ct", (2, 4, 6))
    masks = noise(2, 4, 6)
    label = read_segments(write_seg(tmp_path / "seg.dcm", stack(masks), pixel=(3, 3)), image=image)
    nearest = np.ix_(range(2), [0, 0, 1, 1], [0, 0, 1, 1, 1, 2])  # round(n / 3)
    assert np.array_equal(label.values["liver"], masks[nearest])


def test_frames_that_show_a_part_of_the_slices_are_laid_on_that_part(tmp_path):
    image = make_image(tmp_path / "ct")
    masks = noise(4, 2, 3)
    frames = [(1, (3, 1, 2 * d), mask) for d, mask in enumerate(masks)]
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames), image=image)
    assert np.array_equal(label.values["liver"], np.pad(masks, ((0, 0), (1, 2), (3, 1))))


def test_cropped_frames_with_the_corner_of_the_slices_are_laid_there(tmp_path):
    image = make_image(tmp_path / "ct")
    masks = noise(4, 2, 3)
    label = read_segments(write_seg(tmp_path / "seg.dcm", stack(masks)), image=image)
    assert np.array_equal(label.values["liver"], np.pad(masks, ((0, 0), (0, 3), (0, 4))))


def test_frames_of_several_orientations_are_refused(tmp_path):
    path = write_seg(tmp_path / "seg.dcm", stack(np.ones((2, H, W))))
    dataset = dcmread(path)
    turned = item(ImageOrientationPatient=list(map(float, CORONAL)))
    dataset.PerFrameFunctionalGroupsSequence[1].PlaneOrientationSequence = [turned]
    dataset.save_as(path)
    with pytest.raises(ValueError, match="frames differ in orientation or pixel size"):
        read_segments(path)


def test_frames_beyond_the_image_are_cut_off(tmp_path):
    masks = noise(6, H, W)
    image = make_image(tmp_path / "ct", position=(0, 0, 2))
    label = read_segments(write_seg(tmp_path / "seg.dcm", stack(masks)), image=image)
    assert np.array_equal(label.values["liver"], masks[1:5])


def test_a_seg_far_from_its_image_is_refused(tmp_path):
    image = make_image(tmp_path / "ct")
    path = write_seg(tmp_path / "seg.dcm", [(1, (500, 0, 0), np.ones((H, W)))])
    with pytest.raises(ValueError, match="does not overlap its image"):
        read_segments(path, image=image)


@pytest.mark.parametrize("how", [{"drop": (1,)}, {"offsets": (0, 1, 5, 6)}, {"tilt": 0.5}])
def test_frames_find_the_slices_of_a_flawed_series(tmp_path, how):
    image = make_image(tmp_path / "ct", **how)
    written = [d for d in range(4) if d not in how.get("drop", ())]
    offsets, tilt = how.get("offsets", (0, 2, 4, 6)), how.get("tilt", 0)
    masks = noise(4, H, W)
    frames = [(1, (0, d * tilt, offsets[d]), masks[d]) for d in written]
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames[::-1]), image=image)
    assert np.array_equal(label.values["liver"], masks[written])


def test_unevenly_spaced_frames_are_refused_without_the_slices_they_lie_on(tmp_path):
    frames = [(1, (0, 0, z), np.ones((H, W))) for z in (0, 2, 5)]
    with pytest.raises(ValueError, match=r"2 to 3 mm apart, unevenly"):
        read_segments(write_seg(tmp_path / "seg.dcm", frames))


@pytest.mark.parametrize(("largest", "highest_background"), [(255, 127), (100, 50), (1, 0)])
def test_fractions_count_from_more_than_half_on(tmp_path, largest, highest_background):
    values = np.full((H, W), highest_background)
    values[2, 3] += 1
    path = write_seg(tmp_path / "seg.dcm", [(1, (0, 0, 0), values)], kind="FRACTIONAL", largest=largest)
    assert np.argwhere(read_segments(path).values["liver"]).tolist() == [[0, 2, 3]]


def test_a_label_map_is_split_into_its_segments(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 3, (3, H, W))
    frames = [(0, (0, 0, 2 * d), plane) for d, plane in enumerate(numbers)]
    path = write_seg(tmp_path / "seg.dcm", frames[::-1], kind="LABELMAP", labels=("liver", "spleen"))
    label = read_segments(path)
    assert [np.array_equal(label.values[name], numbers == n) for n, name in ((1, "liver"), (2, "spleen"))] == [True] * 2


def test_the_background_of_a_label_map_is_no_segment(tmp_path):
    described = [item(SegmentNumber=n, SegmentLabel=name) for n, name in enumerate(("Background", "liver"))]
    frames = [(0, (0, 0, 0), noise(H, W))]
    path = write_seg(tmp_path / "seg.dcm", frames, kind="LABELMAP", SegmentSequence=described, PixelPaddingValue=0)
    assert list(read_segments(path).values) == ["liver"]


def test_overlapping_segments_keep_their_own_masks(tmp_path):
    masks = noise(2, 3, H, W)
    frames = stack(masks[0]) + stack(masks[1], segment=2)
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames, labels=("liver", "tumour")))
    assert (masks[0] & masks[1]).any()
    assert np.array_equal(np.stack(list(label.values.values())), masks)


def test_a_segment_without_frames_is_an_empty_mask(tmp_path):
    path = write_seg(tmp_path / "seg.dcm", stack(np.ones((2, H, W))), labels=("liver", "spleen"))
    assert read_segments(path).values["spleen"].sum() == 0


def test_a_seg_without_frames_is_empty_on_its_image(tmp_path):
    image = make_image(tmp_path / "ct")
    assert read_segments(write_seg(tmp_path / "seg.dcm", []), image=image).shape == image.shape


def test_segments_of_one_label_are_joined_and_noted(tmp_path):
    masks = noise(2, 2, H, W)
    frames = stack(masks[0]) + stack(masks[1], segment=2)
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames, labels=("lesion", "lesion")))
    assert np.array_equal(label.values["lesion"], masks[0] | masks[1])
    assert label.notes == ("2 segments are named 'lesion': read as one",)


@pytest.mark.parametrize(("same", "notes"), [(True, 0), (False, 1)])
def test_another_frame_of_reference_is_noted(tmp_path, same, notes):
    uid = generate_uid()
    image = make_image(tmp_path / "ct", elements={"FrameOfReferenceUID": uid})
    frames = stack(np.ones((1, H, W)))
    path = write_seg(tmp_path / "seg.dcm", frames, FrameOfReferenceUID=uid if same else generate_uid())
    assert len(read_segments(path, image=image).notes) == notes


def test_a_seg_of_an_xray_without_position_is_placed_on_it(tmp_path):
    mask = noise(H, W)
    image = read_image(write_frames(tmp_path / "cr.dcm", noise(1, H, W).astype(np.uint16), modality="CR"))
    label = read_segments(write_seg(tmp_path / "seg.dcm", [(1, None, mask)]), image=image)
    assert np.array_equal(label.values["liver"][0], mask)


FRAMES = stack(np.ones((2, H, W)))


@pytest.mark.parametrize(
    ("frames", "elements", "says"),
    [
        (FRAMES, {"DimensionOrganizationType": "TILED_FULL"}, "is tiled"),
        ([(1, None, mask) for *_, mask in FRAMES], {}, "no position in the patient"),
        ([FRAMES[0], (1, None, FRAMES[1][2])], {}, "1 of 2 frames have no position"),
        (FRAMES, {"PerFrameFunctionalGroupsSequence": None}, "PerFrameFunctionalGroupsSequence"),
        (FRAMES, {"SharedFunctionalGroupsSequence": None}, "PlaneOrientationSequence"),
        (FRAMES, {"SegmentSequence": None}, "SegmentSequence"),
        (FRAMES, {"SegmentSequence": []}, "is no valid DICOM SEG"),
        (FRAMES, {"PixelData": None}, "cannot be unpacked"),
        (FRAMES, {"NumberOfFrames": 3}, "describes 2 frames but holds 3"),
    ],
)
def test_a_seg_that_cannot_be_placed_is_refused_in_one_line(tmp_path, frames, elements, says):
    path = write_seg(tmp_path / "seg.dcm", frames, **elements)
    with pytest.raises(ValueError, match=says) as error:
        read_segments(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8, 0.99])
def test_a_truncated_seg_is_refused_in_one_line(tmp_path, kept):
    path = write_seg(tmp_path / "seg.dcm", stack(noise(30, H, W)))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"seg\.dcm: .*; (copy|export)") as error:
        read_segments(path)
    assert "\n" not in str(error.value)


def test_a_position_that_is_no_number_is_refused_in_one_line(tmp_path):
    path = write_seg(tmp_path / "seg.dcm", [(1, (12.345, 0, 0), np.ones((H, W)))])
    path.write_bytes(path.read_bytes().replace(b"12.345", b"12;345"))
    with pytest.raises(ValueError, match=r"seg\.dcm: is no valid DICOM SEG .*; export it again") as error:
        read_segments(path)
    assert "\n" not in str(error.value)


def test_odd_values_of_a_patient_are_read_without_a_word(tmp_path, caplog):
    with disable_value_validation():
        path = write_seg(tmp_path / "seg.dcm", FRAMES, PatientID="x" * 65, FrameOfReferenceUID="no UID")
    image = make_image(tmp_path / "ct", shape=(2, H, W))
    read_segments(path, image=image)
    assert not caplog.records


def test_a_slice_of_a_ct_is_no_label(tmp_path):
    (path,) = write_series(tmp_path, noise(1, H, W).astype(np.int16))
    with pytest.raises(ValueError, match=r"slice_000\.dcm: is a DICOM file of another kind \(CT Image Storage\)"):
        read_segments(path)


def test_a_text_file_is_no_label(tmp_path):
    path = tmp_path / "notes.dcm"
    path.write_text("not a DICOM file")
    with pytest.raises(ValueError, match=r"notes\.dcm: is not a DICOM file"):
        read_segments(path)


def test_a_folder_with_one_seg_is_that_seg(tmp_path):
    write_series(tmp_path, noise(2, H, W).astype(np.int16))
    masks = noise(2, H, W)
    path = write_seg(tmp_path / "seg.dcm", stack(masks))
    assert read_segments(tmp_path).path == str(path)


def test_a_folder_with_two_segs_is_refused(tmp_path):
    write_seg(tmp_path / "a.dcm", FRAMES)
    write_seg(tmp_path / "b.dcm", FRAMES)
    with pytest.raises(ValueError, match="holds 2 DICOM SEG or RTSTRUCT files"):
        read_segments(tmp_path)


# ---- RTSTRUCT


def square(low: float, high: float, z: float = 0.0) -> np.ndarray:
    """(4, 3) mm: corners of an axial square, x and y from low to high."""
    return np.array([(low, low, z), (high, low, z), (high, high, z), (low, high, z)])


def test_a_square_of_four_millimetres_holds_sixteen_pixels_on_its_slice(tmp_path):
    image = make_image(tmp_path / "ct", (3, 16, 16))
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"cord": [square(2.5, 6.5, 4.0)]}), image=image)
    expected = np.zeros((3, 16, 16), bool)
    expected[2, 3:7, 3:7] = True
    assert np.array_equal(label.values["cord"], expected)


@pytest.mark.parametrize("low", range(1, 7))
def test_a_square_through_pixel_centres_holds_as_many_of_them_as_its_area(tmp_path, low):
    corner, pixel = (-123.4567, 98.7654, 0), 0.3515625  # in mm of six decimals, corners miss the centres a little
    image = make_image(tmp_path / "ct", (1, 16, 16), position=corner, spacing=(2, pixel, pixel))
    contour = square(low * pixel, (low + 4) * pixel) + np.array(corner)
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"cord": [contour]}), image=image)
    expected = np.zeros((1, 16, 16), bool)
    expected[0, low : low + 4, low : low + 4] = True  # the upper and left edges count, the lower and right do not
    assert np.array_equal(label.values["cord"], expected)


def test_an_inner_contour_is_a_hole(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    path = write_structures(tmp_path / "rs.dcm", {"ring": [square(1.5, 11.5), square(4.5, 8.5)]})
    assert read_segments(path, image=image).values["ring"].sum() == 100 - 16


def test_a_keyhole_contour_leaves_the_same_hole(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    outer, inner = square(1.5, 11.5), square(4.5, 8.5)
    keyhole = np.concatenate([outer, outer[:1], inner[:1], inner[:0:-1], inner[:1]])
    path = write_structures(tmp_path / "rs.dcm", {"ring": [outer, inner], "keyhole": [keyhole]})
    label = read_segments(path, image=image)
    assert np.array_equal(label.values["keyhole"], label.values["ring"])


def test_two_contours_beside_each_other_are_both_held(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    path = write_structures(tmp_path / "rs.dcm", {"lungs": [square(0.5, 3.5), square(8.5, 12.5)]})
    assert read_segments(path, image=image).values["lungs"].sum() == 9 + 16


@pytest.mark.parametrize("corners", [900, 3600])  # more than 64 kB of text is stored without its representation
@pytest.mark.filterwarnings("ignore:.*exceeds the size of 64 kByte")
def test_a_circle_holds_the_centres_nearer_than_its_radius(tmp_path, corners):
    image = make_image(tmp_path / "ct", (1, 32, 32))
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    circle = np.stack([15.2 + 10.3 * np.cos(angles), 14.7 + 10.3 * np.sin(angles), 0 * angles], axis=1)
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"disc": [circle]}), image=image)
    h, w = np.indices((32, 32))
    assert np.array_equal(label.values["disc"][0], np.hypot(w - 15.2, h - 14.7) < 10.3)


def is_inside(h: int, w: int, corners: np.ndarray) -> bool:
    """Even-odd rule for one point: a ray towards higher h, edge by edge."""
    inside = False
    for (w0, h0), (w1, h1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (w0 > w) != (w1 > w) and h < h0 + (h1 - h0) * (w - w0) / (w1 - w0):
            inside = not inside
    return inside


@pytest.mark.parametrize("seed", range(4))
def test_crooked_polygons_hold_what_a_test_of_every_pixel_says(tmp_path, seed):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    corners = np.random.default_rng(seed).uniform(-3, 19, (9, 2)).round(3)  # crosses itself, reaches over the border
    points = np.concatenate([corners, np.zeros((9, 1))], axis=1)
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"star": [points]}), image=image)
    expected = [[is_inside(h, w, corners) for w in range(16)] for h in range(16)]
    assert label.values["star"][0].tolist() == expected


@pytest.mark.parametrize("orientation", [AXIAL, REVERSED, CORONAL, SAGITTAL, OBLIQUE])
def test_contours_lie_where_they_were_drawn_in_the_patient(tmp_path, orientation):
    image = make_image(tmp_path / "ct", (3, H, W), orientation=orientation, position=(9, 8, 7), spacing=(2, 1.5, 0.5))
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    centre = np.array((9, 8, 7)) + 2 * np.cross(row, column) + 3 * 1.5 * column + 5 * 0.5 * row
    contour = [centre + 0.2 * (a * row + b * column) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"seed": [np.array(contour)]}), image=image)
    (index,) = np.argwhere(label.values["seed"])
    assert np.allclose((label.affine @ (*index, 1))[:3], centre, atol=1e-5)


def test_contours_find_the_slices_of_a_series_with_a_missing_slice(tmp_path):
    image = make_image(tmp_path / "ct", (5, 16, 16), drop=(1,))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2.5, 6.5, z) for z in (4.0, 8.0)]})
    label = read_segments(path, image=image)
    assert label.values["cord"].any(axis=(1, 2)).tolist() == [False, True, False, True]


def test_a_contour_within_half_a_slice_belongs_to_it_and_others_are_noted(tmp_path):
    image = make_image(tmp_path / "ct", (3, 16, 16))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2.5, 6.5, 2.9), square(2.5, 6.5, 5.1)]})
    label = read_segments(path, image=image)
    assert label.values["cord"].sum(axis=(1, 2)).tolist() == [0, 16, 0]
    assert label.notes[0].startswith("1 of 2 contours lie on no slice")


def test_of_contours_drawn_closer_than_slices_the_nearest_counts(tmp_path):
    image = make_image(tmp_path / "ct", (3, 16, 16))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2.5, 6.5, 1.4), square(2.5, 5.5, 2.0)]})
    assert read_segments(path, image=image).values["cord"].sum(axis=(1, 2)).tolist() == [0, 9, 0]


def test_of_planes_equally_far_from_a_slice_the_lower_counts(tmp_path):
    """Slices at 0, 3 and 6 mm; 16 pixels drawn at 2.5 mm, 9 at 3.5 mm."""
    image = make_image(tmp_path / "ct", (3, 16, 16), spacing=(3, 1, 1))
    contours = [square(2.5, 5.5, 3.5), square(2.5, 6.5, 2.5)]
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"cord": contours}), image=image)
    assert label.values["cord"].sum(axis=(1, 2)).tolist() == [0, 16, 0]


def test_a_contour_on_a_missing_slice_is_not_put_on_its_neighbour(tmp_path):
    """Of slices every 2 mm those at 2, 4 and 6 mm are missing: 0, 8, 10, 12 and 14 mm are there, 3.5 mm on average."""
    image = make_image(tmp_path / "ct", (8, 16, 16), drop=(1, 2, 3))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2.5, 6.5, z) for z in (6.5, 12.0)]})
    assert read_segments(path, image=image).values["cord"].any(axis=(1, 2)).tolist() == [0, 0, 0, 1, 0]


def test_contours_across_the_slices_are_refused(tmp_path):
    image = make_image(tmp_path / "ct", (3, 16, 16))
    sagittal = square(0.5, 3.5)[:, [2, 0, 1]] + np.array((5, 0, 0))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [sagittal]})
    with pytest.raises(ValueError, match="contours across the slices"):
        read_segments(path, image=image)


def test_a_contour_of_no_numbers_is_refused_in_one_short_line(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2.5, 6.5)]})
    path.write_bytes(path.read_bytes().replace(b"2.500000", b"2;500000"))
    with pytest.raises(ValueError, match=r"rs\.dcm: is no valid DICOM SEG or RTSTRUCT") as error:
        read_segments(path, image=image)
    assert len(str(error.value)) < len(str(path)) + 220


def test_points_and_open_contours_are_left_out_and_noted(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    contours = [square(2.5, 6.5), ("POINT", square(3, 3)[:1]), ("OPEN_PLANAR", square(8, 12))]
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"cord": contours}), image=image)
    assert label.values["cord"].sum() == 16
    assert [note.split(":")[0] for note in label.notes] == [
        "1 contours of type OPEN_PLANAR are not areas",
        "1 contours of type POINT are not areas",
    ]


def test_a_region_without_contours_is_an_empty_mask(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"a": [square(2, 6)], "b": []}), image=image)
    assert label.values["b"].sum() == 0


def test_contours_beside_the_image_are_refused(tmp_path):
    image = make_image(tmp_path / "ct", (1, 16, 16))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(100, 110)]})
    with pytest.raises(ValueError, match="hold no pixel of its image"):
        read_segments(path, image=image)


OFFSETS = (0, 2, 6, 8, 10, 16)  # of slices every 2 mm, those at 4, 12 and 14 mm are missing


def make_gaps(path: Path):
    write_enhanced(path, noise(6, 16, 16).astype(np.int16), offsets=OFFSETS)
    return read_image(path, allow=("missing_slices",))


def test_contours_find_the_frames_of_an_enhanced_file_with_gaps(tmp_path):
    image = make_gaps(tmp_path / "ct.dcm")
    contours = [square(2.5, 6.5 + d, z) for d, z in enumerate(OFFSETS)]  # 4 x 4 pixels, 5 x 5, ...
    label = read_segments(write_structures(tmp_path / "rs.dcm", {"cord": contours}), image=image)
    assert label.values["cord"].sum(axis=(1, 2)).tolist() == [16, 25, 36, 49, 64, 81]


def test_a_seg_finds_the_frames_of_an_enhanced_file_with_gaps(tmp_path):
    image = make_gaps(tmp_path / "ct.dcm")
    masks = noise(6, 16, 16, seed=1)
    frames = [(1, (0, 0, z), mask) for z, mask in zip(OFFSETS, masks, strict=True)]
    label = read_segments(write_seg(tmp_path / "seg.dcm", frames[::-1]), image=image)
    assert np.array_equal(label.values["liver"], masks)


@pytest.mark.parametrize("drop", [(3,), (2, 6, 7)])
def test_a_nifti_label_is_exact_on_the_slices_of_a_series_with_gaps(tmp_path, drop):
    image = make_image(tmp_path / "ct", (10, H, W), drop=drop)
    masks = noise(10, H, W, seed=1)
    nibabel.save(nibabel.Nifti1Image(masks.T.astype(np.uint8), np.diag([-1, -1, 2, 1])), tmp_path / "label.nii")
    label = read_label(tmp_path / "label.nii", image=image)
    assert np.array_equal(label.values, masks[[d for d in range(10) if d not in drop]])


@pytest.mark.parametrize("offsets", [(0, 2, 3, 7, 9), (0, 1, 5, 6, 10)])
def test_a_fine_label_is_exact_on_uneven_slices(tmp_path, offsets):
    image = make_image(tmp_path / "ct", (5, H, W), offsets=offsets)
    masks = noise(11, H, W, seed=1)  # one every mm
    nibabel.save(nibabel.Nifti1Image(masks.T.astype(np.uint8), np.diag([-1, -1, 1, 1])), tmp_path / "label.nii")
    assert np.array_equal(read_label(tmp_path / "label.nii", image=image).values, masks[list(offsets)])


def without_orientation(path: Path):
    volume = nibabel.Nifti1Image(noise(4, H, W).T.astype(np.int16), None)
    volume.set_qform(None, 0)
    volume.set_sform(None, 0)
    nibabel.save(volume, path)
    return read_image(path)


def test_structures_on_a_volume_without_orientation_are_refused(tmp_path):
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2, 6)]})
    with pytest.raises(ValueError, match=r"x\.nii has no position in the patient to lay contours on"):
        read_segments(path, image=without_orientation(tmp_path / "x.nii"))


def test_a_seg_is_laid_on_a_volume_without_orientation_by_its_shape(tmp_path):
    masks = noise(4, H, W, seed=1)
    path = write_seg(tmp_path / "seg.dcm", [(1, (70, -30, 5 + 2 * d), mask) for d, mask in enumerate(masks)])
    label = read_segments(path, image=without_orientation(tmp_path / "x.nii"))
    assert np.array_equal(label.values["liver"], masks)
    assert "laid on it by its shape" in label.notes[0]


def test_structures_without_their_image_are_refused(tmp_path):
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2, 6)]})
    with pytest.raises(ValueError, match="read it together with its image"):
        read_segments(path)


def test_structures_on_an_image_without_position_are_refused(tmp_path):
    values = noise(1, H, W).astype(np.uint16)
    image = read_image(write_frames(tmp_path / "cr.dcm", values, modality="CR", elements={"PixelSpacing": [1, 1]}))
    path = write_structures(tmp_path / "rs.dcm", {"cord": [square(2, 6)]})
    with pytest.raises(ValueError, match="has no position in the patient"):
        read_segments(path, image=image)
