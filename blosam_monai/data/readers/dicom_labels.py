"""Masks from DICOM SEG and RTSTRUCT files, laid where they lie in the patient: never by the order of their frames.

pydicom alone reads them: SimpleITK and MONAI stack the frames of a SEG in file order, and neither reads RTSTRUCT.
Source: DICOM PS3.3, A.51 (Segmentation), C.7.6.16 (functional groups), C.8.8.6 (ROI Contour).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.pixels import iter_pixels
from pydicom.uid import UID, RTStructureSetStorage, SegmentationStorage

from blosam_monai.data.geometry import Image, Label
from blosam_monai.data.readers.dicom import LABEL_MAP, is_dicom
from blosam_monai.files import PathLike

SEGMENT_FILES = (SegmentationStorage, LABEL_MAP, RTStructureSetStorage)
PLANE_TOLERANCE = 0.1  # pixels; positions are decimal strings of at most 16 characters, often of rounded floats
SAME_PLANE = 1e-2  # mm; slices are not cut closer
CONTOUR_DIGITS = 4  # of a pixel; points drawn on pixel centres come back from mm a little beside them
MESSAGE_LENGTH = 120  # characters quoted of a library's error
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def is_segments(path: PathLike) -> bool:
    """Whether a path is a DICOM SEG or RTSTRUCT file."""
    return _sop_class(path) in SEGMENT_FILES


def read_segments(path: PathLike, *, image: Image | None = None) -> Label:
    """Read the segments of a DICOM SEG, or the regions of an RTSTRUCT, as masks by name.

    The frames of a SEG go to the slices of the image that they lie in; where they lie on another grid, the SEG is read
    on its own grid and brought onto the image's by nearest neighbour. Fractions count from more than half on. Closed
    contours hold the pixels whose centre is inside an odd number of them, so that holes stay open. Segments that share
    a label are one class in several pieces: their union is that label's mask, and noted.

    Args:
        path: the file, or a folder with exactly one such file.
        image: the image it belongs to; a SEG is read on its own grid without, an RTSTRUCT has none and needs it.

    Raises:
        ValueError: neither SEG nor RTSTRUCT, damaged, tiled, frames without a position or unevenly spaced, contours
            across the slices of the image, or nothing on the image.
    """
    with disable_value_validation():  # it would warn of odd values, a patient's among them
        path, dataset = _open(Path(path))
        try:
            label = _read_any(dataset, path, image)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if str(error).startswith(f"{path}: "):  # said by us
                raise
            raise ValueError(f"{path}: is no valid DICOM SEG or RTSTRUCT ({_line(error)}); export it again.") from error
        if image is not None and _is_elsewhere(dataset, image):
            label = replace(label, notes=(*label.notes, "the label names another frame of reference than its image"))
    return label


def _read_any(dataset: Dataset, path: Path, image: Image | None) -> Label:
    if dataset.SOPClassUID != RTStructureSetStorage:
        return _read_segmentation(dataset, path, image)
    if image is None:
        raise ValueError(f"{path}: the contours of an RTSTRUCT lie on an image; read it together with its image.")
    return _read_structures(dataset, path, image)


@dataclass(frozen=True)
class _Planes:
    """Parallel slices of one in-plane grid.

    Attributes:
        origins: (D, 3), centre of pixel (0, 0) of each slice, mm LPS.
        steps: (2, 3), mm from a pixel to the next along h and along w.
        shape: (H, W) in pixels.
    """

    origins: np.ndarray
    steps: np.ndarray
    shape: tuple[int, int]

    def heights(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) mm -> (...) mm along the normal, the cross product of a row's direction and a column's."""
        along_h, along_w = self.steps
        normal = np.cross(along_w, along_h)
        return points @ (normal / np.linalg.norm(normal))

    def nearest(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) mm -> (N,) the slice whose plane is nearest to each."""
        distances = np.abs(self.heights(points)[:, None] - self.heights(self.origins))
        return distances.argmin(axis=1)

    def affine(self, step: np.ndarray) -> np.ndarray:
        """(4, 4), indices -> mm LPS, of evenly spaced slices; ``step``: (3,) mm from a slice to the next."""
        affine = np.eye(4)
        affine[:3] = np.stack([step, *self.steps, self.origins[0]], axis=1)
        return affine


def _open(path: Path) -> tuple[Path, Dataset]:
    """The SEG or RTSTRUCT at a path, and which file it is."""
    if path.is_file():
        candidates = [path]
    else:
        candidates = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
        candidates = [p for p in candidates if _sop_class(p) in SEGMENT_FILES]
        if len(candidates) != 1:
            raise ValueError(f"{path}: holds {len(candidates)} DICOM SEG or RTSTRUCT files, not one; name the file.")
    found = _sop_class(candidates[0])
    if found not in SEGMENT_FILES:
        kind = "not a DICOM file" if found is None else f"a DICOM file of another kind ({UID(str(found)).name})"
        raise ValueError(f"{path}: is {kind}; label_coding segments reads DICOM SEG and RTSTRUCT.")
    return candidates[0], _read(candidates[0])


def _sop_class(path: PathLike) -> str | None:
    """SOP class of a DICOM file, None of any other."""
    return _read(path, "SOPClassUID").get("SOPClassUID", "") if is_dicom(path) else None


def _read(path: PathLike, *keywords: str) -> Dataset:
    """A file, without its pixels where only some elements are asked for; also one without preamble."""
    try:
        dataset = pydicom.dcmread(
            path, force=True, stop_before_pixels=bool(keywords), specific_tags=list(keywords) or None
        )
        for _ in dataset.iterall():  # pydicom decodes when asked: ask now, so that damage is told here
            pass
    except Exception as error:  # a damaged file meets pydicom's parsers in their own ways
        raise ValueError(f"{path}: cannot be read as DICOM ({_line(error)}); copy the file again.") from error
    return dataset


def _line(error: Exception) -> str:
    """The beginning of what a library says; NumPy quotes whole contours."""
    return str(error).partition("\n")[0][:MESSAGE_LENGTH]


def _is_elsewhere(dataset: Dataset, image: Image) -> bool:
    """Whether label and image both name their frame of reference, and differ."""
    if not image.files:
        return False
    of_image = _read(image.files[0], "FrameOfReferenceUID").get("FrameOfReferenceUID")
    of_label = {dataset.get("FrameOfReferenceUID")}
    of_label |= {roi.get("ReferencedFrameOfReferenceUID") for roi in dataset.get("StructureSetROISequence", ())}
    of_label -= {None, ""}
    return bool(of_image and of_label) and of_image not in of_label


def _planes_of(image: Image) -> _Planes | None:
    """The slices of an image where they lie, also those of a flawed series; None where it has no position."""
    if image.affine is None or not image.placed:
        return None
    origins = image.origins
    if origins is None:
        origins = image.affine[:3, 3] + np.arange(image.shape[0])[:, None] * image.affine[:3, 0]  # (D, 3)
    return _Planes(origins, image.affine[:3, 1:3].T, image.shape[1:])


# ---- DICOM SEG


def _read_segmentation(dataset: Dataset, path: Path, image: Image | None) -> Label:
    names = _names((int(item.SegmentNumber), str(item.get("SegmentLabel", ""))) for item in dataset.SegmentSequence)
    if dataset.SOPClassUID == LABEL_MAP:
        names.pop(int(dataset.get("PixelPaddingValue", 0)), None)  # the background is described as a segment
    notes = _joined(names)
    if not int(dataset.get("NumberOfFrames", 0)):
        return _without_frames(dataset, path, names, image)
    frames = _Frames.of(dataset, path)
    slices, affine, depth = _lay(frames, path, image)
    shape = depth, int(dataset.Rows), int(dataset.Columns)
    masks = _fill(dataset, path, names, frames.segments, slices, shape)
    label = Label(str(path), masks, affine, notes)
    return label if image is None else label.on(image)


@dataclass(frozen=True)
class _Frames:
    """What the functional groups say of N frames.

    Attributes:
        segments: (N,) segment number; 0 where a frame holds all segments (label map).
        planes: where each frame lies, N origins; None where frames have no position.
        gap, thickness: mm from slice to slice, and of a slice, as declared; None where they are not.
    """

    segments: list[int]
    planes: _Planes | None
    gap: float | None = None
    thickness: float | None = None

    @classmethod
    def of(cls, dataset: Dataset, path: Path) -> _Frames:
        """Gather the groups, a frame's own before the shared ones."""
        if dataset.get("DimensionOrganizationType") == "TILED_FULL" or "TotalPixelMatrixRows" in dataset:
            raise ValueError(f"{path}: is tiled, as of a microscope's slide; only SEGs of patients' images are read.")
        shared = next(iter(dataset.get("SharedFunctionalGroupsSequence", ())), Dataset())
        groups = [(own, shared) for own in dataset.PerFrameFunctionalGroupsSequence]
        if len(groups) != dataset.NumberOfFrames:
            raise ValueError(
                f"{path}: describes {len(groups)} frames but holds {dataset.NumberOfFrames}; export it again."
            )
        segments = [0] * len(groups)
        if dataset.SOPClassUID != LABEL_MAP:
            segments = [int(_group(g, "SegmentIdentificationSequence").ReferencedSegmentNumber) for g in groups]
        placed = [any("PlanePositionSequence" in group for group in g) for g in groups]
        if not any(placed):
            return cls(segments, None)
        if not all(placed):
            raise ValueError(
                f"{path}: {placed.count(False)} of {len(placed)} frames have no position; export it again."
            )
        origins = np.array([_group(g, "PlanePositionSequence").ImagePositionPatient for g in groups], float)
        steps = np.array([_steps(g) for g in groups])  # (N, 2, 3)
        shape = int(dataset.Rows), int(dataset.Columns)
        if np.abs(steps - steps[0]).max() * max(shape) > PLANE_TOLERANCE * np.linalg.norm(steps[0], axis=1).min():
            raise ValueError(f"{path}: its frames differ in orientation or pixel size; export one SEG for each.")
        measures = _group(groups[0], "PixelMeasuresSequence")
        gap, thickness = (
            abs(float(measures.get(name) or 0)) or None for name in ("SpacingBetweenSlices", "SliceThickness")
        )
        return cls(segments, _Planes(origins, steps[0], shape), gap, thickness)


def _group(groups: Sequence[Dataset], name: str) -> Dataset:
    """The item of a functional group: a frame's own, else the shared one."""
    for group in groups:
        if name in group:
            return group[name].value[0]
    raise KeyError(name)


def _steps(groups: Sequence[Dataset]) -> np.ndarray:
    """(2, 3): mm from a pixel to the next along h and along w."""
    cosines = np.array(_group(groups, "PlaneOrientationSequence").ImageOrientationPatient, float).reshape(2, 3)
    pixel = np.array(_group(groups, "PixelMeasuresSequence").PixelSpacing, float)  # of h, of w
    return cosines[::-1] * pixel[:, None]  # DICOM names the direction of a row, along w, first


def _names(numbered: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Number -> name; one without a name goes by its number."""
    return {number: name.strip() or f"segment {number}" for number, name in numbered}


def _joined(names: dict[int, str]) -> tuple[str, ...]:
    """A note for each name that several segments share."""
    of_name = list(names.values())
    shared = [name for name in dict.fromkeys(of_name) if of_name.count(name) > 1]
    return tuple(f"{of_name.count(name)} segments are named {name!r}: read as one" for name in shared)


def _without_frames(dataset: Dataset, path: Path, names: dict[int, str], image: Image | None) -> Label:
    """Nothing was segmented: empty masks, on the image where there is one."""
    shape = (1, int(dataset.Rows), int(dataset.Columns)) if image is None else image.shape
    masks = {name: np.zeros(shape, bool) for name in names.values()}
    return Label(str(path), masks, None if image is None else image.affine)


def _lay(frames: _Frames, path: Path, image: Image | None) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(N,) slice of each frame, and affine and number of slices of the grid they are slices of."""
    if frames.planes is None:
        if len(set(frames.segments)) < len(frames.segments):
            raise ValueError(f"{path}: its frames have no position in the patient; export it with plane positions.")
        return np.zeros(len(frames.segments), int), None, 1  # of a picture without position, such as an X-ray
    if image is not None:
        slices = _match(frames.planes, _planes_of(image))
        if slices is not None:
            return slices, image.affine, image.shape[0]
    return _own_grid(frames, frames.planes, path)


def _match(planes: _Planes, others: _Planes | None) -> np.ndarray | None:
    """(N,) the slices among others that N planes coincide with; None where one coincides with none."""
    if others is None:
        return None
    tolerance = PLANE_TOLERANCE * np.linalg.norm(others.steps, axis=1).min()  # mm
    slices = others.nearest(planes.origins)
    distances = np.linalg.norm(planes.origins - others.origins[slices], axis=1)
    turned = np.abs(planes.steps - others.steps).max() * max(planes.shape)
    return slices if max(distances.max(), turned) <= tolerance else None


def _own_grid(frames: _Frames, planes: _Planes, path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """(N,) slice of each frame, affine and number of slices of the regular grid that the frames span."""
    heights = planes.heights(planes.origins)
    first, last = int(heights.argmin()), int(heights.argmax())
    heights = heights - heights[first]
    gaps = np.diff(np.sort(heights))
    gaps = gaps[gaps > SAME_PLANE]
    origin = replace(planes, origins=planes.origins[[first]])
    if not gaps.size:
        step = planes.heights(np.eye(3)) * (frames.gap or frames.thickness or 1.0)
        return np.zeros(len(heights), int), origin.affine(step), 1
    gap = frames.gap
    if gap is None or np.abs(gaps / gap - np.round(gaps / gap).clip(min=1)).max() > PLANE_TOLERANCE:
        gap = float(gaps.min())  # what is declared does not fit the positions
    gap = heights.max() / np.round(gaps / gap).sum()  # the mean, lest rounded positions add up
    slices = np.round(heights / gap).astype(int)
    step = (planes.origins[last] - planes.origins[first]) / slices[last]  # leans where the gantry was tilted
    strayed = np.linalg.norm(planes.origins - planes.origins[first] - slices[:, None] * step, axis=1).max()
    if strayed > PLANE_TOLERANCE * min(gap, *np.linalg.norm(planes.steps, axis=1)):
        raise ValueError(
            f"{path}: its frames lie {gaps.min():g} to {gaps.max():g} mm apart, unevenly, and not on the slices of its "
            "image; read it with the image drawn on."
        )
    return slices, origin.affine(step), int(slices.max()) + 1


def _fill(
    dataset: Dataset, path: Path, names: dict[int, str], segments: list[int], slices: np.ndarray, shape: Sequence[int]
) -> dict[str, np.ndarray]:
    """Unpack frame by frame into a mask (D, H, W) for each name."""
    masks = {name: np.zeros(shape, bool) for name in names.values()}
    half = float(dataset.MaximumFractionalValue) / 2 if dataset.SegmentationType == "FRACTIONAL" else 0
    for frame, segment, d in zip(_unpack(dataset, path), segments, slices, strict=True):
        if segment:
            masks[names[segment]][d] |= frame > half
        else:
            for number, name in names.items():
                masks[name][d] |= frame == number
    return masks


def _unpack(dataset: Dataset, path: Path) -> Iterator[np.ndarray]:
    """Each frame's (H, W) stored values."""
    try:
        syntax = dataset.file_meta.get("TransferSyntaxUID")  # a file without preamble has none, and is not compressed
        if dataset.BitsAllocated == 1 and not (syntax and syntax.is_encapsulated):
            yield from _unpack_bits(dataset)
        else:
            yield from iter_pixels(dataset, raw=True)
    except Exception as error:  # decoders fail in their own ways
        raise ValueError(f"{path}: its pixels cannot be unpacked ({_line(error)}); export it uncompressed.") from error


def _unpack_bits(dataset: Dataset) -> Iterator[np.ndarray]:
    """Each frame's (H, W) bits; pydicom 3.0.2 loses some where a frame ends within a byte."""
    shape = dataset.Rows, dataset.Columns
    size = dataset.Rows * dataset.Columns
    stored = np.frombuffer(dataset.PixelData, np.uint8)
    for start in range(0, int(dataset.NumberOfFrames) * size, size):
        held = stored[start // 8 : (start + size + 7) // 8]  # the bytes that the frame shares with its neighbours too
        yield np.unpackbits(held, bitorder="little")[start % 8 :][:size].reshape(shape)


# ---- RTSTRUCT


def _read_structures(dataset: Dataset, path: Path, image: Image) -> Label:
    planes = _planes_of(image)
    if planes is None or image.affine is None:
        raise ValueError(f"{path}: {image.path} has no position in the patient to lay contours on; use masks instead.")
    gaps = np.diff(planes.heights(planes.origins)) if len(planes.origins) > 1 else planes.heights(image.affine[:3, 0])
    thickness = float(np.median(np.abs(gaps)))  # mm from slice to slice along the normal, where none is missing
    names = _names((int(roi.ROINumber), str(roi.get("ROIName", ""))) for roi in dataset.StructureSetROISequence)
    masks = {name: np.zeros(image.shape, bool) for name in names.values()}
    outside, total, skipped = 0, 0, dict[str, int]()
    for roi in dataset.get("ROIContourSequence", ()):
        closed = []
        for contour in roi.get("ContourSequence", ()):
            if contour.ContourGeometricType in _CLOSED:
                closed.append(_points(contour))
            else:
                skipped[contour.ContourGeometricType] = skipped.get(contour.ContourGeometricType, 0) + 1
        on_slices = _sort_contours(closed, planes, thickness, path)
        outside += len(closed) - sum(map(len, on_slices.values()))
        total += len(closed)
        for d, contours in on_slices.items():
            masks[names[int(roi.ReferencedROINumber)]][d] |= _rasterise(contours, planes, d)
    if total and not any(mask.any() for mask in masks.values()):
        raise ValueError(f"{path}: its contours hold no pixel of its image {image.path}; check that they pair.")
    notes = [*_joined(names)]
    if outside:
        notes.append(f"{outside} of {total} contours lie on no slice of the image, or beside one nearer to its slice")
    notes += [f"{count} contours of type {kind} are not areas: left out" for kind, count in sorted(skipped.items())]
    return Label(str(path), masks, image.affine, tuple(notes))


def _points(contour: Dataset) -> np.ndarray:
    """(N, 3) mm; long contours come undecoded, since an explicit transfer syntax holds 64 kB of numbers as text."""
    data = contour.ContourData
    if isinstance(data, bytes):
        data = data.decode("ascii").rstrip("\0 ").split("\\")
    return np.array(data, float).reshape(-1, 3)


def _sort_contours(
    contours: Sequence[np.ndarray], planes: _Planes, thickness: float, path: Path
) -> dict[int, list[np.ndarray]]:
    """Slice -> the contours (N, 3) mm in the plane nearest to it, at most half a slice away; of two the lower one."""
    on_slice: dict[int, list[tuple[float, np.ndarray]]] = {}
    for contour in contours:
        heights = planes.heights(contour)
        if np.ptp(heights) > thickness / 2:
            raise ValueError(f"{path}: has contours across the slices of its image; read it with the image drawn on.")
        d = int(planes.nearest(contour.mean(axis=0, keepdims=True))[0])
        away = float(heights.mean() - planes.heights(planes.origins[d]))
        if abs(away) <= thickness / 2 + SAME_PLANE:
            on_slice.setdefault(d, []).append((away, contour))
    kept = {}
    for d, found in on_slice.items():
        nearest = min(abs(away) for away, _ in found)
        plane = min(away for away, _ in found if abs(away) <= nearest + SAME_PLANE)
        kept[d] = [contour for away, contour in found if abs(away - plane) <= SAME_PLANE]
    return kept


def _rasterise(contours: Sequence[np.ndarray], planes: _Planes, d: int) -> np.ndarray:
    """(H, W) bool: pixels whose centre an odd number of contours (N, 3) mm hold."""
    to_pixels = np.linalg.pinv(planes.steps.T)  # (2, 3)
    mask = np.zeros(planes.shape, bool)
    for contour in contours:
        corners = (contour - planes.origins[d]) @ to_pixels.T  # (N, 2): h, w
        mask ^= _inside(np.round(corners, CONTOUR_DIGITS), planes.shape)
    return mask


def _inside(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels whose centre lies inside a closed polygon (N, 2) of h, w, by the even-odd rule.

    Of centres on the outline, those on upper and left edges count, so that neighbours share none. Every edge toggles
    its rows from where it crosses them on; Pillow's polygons also fill the pixels that their outline touches.
    """
    rows = np.arange(shape[0])[:, None]
    (h0, w0), (h1, w1) = corners.T, np.roll(corners, -1, axis=0).T
    row, edge = np.nonzero((h0 <= rows) != (h1 <= rows))
    crossing = w0[edge] + (row - h0[edge]) * (w1[edge] - w0[edge]) / (h1[edge] - h0[edge])
    first = np.ceil(crossing).clip(0, shape[1]).astype(int)
    toggles = np.zeros((shape[0], shape[1] + 1), int)
    np.add.at(toggles, (row, first), 1)
    return toggles[:, :-1].cumsum(axis=1) % 2 == 1
