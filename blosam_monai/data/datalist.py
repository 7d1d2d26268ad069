"""Data lists: which images train which level, drawn with a seed, split by subject, kept with hashes.

A data list is a JSON file in the style of the Medical Segmentation Decathlon. Beside ``name``, ``description``,
``license`` and ``labels`` (name -> label value or values) it has the lists ``lower`` (D1), ``upper`` (D2),
``validation`` and ``testing`` of ``{"image", "label", "subject"}``, paths relative to ``dataset_dir``, and
``label_coding``, ``n_shot``, ``seed``, ``sha256`` (path -> hash). Items cut from volumes name their ``slice``, counted
in the upright stack along the list's ``slice_axis``; those of a folder with several DICOM series their ``series``. A
list of only ``training`` is split by the run's seed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blosam_monai.data.geometry import SLICE_AXES, Value
from blosam_monai.data.pairing import SECTIONS, case_names, parse_items, read_json
from blosam_monai.data.readers import LABEL_CODINGS, dicom, pictures, volumes
from blosam_monai.data.supports import Case, Item, draw_halves, pick_slices, share, split_halves, survey
from blosam_monai.data.tasks import check_values, parse_labels, task_values
from blosam_monai.data.windows import check_window
from blosam_monai.data.writers.dicom_seg import check_codes
from blosam_monai.files import PathLike, atomic, content_sha256

logger = logging.getLogger(__name__)


def load_datalist(
    path: PathLike,
    dataset_dir: PathLike,
    *,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    section: str | None = None,
) -> dict[str, Any]:
    """Read and check a data list, and make its paths absolute.

    Args:
        path: the JSON file.
        dataset_dir: folder that its paths are relative to.
        seed: splits a list of only ``training`` into the halves.
        tasks: the tasks to be trained; default: all labels.
        section: only this section is needed (for an evaluation); default: the supports and the validation set.

    Returns:
        The list, with ``lower``, ``upper``, ``validation``, ``testing`` (empty where absent), ``label_coding`` and
        ``allow`` (likewise).

    Raises:
        FileNotFoundError, ValueError: what does not hold, which file, and the remedy.
    """
    content = parse_datalist(path)
    values = task_values(content["labels"], tasks)
    if not content["lower"] and not content["upper"]:
        shared = content.get("shared_subjects", False)
        content["lower"], content["upper"] = split_halves(content["training"], seed=seed, shared_subjects=shared)
    for name in SECTIONS:
        content[name] = [{**item, "section": name} for item in content[name]]
    check_subjects(content, path, dataset_dir)
    if section is not None:
        if section not in SECTIONS or not content[section]:
            raise ValueError(f"{path}: {section} is empty; choose one of {', '.join(SECTIONS)} that holds images.")
        _find_files(content, path, dataset_dir, [section])
        return content
    if not content["lower"] or not content["upper"]:
        supports = content["lower"] + content["upper"]
        raise ValueError(
            f"{path}: {len(supports)} support images of {len({item['subject'] for item in supports})} subjects; at "
            "least 2 of 2 subjects are needed, one for each level."
        )
    _find_files(content, path, dataset_dir, ["lower", "upper", "validation"])
    _check_supports(content, values)
    for item in content["validation"]:
        if "slice" not in item and not pictures.is_picture(item["image"]):
            _check_slice(item, _survey(item, content, values))
    return content


def parse_datalist(path: PathLike) -> dict[str, Any]:
    """The content of a data list with every key there and of the right form; no other file is read.

    Raises:
        FileNotFoundError, ValueError: what does not hold, and the remedy.
    """
    content = read_json(path)
    if "labels" not in content:
        raise ValueError(f'{path}: "labels" is missing; give names and values, as {{"background": 0, "lung": 1}}.')
    content["labels"] = parse_labels(content["labels"])
    content.setdefault("label_coding", "index")
    content.setdefault("allow", [])
    if content["label_coding"] not in LABEL_CODINGS:
        raise ValueError(f"{path}: label_coding {content['label_coding']!r} is not one of {', '.join(LABEL_CODINGS)}.")
    check_values(content["labels"], content["label_coding"])
    check_settings(content["labels"], content)
    found = [(section, item) for section in (*SECTIONS, "training") for item in content.get(section, [])]
    # Other lists hold unlabelled tests: there is nothing to score.
    found = [(s, item) for s, item in found if s != "testing" or (isinstance(item, dict) and "label" in item)]
    items = parse_items(found, path)
    for section in (*SECTIONS, "training"):
        content[section] = [item for item, (name, _) in zip(items, found, strict=True) if name == section]
    if content["training"] and (content["lower"] or content["upper"]):
        raise ValueError(f"{path}: has training beside lower or upper; keep training, or the two halves.")
    _check_axis(content, path)
    return content


def check_settings(labels: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise where a list's ``allow``, ``snomed`` or ``window`` is not of its form.

    Raises:
        ValueError: which, and what it holds.
    """
    check_allow(settings.get("allow") or [])
    snomed = settings.get("snomed") or {}
    if not isinstance(snomed, Mapping):
        raise ValueError(f'snomed: {snomed!r} is not tasks and codes, as {{"liver": ["10200004", "Liver"]}}.')
    check_codes(task_values(labels), snomed)
    check_window(settings.get("window"))


def check_allow(allow: Any) -> None:
    """Raise where it is no list of flaws of DICOM series.

    Raises:
        ValueError: what it is, or which name is unknown.
    """
    if (
        isinstance(allow, (str, Mapping))
        or not isinstance(allow, Collection)
        or not all(isinstance(name, str) for name in allow)
    ):
        raise ValueError(f'allow: {allow!r} is not a list of names, as ["gantry_tilt"].')
    dicom.check_flaws(allow)


def make_datalist(
    items: Sequence[Item],
    labels: dict[str, Any],
    *,
    dataset_dir: PathLike,
    n_shot: int,
    seed: int,
    label_coding: str = "index",
    n_validation: int = 0,
    n_testing: int | None = None,
    support: str | None = None,
    slice_axis: str | None = None,
    slices_per_volume: int = 1,
    shared_subjects: bool = False,
    allow: Collection[str] = (),
    snomed: Mapping[str, Sequence[str]] | None = None,
    window: Any = None,
    name: str = "",
    description: str = "",
    license: str = "unknown",
) -> dict[str, Any]:
    """Draw a few-shot data list from labelled items: n supports in two halves, subjects disjoint everywhere.

    Supports come from different subjects while there are enough. Of up to 1000 seeded draws the first is taken in which
    every class is in both halves, else the one that comes closest; what is absent is logged. After 100 draws, images of
    rare classes are preferred. Of volumes, slices are drawn, see ``pick_slices``; tested are whole volumes.

    Args:
        items: ``{"image", "label", "subject"}``, paths relative to ``dataset_dir``; where needed ``series``, and
            ``slice`` for a volume of which only that slice is labelled.
        labels: name -> value, or values of a union.
        dataset_dir, label_coding: see the module.
        n_shot: number of labelled images, or slices, to train on, 2 or more.
        seed: of the draw.
        n_validation: images, or slices, kept for choosing the checkpoint.
        n_testing: images or whole volumes to test on; default: all others.
        support: regular expression on the case's name, see ``case_names``. Supports and validation come from the
            cases that match, the others are for testing: train at one site, test at the other.
        slice_axis: axis along which volumes are cut; default: that of ``choose_slice_axis``, if all volumes agree.
        slices_per_volume: most slices of one volume; more are taken where there are too few volumes.
        allow: flaws of DICOM series to accept, see ``read_image``.
        snomed: task -> SNOMED CT code and meaning, for DICOM SEG.
        shared_subjects: both halves may hold slices of one subject.
        window: intensities to show, see ``blosam_monai.data.windows``.
        name, description, license: copied into the list.

    Raises:
        FileNotFoundError, ValueError: what cannot be read or drawn, and the remedy.
    """
    counts = {"n_shot": (n_shot, 2), "slices_per_volume": (slices_per_volume, 1), "n_validation": (n_validation, 0)}
    for count, (number, least) in {**counts, "n_testing": (n_testing or 0, 0)}.items():
        if number < least:
            raise ValueError(f"{count}: {number} is too few; at least {least} needed.")
    check_values(labels, label_coding)
    check_settings(labels, {"allow": allow, "snomed": snomed, "window": window})
    _check_images(items)
    values = task_values(labels)
    cases = [
        survey(item, dataset_dir, values, coding=label_coding, slice_axis=slice_axis, allow=allow)
        for item in tqdm(items, "reading labels")
    ]
    names = case_names([item["image"] for item in items])
    from_here = [support is None or bool(re.search(support, case)) for case in names]
    # An empty label teaches nothing.
    usable = [i for i, case in enumerate(cases) if case.n_shown and from_here[i]]
    _check_enough(cases, usable, n_shot, support)
    axis = _common_axis(items, cases, slice_axis)
    rng = np.random.default_rng(seed)
    few: dict[str, Any] = {"n_shot": n_shot, "slices_per_volume": slices_per_volume, "shared_subjects": shared_subjects}
    lower, upper = draw_halves(items, cases, usable, **few, rng=rng)
    for half, chosen in (("lower", lower), ("upper", upper)):
        shown = np.any([cases[i].areas[place] for i, place in chosen], axis=0)
        for missing in sorted(task for task, found in zip(values, shown, strict=True) if not found):
            logger.warning("class %s is in no image of the %s set; label one more image that shows it.", missing, half)
    taken = {items[i]["subject"] for i, _ in (*lower, *upper)}
    others = [i for i in range(len(items)) if items[i]["subject"] not in taken]
    rng = np.random.default_rng(seed + 1)
    rng.shuffle(others)
    left = [i for i in others if from_here[i]]
    kept, testing = _split_by_subject(items, cases, left, count=n_validation, slices_per_volume=slices_per_volume)
    validation = sorted(pick_slices(kept, cases, rng=rng))
    if support is not None:
        testing = [i for i in others if not from_here[i]]
    testing = sorted(testing[:n_testing] if n_testing is not None else testing)
    sections = {
        section: [_item(items[i], cases[i], place) for i, place in picked]
        for section, picked in (("lower", lower), ("upper", upper), ("validation", validation))
    }
    sections["testing"] = [dict(items[i]) for i in testing]
    files = {item[key] for section in sections.values() for item in section for key in ("image", "label")}
    options = {
        "slice_axis": axis,
        "window": window,
        "allow": sorted(allow),
        "shared_subjects": shared_subjects,
        "snomed": {task: list(code) for task, code in (snomed or {}).items()},
    }
    return {
        "name": name,
        "description": description,
        "license": license,
        "labels": labels,
        "label_coding": label_coding,
        **{key: value for key, value in options.items() if value},
        "n_shot": n_shot,
        "seed": seed,
        **sections,
        "sha256": {file: content_sha256(Path(dataset_dir, file)) for file in sorted(files)},
    }


def write_datalist(path: PathLike, datalist: dict[str, Any]) -> None:
    """Write a data list as JSON; it appears whole or not at all."""
    with atomic(path) as part:
        part.write_text(json.dumps(datalist, indent=1) + "\n", encoding="utf-8")


def _find_files(content: dict[str, Any], path: PathLike, dataset_dir: PathLike, sections: Sequence[str]) -> None:
    """Make paths absolute; every file must be there, and a support's must be what it was when the list was made."""
    hashes = content.get("sha256", {})
    for item in (item for section in sections for item in content[section]):
        for key in ("image", "label"):
            file = Path(dataset_dir, item[key])
            if not file.exists():
                raise FileNotFoundError(f"{file}: listed in {path} but missing; check dataset_dir ({dataset_dir}).")
            known = hashes.get(item[key]) if item["section"] in ("lower", "upper") else None
            if known not in (None, content_sha256(file)):
                raise ValueError(f"{file}: has changed since {path} was made; make the list again.")
            item[key] = str(file)


def check_subjects(content: Mapping[str, Any], path: PathLike, dataset_dir: PathLike) -> None:
    """Neither a subject nor an image may be in two sections; slices of one image in one section are fine.

    With ``shared_subjects`` D1 and D2 may share both, but no slice. An image is the same however its path is spelt.

    Raises:
        ValueError: what is in two sections.
    """
    shared = {"lower", "upper"} if content.get("shared_subjects") else set()
    section_of: dict[tuple[Any, ...], str] = {}
    for section in SECTIONS:
        for item in content[section]:
            image = os.path.normpath(os.path.join(dataset_dir, item["image"]))
            for key, found in (("subject", item["subject"]), ("image", image)):
                first = section_of.setdefault((key, found), section)
                if first != section and not {first, section} <= shared:
                    raise ValueError(
                        f"{path}: {key} {item[key]} is in {first} and in {section}; keep it in one of them."
                    )
            slice_of_image = image, item.get("slice")
            if section in shared and section_of.setdefault(slice_of_image, section) != section:
                slice_name = f"slice {item.get('slice')} of {item['image']}"
                raise ValueError(f"{path}: {slice_name} is in lower and in upper; keep it in one of them.")


def _check_supports(content: dict[str, Any], values: dict[str, list[Value]]) -> None:
    shown: dict[str, np.ndarray] = {}
    for half in ("lower", "upper"):
        cases = [_survey(item, content, values) for item in content[half]]
        for item, case in zip(content[half], cases, strict=True):
            _check_slice(item, case)
            if not case.n_shown:
                raise ValueError(
                    f"{item['label']}: the label is empty for {', '.join(values)}; replace this image ({half} set)."
                )
        shown[half] = np.any([case.shows() for case in cases], axis=0)
    for number, task in enumerate(values):
        absent = [half for half, classes in shown.items() if not classes[number]]
        if len(absent) == 2:
            raise ValueError(f"tasks: {task} is in no label of the lower and upper set; leave it out or label it.")
        if absent:
            logger.warning("task %s is in no label of the %s set.", task, absent[0])


def _survey(item: Item, content: dict[str, Any], values: Mapping[str, Sequence[Value]]) -> Case:
    """What the label of an item with absolute paths shows of the tasks."""
    return survey(
        item,
        "",
        values,
        coding=content["label_coding"],
        slice_axis=content.get("slice_axis"),
        allow=content["allow"],
    )


def _check_slice(item: Item, case: Case) -> None:
    if case.size > 1 and "slice" not in item:
        raise ValueError(
            f"{item['image']}: is a volume of {case.size} slices, its item in {item['section']} names none; make the "
            "list with `blosam datalist`."
        )


def _check_axis(content: dict[str, Any], path: PathLike) -> None:
    """A list that names slices of volumes must say along which axis they are counted; a stack of pages has one."""
    axis = content.get("slice_axis")
    sliced = any(
        "slice" in item and volumes.is_volume(item["image"])
        for section in (*SECTIONS, "training")
        for item in content[section]
    )
    if (axis is not None or sliced) and axis not in SLICE_AXES:
        raise ValueError(f"{path}: slice_axis is {axis!r}; write one of {', '.join(SLICE_AXES)}.")


def _check_enough(cases: Sequence[Case], usable: Sequence[int], n_shot: int, support: str | None) -> None:
    """There are as many labelled images, or slices of volumes, as are asked for."""
    found = sum(len(case.areas) for case in cases)
    if n_shot > found:
        raise ValueError(f"n_shot: {n_shot} asked for, {found} labelled images found.")
    found = sum(cases[i].n_shown for i in usable)
    if n_shot > found:
        kind = "slices" if any(case.size > 1 for case in cases) else "images"
        which = "have a label that is not empty" + (f" and match {support!r}" if support else "")
        raise ValueError(f"n_shot: {n_shot} asked for, {found} {kind} {which}.")


def _check_images(items: Sequence[Item]) -> None:
    """An image is of one subject, however its path is spelt: else it could be trained and tested on."""
    subject_of: dict[str, str] = {}
    for item in items:
        first = subject_of.setdefault(os.path.normpath(item["image"]), item["subject"])
        if first != item["subject"]:
            raise ValueError(f"{item['image']}: is of the subjects {first} and {item['subject']}; name one.")


def _common_axis(items: Sequence[Item], cases: Sequence[Case], asked: str | None) -> str | None:
    """The axis along which the volumes are cut; None where no image has geometry: stacks are cut as stored."""
    if all(case.size == 1 for case in cases):
        if asked is not None:
            raise ValueError(f"slice_axis: {asked} asked for, but every image is a single slice; leave it out.")
        return None
    first_of = {case.slice_axis: item["image"] for item, case in zip(items, cases, strict=True) if case.slice_axis}
    if len(first_of) > 1:
        found = ", ".join(f"{axis} (as {image})" for axis, image in sorted(first_of.items()))
        raise ValueError(f"slice_axis: the volumes were acquired along {found}; give one for all of them.")
    if asked is not None and not first_of:
        raise ValueError(f"slice_axis: {asked} asked for, but no image says how it lies in the patient; leave it out.")
    return next(iter(first_of), None)


def _split_by_subject(
    items: Sequence[Item], cases: Sequence[Case], numbers: list[int], *, count: int, slices_per_volume: int
) -> tuple[list[int], list[int]]:
    """At least ``count`` of the numbers, a volume's once for each of its slices, and the others; no subject in both."""
    if count == 0:
        return [], numbers
    if count > sum(max(1, cases[i].n_shown) for i in numbers):
        raise ValueError(f"n_validation: {count} asked for, {len(numbers)} images are left after the supports.")
    chosen = share(numbers, cases, count, slices_per_volume)
    subjects = {items[i]["subject"] for i in chosen}
    chosen += [i for i in numbers if items[i]["subject"] in subjects and i not in chosen]
    return chosen, [i for i in numbers if items[i]["subject"] not in subjects]


def _item(item: Item, case: Case, place: int) -> Item:
    """The item as a list names it: a volume with one of its slices."""
    return {**item, "slice": place} if case.size > 1 and "slice" not in item else dict(item)
