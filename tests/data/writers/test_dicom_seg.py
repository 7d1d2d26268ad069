from __future__ import annotations

import logging
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import RLELossless

from blosam_monai import __version__
from blosam_monai.data.geometry import Image
from blosam_monai.data.readers import read_image, read_label
from blosam_monai.data.readers.dicom import FLAWS, read_headers
from blosam_monai.data.writers.dicom_seg import check_dicom_seg, write_dicom_seg
from tests.data.dicom_files import AXIAL, CORONAL, OBLIQUE, SAGITTAL, write_enhanced, write_frames, write_series

SHAPE = (4, 5, 7)  # 35 pixels: frames do not begin with a byte
REVERSED = (1, 0, 0, 0, -1, 0)  # axial, columns run to the front: the normal points to the feet


def noise(shape=SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)


def pixels(shape=SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


SERIES = {
    "axial": {"orientation": AXIAL},
    "axially reversed": {"orientation": REVERSED},
    "coronal": {"orientation": CORONAL},
    "sagittal": {"orientation": SAGITTAL},
    "oblique": {"orientation": OBLIQUE, "position": (-101.25, 33.3, 7.125), "spacing": (1.7, 0.6, 0.6)},
    "shuffled file names": {"names": ["d", "a", "c", "b"]},
    "numbered backwards": {"numbers": [4, 3, 2, 1]},
    "compressed": {"compression": RLELossless},
    "tilted": {"tilt": 0.7},
    "slice missing": {"drop": (1,)},
    "uneven": {"offsets": (0, 2, 5, 6)},
}


@pytest.fixture(params=SERIES)
def series(request, tmp_path) -> Image:
    write_series(tmp_path / "ct", pixels(), **SERIES[request.param])
    return read_image(tmp_path / "ct", allow=FLAWS)


@pytest.fixture
def ct(tmp_path) -> Image:
    write_series(tmp_path / "ct", pixels())
    return read_image(tmp_path / "ct")


@pytest.fixture
def seg(tmp_path) -> Path:
    return tmp_path / "out" / "seg.dcm"


def masks_for(image: Image) -> dict[str, np.ndarray]:
    """Three tasks: two overlap, one is empty; the first slice is empty."""
    masks = {"liver": noise(image.shape, 1), "tumour": noise(image.shape, 2), "spleen": np.zeros(image.shape, bool)}
    masks["liver"][0] = masks["tumour"][0] = False
    return masks


def same(found, expected: dict[str, np.ndarray]) -> bool:
    return list(found) == list(expected) and all(np.array_equal(found[name], expected[name]) for name in expected)


def test_masks_read_back_on_their_series_are_identical(series, seg):
    masks = masks_for(series)
    write_dicom_seg(seg, masks, series)
    assert same(read_label(seg, "segments", image=series).values, masks)


def test_highdicom_finds_each_mask_on_its_source_slice(series, seg):
    masks = masks_for(series)
    write_dicom_seg(seg, masks, series)
    uids = [header.SOPInstanceUID for header in read_headers(series)]
    found = highdicom.seg.segread(seg).get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert np.array_equal(found, np.stack(list(masks.values()), axis=-1))


def test_every_frame_lies_where_the_slice_it_was_drawn_on_lies(series, seg):
    masks = masks_for(series)
    write_dicom_seg(seg, masks, series)
    position_of = {header.SOPInstanceUID: header.ImagePositionPatient for header in read_headers(series)}
    frames = pydicom.dcmread(seg).PerFrameFunctionalGroupsSequence
    found = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames]
    sources = [frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID for frame in frames]
    assert found == [position_of[uid] for uid in sources]


def test_frames_hold_the_pixels_of_their_mask_and_empty_ones_are_left_out(ct, seg):
    masks = masks_for(ct)
    write_dicom_seg(seg, masks, ct)
    dataset = pydicom.dcmread(seg)
    heights = [header.ImagePositionPatient[2] for header in read_headers(ct)]
    expected = {
        (number, heights[d]): mask[d].tolist()
        for number, mask in enumerate(masks.values(), start=1)
        for d in range(len(mask))
        if mask[d].any()
    }
    found = {
        (
            frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber,
            frame.PlanePositionSequence[0].ImagePositionPatient[2],
        ): plane.astype(bool).tolist()
        for frame, plane in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True)
    }
    assert found == expected


@pytest.mark.parametrize("name", ["axial", "axially reversed", "coronal", "sagittal", "oblique", "tilted"])
def test_a_seg_without_its_image_has_the_grid_of_the_series(tmp_path, seg, name):
    write_series(tmp_path / "ct", pixels(), **SERIES[name])
    image = read_image(tmp_path / "ct", allow=FLAWS)
    mask = noise()
    write_dicom_seg(seg, {"liver": mask}, image)
    label = read_label(seg, "segments")
    assert np.allclose(label.affine, image.affine, atol=1e-5)
    assert np.array_equal(label.values["liver"], mask)


@pytest.mark.parametrize("offsets", [(0, 2, 4, 6), (6, 4, 2, 0), (4, 0, 6, 2)])
def test_an_enhanced_file_gets_its_masks_on_the_frames_they_were_drawn_on(tmp_path, seg, offsets):
    source = write_enhanced(tmp_path / "ct.dcm", pixels(), offsets=offsets)
    image = read_image(source)
    masks = masks_for(image)
    write_dicom_seg(seg, masks, image)
    order = np.argsort(offsets)  # frame of each slice, counted from 0
    found = highdicom.seg.segread(seg).get_pixels_by_source_frame(
        pydicom.dcmread(source).SOPInstanceUID, (order + 1).tolist(), assert_missing_frames_are_empty=True
    )
    assert np.array_equal(found, np.stack(list(masks.values()), axis=-1))
    assert same(read_label(seg, "segments", image=image).values, masks)


def test_an_enhanced_file_with_orientation_in_every_frame_is_accepted(tmp_path, seg):
    source = write_enhanced(tmp_path / "ct.dcm", pixels(), orientation=OBLIQUE)
    dataset = pydicom.dcmread(source)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            frame[name] = shared[name]
    del dataset.SharedFunctionalGroupsSequence
    dataset.save_as(source)
    image = read_image(source)
    masks = masks_for(image)
    write_dicom_seg(seg, masks, image)
    assert same(read_label(seg, "segments", image=image).values, masks)


def test_a_single_slice_round_trips(tmp_path, seg):
    write_series(tmp_path / "ct", pixels((1, 5, 7)))
    image = read_image(tmp_path / "ct")
    mask = noise((1, 5, 7))
    write_dicom_seg(seg, {"liver": mask}, image)
    assert same(read_label(seg, "segments", image=image).values, {"liver": mask})


def test_an_xray_without_position_round_trips(tmp_path, seg):
    image = read_image(write_frames(tmp_path / "cr.dcm", pixels((1, 5, 7)).astype(np.uint16), modality="CR"))
    masks = {"lung": noise((1, 5, 7), 1), "heart": noise((1, 5, 7), 2)}
    write_dicom_seg(seg, masks, image)
    assert same(read_label(seg, "segments", image=image).values, masks)


def test_masks_that_are_all_empty_give_a_file_with_empty_frames(ct, seg):
    masks = {"liver": np.zeros(SHAPE, bool), "spleen": np.zeros(SHAPE, bool)}
    write_dicom_seg(seg, masks, ct)
    assert pydicom.dcmread(seg).NumberOfFrames == 2 * 4
    assert same(read_label(seg, "segments", image=ct).values, masks)


@pytest.mark.parametrize(("overlap", "says"), [(True, "YES"), (False, "NO")])
def test_the_file_says_whether_segments_overlap(ct, seg, overlap, says):
    mask = noise()
    write_dicom_seg(seg, {"liver": mask, "rest": mask if overlap else ~mask}, ct)
    assert pydicom.dcmread(seg).SegmentsOverlap == says


def test_more_than_255_tasks_keep_their_own_masks(ct, seg):
    masks = {f"part {n}": np.zeros(SHAPE, bool) for n in range(260)}
    for n in range(120, 260):
        masks[f"part {n}"].flat[n - 120] = True
    write_dicom_seg(seg, masks, ct)
    assert same(read_label(seg, "segments", image=ct).values, masks)


def test_slices_whose_orientation_differs_by_rounding_are_accepted(tmp_path, seg):
    paths = write_series(tmp_path / "ct", pixels())
    dataset = pydicom.dcmread(paths[2])
    dataset.ImageOrientationPatient = [1, 1e-6, 0, -1e-6, 1, 0]
    dataset.save_as(paths[2])
    image = read_image(tmp_path / "ct")
    mask = noise()
    write_dicom_seg(seg, {"liver": mask}, image)
    assert same(read_label(seg, "segments", image=image).values, {"liver": mask})


def code(sequence) -> tuple[str, str, str]:
    return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator, sequence[0].CodeMeaning


@pytest.mark.parametrize(
    ("snomed", "kind", "category"),
    [
        ({}, ("85756007", "SCT", "Tissue"), ("85756007", "SCT", "Tissue")),
        (
            {"liver": ["10200004", "Liver"]},
            ("10200004", "SCT", "Liver"),
            ("91723000", "SCT", "Anatomical Structure"),
        ),
        (
            {"liver": ["108369006", "Neoplasm", "49755003", "Morphologically Abnormal Structure"]},
            ("108369006", "SCT", "Neoplasm"),
            ("49755003", "SCT", "Morphologically Abnormal Structure"),
        ),
    ],
)
def test_a_segment_names_its_snomed_codes(ct, seg, snomed, kind, category):
    write_dicom_seg(seg, {"liver": noise()}, ct, snomed=snomed)
    segment = pydicom.dcmread(seg).SegmentSequence[0]
    assert code(segment.SegmentedPropertyTypeCodeSequence) == kind
    assert code(segment.SegmentedPropertyCategoryCodeSequence) == category


def test_a_segment_names_the_algorithm_and_its_version(ct, seg):
    write_dicom_seg(seg, {"liver": noise()}, ct)
    segment = pydicom.dcmread(seg).SegmentSequence[0]
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == ("AUTOMATIC", "blosam_monai")
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("blosam_monai", __version__)


def test_the_file_belongs_to_the_patient_and_study_of_its_series_and_says_what_it_is(ct, seg):
    write_dicom_seg(seg, {"liver": noise()}, ct)
    dataset, source = pydicom.dcmread(seg), read_headers(ct)[0]
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.SeriesDescription == "blosam_monai segmentation (research use only)"
    assert dataset.Manufacturer == "blosam_monai"


def test_the_file_refers_to_all_slices_of_its_series(ct, seg):
    write_dicom_seg(seg, {"liver": noise()}, ct)
    (series,) = pydicom.dcmread(seg).ReferencedSeriesSequence
    headers = read_headers(ct)
    assert series.SeriesInstanceUID == headers[0].SeriesInstanceUID
    found = {instance.ReferencedSOPInstanceUID for instance in series.ReferencedInstanceSequence}
    assert found == {header.SOPInstanceUID for header in headers}


def test_every_call_makes_a_series_and_an_instance_of_its_own(ct, seg, tmp_path):
    for path in (seg, tmp_path / "other.dcm"):
        write_dicom_seg(path, {"liver": noise()}, ct)
    one, other = pydicom.dcmread(seg), pydicom.dcmread(tmp_path / "other.dcm")
    assert len({one.SOPInstanceUID, other.SOPInstanceUID, one.SeriesInstanceUID, other.SeriesInstanceUID}) == 4


def test_names_beyond_ascii_are_kept(tmp_path, seg):
    latin = {"SpecificCharacterSet": "ISO_IR 100"}
    write_series(tmp_path / "ct", pixels(), patient_name="Müller^Jörg", elements=latin)
    image = read_image(tmp_path / "ct")
    write_dicom_seg(seg, {"épine 脊柱": noise()}, image)
    dataset = pydicom.dcmread(seg)
    assert dataset.PatientName == "Müller^Jörg"
    assert list(read_label(seg, "segments", image=image).values) == ["épine 脊柱"]


def test_an_anonymised_series_without_patient_and_uids_is_accepted(tmp_path, seg):
    gone = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyID", "AccessionNumber")
    emptied = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    paths = write_series(tmp_path / "ct", pixels())
    for path in paths:
        dataset = pydicom.dcmread(path)
        for keyword in gone:
            del dataset[keyword]
        for keyword in emptied:
            dataset[keyword].value = ""
        dataset.save_as(path)
    image = read_image(tmp_path / "ct")
    mask = noise()
    write_dicom_seg(seg, {"liver": mask}, image)
    assert same(read_label(seg, "segments", image=image).values, {"liver": mask})
    referenced = pydicom.dcmread(seg).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    stored = {pydicom.dcmread(path).file_meta.MediaStorageSOPInstanceUID for path in paths}
    assert {instance.ReferencedSOPInstanceUID for instance in referenced} == stored


def test_odd_values_of_a_series_are_carried_over_without_a_word(tmp_path, seg, caplog):
    paths = write_series(tmp_path / "ct", pixels())
    with pydicom.config.disable_value_validation():
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.StudyDate, dataset.AccessionNumber = "2026.01.01", "longer than sixteen characters"
            dataset.PatientName = "JOHNDOE"  # of one component: highdicom would quote it in a warning
            dataset.save_as(path)
    image = read_image(tmp_path / "ct")
    caplog.clear()
    write_dicom_seg(seg, {"liver": noise()}, image)
    assert not caplog.records
    with pydicom.config.disable_value_validation():
        assert pydicom.dcmread(seg).AccessionNumber == "longer than sixteen characters"


def test_a_file_that_fails_to_be_written_leaves_the_one_before_it(ct, seg, monkeypatch):
    def save_half(self, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    write_dicom_seg(seg, {"liver": noise()}, ct)
    before = seg.read_bytes()
    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", save_half)
    with pytest.raises(OSError, match="disk full"):
        write_dicom_seg(seg, {"liver": noise()}, ct)
    assert {path.name: path.read_bytes() for path in seg.parent.iterdir()} == {"seg.dcm": before}


def test_nothing_of_the_patient_is_logged(tmp_path, seg, caplog):
    caplog.set_level(logging.DEBUG)
    write_series(tmp_path / "ct", pixels(), patient_name="Secret^Name", elements={"StudyInstanceUID": ""})
    image = read_image(tmp_path / "ct")
    write_dicom_seg(seg, {"liver": noise()}, image)
    assert "no StudyInstanceUID" in caplog.text
    assert not any(word in caplog.text for word in ("Secret", "PHANTOM-1", read_headers(image)[0].SOPInstanceUID))


def refusal(path: Path, *args, **kwargs) -> str:
    """What a call is refused with; nothing may be left behind."""
    with pytest.raises(ValueError, match=r"NIfTI|invert") as error:
        write_dicom_seg(path, *args, **kwargs)
    assert not path.parent.exists() or not list(path.parent.iterdir())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_volume_that_is_no_dicom_is_refused(tmp_path, seg):
    volume = sitk.GetImageFromArray(pixels())
    sitk.WriteImage(volume, str(tmp_path / "ct.nii.gz"))
    image = read_image(tmp_path / "ct.nii.gz")
    assert "ct.nii.gz: is no DICOM image" in refusal(seg, {"liver": noise()}, image)


def test_frames_without_position_are_refused(tmp_path, seg):
    image = read_image(write_frames(tmp_path / "us.dcm", pixels().astype(np.uint8)))
    assert "us.dcm: its 4 slices have no position" in refusal(seg, {"liver": noise()}, image)


def test_a_series_without_frame_of_reference_is_refused(tmp_path, seg):
    write_series(tmp_path / "ct", pixels(), elements={"FrameOfReferenceUID": None})
    image = read_image(tmp_path / "ct")
    assert "ct: its 4 slices have no position in a frame of reference" in refusal(seg, {"liver": noise()}, image)


def test_an_enhanced_file_of_which_frames_were_left_out_is_refused(tmp_path, seg):
    image = read_image(write_enhanced(tmp_path / "ct.dcm", pixels(), offsets=(0, 0, 2, 4)), allow=FLAWS)
    assert "3 slices were read of its 4 frames" in refusal(seg, {"liver": noise(image.shape)}, image)


def test_masks_of_another_shape_are_refused(ct, seg):
    assert "mask liver has shape (4, 7, 5), its image (4, 5, 7)" in refusal(seg, {"liver": noise((4, 7, 5))}, ct)


@pytest.mark.parametrize(
    ("tasks", "snomed", "says"),
    [
        (["x" * 65], {}, "cannot be a DICOM label"),
        (["a\\b"], {}, "cannot be a DICOM label"),
        ([" "], {}, "cannot be a DICOM label"),
        (["liver"], {"spleen": ["78961009", "Spleen"]}, "'spleen' is no task; the tasks are liver"),
        (["liver"], {"liver": "10200004"}, "snomed: liver has '10200004'"),
        (["liver"], {"liver": ["10200004"]}, "snomed: liver has"),
        (["liver"], {"liver": [10200004, "Liver"]}, "snomed: liver has"),
        (["liver"], {"liver": ["10200004", ""]}, "snomed: liver has"),
    ],
)
def test_what_dicom_cannot_hold_is_said_beforehand(tasks, snomed, says):
    with pytest.raises(ValueError, match=r"^(labels|snomed): ") as error:
        check_dicom_seg(tasks, snomed=snomed)
    assert says in str(error.value)


def test_without_highdicom_the_check_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r"pip install blosam_monai\[dicom\]"):
        check_dicom_seg(["liver"])


@pytest.mark.parametrize("folder", ["dicom_totalseg_ct/image", "msd_hippocampus/dicom_unlabelled/13_HCropVolume"])
def test_a_real_series_gets_a_seg_that_reads_back_identically(real_data, seg, folder):
    image = read_image(real_data / folder)
    masks = masks_for(image)
    write_dicom_seg(seg, masks, image)
    assert same(read_label(seg, "segments", image=image).values, masks)
    uids = [pydicom.dcmread(f, stop_before_pixels=True).file_meta.MediaStorageSOPInstanceUID for f in image.files]
    found = highdicom.seg.segread(seg).get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert np.array_equal(found, np.stack(list(masks.values()), axis=-1))
