"""Writes small DICOM files for tests: series of slices, multi-frame files, and what is wrong with real ones."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from pydicom import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

AXIAL = (1, 0, 0, 0, 1, 0)
CORONAL = (1, 0, 0, 0, 0, -1)
SAGITTAL = (0, 1, 0, 0, 0, -1)
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)  # coronal, turned by atan(3 / 4) about z

_SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
    "OT": "1.2.840.10008.5.1.4.1.1.7",
}
_ENHANCED = {"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1"}
_ULTRASOUND_FRAMES = "1.2.840.10008.5.1.4.1.1.3.1"


def write_series(
    folder: Path,
    values: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    position: Sequence[float] = (0, 0, 0),
    spacing: Sequence[float] = (2, 1, 1),
    offsets: Sequence[float] | None = None,
    tilt: float = 0,
    drop: Collection[int] = (),
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
    series_uid: str | None = None,
    patient_name: str = "Phantom^Test",
    modality: str = "CT",
    description: str = "phantom",
    slope: float | Sequence[float] = 1,
    intercept: float | Sequence[float] = 0,
    photometric: str | None = None,
    compression: str | None = None,
    elements: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write one file a slice and return their paths in the order of the slices.

    Args:
        folder: made if missing; files that are there stay.
        values: (D, H, W) stored values, of int16, uint16 or uint8; or (D, H, W, 3) uint8 colours.
        orientation: direction cosines of a row (towards higher w), then of a column (towards higher h).
        position: centre of voxel (0, 0, 0), mm LPS.
        spacing: of d, h, w in mm; d runs along the normal, row x column.
        offsets: (D,) of each slice along the normal in mm; by default d times the spacing.
        tilt: mm that each slice is shifted along its columns (h) per step, as under a tilted gantry.
        drop: slices that are not written.
        names: (D,) file names; by default slice_000.dcm ...
        numbers: (D,) InstanceNumber; by default 1, 2 ...
        slope, intercept: for all slices, or one a slice.
        photometric: MONOCHROME2 by default, RGB for colours.
        compression: transfer syntax; by default not compressed.
        elements: keywords -> values to set last in every file; None removes the element.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    offsets = [d * spacing[0] for d in range(len(values))] if offsets is None else offsets
    series_uid = series_uid or generate_uid()
    slopes, intercepts = (np.broadcast_to(number, len(values)).tolist() for number in (slope, intercept))
    paths = []
    for d, plane in enumerate(values):
        if d in drop:
            continue
        number = d + 1 if numbers is None else numbers[d]
        dataset = _describe(series_uid, number, patient_name, modality, description, _SOP_CLASSES[modality])
        dataset.ImageOrientationPatient = list(map(float, orientation))
        dataset.ImagePositionPatient = _decimal(np.array(position) + offsets[d] * normal + d * tilt * column)
        dataset.PixelSpacing = _decimal(spacing[1:])
        dataset.SliceThickness = float(spacing[0])
        dataset.RescaleSlope, dataset.RescaleIntercept = slopes[d], intercepts[d]
        path = folder / (f"slice_{d:03d}.dcm" if names is None else names[d])
        _save(path, dataset, plane[None], photometric=photometric, compression=compression, elements=elements or {})
        paths.append(path)
    return paths


def write_enhanced(
    path: Path,
    values: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    position: Sequence[float] = (0, 0, 0),
    spacing: Sequence[float] = (2, 1, 1),
    offsets: Sequence[float] | None = None,
    slope: float | Sequence[float] = 1,
    intercept: float | Sequence[float] = 0,
    modality: str = "CT",
    series_uid: str | None = None,
    compression: str | None = None,
    elements: Mapping[str, object] | None = None,
) -> Path:
    """Write a multi-frame enhanced CT or MR file; arguments as in ``write_series``, frames in the order of values."""
    dataset = _describe(
        series_uid or generate_uid(), 1, "Phantom^Test", modality, "enhanced phantom", _ENHANCED[modality]
    )
    normal = np.cross(orientation[:3], orientation[3:])
    offsets = [d * spacing[0] for d in range(len(values))] if offsets is None else offsets
    slopes, intercepts = (np.broadcast_to(number, len(values)).tolist() for number in (slope, intercept))
    measures = _item(PixelSpacing=_decimal(spacing[1:]), SliceThickness=float(spacing[0]))
    dataset.SharedFunctionalGroupsSequence = [
        _item(
            PixelMeasuresSequence=[measures],
            PlaneOrientationSequence=[_item(ImageOrientationPatient=list(map(float, orientation)))],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=_decimal(np.array(position) + offset * normal))],
            PixelValueTransformationSequence=[
                _item(RescaleSlope=slopes[d], RescaleIntercept=intercepts[d], RescaleType="HU")
            ],
        )
        for d, offset in enumerate(offsets)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(path, dataset, values, photometric=None, compression=compression, elements=elements or {})
    return path


def write_frames(
    path: Path,
    values: np.ndarray,
    *,
    modality: str = "US",
    photometric: str | None = None,
    compression: str | None = None,
    elements: Mapping[str, object] | None = None,
) -> Path:
    """Write a file without a position: an X-ray, a secondary capture, or the frames (D, H, W[, 3]) of an ultrasound."""
    sop_class = _ULTRASOUND_FRAMES if modality == "US" and len(values) > 1 else _SOP_CLASSES[modality]
    dataset = _describe(generate_uid(), 1, "Phantom^Test", modality, "frames", sop_class)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(path, dataset, values, photometric=photometric, compression=compression, elements=elements or {})
    return path


def _describe(
    series_uid: str, number: int, patient_name: str, modality: str, description: str, sop_class: str
) -> Dataset:
    """Patient, study, series and instance: what highdicom asks of the images that it refers to."""
    dataset = Dataset()
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(number), "instance"])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[patient_name, "study"])
    dataset.SeriesInstanceUID = series_uid
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[patient_name, "frame of reference"])
    dataset.PositionReferenceIndicator = ""
    dataset.PatientName, dataset.PatientID = patient_name, "PHANTOM-1"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260101", "120000", "1"
    dataset.Modality, dataset.SeriesDescription = modality, description
    dataset.SeriesNumber, dataset.InstanceNumber = 1, number
    dataset.Manufacturer = "Phantom"
    return dataset


def _save(
    path: Path,
    dataset: Dataset,
    frames: np.ndarray,
    *,
    photometric: str | None,
    compression: str | None,
    elements: Mapping[str, object],
) -> None:
    """Put (D, H, W[, 3]) pixels into a data set and write it."""
    colours = frames.ndim == 4
    dataset.SamplesPerPixel = 3 if colours else 1
    if colours:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric or ("RGB" if colours else "MONOCHROME2")
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    dataset.BitsAllocated = dataset.BitsStored = 8 * frames.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pixels = frames.tobytes()
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    dataset["PixelData"].VR = "OB" if frames.itemsize == 1 else "OW"
    if compression == JPEGBaseline8Bit:
        _compress_jpeg(dataset, frames)
    elif compression == DeflatedExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = compression  # applied on saving
    elif compression is not None:
        dataset.compress(UID(compression), generate_instance_uid=False)
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID or _SOP_CLASSES["OT"]  # anonymisers leave it
    dataset.save_as(path, enforce_file_format=True)


def _compress_jpeg(dataset: Dataset, frames: np.ndarray) -> None:
    """JPEG baseline by Pillow, quality 95; colours become YBR_FULL_422, as scanners write them."""
    streams = []
    for plane in frames:
        stream = io.BytesIO()
        Pillow.fromarray(plane).save(stream, "JPEG", quality=95, subsampling="4:2:2")
        streams.append(stream.getvalue())
    dataset.PixelData = encapsulate(streams)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    if frames.ndim == 4:
        dataset.PhotometricInterpretation = "YBR_FULL_422"


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def _decimal(numbers: np.ndarray | Sequence[float]) -> list[float]:
    """Numbers that fit the 16 characters of a DICOM decimal string."""
    return [round(float(number), 8) for number in numbers]
