"""Data lists seen as classes: which picture or slice shows which class, of one multi-class list or of several lists.

With one list a class is called as in its labels (``liver``); with several, list and label (``lungs/lung``), and the
name of a list (its ``name``, else that of its file) stands for all of its classes. What is trained on are the sections
``lower``, ``upper`` and ``training``; ``testing`` is tested on. Of a list without ``testing`` half of the subjects are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.transforms import Transform
from tqdm import tqdm

from blosam_monai.data.datalist import parse_datalist
from blosam_monai.data.geometry import choose_slice_axis, upright
from blosam_monai.data.pairing import read_json
from blosam_monai.data.readers import read_image, read_label
from blosam_monai.data.supports import Item, class_areas, split_halves
from blosam_monai.data.tasks import task_values
from blosam_monai.files import PathLike
from blosam_monai.transforms import LoadCased

TRAINING = ("lower", "upper", "training")
PARTS = ("training", "testing")


@dataclass(frozen=True)
class Picture:
    """A picture or a slice of a volume.

    Attributes:
        item: ``image label subject section dataset``, where needed ``slice series``; ``dataset`` is its list's number.
        shares: class -> share of the picture's pixels that it covers, of the classes that are shown.
    """

    item: Item
    shares: Mapping[str, float]


class ClassLists:
    """One or several data lists, their items with absolute paths.

    Args:
        paths: the JSON files, or one.
        dataset_dirs: folder of each, or one for all.
        seed: halves a list that has no ``testing``, by subject.

    Raises:
        FileNotFoundError, ValueError: what does not hold, which file, and the remedy.
    """

    def __init__(
        self, paths: PathLike | Sequence[PathLike], dataset_dirs: PathLike | Sequence[PathLike], *, seed: int = 0
    ) -> None:
        self.paths = [str(path) for path in _several(paths)]
        folders = [str(folder) for folder in _several(dataset_dirs)]
        if len(folders) not in (1, len(self.paths)):
            raise ValueError(
                f"dataset_dir: {len(folders)} folders for {len(self.paths)} data lists; give each its own."
            )
        self.folders = folders * len(self.paths) if len(folders) == 1 else folders
        self.lists = [_read(*given, seed=seed) for given in zip(self.paths, self.folders, strict=True)]
        names = [content.get("name") or Path(path).stem for path, content in zip(self.paths, self.lists, strict=True)]
        if len(set(names)) < len(names):
            raise ValueError(f"data_list: {len(names)} lists are named {', '.join(names)}; name them apart.")
        self.classes: dict[str, tuple[int, str]] = {}  # class -> number of its list, its label there
        self.groups: dict[str, list[str]] = {}  # name of a list -> its classes
        for number, content in enumerate(self.lists):
            labels = list(task_values(content["labels"]))
            prefix = f"{names[number]}/" if len(names) > 1 else ""
            for item in (item for part in PARTS for item in content[part]):
                item["subject"] = prefix + item["subject"]  # patient 1 of two lists is two patients
            self.groups[names[number]] = [prefix + label for label in labels]
            self.classes |= {prefix + label: (number, label) for label in labels}

    def expand(self, names: Sequence[str], key: str = "novel") -> list[str]:
        """Classes by their own names or by those of their lists, each once.

        Raises:
            ValueError: an unknown name, or none; ``key`` says where it was given.
        """
        groups = self.groups if len(self.lists) > 1 else {}
        given = list(names)
        unknown = [name for name in given if name not in self.classes and name not in groups]
        if unknown or not given:
            raise ValueError(f"{key}: {given} must be some of {', '.join((*groups, *self.classes))}.")
        return list(dict.fromkeys(name for asked in given for name in groups.get(asked, [asked])))

    def others(self, names: Sequence[str], key: str = "novel") -> list[str]:
        """The classes that are not among these.

        Raises:
            ValueError: as ``expand``, or none is left.
        """
        chosen = self.expand(names, key)
        left = [name for name in self.classes if name not in chosen]
        if not left:
            raise ValueError(f"{key}: {', '.join(chosen)} are all classes there are; leave some to train on.")
        return left

    def survey(self, part: str) -> list[Picture]:
        """Every picture, and every slice of the volumes, of ``training`` or ``testing`` that shows a class.

        Labels are read, and the images of volumes for how they lie.
        """
        listed = [(n, item) for n, content in enumerate(self.lists) for item in content[part]]
        return [p for n, item in tqdm(listed, f"reading {part} labels") for p in self._pictures(n, item, part)]

    def reader(self, classes: Sequence[str], *, neighbours: int = 0) -> ReadPictured:
        """What reads the items of pictures, with the masks of these classes only."""
        own: list[list[str]] = [[] for _ in self.lists]
        for name in classes:
            number, label = self.classes[name]
            own[number].append(label)
        return ReadPictured(
            [
                LoadCased(
                    content["labels"],
                    labels,
                    content["label_coding"],
                    window=content.get("window"),
                    neighbours=neighbours,
                    slice_axis=content.get("slice_axis"),
                    allow=content["allow"],
                )
                if labels
                else None
                for content, labels in zip(self.lists, own, strict=True)
            ]
        )

    def place(self, name: str, classes: Sequence[str]) -> int:
        """Number of a class among the masks of an item that ``reader`` has read for these classes."""
        number = self.classes[name][0]
        return [other for other in classes if self.classes[other][0] == number].index(name)

    def _pictures(self, number: int, item: Item, part: str) -> list[Picture]:
        content = self.lists[number]
        values = {name: task_values(content["labels"])[label] for name, label in self._of(number).items()}
        image = read_image(item["image"], series=item.get("series"), allow=content["allow"])
        label = read_label(item["label"], content["label_coding"], image=image)
        orientation = upright(image, content.get("slice_axis") or choose_slice_axis(image))
        areas = class_areas(label, values, coding=content["label_coding"], orientation=orientation)
        pixels = math.prod(image.shape) // len(areas)
        places = [item["slice"]] if "slice" in item else range(len(areas))
        result = []
        for place in places:
            if not 0 <= place < len(areas):
                raise ValueError(f"{item['image']}: slice {place} asked for, it has {len(areas)}; correct the list.")
            shares = {n: int(area) / pixels for n, area in zip(values, areas[place], strict=True) if area}
            if shares:
                which = {"slice": place} if len(areas) > 1 else {}
                result.append(Picture({**item, **which, "dataset": number, "section": part}, shares))
        return result

    def _of(self, number: int) -> dict[str, str]:
        """Class -> label of the classes of one list."""
        return {name: label for name, (own, label) in self.classes.items() if own == number}


class ReadPictured(Transform):
    """Read an item by the ``LoadCased`` of its ``dataset``."""

    def __init__(self, loads: Sequence[LoadCased | None]) -> None:
        self.loads = list(loads)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Read the files of one item."""
        load = self.loads[data["dataset"]]
        if load is None:
            raise ValueError(f"{data['image']}: its data list has none of the classes that are asked for.")
        return load(data)


def read_supports(path: PathLike, dataset_dir: PathLike) -> dict[str, Any]:
    """A data list whose ``training`` are all labelled images that may support, with absolute paths.

    Raises:
        FileNotFoundError, ValueError: as ``parse_datalist``; or there are none.
    """
    content = parse_datalist(path)
    supports = [_absolute(item, path, dataset_dir) for section in TRAINING for item in content[section]]
    if not supports:
        raise ValueError(f"{path}: {', '.join(TRAINING)} are empty; list the labelled images there.")
    return {**content, "training": supports}


def fold_classes(folds: Any, fold: str | int) -> list[str]:
    """The novel classes of a fold.

    Args:
        folds: lists of classes, lists by name, or a JSON file with such ``folds`` (``data_lists/pascal_5i.json``).
        fold: number or name.

    Raises:
        FileNotFoundError, ValueError: no folds, no such file, or no such fold.
    """
    if folds is None:
        raise ValueError("novel: name the classes that are kept for testing, or give folds and fold.")
    given: Any = read_json(folds).get("folds", {}) if isinstance(folds, str | Path) else folds
    by_name = given if isinstance(given, Mapping) else {str(n): classes for n, classes in enumerate(given)}
    if str(fold) not in by_name:
        raise ValueError(f"fold: {fold} is not one of {', '.join(by_name)}; see folds.")
    return list(by_name[str(fold)])


def _several(value: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [value] if isinstance(value, str | Path) else list(value)  # type: ignore[arg-type]


def _read(path: PathLike, folder: PathLike, *, seed: int) -> dict[str, Any]:
    """A list with its items under ``training`` and ``testing``, paths absolute and subjects apart."""
    content = parse_datalist(path)
    training = [item for section in TRAINING for item in content[section]]
    testing = content["testing"]
    if not testing:
        if len({item["subject"] for item in training}) < 2:
            raise ValueError(f"{path}: has one subject and no testing section; list images of another to test on.")
        training, testing = split_halves(training, seed=seed)
    both = {item["subject"] for item in training} & {item["subject"] for item in testing}
    if both:
        raise ValueError(f"{path}: subject {min(both)} is trained on and in testing; keep it in one of them.")
    parts = {"training": training, "testing": testing}
    return {**content, **{name: [_absolute(item, path, folder) for item in items] for name, items in parts.items()}}


def _absolute(item: Item, path: PathLike, folder: PathLike) -> Item:
    files = {key: Path(folder, item[key]) for key in ("image", "label")}
    for file in files.values():
        if not file.exists():
            raise FileNotFoundError(f"{file}: listed in {path} but missing; check dataset_dir ({folder}).")
    return {**item, **{key: str(file) for key, file in files.items()}}
