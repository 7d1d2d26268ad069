"""Images and labels on their grids: where voxels are, which way up slices are shown, and how a label meets its image.

Arrays are indexed (d, h, w), slowest first: slice, row, column of a DICOM series; k, j, i of a NIfTI or NRRD file. An
affine takes (d, h, w, 1) to millimetres in the patient's LPS frame: x to the left, y to the back, z to the head (DICOM
and ITK; NIfTI's own RAS is converted by its reader and writer). A picture has one slice and no affine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from nibabel.orientations import io_orientation
from scipy.ndimage import affine_transform

SLICE_AXES = ("axial", "coronal", "sagittal")
ANISOTROPIC = 1.5  # slices this many times thicker than pixels are wide were acquired as slices
GRID_TOLERANCE = 1e-2  # voxels; headers are rounded to four or five digits
# Rows and columns as radiologists look at them: (world axis, sign) of slice, row and column; 0 = L, 1 = P, 2 = S.
_UPRIGHT = {
    "axial": ((2, 1), (1, 1), (0, 1)),  # back down, patient's left at the right
    "coronal": ((1, 1), (2, -1), (0, 1)),  # head up, patient's left at the right
    "sagittal": ((0, 1), (2, -1), (1, 1)),  # head up, back at the right
}

Value = int | str  # of a label: a number of an index map, or the name of a segment, a colour, a file


@dataclass(frozen=True)
class Image:
    """An image as read.

    Attributes:
        path: where it was read from, for messages.
        values: (D, H, W) gray or (D, H, W, 3) RGB, numbers as the file means them (rescaled, not windowed).
        affine: (4, 4), indices -> mm LPS; None where the file has none (pictures).
        full_range: intensities shown as black and white unless a window is asked for; None: percentiles.
        files: of DICOM only, its files: one a slice in the order of d, or the one file of many frames.
        notes: what the reader had to decide or allow, for the reports.
    """

    path: str
    values: np.ndarray
    affine: np.ndarray | None = None
    full_range: tuple[float, float] | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) in voxels."""
        return self.values.shape[:3]


@dataclass(frozen=True)
class Label:
    """A label as read: an index map, or masks by name that may overlap.

    Attributes:
        path: where it was read from, for messages.
        values: (D, H, W) of whole numbers, 0 is background; or name -> (D, H, W) bool.
        affine, notes: as in ``Image``.
    """

    path: str
    values: np.ndarray | Mapping[str, np.ndarray]
    affine: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) in voxels."""
        values = self.values if isinstance(self.values, np.ndarray) else next(iter(self.values.values()))
        return values.shape

    def counts(self) -> dict[Value, int]:
        """Voxels of each value or name that occurs; background is left out."""
        if isinstance(self.values, Mapping):
            return {name: int(mask.sum()) for name, mask in self.values.items() if mask.any()}
        numbers, counts = np.unique(self.values, return_counts=True)
        return {int(n): int(c) for n, c in zip(numbers, counts, strict=True) if n != 0}

    def mask(self, wanted: Sequence[Value]) -> np.ndarray:
        """Union of the given values or names, (D, H, W) bool; one that does not occur adds nothing."""
        if isinstance(self.values, Mapping):
            masks = [self.values[name] for name in wanted if name in self.values]  # type: ignore[index]
            return np.logical_or.reduce(masks) if masks else np.zeros(self.shape, bool)
        return np.isin(self.values, [v for v in wanted if not isinstance(v, str)])

    def on(self, image: Image) -> Label:
        """The label on the image's grid: as it is, its axes reordered, or resampled by nearest neighbour; then noted.

        Raises:
            ValueError: another shape and no geometry to tell where it lies, or the two do not overlap.
        """
        if self.affine is None or image.affine is None:
            if self.shape != image.shape:
                raise ValueError(
                    f"{self.path}: label has shape {_show(self.shape)}, its image {_show(image.shape)}; export the "
                    "label again."
                )
            return self
        to_label = np.linalg.inv(self.affine) @ image.affine  # indices of the image -> indices of the label
        if self.shape == image.shape and _near(to_label, np.eye(4), self.shape):
            return self
        if isinstance(self.values, Mapping):
            values: np.ndarray | dict[str, np.ndarray] = {
                name: _resample(mask, to_label, image.shape) for name, mask in self.values.items()
            }
        else:
            values = _resample(self.values, to_label, image.shape)
        moved = replace(self, values=values, affine=image.affine, notes=(*self.notes, _say_grid(self, image, to_label)))
        if self.counts() and not moved.counts():
            raise ValueError(f"{self.path}: the label does not overlap its image {image.path}; check that they pair.")
        return moved


@dataclass(frozen=True)
class Orientation:
    """A reordering of array axes without loss: ``order`` picks the axes, then ``flips`` reverses them."""

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """(D, H, W, ...) in the file's order -> upright slices, a view."""
        rest = tuple(range(3, values.ndim))
        return values.transpose(*self.order, *rest)[self._reversed()]

    def invert(self, values: np.ndarray) -> np.ndarray:
        """Upright slices (D, H, W, ...) -> the file's order, a view."""
        rest = tuple(range(3, values.ndim))
        return values[self._reversed()].transpose(*np.argsort(self.order), *rest)

    def _reversed(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)


def spacing(affine: np.ndarray | None) -> tuple[float, float, float]:
    """Size of a voxel along d, h and w in mm; 1 each without an affine (then the unit is the pixel)."""
    if affine is None:
        return 1.0, 1.0, 1.0
    return tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))  # type: ignore[return-value]


def choose_slice_axis(image: Image) -> str:
    """The axis a volume was acquired along: the one clearly coarser than the others, else axial."""
    if image.affine is None:
        return "axial"
    sizes = spacing(image.affine)
    coarse = int(np.argmax(sizes))
    if sizes[coarse] < ANISOTROPIC * sorted(sizes)[1]:
        return "axial"
    world = int(io_orientation(image.affine)[coarse, 0])
    return next(name for name, axes in _UPRIGHT.items() if axes[0][0] == world)


def check_slice_axis(slice_axis: str) -> None:
    """Raise where a name is none of ``SLICE_AXES``.

    Raises:
        ValueError: which name.
    """
    if slice_axis not in SLICE_AXES:
        raise ValueError(f"slice_axis: {slice_axis!r} is not one of {', '.join(SLICE_AXES)}.")


def upright(image: Image | Label, slice_axis: str) -> Orientation:
    """How the file's indices become upright slices along an axis, as radiologists look at them.

    Slices run left, back or head; oblique volumes are cut along their own axes, those nearest to the patient's. A
    picture, or a volume of a single slice, is cut along that slice.
    """
    check_slice_axis(slice_axis)
    if image.affine is None:
        return Orientation((0, 1, 2), (False, False, False))
    world_of = io_orientation(image.affine)  # (3, 2): world axis and sign of d, h, w
    single = [int(world_of[axis, 0]) for axis in range(3) if image.shape[axis] == 1]
    if len(single) == 1:
        slice_axis = next(name for name, axes in _UPRIGHT.items() if axes[0][0] == single[0])
    order, flips = [], []
    for world, sign in _UPRIGHT[slice_axis]:
        axis = int(np.flatnonzero(world_of[:, 0] == world)[0])
        order.append(axis)
        flips.append(bool(world_of[axis, 1] != sign))
    return Orientation(tuple(order), tuple(flips))  # type: ignore[arg-type]


def turn(slice_axis: str, other_axis: str) -> Orientation:
    """How upright slices along one axis become upright slices along another."""
    of_world = {world: (axis, sign) for axis, (world, sign) in enumerate(_UPRIGHT[slice_axis])}
    wanted = _UPRIGHT[other_axis]
    return Orientation(
        tuple(of_world[world][0] for world, _ in wanted),  # type: ignore[arg-type]
        tuple(of_world[world][1] != sign for world, sign in wanted),  # type: ignore[arg-type]
    )


def _resample(values: np.ndarray, to_label: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Nearest neighbour on the image's grid; 0 outside the label. SciPy, since ITK refuses sheared (tilted) grids."""
    stored = values.view(np.uint8) if values.dtype == bool else values
    moved = affine_transform(
        stored, to_label[:3, :3], to_label[:3, 3], output_shape=shape, order=0, mode="grid-constant", cval=0
    )
    return moved.view(bool) if values.dtype == bool else moved


def _say_grid(label: Label, image: Image, to_label: np.ndarray) -> str:
    whole = np.round(to_label)
    turns = np.abs(whole[:3, :3])
    permutes = (turns.sum(axis=0) == 1).all() and (turns.sum(axis=1) == 1).all()
    exact = permutes and _near(to_label, whole, image.shape)
    how = "axes reordered, voxel by voxel" if exact else "resampled by nearest neighbour"
    return f"label of shape {_show(label.shape)} lies on another grid than its image of {_show(image.shape)}: {how}"


def _near(matrix: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Whether two index maps agree within the tolerance at every corner of a grid."""
    corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])])
    return float(np.abs((matrix - other) @ corners.T).max()) < GRID_TOLERANCE


def _show(shape: Sequence[int]) -> str:
    """A size as people write it; a single slice by rows and columns.

    >>> _show((1, 310, 700)), _show((20, 512, 512))
    ('(310, 700)', '(20, 512, 512)')
    """
    return str(tuple(int(n) for n in (shape[1:] if shape[0] == 1 else shape)))
