"""Which images and slices become supports: drawn with a seed, subjects disjoint, every class in both halves.

A case is an item of a data list: a picture, or a volume of which slices are picked by the area of the classes on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blosam_monai.data.geometry import SLICE_AXES, Label, Orientation, Value, choose_slice_axis, upright
from blosam_monai.data.readers import pictures, read_image, read_label
from blosam_monai.files import PathLike

AS_STORED = Orientation((0, 1, 2), (False, False, False))
LARGE = 0.5  # of a class's largest area in a volume: from there on, a slice shows much of it
_DRAWS = 1000  # draws tried for one in which every class is in both halves
_PLAIN_DRAWS = 100  # of these, the draws that do not prefer images of rare classes

Item = dict[str, Any]  # image, label, subject; where needed slice and series


@dataclass(frozen=True)
class Case:
    """What the label of an item shows.

    Attributes:
        areas: (S, C) pixels of each class on each slice; S = 1 for a picture, or an item that names its slice.
        slice_axis: along which the slices were counted; None where the file leaves no choice.
        size: number of slices of the image, 1 for a picture.
    """

    areas: np.ndarray
    slice_axis: str | None = None
    size: int = 1

    @property
    def n_shown(self) -> int:
        """Number of slices that show any class."""
        return int(self.areas.any(axis=1).sum())

    def shows(self) -> np.ndarray:
        """(C,) whether any slice shows the class."""
        return np.asarray(self.areas.any(axis=0))

    def shows_much(self) -> np.ndarray:
        """(S, C) whether a slice shows at least half of the class's largest area in the volume."""
        return (self.areas > 0) & (self.areas >= LARGE * self.areas.max(axis=0))


def survey(
    item: Item,
    folder: PathLike,
    values: Mapping[str, Sequence[Value]],
    *,
    coding: str,
    slice_axis: str | None = None,
    allow: Collection[str] = (),
) -> Case:
    """Read the label of an item, and its image where that has geometry.

    Args:
        item: paths relative to ``folder``.
        folder: their folder.
        values: of each class, see ``task_values``.
        coding: see ``read_label``.
        slice_axis: axis of the slices; default: ``choose_slice_axis``.
        allow: see ``read_image``.

    Raises:
        FileNotFoundError, ValueError: as the readers; or the item names a slice that its image does not have, or of a
            volume with geometry without the axis it is counted along.
    """
    path = Path(folder, item["image"])
    orientation, axis = AS_STORED, None
    if pictures.is_picture(path):  # whether it has the size of its label is seen when it is trained
        label = read_label(Path(folder, item["label"]), coding)
    else:
        image = read_image(path, series=item.get("series"), allow=allow)
        label = read_label(Path(folder, item["label"]), coding, image=image)
        if image.affine is not None:
            orientation = upright(image, slice_axis or choose_slice_axis(image))
            axis = None if 1 in image.shape else slice_axis or choose_slice_axis(image)
            if axis and slice_axis is None and "slice" in item:
                raise ValueError(f"{path}: has a slice, its slice_axis is None; write one of {', '.join(SLICE_AXES)}.")
    areas = class_areas(label, values, coding=coding, orientation=orientation)
    size = len(areas)
    if "slice" in item:
        if not 0 <= item["slice"] < size:
            raise ValueError(f"{path}: slice {item['slice']} asked for, it has {size} (0 to {size - 1}).")
        areas = areas[[item["slice"]]]
    return Case(areas, axis, size)


def class_areas(
    label: Label, values: Mapping[str, Sequence[Value]], *, coding: str, orientation: Orientation = AS_STORED
) -> np.ndarray:
    """Pixels (S, C) of each class on each slice of a label.

    Args:
        label: as read.
        values: of each class; of the coding ``threshold`` they do not matter.
        coding: see ``read_label``.
        orientation: what makes slices of it.
    """
    wanted = [[1] if coding == "threshold" else list(numbers) for numbers in values.values()]
    if isinstance(label.values, Mapping):
        return np.stack([orientation.apply(label.mask(names)).sum(axis=(1, 2)) for names in wanted], axis=1)
    rows = []
    for values_of_slice in orientation.apply(label.values):
        foreground = values_of_slice[values_of_slice != 0]  # the lesser part: sorting it is quick
        counts = Counter(dict(zip(*(a.tolist() for a in np.unique(foreground, return_counts=True)), strict=True)))
        rows.append([sum(counts[number] for number in set(numbers)) for numbers in wanted])
    return np.array(rows, dtype=np.int64)


def split_halves(items: Sequence[Item], *, seed: int, shared_subjects: bool = False) -> tuple[list[Item], list[Item]]:
    """Two halves, D1 and D2, disjoint by subject, filled in random order; of an odd number of images D2 has one more.

    Where subjects have several images each, D1 takes those that still fit into half of the images (at least one). With
    ``shared_subjects`` the halves are disjoint by item only.
    """
    if shared_subjects:
        order = np.random.default_rng(seed).permutation(len(items)).tolist()
        first = set(order[: len(items) // 2])
        return [items[i] for i in sorted(first)], [item for i, item in enumerate(items) if i not in first]
    subjects = sorted({item["subject"] for item in items})
    order = np.random.default_rng(seed).permutation(len(subjects))
    lower: list[Item] = []
    for subject in (subjects[i] for i in order):
        own = [item for item in items if item["subject"] == subject]
        if len(lower) + len(own) <= len(items) // 2 or not lower:
            lower += own
    return lower, [item for item in items if item not in lower]


def draw_halves(
    items: Sequence[Item],
    cases: Sequence[Case],
    usable: Sequence[int],
    *,
    n_shot: int,
    slices_per_volume: int,
    shared_subjects: bool,
    rng: np.random.Generator,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Supports of D1 and of D2 as (number of the item, slice): disjoint subjects, as many classes in both as can be.

    Of up to 1000 draws the first is taken that has every class in both halves, else the one that comes closest. After
    100 draws, images of rare classes are preferred.

    Args:
        items, cases: all of them.
        usable: numbers of those that may become supports.
        n_shot: number of supports.
        slices_per_volume: of one volume, unless there are too few volumes; never all of one.
        shared_subjects: a subject's slices may be in both halves, each slice in one.
        rng: of the draw.

    Raises:
        ValueError: all supports are of one subject.
    """
    shows = np.array([case.shows() for case in cases])  # (N, C)
    rarest_first = sorted((np.array([i for i in usable if column[i]], int) for column in shows.T), key=len)
    best: tuple[int, list[list[tuple[int, int]]]] | None = None
    for draw in range(_DRAWS):
        order = [usable[i] for i in rng.permutation(len(usable))]
        if draw >= _PLAIN_DRAWS:  # chance alone does not find the rare classes: two images of each go first
            order = list(dict.fromkeys([int(i) for shown in rarest_first for i in rng.permutation(shown)[:2]] + order))
        first_of = list({items[i]["subject"]: i for i in reversed(order)}.values())[::-1]
        chosen = share(list(dict.fromkeys(first_of + order)), cases, n_shot, min(slices_per_volume, n_shot // 2))
        if shared_subjects:
            slices = rng.permutation(pick_slices(chosen, cases, rng=rng)).tolist()
            picked = [[(i, place) for i, place in half] for half in (slices[: n_shot // 2], slices[n_shot // 2 :])]
        else:
            halves = split_halves([{**items[i], "number": i} for i in chosen], seed=int(rng.integers(2**31)))
            if not halves[1]:
                raise ValueError(
                    "subject: all supports are of one subject, two are needed; label a second, or add "
                    "shared_subjects=true to divide the slices of one."
                )
            picked = [pick_slices([item["number"] for item in half], cases, rng=rng) for half in halves]
        covered = sum(int(np.count_nonzero(count_shown(half, cases))) for half in picked)
        if best is None or covered > best[0]:
            best = covered, picked
        if covered == 2 * shows.shape[1]:
            break
    assert best is not None
    return best[1][0], best[1][1]


def share(order: Sequence[int], cases: Sequence[Case], count: int, slices_per_volume: int) -> list[int]:
    """Numbers of the first cases that give ``count`` slices, each as often as it gives one.

    No volume gives more slices than asked for while there are enough volumes, and none much more than another.

    >>> one, five = (Case(np.ones((n, 1), int)) for n in (1, 5))
    >>> share([2, 0, 1], [one, five, five], 3, 1), share([2, 0, 1], [one, five, five], 6, 2)
    ([2, 0, 1], [2, 0, 1, 2, 1, 2])
    """
    room = {i: max(1, cases[i].n_shown) for i in order}
    limit = slices_per_volume
    while sum(min(n, limit) for n in room.values()) < count and limit < max(room.values()):
        limit += 1
    offered = np.cumsum([min(room[i], limit) for i in order])
    givers = order[: int(np.searchsorted(offered, count)) + 1]
    rounds = [i for turn in range(limit) for i in givers if turn < room[i]]
    return rounds[:count]


def pick_slices(numbers: Sequence[int], cases: Sequence[Case], *, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A slice for each of the numbers, as (number, slice); a number that comes again gets another slice.

    The classes take turns: each slice is picked for the class that the fewest picked so far show much of, among those
    on which this class has at least half of its largest area in the volume; slices that show much of many classes are
    likelier, and slices of one volume keep a distance.
    """
    picked: list[tuple[int, int]] = []
    for i in numbers:
        case = cases[i]
        if len(case.areas) == 1:
            picked.append((i, 0))
        elif not case.n_shown:
            picked.append((i, len(case.areas) // 2))
        else:
            turns = count_shown(picked, cases) if picked else np.zeros(case.areas.shape[1], int)
            taken = [place for number, place in picked if number == i]
            picked.append((i, _pick_slice(case, turns, taken, wanted=list(numbers).count(i), rng=rng)))
    return picked


def count_shown(picked: Sequence[tuple[int, int]], cases: Sequence[Case]) -> np.ndarray:
    """(C,) how many of the picked slices show much of each class."""
    return np.sum([cases[i].shows_much()[place] for i, place in picked], axis=0)


def _pick_slice(case: Case, turns: np.ndarray, taken: list[int], *, wanted: int, rng: np.random.Generator) -> int:
    """A slice for the class that had the fewest turns, not one of the taken, ``wanted`` being needed of the volume."""
    areas = case.areas
    here = np.flatnonzero(case.shows())
    turn = rng.choice(here[turns[here] == turns[here].min()])
    large = case.shows_much()[:, turn]
    free = np.asarray(areas.any(axis=1))
    distance = case.n_shown // (2 * wanted)
    free[taken] = False
    places = np.arange(len(areas))
    far = np.all([np.abs(places - place) >= distance for place in taken] or [free], axis=0)
    candidates = next(np.flatnonzero(c) for c in (large & free & far, large & free, free) if c.any())
    weights = (areas[:, here] / areas.max(axis=0)[here]).sum(axis=1)[candidates]
    return int(rng.choice(candidates, p=weights / weights.sum()))
