"""DICOM images: a series in a folder, a single file, or a multi-frame file; placed by position, checked before use.

pydicom reads headers and uncompressed or run-length coded pixels, GDCM (through SimpleITK) decodes JPEG, JPEG-LS and
JPEG 2000. Why not ``SimpleITK.ImageSeriesReader`` for all of it: it stacks what a folder holds without a word on
missing or doubled slices, applies the first frame's rescale to all frames of an enhanced file, and fails on run-length
coded slices of some sizes.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import walk
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)

from blosam_monai.data.geometry import Image
from blosam_monai.files import PathLike

FLAWS = ("missing_slices", "duplicate_positions", "uneven_spacing", "gantry_tilt")

SAME_POSITION = 0.01  # mm; acquisitions repeated at one position differ by rounding only
EVEN = 0.1  # of a step, off its even place; positions rounded to 0.1 mm stay within it for steps of 0.5 mm and more
TILT = 0.25  # pixels from the first slice to the last; rounded positions and direction cosines stay within it
SAME_DIRECTION = 1e-3  # of direction cosines, which have four digits or more; half a pixel at 512 pixels
SAME_SPACING = 1e-3  # of a pixel's size, likewise

LABEL_MAP = UID("1.2.840.10008.5.1.4.1.1.66.7")  # Label Map Segmentation Storage, which pydicom does not name
# Pixels on a grid of their own, not a scanner's.
_NO_IMAGES = {SegmentationStorage, LABEL_MAP, "SEG", RTDoseStorage, "RTDOSE"}
_SLICED = ("CT", "MR", "PT", "NM")  # slices, even where an anonymiser took their positions
_GROUP_OF = {  # where a multi-frame file keeps what a slice's file has at its top
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
_PIXEL_MODULE = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)
_TAGS = (
    *_GROUP_OF,
    *_PIXEL_MODULE,
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesDescription",
    "Modality",
    "InstanceNumber",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ModalityLUTSequence",
)


@dataclass(frozen=True)
class Series:
    """What a folder says of one of its series.

    Attributes:
        uid: SeriesInstanceUID, empty where it was removed.
        description, modality: as in the header of its first file.
        files: sorted by name.
        rows, columns: of its first file, in pixels.
        frames: slices in all files.
        is_stack: whether its files are, or may be, the slices of one volume; films are not: each is an image.
    """

    uid: str
    description: str
    modality: str
    files: tuple[Path, ...]
    rows: int
    columns: int
    frames: int
    is_stack: bool = True

    def __str__(self) -> str:
        name = self.description or self.modality or "no description"
        return f"{name!r} {self.rows} x {self.columns} x {self.frames} UID {self.uid or '(none)'}"


@dataclass(frozen=True)
class _Slice:
    """A slice: where its pixels are, where it lies in the patient, and what its numbers mean."""

    file: Path
    frame: int
    header: Dataset
    position: np.ndarray | None  # (3,) mm LPS, centre of its first pixel
    directions: np.ndarray | None  # (2, 3): along a row, along a column
    pixel: np.ndarray | None  # (2,) mm from row to row, from column to column
    slope: float
    intercept: float

    @property
    def is_colour(self) -> bool:
        return self.header.get("SamplesPerPixel", 1) == 3 or _photometric(self.header) == "PALETTE COLOR"

    @property
    def rank(self) -> tuple[int, str, int]:
        """The order among slices of one position."""
        number = _numbers(self.file, self.header, self.frame, "InstanceNumber", 1)
        return 0 if number is None else int(number[0]), self.file.name, self.frame


@contextmanager
def quietly() -> Iterator[None]:
    """Keep remarks of pydicom (which quote what they remark on: names, dates) and ITK off the screen and the logs."""
    logger = logging.getLogger("pydicom")
    level, shown = logger.level, sitk.ProcessObject.GetGlobalWarningDisplay()
    logger.setLevel(logging.CRITICAL)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def is_dicom(path: PathLike) -> bool:
    """Whether a path is a DICOM file, whatever its name; also one without preamble, but no DICOMDIR."""
    path = Path(path)
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    if start[:2] not in (b"\x02\x00", b"\x08\x00"):  # the groups that a file without preamble may begin with
        return False
    try:
        with quietly():
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID"])
    except (InvalidDicomError, EOFError, ValueError, KeyError, NotImplementedError):
        return False
    return "SOPClassUID" in header


@quietly()
def list_series(folder: PathLike) -> list[Series]:
    """The image series of a folder, not of those below it, sorted by UID; reads headers only.

    Raises:
        ValueError: no DICOM image in it.
    """
    return [_describe(uid, headers) for uid, headers in _read_series(Path(folder)).items()]


@quietly()
def list_folders(path: PathLike) -> list[Path]:
    """Folders at any depth below a path that hold DICOM images themselves, sorted; hidden ones are left out.

    Links are followed; a folder that is reached twice counts once.
    """
    found, seen = [], set()
    for folder, below, names in walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link back, or to another folder below
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(
            (name for name in below if not name.startswith(".")),
            key=lambda name: (Path(folder, name).is_symlink(), name),  # a folder by its own name, if it is below
        )
        if Path(folder) != Path(path) and _holds_images(Path(folder, name) for name in sorted(names)):
            found.append(Path(folder))
    return sorted(found)


@quietly()
def holds_images(folder: PathLike) -> bool:
    """Whether a folder itself holds a DICOM image; files are looked at until one is."""
    return _holds_images(sorted(Path(folder).iterdir()))


def _holds_images(files: Iterable[Path]) -> bool:
    return any(not f.name.startswith(".") and is_dicom(f) and _is_image(_read_header(f)) for f in files)


@quietly()
def read_dicom(path: PathLike, *, series: str | None = None, allow: Collection[str] = ()) -> Image:
    """Read the series of a folder, or a single file, of one frame or many.

    Slices are sorted by their position along the normal. Numbers are rescaled (HU of CT, activity of PET) and not
    windowed: int16 (int32 if need be) where the slope is 1, else float32. MONOCHROME1 is inverted within the stored
    range, so that bright is bright. Colours are RGB. A file without position has spacing only, or no affine.

    A multi-frame file is held in memory beside its values; of a series, one file at a time.

    Args:
        path: file or folder; of a folder its own files only.
        series: SeriesInstanceUID, needed where a folder holds several.
        allow: flaws of ``FLAWS`` to accept; each is then said in the notes. Of slices at one position the first by
            InstanceNumber is kept; a tilted series keeps its exact (sheared) affine; with missing or uneven slices the
            affine has the mean step, and where each slice lies is in ``origins``.

    Raises:
        ValueError: no image, several series, a flaw that is not allowed, slices that do not fit together, pixels that
            are missing, truncated or all equal, an unknown flaw.
    """
    path = Path(path)
    check_flaws(allow)
    chosen = _choose(path, _read_series(path), series)
    slices = [part for file, header in chosen for part in _split(file, header)]
    _check_alike(path, slices)
    slices, affine, notes = _place(path, slices, allow)
    placed = slices[0].position is not None
    values = _read_values(slices)
    flat = values.reshape(-1, 3 if values.ndim == 4 else 1)
    if (flat.min(axis=0) == flat.max(axis=0)).all():
        raise ValueError(f"{path}: every pixel has the same value; repair or leave out the image.")
    return Image(
        str(path),
        values,
        affine,
        full_range=(0.0, 255.0) if slices[0].is_colour else None,
        files=tuple(dict.fromkeys(str(part.file) for part in slices)),
        notes=notes,
        placed=placed,
        origins=_find_strays(slices, affine) if placed and affine is not None else None,
    )


def check_flaws(allow: Collection[str]) -> None:
    """Raise where a flaw to be allowed is none of ``FLAWS``.

    Raises:
        ValueError: the first such name.
    """
    unknown = sorted(set(allow) - set(FLAWS))
    if unknown:
        raise ValueError(f"allow: {unknown[0]!r} is not one of {', '.join(FLAWS)}.")


@quietly()
def read_headers(image: Image) -> list[Dataset]:
    """Headers without pixels of the files of an image, in their order: the slices', or the one multi-frame file's.

    Elements are converted when first used; who uses them does so in ``quietly()``.

    Raises:
        ValueError: the image is not from DICOM.
    """
    for file in image.files:
        if not is_dicom(file):
            raise ValueError(f"{file}: is no DICOM file; a DICOM result needs a DICOM image.")
    return [pydicom.dcmread(file, force=True, stop_before_pixels=True) for file in image.files]


# ---- which files ----------------------------------------------------------------------------------------------------


def _read_series(path: Path) -> dict[str, list[tuple[Path, Dataset]]]:
    """SeriesInstanceUID -> its image files with their headers, all sorted."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if not p.name.startswith("."))
    read = [(file, _read_header(file)) for file in files if is_dicom(file)]
    images = [(file, header) for file, header in read if _is_image(header)]
    if not images:
        kinds = sorted({UID(header.get("SOPClassUID") or "").name for _, header in read} - {""})
        held = f"holds {', '.join(kinds)} and no image" if kinds else "holds no DICOM image"
        raise ValueError(f"{path}: {held}; name the folder or file of an image series.")
    empty = [(file, Dataset()) for file in files if file.is_file() and not file.stat().st_size]
    for file, header in (*read, *empty):
        _check_whole(file, header)
    series: dict[str, list[tuple[Path, Dataset]]] = {}
    for file, header in images:
        series.setdefault(str(header.get("SeriesInstanceUID") or ""), []).append((file, header))
    return dict(sorted(series.items()))


def _check_whole(file: Path, header: Dataset) -> None:
    """Refuse a file beside images that was one itself: nobody would miss a first or last slice."""
    kind = header.get("SOPClassUID") or getattr(header, "file_meta", header).get("MediaStorageSOPClassUID") or ""
    if not _is_image(header) and (not kind or "Image Storage" in UID(kind).name):
        raise ValueError(f"{file}: is cut short after {file.stat().st_size} bytes; copy the file again.")


def _read_header(file: Path) -> Dataset:
    try:
        return pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(_TAGS))
    except (InvalidDicomError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{file}: its DICOM header cannot be read ({_line(error)}); export the file again.") from error


def _is_image(header: Dataset) -> bool:
    kind = (header.get("SOPClassUID"), header.get("Modality"))
    return bool(header.get("Rows") and header.get("Columns")) and not set(kind) & _NO_IMAGES


def _describe(uid: str, headers: Sequence[tuple[Path, Dataset]]) -> Series:
    first = headers[0][1]
    return Series(
        uid=uid,
        description=" ".join(str(first.get("SeriesDescription") or "").split()),
        modality=str(first.get("Modality") or ""),
        files=tuple(file for file, _ in headers),
        rows=int(first.Rows),
        columns=int(first.Columns),
        frames=sum(_count_frames(header) for _, header in headers),
        is_stack=len(headers) > 1 and (first.get("Modality") in _SLICED or any(_is_placed(h) for _, h in headers)),
    )


def _is_placed(header: Dataset) -> bool:
    return bool(header.get("ImagePositionPatient") or header.get("PerFrameFunctionalGroupsSequence"))


def _choose(path: Path, held: dict[str, list[tuple[Path, Dataset]]], series: str | None) -> list[tuple[Path, Dataset]]:
    """The files of the series asked for, or of the only one."""
    if series is None and len(held) == 1:
        return next(iter(held.values()))
    if series in held:
        return held[series]
    listed = "; ".join(str(_describe(uid, headers)) for uid, headers in held.items())
    if series is None:
        raise ValueError(f"{path}: holds {len(held)} series: {listed} ; choose one with series=UID.")
    raise ValueError(f"{path}: holds no series {series} , but {listed} ; choose one of these.")


# ---- what a header says ---------------------------------------------------------------------------------------------


def _count_frames(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _photometric(header: Dataset) -> str:
    return str(header.get("PhotometricInterpretation") or "MONOCHROME2")


def _split(file: Path, header: Dataset) -> list[_Slice]:
    """The slices of a file: its frames."""
    frames = _count_frames(header)
    described = len(header.get("PerFrameFunctionalGroupsSequence") or ())
    if described not in (0, frames):
        raise ValueError(f"{file}: describes {described} frames but holds {frames}; export the file again.")
    slices = []
    for frame in range(frames):
        numbers = partial(_numbers, file, header, frame)
        # At the top of a file of several frames these would put all frames at one place.
        position = numbers("ImagePositionPatient", 3) if described or frames == 1 else None
        directions = numbers("ImageOrientationPatient", 6) if position is not None else None
        slope, intercept = numbers("RescaleSlope", 1), numbers("RescaleIntercept", 1)
        slices.append(
            _Slice(
                file,
                frame,
                header,
                position,
                None if directions is None else directions.reshape(2, 3),
                numbers("PixelSpacing", 2),
                1.0 if slope is None else float(slope[0]),
                0.0 if intercept is None else float(intercept[0]),
            )
        )
    return slices


def _numbers(file: Path, header: Dataset, frame: int, keyword: str, count: int) -> np.ndarray | None:
    """(count,) numbers of an element, of the frame before those of all frames; None where there is none."""
    try:
        found = [holder.get(keyword) for holder in _holders(header, frame, keyword)]
        value = next((value for value in found if value is not None and np.size(value) and value != ""), None)
        if value is None:
            return None
        numbers = np.atleast_1d(np.array(value, dtype=float))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {keyword} is no number ({_line(error)}); repair the header.") from error
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{file}: {keyword} is {value}, not {count} finite numbers; repair the header.")
    return numbers


def _holders(header: Dataset, frame: int, keyword: str) -> Iterator[Dataset]:
    """Where an element may be, first come first: groups of the frame, groups of all frames, the header."""
    per_frame, shared = (header.get(f"{kind}FunctionalGroupsSequence") or () for kind in ("PerFrame", "Shared"))
    if keyword in _GROUP_OF:
        for groups in (*per_frame[frame : frame + 1], *shared[:1]):
            yield from (groups.get(_GROUP_OF[keyword]) or ())[:1]
    yield header


def _check_alike(path: Path, slices: Sequence[_Slice]) -> None:
    """Refuse localisers and other strangers in a series, and files that say too little to be stacked."""
    first = slices[0]
    for part in slices:
        for what, found, expected, tolerance in (
            ("rows x columns", (part.header.Rows, part.header.Columns), (first.header.Rows, first.header.Columns), 0),
            ("samples a pixel", 3 if part.is_colour else 1, 3 if first.is_colour else 1, 0),
            ("ImagePositionPatient", part.position is not None, first.position is not None, 0),
            ("directions", part.directions, first.directions, SAME_DIRECTION),
            ("pixel spacing", part.pixel, first.pixel, 0 if first.pixel is None else SAME_SPACING * first.pixel.min()),
        ):
            if not _agree(found, expected, tolerance):
                raise ValueError(
                    f"{path}: {part.file.name} has {what} {_show(found)}, {first.file.name} {_show(expected)}; "
                    "move localisers and other images to a folder of their own."
                )
    if first.position is None and len({part.file for part in slices}) > 1:
        raise ValueError(f"{path}: its files have no ImagePositionPatient to stack them by; name a single file.")
    if first.pixel is not None and first.pixel.min() <= 0:
        raise ValueError(f"{first.file}: PixelSpacing is {_show(first.pixel)}; repair the header.")


def _agree(found: Any, expected: Any, tolerance: float) -> bool:
    if found is None or expected is None:
        return found is expected
    return bool(np.abs(np.subtract(found, expected, dtype=float)).max() <= tolerance)


def _show(value: Any) -> str:
    """A value as people write it.

    >>> _show(np.array([0.5, 0.1 + 0.2])), _show((6, 5)), _show(False)
    ('[0.5, 0.3]', '(6, 5)', 'missing')
    """
    if isinstance(value, np.ndarray):
        return str([float(f"{number:g}") for number in value.ravel()])
    if value is None or isinstance(value, bool):
        return "present" if value else "missing"
    return str(value)


# ---- where the slices lie -------------------------------------------------------------------------------------------


def _place(
    path: Path, slices: list[_Slice], allow: Collection[str]
) -> tuple[list[_Slice], np.ndarray | None, tuple[str, ...]]:
    """Slices sorted along their normal, the affine, and what was allowed."""
    first = slices[0]
    if first.position is None:
        return slices, *_place_nowhere(first.pixel)
    if first.directions is None or first.pixel is None:
        raise ValueError(f"{first.file}: has a position but no orientation or PixelSpacing; repair the header.")
    if np.abs(first.directions @ first.directions.T - np.eye(2)).max() > SAME_DIRECTION:
        raise ValueError(f"{first.file}: ImageOrientationPatient is {_show(first.directions)}; repair the header.")
    notes: list[str] = []
    normal = np.cross(*first.directions)
    slices = _leave_out_duplicates(path, slices, normal, allow, notes)
    positions = np.stack([part.position for part in slices])  # type: ignore[misc]  # (D, 3) mm
    if len(slices) == 1:
        step = normal * _thickness(slices[0], notes)
    else:
        offsets = positions @ normal
        tilt = _measure_tilt(path, positions, normal, first.pixel.min(), allow, notes)
        _check_even(path, offsets, allow, notes)
        step = (normal + tilt) * (offsets[-1] - offsets[0]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = first.directions[1] * first.pixel[0]
    affine[:3, 2] = first.directions[0] * first.pixel[1]
    affine[:3, 3] = positions[0]
    return slices, affine, tuple(notes)


def _place_nowhere(pixel: np.ndarray | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The affine of a file without position: its pixel spacing, if it is calibrated."""
    if pixel is None:
        return None, ("no position and no pixel spacing: sizes are in pixels",)
    # Slices along z, rows along y, columns along x, as in an axial image.
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = 1.0, pixel[0], pixel[1], 1.0
    return affine, ("no position: placed at the origin, slices 1 mm apart",)


def _find_strays(slices: Sequence[_Slice], affine: np.ndarray) -> np.ndarray | None:
    """(D, 3) mm, where slices lie; None where the affine says the same."""
    positions = np.stack([part.position for part in slices])  # type: ignore[misc]
    even = affine[:3, 3] + np.arange(len(slices))[:, None] * affine[:3, 0]
    return positions if np.abs(positions - even).max() > SAME_POSITION else None


def _thickness(part: _Slice, notes: list[str]) -> float:
    """Step of a single slice in mm."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        number = _numbers(part.file, part.header, part.frame, keyword, 1)
        if number is not None and number[0] != 0:
            return abs(float(number[0]))
    notes.append("a single slice without thickness: taken as 1 mm")
    return 1.0


def _leave_out_duplicates(
    path: Path, slices: list[_Slice], normal: np.ndarray, allow: Collection[str], notes: list[str]
) -> list[_Slice]:
    """Sort slices along the normal, and keep the first by number of those at one position."""
    offset_of = {id(part): float(part.position @ normal) for part in slices}
    kept: list[_Slice] = []
    for part in sorted(slices, key=lambda part: (offset_of[id(part)], part.rank)):
        if not kept or offset_of[id(part)] - offset_of[id(kept[-1])] > SAME_POSITION:
            kept.append(part)
        elif part.rank < kept[-1].rank:
            kept[-1] = part
    if len(kept) < len(slices):
        said = f"{len(slices)} slices lie at {len(kept)} positions (repeated, or several acquisitions in one series)"
        _accept("duplicate_positions", path, said, allow)
        notes.append(f"{said}: the first of each position by InstanceNumber is used")
    return kept


def _measure_tilt(
    path: Path, positions: np.ndarray, normal: np.ndarray, pixel: float, allow: Collection[str], notes: list[str]
) -> np.ndarray:
    """(3,) mm by which slices are shifted in their plane per mm along the normal; 0 where they are not."""
    offsets = (positions - positions[0]) @ normal  # (D,) mm
    shifts = positions - positions[0] - offsets[:, None] * normal  # (D, 3) mm
    tilt = shifts[-1] / offsets[-1]
    strays = np.linalg.norm(shifts - offsets[:, None] * tilt, axis=1).max()
    if strays > TILT * pixel:
        said = f"slices lie beside each other, up to {strays:.2f} mm off the line from the first to the last"
        _accept("uneven_spacing", path, said, allow)
        notes.append(f"{said}: placed on that line")
    if np.linalg.norm(shifts[-1]) <= TILT * pixel:
        return np.zeros(3)
    angle = np.degrees(np.arctan(np.linalg.norm(tilt)))
    said = f"slices are shifted against each other (gantry tilt of {angle:.1f} degrees)"
    _accept("gantry_tilt", path, said, allow)
    notes.append(f"{said}: the affine is sheared")
    return tilt


def _check_even(path: Path, offsets: np.ndarray, allow: Collection[str], notes: list[str]) -> None:
    """Tell missing slices (every gap a whole multiple of the usual step) from uneven ones."""
    gaps = np.diff(offsets)
    places = np.concatenate([[0], np.cumsum(np.maximum(1, np.round(gaps / np.median(gaps))))])
    step = (offsets[-1] - offsets[0]) / places[-1]
    strays = np.abs(offsets - offsets[0] - step * places).max() / step
    missing = int(places[-1]) - len(gaps)
    if strays > EVEN:
        said = f"slices are between {gaps.min():.2f} and {gaps.max():.2f} mm apart"
        _accept("uneven_spacing", path, said, allow)
    elif missing:
        said = f"{missing} of {len(offsets) + missing} slices are missing (gap of {gaps.max():.2f} mm, step {step:.2f})"
        _accept("missing_slices", path, said, allow)
    else:
        return
    notes.append(f"{said}: stacked in order, with the mean step of {gaps.mean():.2f} mm")


def _accept(flaw: str, path: Path, said: str, allow: Collection[str]) -> None:
    if flaw not in allow:
        raise ValueError(f"{path}: {said}; complete or repair the series, or accept it by allowing {flaw}.")


# ---- pixels ---------------------------------------------------------------------------------------------------------


def _read_values(slices: Sequence[_Slice]) -> np.ndarray:
    """(D, H, W) numbers as the files mean them, or (D, H, W, 3) uint8; each file is read once."""
    header = slices[0].header
    shape = (len(slices), int(header.Rows), int(header.Columns))
    colour, whole = slices[0].is_colour, all(_is_whole(part) for part in slices)
    values = np.empty((*shape, 3), np.uint8) if colour else np.empty(shape, np.int16 if whole else np.float32)
    places: dict[Path, list[int]] = {}
    for d, part in enumerate(slices):
        places.setdefault(part.file, []).append(d)
    for file, indices in places.items():
        dataset = _read_pixels(file)
        for d in indices:
            pixels = _decode(file, dataset, slices[d].frame)
            numbers = _to_rgb(file, pixels, dataset) if colour else _rescale(pixels, slices[d], dataset)
            if whole and not colour:
                values = _widen(values, numbers)
            values[d] = numbers
    return values


def _is_whole(part: _Slice) -> bool:
    """Whether rescaled numbers are integers, and stored one apart."""
    return part.slope == 1 and part.intercept.is_integer() and not _has_table(part.header)


def _widen(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The array itself, or a copy in the smallest of int32 and int64 that holds the numbers to come."""
    lowest, highest = numbers.min(), numbers.max()
    types = (values.dtype, np.dtype(np.int32), np.dtype(np.int64))
    fitting = next(t for t in types if np.iinfo(t).min <= lowest and highest <= np.iinfo(t).max)
    return values.astype(fitting, copy=False)


def _stored_range(header: Dataset) -> tuple[int, int]:
    """Lowest and highest number that the bits of a pixel can say."""
    bits = int(header.get("BitsStored") or header.get("BitsAllocated") or 16)
    if header.get("PixelRepresentation"):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _has_table(header: Dataset) -> bool:
    return bool(header.get("ModalityLUTSequence"))


def _read_pixels(file: Path) -> Dataset:
    """A file with its pixels."""
    try:
        dataset = pydicom.dcmread(file, force=True)
    except (EOFError, ValueError, KeyError, NotImplementedError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({_line(error)}); copy the file again.") from error
    if not dataset.get("PixelData"):
        raise ValueError(f"{file}: holds no pixels (PixelData), or is truncated; copy the file again.")
    if "TransferSyntaxUID" not in dataset.file_meta:  # a file without preamble: pydicom has found out how it is written
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _decode(file: Path, dataset: Dataset, frame: int) -> np.ndarray:
    """(H, W) stored numbers, or (H, W, 3) RGB, of a frame."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        if syntax.is_compressed and syntax.is_encapsulated and syntax != RLELossless:
            pixels = _decode_by_gdcm(dataset, frame)
        else:
            pixels = pixel_array(dataset, index=frame)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, EOFError) as error:
        raise ValueError(
            f"{file}: pixels cannot be decoded ({syntax.name}: {_line(error)}); copy or export the file again."
        ) from error
    expected = (dataset.Rows, dataset.Columns)
    if pixels.shape[:2] != expected:
        raise ValueError(f"{file}: pixels have shape {pixels.shape[:2]}, its header says {expected}; copy it again.")
    return pixels


def _decode_by_gdcm(dataset: Dataset, frame: int) -> np.ndarray:
    """A compressed frame, through a file of its own: so GDCM neither rescales nor inverts, and names no patient."""
    single = Dataset()
    for keyword in _PIXEL_MODULE:
        if keyword in dataset:
            setattr(single, keyword, dataset[keyword].value)
    single.SOPClassUID, single.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    tables = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    offsets = tuple(dataset[name].value for name in tables) if all(name in dataset for name in tables) else None
    stream = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=_count_frames(dataset),
        extended_offsets=offsets,
    )
    if single.SamplesPerPixel == 1:
        single.PhotometricInterpretation = "MONOCHROME2"
    elif b"JFIF\0" in stream[:32]:  # luma and chroma by definition, though some headers still say RGB
        single.PhotometricInterpretation = "YBR_FULL_422"
    single.PixelData = encapsulate([stream])
    single["PixelData"].VR = "OB"
    single["PixelData"].is_undefined_length = True
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder, "frame.dcm")
        single.save_as(name, enforce_file_format=True)
        pixels: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(name), imageIO="GDCMImageIO"))
    return pixels[0]


def _rescale(stored: np.ndarray, part: _Slice, dataset: Dataset) -> np.ndarray:
    """Stored numbers -> what they mean, (H, W)."""
    if _photometric(part.header) == "MONOCHROME1":
        stored = sum(_stored_range(part.header)) - stored.astype(np.int64)
    if _has_table(dataset):
        return apply_modality_lut(stored, dataset)
    if _is_whole(part):
        return stored.astype(np.int64) + int(part.intercept)
    return stored * part.slope + part.intercept


def _to_rgb(file: Path, pixels: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Palette indices or colours -> (H, W, 3) uint8."""
    if _photometric(dataset) == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)[..., :3]
        return (pixels >> 8).astype(np.uint8) if pixels.itemsize == 2 else pixels
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"{file}: colours have {8 * pixels.itemsize} bits, not 8; export the file with 8 bits a colour."
        )
    return pixels


def _line(error: BaseException) -> str:
    """The first line of what a library says, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
