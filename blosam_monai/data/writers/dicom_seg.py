"""Masks as one DICOM SEG that refers to the series they were drawn on, by highdicom.

Why not MONAI's writer: its DICOM output is a secondary capture without segments or references. highdicom is an optional
extra, since reading needs none of it: ``pip install blosam_monai[dicom]``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.uid import generate_uid

from blosam_monai import __version__
from blosam_monai.data.geometry import Image
from blosam_monai.data.readers.dicom import quietly, read_headers
from blosam_monai.data.writers.pictures import COLOURS
from blosam_monai.files import PathLike, atomic

logger = logging.getLogger(__name__)

Codes = Mapping[str, Sequence[str]]  # task -> (value, meaning) of its type, or both of its type and of its category

ALGORITHM = "blosam_monai"
SERIES_DESCRIPTION = "blosam_monai segmentation (research use only)"
SERIES_NUMBER = 300  # listed after the scanner's own series
TISSUE = ("85756007", "Tissue")  # DICOM PS3.16 CID 7150 and 7151: says least, for tasks without a code
ANATOMICAL_STRUCTURE = ("91723000", "Anatomical Structure")  # CID 7150
ARTIFICIAL_INTELLIGENCE = ("123110", "Artificial Intelligence")  # CID 7162
LONG_STRING = 64  # characters of a DICOM value representation LO, as labels and meanings are
CODE_LENGTH = 16  # characters of SH, as code values are
# Patients and studies must have these, if only empty (type 2); anonymised series often lack some.
_MAY_BE_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


@quietly()
def check_dicom_seg(tasks: Collection[str], *, snomed: Codes | None = None, image: Image | None = None) -> None:
    """See before a long prediction whether its tasks can be written as DICOM SEG.

    Args:
        tasks: names, which become segment labels.
        snomed: SNOMED CT codes by task, see ``write_dicom_seg``.
        image: the image that it would refer to.

    Raises:
        ImportError: highdicom is not installed.
        ValueError: names or codes that DICOM cannot hold, codes of no task, or an image that no SEG can refer to.
    """
    _highdicom()
    for task in tasks:
        if not 0 < len(task.strip()) <= LONG_STRING or "\\" in task:
            raise ValueError(f"labels: {task!r} cannot be a DICOM label; use 1 to {LONG_STRING} characters without \\.")
    check_codes(tasks, snomed or {})
    if image is not None:
        _sources(image)


def check_codes(tasks: Collection[str], snomed: Codes) -> None:
    """Codes are of tasks, and of a form that DICOM can hold.

    Raises:
        ValueError: codes of no task, or of another form.
    """
    for task, codes in snomed.items():
        if task not in tasks:
            raise ValueError(f"snomed: {task!r} is no task; the tasks are {', '.join(tasks)}.")
        pairs = isinstance(codes, (list, tuple)) and len(codes) in (2, 4) and all(isinstance(c, str) for c in codes)
        if not pairs or not all(map(_is_code, codes[::2], codes[1::2])):
            raise ValueError(
                f'snomed: {task} has {codes!r}; write ["10200004", "Liver"], the code and its meaning, or these and '
                "the same of the category."
            )


def write_dicom_seg(
    path: PathLike, masks: Mapping[str, np.ndarray], image: Image, *, snomed: Codes | None = None
) -> None:
    """Write masks as the binary segments of one DICOM SEG, beside the series in its study.

    Frames without foreground are left out, unless there is no foreground at all: DICOM allows no SEG without frames.
    Each call makes a series of its own.

    Args:
        path: the file to write.
        masks: name -> (D, H, W) bool, on the image's grid, slices in its order; they may overlap. Taken one after
            another, so that a mapping may make each when asked for.
        image: as read from a DICOM series or file.
        snomed: SNOMED CT codes by name: (code, meaning) of an anatomical structure, as ("10200004", "Liver"), or
            (code, meaning, category code, category meaning), as ("108369006", "Neoplasm", "49755003", "Morphologically
            Abnormal Structure"); a segment without is a tissue.

    Raises:
        ImportError: highdicom is not installed.
        ValueError: names or codes that DICOM cannot hold, masks of another shape, or an image that no SEG can refer to.
    """
    check_dicom_seg(masks, snomed=snomed)
    pixels = _stack(path, masks, image)
    with disable_value_validation(), quietly():  # odd values of the series, names too, are carried over and not told
        sources, order = _sources(image)
        seg = _build(pixels[order], list(masks), sources, image, snomed or {})
        with atomic(path) as part:
            seg.save_as(part)


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise ImportError(
            'DICOM SEG is written by highdicom: pip install blosam_monai[dicom], or choose dicom_output=["nifti"]'
        ) from error
    logging.getLogger("highdicom").setLevel(logging.ERROR)  # it tells UIDs at INFO, and warns of empty masks
    return highdicom


def _is_code(value: str, meaning: str) -> bool:
    return 0 < len(value) <= CODE_LENGTH and 0 < len(meaning) <= LONG_STRING


def _sources(image: Image) -> tuple[list[Dataset], np.ndarray | slice]:
    """Headers that highdicom accepts, and the image's slice that each file, or frame of one file, holds."""
    if not image.files:
        raise ValueError(f"{image.path}: is no DICOM image for a DICOM SEG to refer to; write NIfTI or PNG instead.")
    headers = read_headers(image)
    for header in headers:
        _complete(header, image)
    _join(headers)
    first = headers[0]
    if "PerFrameFunctionalGroupsSequence" in first:
        return headers, _share_groups(first, image)
    if image.shape[0] > len(headers) or (len(headers) > 1 and "FrameOfReferenceUID" not in first):
        raise ValueError(
            f"{image.path}: its {image.shape[0]} slices have no position in a frame of reference, as a DICOM SEG must "
            "have; write NIfTI instead."
        )
    for header in headers[1:]:  # the reader has seen that they are parallel; highdicom asks for the same digits
        header.ImageOrientationPatient = first.ImageOrientationPatient
    return headers, slice(None)


def _complete(header: Dataset, image: Image) -> None:
    """Add what a header lacks: what may be empty, and UIDs that were removed from it but not from its file's start."""
    for keyword in _MAY_BE_EMPTY:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        uid = header.get(keyword) or header.file_meta.get(f"MediaStorage{keyword}")
        if not uid:
            raise ValueError(f"{image.path}: has no {keyword} for a DICOM SEG to refer to; write NIfTI instead.")
        setattr(header, keyword, uid)


def _join(headers: Sequence[Dataset]) -> None:
    """Give an image whose study or series UID was removed new ones, the same for all of its slices and SEGs."""
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        if not headers[0].get(keyword):
            logger.warning("the series has no %s: the DICOM SEG names a new one", keyword)
            uid = generate_uid(entropy_srcs=[keyword, headers[0].SOPInstanceUID])
            for header in headers:
                setattr(header, keyword, uid)


def _share_groups(header: Dataset, image: Image) -> np.ndarray:
    """Move orientation and pixel size, the same in all frames, to the shared groups; (D,) the slice of each frame."""
    if not header.get("SharedFunctionalGroupsSequence"):
        header.SharedFunctionalGroupsSequence = [Dataset()]
    shared, frames = header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name not in shared:
            shared[name] = frames[0][name]
    if image.affine is None or len(frames) != image.shape[0]:
        raise ValueError(
            f"{image.path}: {image.shape[0]} slices were read of its {len(frames)} frames, and a DICOM SEG refers to "
            "all; write NIfTI instead."
        )
    positions = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], float)
    along = (positions - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3])[0]  # (D,) in slices
    return np.argsort(np.argsort(along))


class _Layers(np.ndarray):
    """Masks (D, H, W, T); highdicom takes their sum over T, 64 bits a voxel, to see that they overlap: 16 suffice."""

    def sum(self, axis: Any = None, dtype: Any = np.uint16, **options: Any) -> Any:  # type: ignore[override]
        return super().sum(axis, dtype, **options)


def _stack(path: PathLike, masks: Mapping[str, np.ndarray], image: Image) -> np.ndarray:
    """Masks as (D, H, W) segment numbers, which take least memory; where they overlap, as (D, H, W, T)."""
    numbers = np.zeros(image.shape, np.uint8 if len(masks) < 256 else np.uint16)
    for number, (name, mask) in enumerate(masks.items(), start=1):
        if mask.shape != image.shape:
            raise ValueError(f"{path}: mask {name} has shape {mask.shape}, its image {image.shape}; invert it first.")
        if numbers[mask].any():
            return _layer(masks, image)
        numbers[mask] = number
    return numbers


def _layer(masks: Mapping[str, np.ndarray], image: Image) -> np.ndarray:
    layers = np.empty((len(masks), *image.shape), bool)
    for layer, mask in zip(layers, masks.values(), strict=True):
        layer[:] = mask
    return np.moveaxis(layers, 0, -1).view(_Layers)  # (D, H, W, T)


def _build(pixels: np.ndarray, names: Sequence[str], sources: list[Dataset], image: Image, snomed: Codes) -> Dataset:
    seg = _highdicom().seg
    segments = [_describe(number, name, snomed.get(name)) for number, name in enumerate(names, start=1)]
    try:
        return seg.Segmentation(
            source_images=sources,
            pixel_array=pixels,
            segmentation_type=seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER,
            series_description=SERIES_DESCRIPTION,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=ALGORITHM,
            manufacturer_model_name=ALGORITHM,
            software_versions=__version__,
            device_serial_number="0",
            content_label="SEGMENTATION",
            content_description=SERIES_DESCRIPTION,
            specific_character_set="ISO_IR 192",
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{image.path}: no DICOM SEG can refer to it ({error}); write NIfTI instead.") from error


def _describe(number: int, name: str, codes: Sequence[str] | None) -> Dataset:
    highdicom = _highdicom()
    kind = TISSUE if codes is None else codes[:2]
    category = TISSUE if codes is None else codes[2:] or ANATOMICAL_STRUCTURE
    colour = (COLOURS[(number - 1) % len(COLOURS)]).astype(int).tolist()  # those of the overlays
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=_coded("SCT", category),
        segmented_property_type=_coded("SCT", kind),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=ALGORITHM, version=__version__, family=_coded("DCM", ARTIFICIAL_INTELLIGENCE)
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*colour),
    )


def _coded(scheme: str, code: Sequence[str]) -> Any:
    value, meaning = code
    return _highdicom().sr.CodedConcept(value, scheme, meaning)
