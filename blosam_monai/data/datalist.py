"""Data lists: which images train which level, drawn with a seed, split by subject, kept with hashes.

A data list is a JSON file in the style of the Medical Segmentation Decathlon. Beside ``name``, ``description``,
``license`` and ``labels`` (name -> label value or values) it has the lists ``lower`` (D1), ``upper`` (D2),
``validation`` and ``testing`` of ``{"image", "label", "subject"}``, paths relative to ``dataset_dir``, and
``label_coding``, ``n_shot``, ``seed``, ``sha256`` (path -> hash). A list of only ``training`` is split by the run's
seed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blosam_monai.data.readers import LABEL_CODINGS, list_images, read_label
from blosam_monai.files import PathLike, atomic, file_sha256
from blosam_monai.transforms import task_values

logger = logging.getLogger(__name__)

SECTIONS = ("lower", "upper", "validation", "testing")
_MANY = 32  # gray values: more are no classes
_SOFT_EDGE = 0.3  # share of the foreground that may lie between 0 and 255 at the edges of a mask
_DRAWS = 1000  # draws tried for one in which every class is in both halves
_PLAIN_DRAWS = 100  # of these, the draws that do not prefer images of rare classes

Item = dict[str, str]


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
        The list, with ``lower``, ``upper``, ``validation``, ``testing`` (empty where absent), ``label_coding``.

    Raises:
        FileNotFoundError, ValueError: what does not hold, which file, and the remedy.
    """
    content = _parse_datalist(path)
    values = task_values(content["labels"], tasks)
    if not content["lower"] and not content["upper"]:
        content["lower"], content["upper"] = split_halves(content["training"], seed=seed)
    for name in SECTIONS:
        content[name] = [{**item, "section": name} for item in content[name]]
    _check_subjects(content, path)
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
    return content


def _parse_datalist(path: PathLike) -> dict[str, Any]:
    """The content of a data list with every key there and of the right form."""
    content = _read_json(path)
    if "labels" not in content:
        raise ValueError(f'{path}: "labels" is missing; give names and values, as {{"background": 0, "lung": 1}}.')
    content["labels"] = _parse_labels(content["labels"])
    content.setdefault("label_coding", "index")
    if content["label_coding"] not in LABEL_CODINGS:
        raise ValueError(f"{path}: label_coding {content['label_coding']!r} is not one of {', '.join(LABEL_CODINGS)}.")
    for section in (*SECTIONS, "training"):
        items = content.get(section) or []
        if not isinstance(items, list):
            raise ValueError(f"{path}: {section} is not a list of images.")
        if section == "testing":  # other lists hold unlabelled tests: there is nothing to score
            items = [item for item in items if isinstance(item, dict) and "label" in item]
        content[section] = [_named(item, section, path) for item in items]
    return content


def _find_files(content: dict[str, Any], path: PathLike, dataset_dir: PathLike, sections: Sequence[str]) -> None:
    """Make paths absolute; every file must be there, and a support's must be what it was when the list was made."""
    hashes = content.get("sha256", {})
    for item in (item for section in sections for item in content[section]):
        for key in ("image", "label"):
            file = Path(dataset_dir, item[key])
            if not file.is_file():
                raise FileNotFoundError(f"{file}: listed in {path} but missing; check dataset_dir ({dataset_dir}).")
            known = hashes.get(item[key]) if item["section"] in ("lower", "upper") else None
            if known not in (None, file_sha256(file)):
                raise ValueError(f"{file}: has changed since {path} was made; make the list again.")
            item[key] = str(file)


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
    name: str = "",
    description: str = "",
    license: str = "unknown",
) -> dict[str, Any]:
    """Draw a few-shot data list from labelled items: n supports in two halves, subjects disjoint everywhere.

    Supports come from different subjects while there are enough. Of up to 1000 seeded draws the first is taken in which
    every class is in both halves, else the one that comes closest; what is absent is logged. After 100 draws, images of
    rare classes are preferred.

    Args:
        items: ``{"image", "label", "subject"}``, paths relative to ``dataset_dir``.
        labels: name -> value, or values of a union.
        dataset_dir, label_coding: see the module.
        n_shot: number of labelled images to train on, 2 or more.
        seed: of the draw.
        n_validation: images kept for choosing the checkpoint.
        n_testing: images to test on; default: all others.
        support: regular expression on the image's stem. Supports and validation come from the images that match, the
            others are for testing: train at one site, test at the other.
        name, description, license: copied into the list.
    """
    if n_shot < 2:
        raise ValueError(f"n_shot: {n_shot} is too few; at least 2 are needed, one for each level.")
    if n_shot > len(items):
        raise ValueError(f"n_shot: {n_shot} asked for, {len(items)} labelled images found.")
    values = task_values(labels)
    present = [
        _classes(Path(dataset_dir, item["label"]), values, label_coding) for item in tqdm(items, "reading labels")
    ]
    from_here = [support is None or bool(re.search(support, Path(item["image"]).stem)) for item in items]
    # An empty label teaches nothing.
    usable = [i for i, classes in enumerate(present) if classes and from_here[i]]
    if len(usable) < n_shot:
        which = "have a label that is not empty" + (f" and match {support!r}" if support else "")
        raise ValueError(f"n_shot: {n_shot} asked for, {len(usable)} images {which}.")
    lower, upper = _draw_halves(items, usable, present, n_shot, set(values), np.random.default_rng(seed))
    for half, chosen in (("lower", lower), ("upper", upper)):
        for missing in sorted(set(values) - set().union(*(present[i] for i in chosen))):
            logger.warning("class %s is in no image of the %s set; label one more image that shows it.", missing, half)
    taken = {items[i]["subject"] for i in (*lower, *upper)}
    others = [i for i in range(len(items)) if items[i]["subject"] not in taken]
    np.random.default_rng(seed + 1).shuffle(others)
    validation, testing = _split_by_subject(items, [i for i in others if from_here[i]], n_validation)
    if support is not None:
        testing = [i for i in others if not from_here[i]]
    numbers_of = {
        "lower": lower,
        "upper": upper,
        "validation": sorted(validation),
        "testing": sorted(testing[:n_testing] if n_testing is not None else testing),
    }
    sections = {section: [dict(items[i]) for i in numbers] for section, numbers in numbers_of.items()}
    files = {item[key] for section in sections.values() for item in section for key in ("image", "label")}
    return {
        "name": name,
        "description": description,
        "license": license,
        "labels": labels,
        "label_coding": label_coding,
        "n_shot": n_shot,
        "seed": seed,
        **sections,
        "sha256": {file: file_sha256(Path(dataset_dir, file)) for file in sorted(files)},
    }


def pair_folders(
    images: PathLike,
    labels: PathLike,
    dataset_dir: PathLike,
    *,
    image_suffix: str = "",
    label_suffix: str = "",
    subject: str | None = None,
) -> list[Item]:
    """Pair the pictures of two folders by file stem; each suffix is cut off its stems first.

    Args:
        images, labels, dataset_dir: folders; the items' paths are relative to the last.
        image_suffix, label_suffix: as ``_training`` and ``_manual1`` for DRIVE.
        subject: regular expression on the stem; its first group (or the match) is the subject. Default: the stem.

    Raises:
        ValueError: an image without label or the other way round, two files of one stem, or a subject not found.
    """
    by_stem = [_by_stem(list_images(folder), cut) for folder, cut in ((images, image_suffix), (labels, label_suffix))]
    alone = sorted(by_stem[0].keys() ^ by_stem[1].keys())
    if alone:
        stem = alone[0]
        found = by_stem[0].get(stem) or by_stem[1].get(stem)
        raise ValueError(f"{found}: has no partner of stem {stem!r} in {labels if stem in by_stem[0] else images}.")
    return [
        {
            "image": _relative(by_stem[0][stem], dataset_dir),
            "label": _relative(by_stem[1][stem], dataset_dir),
            "subject": find_subject(stem, subject),
        }
        for stem in sorted(by_stem[0])
    ]


def items_of_list(path: PathLike, *, subject: str | None = None) -> tuple[list[Item], dict[str, Any]]:
    """Labelled items and the rest of an existing list: ours, a Decathlon ``dataset.json`` or one of nnU-Net."""
    content = _read_json(path)
    items = [
        _named(item, section, path, subject)
        for section in ("training", *SECTIONS)
        for item in content.get(section, [])
        if isinstance(item, dict) and "label" in item
    ]
    if not items:
        raise ValueError(f"{path}: holds no labelled image in training, {', '.join(SECTIONS)}.")
    content["labels"] = _parse_labels(content.get("labels", {}))
    return items, content


def find_coding(files: Iterable[PathLike]) -> tuple[str, dict[str, int]]:
    """Guess how label files are coded, from all of them: coding and labels (``foreground`` or ``class_<value>``).

    One class in masks of 0 and 255, with soft edges or JPEG noise, is ``threshold``: many gray values, or few pixels of
    them. Anything else is ``index``.
    """
    pixels: Counter[int] = Counter()  # of each label value
    for file in tqdm(list(files), "reading labels"):
        if Path(file).suffix.lower() in (".jpg", ".jpeg"):
            return "threshold", {"background": 0, "foreground": 255}
        pixels.update(dict(zip(*(a.tolist() for a in np.unique(read_label(file), return_counts=True)), strict=True)))
    del pixels[0]
    positive = sorted(pixels)
    if not positive:
        raise ValueError("labels: every label file is empty.")
    between = sum(count for value, count in pixels.items() if value < positive[-1])
    if positive[-1] > 240 and (len(positive) > _MANY or between < _SOFT_EDGE * pixels.total()):
        return "threshold", {"background": 0, "foreground": 255}
    names = {"foreground": 1} if positive == [1] else {f"class_{value}": value for value in positive}
    return "index", {"background": 0, **names}


def write_datalist(path: PathLike, datalist: dict[str, Any]) -> None:
    """Write a data list as JSON; it appears whole or not at all."""
    with atomic(path) as part:
        part.write_text(json.dumps(datalist, indent=1) + "\n", encoding="utf-8")


def split_halves(items: Sequence[Item], *, seed: int) -> tuple[list[Item], list[Item]]:
    """Two halves, D1 and D2, disjoint by subject, filled in random order; of an odd number of images D2 has one more.

    Where subjects have several images each, D1 takes those that still fit into half of the images (at least one).
    """
    subjects = sorted({item["subject"] for item in items})
    order = np.random.default_rng(seed).permutation(len(subjects))
    lower: list[Item] = []
    for subject in (subjects[i] for i in order):
        own = [item for item in items if item["subject"] == subject]
        if len(lower) + len(own) <= len(items) // 2 or not lower:
            lower += own
    return lower, [item for item in items if item not in lower]


def find_subject(stem: str, pattern: str | None) -> str:
    """The subject of a file stem.

    >>> find_subject("MCUCXR_0056_0", r"_([0-9]+)_")
    '0056'
    """
    if pattern is None:
        return stem
    match = re.search(pattern, stem)
    if match is None:
        raise ValueError(f"subject: {pattern!r} matches nothing in {stem!r}; mend the expression.")
    return match[1] if match.re.groups else match[0]


def _draw_halves(
    items: Sequence[Item],
    usable: list[int],
    present: list[set[str]],
    n_shot: int,
    classes: set[str],
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Numbers of the supports of D1 and D2: disjoint subjects, as many classes in both as 1000 draws offer."""
    best: tuple[int, list[int], list[int]] | None = None
    showing = {name: [i for i in usable if name in present[i]] for name in sorted(classes)}
    rarest_first = sorted(showing.values(), key=len)
    for draw in range(_DRAWS):
        order = [usable[i] for i in rng.permutation(len(usable))]
        if draw >= _PLAIN_DRAWS:  # chance alone does not find the rare classes: two images of each go first
            order = list(dict.fromkeys([i for shown in rarest_first for i in rng.permutation(shown)[:2]] + order))
        first_of = list({items[i]["subject"]: i for i in reversed(order)}.values())[::-1]
        chosen = list(dict.fromkeys(first_of + order))[:n_shot]
        halves = split_halves([{**items[i], "number": str(i)} for i in chosen], seed=int(rng.integers(2**31)))
        lower, upper = ([int(item["number"]) for item in half] for half in halves)
        if not upper:
            raise ValueError("subject: all supports are of one subject; two are needed.")
        covered = sum(len(classes & set().union(*(present[i] for i in half))) for half in (lower, upper))
        if best is None or covered > best[0]:
            best = covered, lower, upper
        if covered == 2 * len(classes):
            break
    assert best is not None
    return best[1], best[2]


def _split_by_subject(items: Sequence[Item], numbers: list[int], count: int) -> tuple[list[int], list[int]]:
    """At least ``count`` of the numbers, and the others, no subject in both."""
    if count > len(numbers):
        raise ValueError(f"n_validation: {count} asked for, {len(numbers)} images are left after the supports.")
    subjects = {items[i]["subject"] for i in numbers[:count]}
    return [i for i in numbers if items[i]["subject"] in subjects], [
        i for i in numbers if items[i]["subject"] not in subjects
    ]


def _check_subjects(content: dict[str, Any], path: PathLike) -> None:
    """Neither a subject nor an image file may be in two sections."""
    section_of: dict[tuple[str, str], str] = {}
    for section in SECTIONS:
        for item in content[section]:
            for key in ("subject", "image"):
                first = section_of.setdefault((key, item[key]), section)
                if first != section:
                    found = f"{key} {item[key]} is in {first} and in {section}"
                    raise ValueError(f"{path}: {found}; keep it in one of them.")


def _relative(file: Path, folder: PathLike) -> str:
    """Path of a file from a folder, with forward slashes, so that a list works on every system."""
    return Path(os.path.relpath(file, folder)).as_posix()


def _check_supports(content: dict[str, Any], values: dict[str, list[int]]) -> None:
    seen: dict[str, set[str]] = {"lower": set(), "upper": set()}
    for half, classes in seen.items():
        for item in content[half]:
            shown = _classes(Path(item["label"]), task_values(content["labels"]), content["label_coding"])
            if not shown & set(values):
                raise ValueError(
                    f"{item['label']}: the label is empty for {', '.join(values)}; replace this image ({half} set)."
                )
            classes |= shown
    for task in values:
        absent = [half for half, classes in seen.items() if task not in classes]
        if len(absent) == 2:
            raise ValueError(f"tasks: {task} is in no label of the lower and upper set; leave it out or label it.")
        if absent:
            logger.warning("task %s is in no label of the %s set.", task, absent[0])


def _classes(label: Path, values: dict[str, list[int]], coding: str) -> set[str]:
    """Names of the classes that a label file shows."""
    found = set(np.unique(read_label(label, coding)).tolist()) - {0}
    if coding == "threshold":
        return set(values) if found else set()
    return {name for name, numbers in values.items() if found & set(numbers)}


def _named(item: Any, section: str, path: PathLike, subject: str | None = None) -> Item:
    """An item with image, label and subject as text; nnU-Net's and Decathlon's spellings accepted."""
    if not isinstance(item, dict) or not item.get("image") or not item.get("label"):
        raise ValueError(f'{path}: an item of {section} is not {{"image": ..., "label": ...}}: {item!r}.')
    image = item["image"][0] if isinstance(item["image"], list) and len(item["image"]) == 1 else item["image"]
    if not isinstance(image, str):
        raise ValueError(f"{path}: {section} has an item of {len(image)} image files; one file an item is read.")
    return {
        "image": image,
        "label": str(item["label"]),
        "subject": str(item.get("subject") or find_subject(Path(image).stem.removesuffix(".nii"), subject)),
    }


def _parse_labels(labels: Any) -> dict[str, Any]:
    """Name -> value(s), also from Decathlon's value -> name."""
    if isinstance(labels, dict) and labels and all(str(k).isdigit() and isinstance(v, str) for k, v in labels.items()):
        labels = {name: int(value) for value, name in labels.items()}
    valid = isinstance(labels, dict) and all(
        isinstance(v, int) or (isinstance(v, list) and v and all(isinstance(i, int) for i in v))
        for v in labels.values()
    )
    if not valid:
        raise ValueError(f'labels: {labels!r} is not names and values, as {{"background": 0, "lung": 1}}.')
    return dict(labels)


def _by_stem(files: list[Path], cut: str) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for file in files:
        stem = file.stem.removesuffix(cut)
        if stem in result:
            raise ValueError(f"{file}: has the same stem as {result[stem].name}; rename one of them.")
        result[stem] = file
    return result


def _read_json(path: PathLike) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"data_list: {path} does not exist; make one with `blosam datalist`.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data_list: {path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"data_list: {path} holds no JSON object.")
    return content
