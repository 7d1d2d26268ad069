"""What a data list holds, read pair by pair before anyone trains: sizes, spacing, classes and their areas, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blosam_monai.data.datalist import parse_datalist
from blosam_monai.data.geometry import SLICE_AXES, Image, Label, Value, choose_slice_axis, spacing, upright
from blosam_monai.data.pairing import SECTIONS, case_names
from blosam_monai.data.readers import read_image, read_label
from blosam_monai.data.supports import Item, class_areas
from blosam_monai.data.tasks import NUMBER_CODINGS, check_names, known_values, task_values
from blosam_monai.files import PathLike

_STEM = 28  # characters of a case's name in the table
_CLASSES = 4  # largest classes of a case in the table
_MM3_PER_ML = 1000


@dataclass(frozen=True)
class Row:
    """What was found of one item.

    Attributes:
        number: of the item, from 1.
        section: of the list.
        case: its name, see ``case_names``.
        slice: number of the slice; None for a picture or a whole volume.
        size: (H, W), of a whole volume (D, H, W), upright, in voxels; () where it could not be read.
        spacing: of these axes in mm; () without geometry.
        slice_axis: along which a volume is cut; None for a picture.
        intensities: lowest and highest number of the image.
        areas: of each class that is there.
        unit: of the areas: mm2, of a whole volume mL; px or voxels without geometry.
        warnings: what a person should know.
        error: why it cannot be used; None if it can.
    """

    number: int
    section: str
    case: str
    slice: int | None = None
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    slice_axis: str | None = None
    intensities: tuple[float, float] | None = None
    areas: Mapping[str, float] | None = None
    unit: str = ""
    warnings: tuple[str, ...] = ()
    error: str | None = None


def check_datalist(datalist: PathLike | Mapping[str, Any], dataset_dir: PathLike) -> list[Row]:
    """Read every pair of a data list.

    Args:
        datalist: the JSON file, or its content as ``make_datalist`` gives it.
        dataset_dir: folder that its paths are relative to.

    Returns:
        A row for each item, in the order of the list; what is wrong with an item is said in its row.

    Raises:
        FileNotFoundError, ValueError: the list itself does not hold.
    """
    content = datalist if isinstance(datalist, Mapping) else parse_datalist(datalist)
    sections = [section for section in (*SECTIONS, "training") if content.get(section)]
    items = [{**item, "section": section} for section in sections for item in content[section]]
    items = [{**i, "case": case} for i, case in zip(items, case_names([i["image"] for i in items]), strict=True)]
    rows: list[Row] = []
    with tqdm(total=len(items), desc="checking") as bar:
        for _, same in groupby(items, key=lambda item: (item["image"], item["label"], item.get("series"))):
            for row in _check_pair(list(same), content, Path(dataset_dir), first=len(rows) + 1):
                rows.append(row)
                bar.update()
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Rows as a table to read, below it the warnings and errors with the numbers of their cases."""
    header = ("#", "case", "section", "slice", "size", "spacing/mm", "axis", "intensities", "classes")
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(n) if column in (0, 3) else cell.ljust(n) for column, (cell, n) in enumerate(columns))
        for columns in ([*zip(line, widths, strict=True)] for line in cells)
    ]
    for kind, texts in (
        ("warning", [(text, row.number) for row in rows for text in row.warnings]),
        ("error", [(row.error, row.number) for row in rows if row.error is not None]),
    ):
        numbers: dict[str, list[int]] = {}
        for text, number in texts:
            numbers.setdefault(text, []).append(number)
        lines += [f"{kind} ({_ranges(found)}): {text}" for text, found in numbers.items()]
    errors = sum(row.error is not None for row in rows)
    lines.append(f"{len(rows)} checked: {errors} with errors, {sum(bool(row.warnings) for row in rows)} with warnings")
    return "\n".join(line.rstrip() for line in lines)


def _check_pair(items: Sequence[Item], content: Mapping[str, Any], folder: Path, *, first: int) -> list[Row]:
    """A row for each of the items of one image and label, which are read once."""
    names = [(first + place, item["section"], item["case"]) for place, item in enumerate(items)]
    try:
        image = read_image(folder / items[0]["image"], series=items[0].get("series"), allow=content.get("allow", ()))
        label = read_label(folder / items[0]["label"], content["label_coding"], image=image)
        if isinstance(label.values, Mapping):
            said = check_names(label.path, label.names, content["labels"], content["label_coding"])
            label = replace(label, notes=(*label.notes, *said))
        foreign = _foreign(label, content)
    except (ValueError, OSError) as error:
        return [Row(*name, slice=item.get("slice"), error=str(error)) for name, item in zip(names, items, strict=True)]
    return [_describe(name, item, image, label, content, foreign) for name, item in zip(names, items, strict=True)]


def _describe(
    name: tuple[int, str, str], item: Item, image: Image, label: Label, content: Mapping[str, Any], foreign: list[Value]
) -> Row:
    """The row of one item."""
    values, coding = task_values(content["labels"]), content["label_coding"]
    axis = content.get("slice_axis") or choose_slice_axis(image)
    orientation = upright(image, axis)
    pixels = class_areas(label, values, coding=coding, orientation=orientation)  # (S, C)
    size = tuple(image.shape[a] for a in orientation.order)
    steps = () if image.affine is None else tuple(spacing(image.affine)[a] for a in orientation.order)
    place = item.get("slice")
    error = None
    if place is not None and size[0] > 1 and image.affine is not None and not content.get("slice_axis"):
        error = f"{image.path}: has a slice, its slice_axis is None; write one of {', '.join(SLICE_AXES)}."
    elif place is not None and place >= size[0]:
        error = f"{image.path}: slice {place} asked for, it has {size[0]} (0 to {size[0] - 1})."
    elif place is None and size[0] > 1 and item["section"] != "testing":
        error = f"{image.path}: is a volume of {size[0]} slices, name one; make the list with `blosam datalist`."
    whole = size[0] > 1 and (place is None or error is not None)
    counts = pixels.sum(axis=0) if whole else pixels[place or 0]
    scale, unit = _unit(steps, whole)
    warnings = (*image.notes, *label.notes)
    if not counts.any():
        warnings += ("the label shows no class of the list",)
        if item["section"] in ("lower", "upper"):
            error = error or f"{label.path}: the label is empty; replace this image ({item['section']} set)."
    if foreign and coding in NUMBER_CODINGS:
        error = error or f"{label.path}: label value {foreign[0]} is not in the data list's labels; add it there."
    elif foreign:
        warnings += (f"not in the data list's labels: {', '.join(map(str, foreign))}",)
    return Row(
        *name,
        slice=place,
        size=size if whole else size[1:],
        spacing=steps if whole else steps[1:],
        slice_axis=axis if size[0] > 1 else None,
        intensities=(float(image.values.min()), float(image.values.max())),
        areas={task: float(n * scale) for task, n in zip(values, counts, strict=True) if n},
        unit=unit,
        warnings=tuple(dict.fromkeys(warnings)),
        error=error,
    )


def _unit(steps: tuple[float, ...], whole: bool) -> tuple[float, str]:
    """Area or volume of a voxel, and its unit."""
    if not steps:
        return 1.0, "voxels" if whole else "px"
    if whole:
        return float(np.prod(steps)) / _MM3_PER_ML, "mL"
    return float(np.prod(steps[1:])), "mm2"


def _foreign(label: Label, content: Mapping[str, Any]) -> list[Value]:
    """Values and names of a label that the list does not know."""
    if content["label_coding"] == "threshold":
        return []
    known = known_values(content["labels"])
    return [value for value in label.counts() if value not in known]


def _cells(row: Row) -> tuple[str, ...]:
    case = row.case if len(row.case) <= _STEM else f"{row.case[: _STEM - 3]}..."
    largest = sorted((row.areas or {}).items(), key=lambda named: -named[1])
    classes = ", ".join(f"{name} {_short(area)} {row.unit}" for name, area in largest[:_CLASSES])
    if len(largest) > _CLASSES:
        classes += f", {len(largest) - _CLASSES} more"
    return (
        str(row.number),
        case,
        row.section,
        "" if row.slice is None else str(row.slice),
        " x ".join(map(str, row.size)),
        " x ".join(f"{step:.2f}" for step in row.spacing),
        row.slice_axis or "",
        "" if row.intensities is None else f"{_short(row.intensities[0])} to {_short(row.intensities[1])}",
        classes or ("ERROR" if row.error else "none"),
    )


def _short(number: float) -> str:
    """A number in few characters.

    >>> _short(1.2345), _short(1234.5), _short(0.0)
    ('1.23', '1234', '0')
    """
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs as first-last.

    >>> _ranges([1, 2, 3, 5, 8, 9])
    '1-3, 5, 8-9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
