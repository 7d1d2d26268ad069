"""Images and labels on their grids: where voxels are, which way up slices are shown, and how a label meets its image.

Arrays are indexed (d, h, w), slowest first: slice, row, column of a DICOM series; k, j, i of a NIfTI or NRRD file. An
affine takes (d, h, w, 1) to millimetres in the patient's LPS frame: x to the left, y to the back, z to the head (DICOM
and ITK; NIfTI's own RAS is converted by its reader and writer). A picture has one slice and no affine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from nibabel.orientations import io_orientation
from scipy.ndimage import affine_transform

SLICE_AXES = ("axial", "coronal", "sagittal")
ANISOTROPIC = 1.5  # slices this many times thicker than pixels are wide were acquired as slices
GRID_TOLERANCE = 1e-2  # voxels; headers are rounded to four or five digits
OUTSIDE = 0.01  # share of a label's foreground that may lie outside its image without a word
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
        placed: whether the affine says where the image lies; if not, it says the voxels' sizes only.
        origins: (D, 3) mm LPS of voxel (d, 0, 0), where slices do not lie evenly as in the affine (missing ones).
    """

    path: str
    values: np.ndarray
    affine: np.ndarray | None = None
    full_range: tuple[float, float] | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    placed: bool = True
    origins: np.ndarray | None = None

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
        parts: of names that unite several files or end on a number, each file's own name -> its mask.
    """

    path: str
    values: np.ndarray | Mapping[str, np.ndarray]
    affine: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) in voxels."""
        values = self.values if isinstance(self.values, np.ndarray) else next(iter(self.values.values()))
        return values.shape

    @property
    def names(self) -> list[str]:
        """The names that ``mask`` knows, also of masks that are empty; none of an index map."""
        return [*self.values, *self.parts] if isinstance(self.values, Mapping) else []

    def counts(self) -> dict[Value, int]:
        """Voxels of each value or name that occurs; background is left out."""
        if isinstance(self.values, Mapping):
            return {name: int(mask.sum()) for name, mask in self.values.items() if mask.any()}
        numbers, counts = np.unique(self.values, return_counts=True)
        return {int(n): int(c) for n, c in zip(numbers, counts, strict=True) if n != 0}

    def mask(self, wanted: Sequence[Value]) -> np.ndarray:
        """Union of the given values or names, (D, H, W) bool; one that does not occur adds nothing."""
        if isinstance(self.values, Mapping):
            named = {**self.parts, **self.values}
            masks = [named[name] for name in wanted if isinstance(name, str) and name in named]
            return np.logical_or.reduce(masks) if masks else np.zeros(self.shape, bool)
        return np.isin(self.values, [v for v in wanted if not isinstance(v, str)])

    def on(self, image: Image) -> Label:
        """The label on the image's grid: as it is, its axes reordered, or resampled by nearest neighbour; then noted.

        Where the label or the image does not say where it lies, they are laid on each other by their shape.

        Raises:
            ValueError: another shape and no geometry to tell where it lies, the two do not overlap, or nothing of the
                label lands on the voxels of a coarser image.
        """
        if self.affine is None or image.affine is None or not image.placed:
            return self._by_shape(image)
        to_label = np.linalg.inv(self.affine) @ image.affine  # indices of the image -> indices of the label
        if self.shape == image.shape and _near(to_label, np.eye(4), self.shape):
            return self
        if not _overlap(self.shape, image.shape, to_label):
            raise _no_overlap(self, image)
        if _reorders(to_label, image.shape):
            image = replace(image, origins=None)  # drawn on the image's own grid, evenly stacked as that is
        values: np.ndarray | dict[str, np.ndarray]
        if isinstance(self.values, Mapping):
            values = {name: _resample(mask, self.affine, image) for name, mask in self.values.items()}
        else:
            values = _resample(self.values, self.affine, image)
        parts = {name: _resample(mask, self.affine, image) for name, mask in self.parts.items()}
        moved = replace(self, values=values, affine=image.affine, parts=parts)
        notes = _say_loss(self, moved, image, np.linalg.inv(to_label))
        return replace(moved, notes=(*self.notes, _say_grid(self, image, to_label), *notes))

    def _by_shape(self, image: Image) -> Label:
        """The label voxel by voxel on an image of its shape."""
        if self.shape != image.shape:
            raise ValueError(
                f"{self.path}: label has shape {_show(self.shape)}, its image {_show(image.shape)}; export the "
                "label again."
            )
        if self.affine is None:
            return self
        said = "the image does not say where it lies: the label is laid on it by its shape"
        return replace(self, affine=image.affine, notes=(*self.notes, said))


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


def _resample(values: np.ndarray, affine: np.ndarray, image: Image) -> np.ndarray:
    """Nearest neighbour on the image's voxels; 0 outside the label. SciPy, since ITK refuses sheared (tilted) grids."""
    stored = values.view(np.uint8) if values.dtype == bool else values
    to_label = np.linalg.inv(affine) @ image.affine
    depth, *plane = image.shape
    moved = np.empty(image.shape, stored.dtype)
    if image.origins is None:
        blocks = [(slice(0, depth), to_label[:3, 3])]
    else:  # slice by slice, from where each lies
        starts = np.linalg.solve(affine, np.column_stack([image.origins, np.ones(depth)]).T)[:3].T  # (D, 3)
        blocks = [(slice(d, d + 1), start) for d, start in enumerate(starts)]
    for block, start in blocks:
        shape = (block.stop - block.start, *plane)
        moved[block] = affine_transform(
            stored, to_label[:3, :3], start, output_shape=shape, order=0, mode="grid-constant", cval=0
        )
    return moved.view(bool) if values.dtype == bool else moved


def _overlap(shape: Sequence[int], other: Sequence[int], to_shape: np.ndarray) -> bool:
    """Whether two grids' boxes meet, seen along the axes of each; the matrix leads to indices of the first."""
    for box, seen, matrix in ((shape, other, to_shape), (other, shape, np.linalg.inv(to_shape))):
        edges = [(-0.5, n - 0.5) for n in seen]
        corners = matrix[:3] @ np.array([(*corner, 1) for corner in product(*edges)]).T  # (3, 8)
        if (corners.max(axis=1) < -0.5).any() or (corners.min(axis=1) > np.array(box) - 0.5).any():
            return False
    return True


def _say_loss(label: Label, moved: Label, image: Image, to_image: np.ndarray) -> list[str]:
    """What of a label its image's voxels do not hold; raises where that is all."""
    before, after = label.counts(), moved.counts()
    if not before:
        return []
    outside = _share_outside(label, image.shape, to_image)
    if not after and outside == 1:
        raise _no_overlap(label, image)
    if not after:
        raise ValueError(
            f"{label.path}: nothing of the label lands on the coarser grid of its image {image.path}; draw it on the "
            "image's own slices, or leave the case out."
        )
    notes = [f"{outside:.0%} of the label lie outside its image: cut off"] if outside > OUTSIDE else []
    if lost := sorted(str(value) for value in before if value not in after):
        notes.append(f"nothing of {', '.join(lost)} in the label lands on the image's voxels")
    return notes


def _share_outside(label: Label, shape: tuple[int, int, int], to_image: np.ndarray) -> float:
    """Share of a label's foreground voxels whose centre lies outside the image; a slice at a time, to save memory."""
    masks = list(label.values.values()) if isinstance(label.values, Mapping) else [label.values]
    outside = total = 0
    for d in range(label.shape[0]):
        rows, columns = np.nonzero(np.logical_or.reduce([mask[d] != 0 for mask in masks]))
        places = to_image[:3] @ np.stack([np.full(len(rows), d), rows, columns, np.ones(len(rows))])  # (3, N)
        within = (places > -0.5 - GRID_TOLERANCE) & (places < np.array(shape)[:, None] - 0.5 + GRID_TOLERANCE)
        outside += len(rows) - int(within.all(axis=0).sum())
        total += len(rows)
    return outside / total


def _no_overlap(label: Label, image: Image) -> ValueError:
    return ValueError(f"{label.path}: the label does not overlap its image {image.path}; check that they pair.")


def _say_grid(label: Label, image: Image, to_label: np.ndarray) -> str:
    exact = _reorders(to_label, image.shape)
    how = "axes reordered, voxel by voxel" if exact else "resampled by nearest neighbour"
    if image.origins is not None:
        how += ", slice by slice"
    return f"label of shape {_show(label.shape)} lies on another grid than its image of {_show(image.shape)}: {how}"


def _reorders(to_label: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Whether voxels of an image are voxels of its label, with axes in another order, reversed or cut."""
    whole = np.round(to_label)
    turns = np.abs(whole[:3, :3])
    permutes = (turns.sum(axis=0) == 1).all() and (turns.sum(axis=1) == 1).all()
    return bool(permutes and _near(to_label, whole, shape))


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
