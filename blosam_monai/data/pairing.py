"""Where labelled images are found: two folders paired by names, or an existing list of Decathlon, nnU-Net or ours."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError
from tqdm import tqdm

from blosam_monai.data.readers import case_stem, dicom, dicom_labels, list_cases, pictures, volumes
from blosam_monai.data.supports import Item
from blosam_monai.data.tasks import parse_labels
from blosam_monai.files import PathLike

SECTIONS = ("lower", "upper", "validation", "testing")
# Keys of a list with their types where these are plain; lists of others carry more keys, which are left alone.
_KEYS: dict[str, type | None] = {
    **dict.fromkeys((*SECTIONS, "training"), list),
    **{"labels": None, "label_coding": str, "slice_axis": str, "window": None, "allow": None, "snomed": dict},
    **{"shared_subjects": bool, "sha256": dict, "n_shot": int, "seed": int},
    **dict.fromkeys(("name", "description", "license")),
}
_ITEM_KEYS = ("image", "label", "subject", "slice", "series", "section", "case")
_NEAR = 0.85  # likeness of two spellings of one key
_KINDS = {list: "a list", str: "text", dict: "an object", bool: "true or false", int: "a whole number"}
_CHANNEL = re.compile(r"_(\d{4})$")  # of nnU-Net's image files
_BIDS_SUBJECT = re.compile(r"^(sub-[A-Za-z0-9]+)(?:_|$)")
_BIDS_ENDING = re.compile(r"((_(label|desc|space|res|den|hemi|seg)-[A-Za-z0-9]+)*_[A-Za-z0-9]+)$")  # T1w, label-x_mask


def pair_folders(
    images: PathLike,
    labels: PathLike,
    dataset_dir: PathLike,
    *,
    image_suffix: str = "",
    label_suffix: str = "",
    subject: str | None = None,
    channel: int | None = None,
) -> list[Item]:
    """Pair the images of a folder with the labels of another by their stems; each suffix is cut off its stems first.

    Images are those of ``list_cases``. Labels are files (pictures, volumes, DICOM SEG or RTSTRUCT) or folders (of one
    mask a class, or of one DICOM file). Series and labels may lie deeper, one in each folder of the folder, which may
    be one for both: patients with studies. Volumes may lie in such folders themselves, one in each. A single DICOM
    series and a single label pair whatever their names. Without suffixes, nnU-Net's channel numbers (``_0000``, where
    the rest has a label) and the last parts of BIDS names (``_T1w`` and ``_label-lesion_mask``) are cut where the stems
    do not match with them.

    Args:
        images, labels, dataset_dir: folders; the items' paths are relative to the last.
        image_suffix, label_suffix: as ``_training`` and ``_manual1`` for DRIVE.
        subject: regular expression on the stem; its first group (or the match) is the subject. Default: see
            ``find_subject``.
        channel: number of the nnU-Net channel, needed where the images have several.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an image without label or the other way round, two files of one stem, or a subject not found.
    """
    image_files = _list_images(images)
    nested = {file.parent for file in image_files if file.is_file()} - {Path(images)}
    label_files = list_labels(labels, skip=nested)
    image_stems = [stem.removesuffix(image_suffix) for stem in image_files.values()]
    label_stems = [stem.removesuffix(label_suffix) for stem in label_files.values()]
    if len(image_files) == len(label_files) == 1 and next(iter(image_files)).is_dir():
        label_stems = image_stems
    if not image_suffix and _have_channels(image_stems, label_stems):
        image_files, image_stems = _choose_channel(image_files, image_stems, images, channel)
    elif channel is not None:
        raise ValueError(f"channel: {channel} asked for, the images of {images} have no channel number, as _0000.")
    if set(image_stems) != set(label_stems) and all(map(_BIDS_SUBJECT.match, (*image_stems, *label_stems))):
        image_stems = [_BIDS_ENDING.sub("", stem) for stem in image_stems]
        label_stems = [_BIDS_ENDING.sub("", stem) for stem in label_stems]
    image_of, label_of = _by_stem(image_files, image_stems), _by_stem(label_files, label_stems)
    for stem in sorted(image_of.keys() ^ label_of.keys())[:1]:
        _check_single_series(images, image_of.values())
        found = image_of.get(stem) or label_of.get(stem)
        raise ValueError(
            f"{found}: has no partner of stem {stem!r} in {labels if stem in image_of else images}; rename it, or cut "
            "off what differs by image_suffix and label_suffix."
        )
    return [
        {
            "image": _relative(image_of[stem], dataset_dir),
            "label": _relative(label_of[stem], dataset_dir),
            "subject": find_subject(stem, subject),
        }
        for stem in sorted(image_of)
    ]


def list_labels(path: PathLike, *, skip: Collection[Path] = ()) -> dict[Path, str]:
    """The labels at a path and their stems, sorted: a file, or the label files and folders of a folder.

    For each folder in it, that is the one at any depth that holds label files, or the one DICOM SEG or RTSTRUCT among
    DICOM images. Other DICOM files, as plans and doses, are no labels.

    Args:
        path: file or folder.
        skip: folders whose own files are images.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no label, or several folders of labels in one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.is_file():
        return {path: case_stem(path)}
    series = set(dicom.list_folders(path))
    labels: dict[Path, str] = {}
    for entry in tqdm(_visible(path), "looking for labels", delay=2):
        if entry.is_dir():
            below = [folder for folder in _folders(entry) if folder not in skip]
            held = [folder for folder in below if folder not in series and any(map(_is_label, _visible(folder)))]
            held += [file for folder in below if folder in series for file in _visible(folder) if _is_segments(file)]
            if len(held) > 1:
                raise ValueError(f"{entry}: holds labels in {len(held)} places, as {held[1].name}; keep one.")
            labels |= {folder: case_stem(entry) for folder in held}
        elif _is_label(entry):
            labels[entry] = case_stem(entry)
    if not labels:
        raise ValueError(f"{path}: holds no label ({' '.join((*pictures.SUFFIXES, *volumes.SUFFIXES))}, DICOM).")
    return labels


def items_of_list(
    path: PathLike, *, subject: str | None = None, channel: int | None = None
) -> tuple[list[Item], dict[str, Any]]:
    """Labelled items and the rest of an existing list: ours, a Decathlon ``dataset.json`` or nnU-Net's of raw data.

    Args:
        path: the JSON file; paths of items stay as they are, those of nnU-Net's folders are relative to its folder.
        subject: regular expression on the stem, see ``find_subject``.
        channel: number of the image file to take, needed where an item has several.

    Raises:
        FileNotFoundError: no such list, or an image that it stands for.
        ValueError: not such a list, nothing labelled in it, or several channels.
    """
    content = read_json(path)
    if "labels" in content:
        content["labels"] = parse_labels(content["labels"])
    if "training" not in content and "file_ending" in content:
        found = _nnunet_items(Path(path), content)
    else:
        found = [
            (section, item)
            for section in ("training", *SECTIONS)
            for item in content.get(section) or []
            if isinstance(item, dict) and "label" in item
        ]
    if not found:
        raise ValueError(f"{path}: holds no labelled image in training, {', '.join(SECTIONS)}.")
    names = content.get("channel_names") or content.get("modality") or []
    names = list(names.values()) if isinstance(names, dict) else [names] if isinstance(names, str) else names
    return parse_items(found, path, subject=subject, channel=channel, names=list(map(str, names))), content


def parse_items(
    found: Sequence[tuple[str, Any]],
    path: PathLike,
    *,
    subject: str | None = None,
    channel: int | None = None,
    names: Sequence[str] = (),
) -> list[Item]:
    """Items of a list, given with their sections; see ``parse_item``. Where none is named, subjects are the cases'.

    Raises:
        ValueError: what is missing or of another kind in one of them.
    """
    cases = case_names([_first_image(item) for _, item in found])
    return [
        parse_item(item, section, path, subject=subject, channel=channel, names=names, case=case)
        for (section, item), case in zip(found, cases, strict=True)
    ]


def case_names(images: Sequence[str]) -> list[str]:
    """A name for each image: its stem, or of images of one stem in folders a patient, the patient's folder.

    >>> case_names(["images/a.png", "images/b.nii.gz"])
    ['a', 'b']
    >>> case_names(["data/P00/ct", "data/P01/ct", "data/P01/ct", "data/P02/mr"])
    ['P00', 'P01', 'P01', 'mr']
    >>> case_names(["train/0.png", "train/1.png", "train/2.png", "test/0.png"])  # fewer folders than stems
    ['0', '1', '2', '0']
    """
    paths = {image: Path(os.path.normpath(image)).parts for image in images}
    distinct = set(paths.values())
    stems = Counter(case_stem(parts[-1]) for parts in distinct if parts)
    parents = zip(*(parts[:-1] for parts in distinct), strict=False)
    common = next((n for n, level in enumerate(parents) if len(set(level)) > 1), min(map(len, distinct), default=1) - 1)
    trees = len({parts[common] for parts in distinct if parts}) >= len(stems)
    return [paths[image][common] if trees and stems[case_stem(image)] > 1 else case_stem(image) for image in images]


def parse_item(
    item: Any,
    section: str,
    path: PathLike,
    *,
    subject: str | None = None,
    channel: int | None = None,
    names: Sequence[str] = (),
    case: str | None = None,
) -> Item:
    """An item with image, label and subject as text, and its slice and series; nnU-Net's spelling accepted.

    Args:
        item: as the list has it.
        section, path: where, for messages.
        subject, channel: see ``items_of_list``.
        names: of the channels, for messages.
        case: its name; default: the image's stem. An expression goes before a subject that the item names.

    Raises:
        ValueError: what is missing or of another kind.
    """
    if not isinstance(item, dict) or not item.get("image") or not isinstance(item.get("label"), str):
        raise ValueError(f'{path}: an item of {section} is not {{"image": ..., "label": ...}}: {item!r}.')
    _check_spelling(item, _ITEM_KEYS, f"{path}: an item of {section}")
    image = _one_channel(item["image"], section, path, channel=channel, names=names)
    named = None if subject is not None else item.get("subject")
    stem = str(item.get("case") or case or case_stem(image))
    result: Item = {"image": image, "label": item["label"], "subject": str(named or find_subject(stem, subject))}
    if item.get("slice") is not None:
        if type(item["slice"]) is not int or item["slice"] < 0:
            raise ValueError(f"{path}: {section} has the slice {item['slice']!r}; slices are numbers, counted from 0.")
        result["slice"] = item["slice"]
    if item.get("series"):
        result["series"] = str(item["series"])
    return result


def find_subject(stem: str, pattern: str | None = None) -> str:
    """The subject of a file stem: what the pattern finds; without one, the subject of a BIDS name, else the stem.

    >>> find_subject("MCUCXR_0056_0", r"_([0-9]+)_"), find_subject("sub-01_ses-1_T1w"), find_subject("lung_01")
    ('0056', 'sub-01', 'lung_01')
    """
    if pattern is None:
        bids = _BIDS_SUBJECT.match(stem)
        return bids[1] if bids else stem
    match = re.search(pattern, stem)
    found = match and (match[1] if match.re.groups else match[0])
    if not found:
        raise ValueError(f"subject: {pattern!r} matches nothing in {stem!r}; mend the expression.")
    return found


def read_json(path: PathLike) -> dict[str, Any]:
    """The object in a data list's file, keys of null left out.

    Raises:
        FileNotFoundError, ValueError: no such file, not JSON, no object, a key of another type or nearly one of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data_list: {path} does not exist; make one with `blosam datalist`.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data_list: {path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"data_list: {path} holds no JSON object.")
    content = {key: value for key, value in content.items() if value is not None}
    _check_spelling(content, tuple(_KEYS), str(path))
    for key, kind in _KEYS.items():
        if kind is not None and type(content.get(key, kind())) is not kind:
            raise ValueError(f"{path}: {key} is {content[key]!r}, not {_KINDS[kind]}; correct the list.")
    return content


def _check_spelling(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise where a key is nearly one that is known, and would be passed over."""
    for key in (key for key in found if key not in known):
        if near := difflib.get_close_matches(key, known, n=1, cutoff=_NEAR):
            raise ValueError(f"{where} has the key {key!r}; did you mean {near[0]!r}? Rename it.")


def _nnunet_items(path: Path, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Items of an nnU-Net raw folder, whose list names the files' ending only: images are lists of channels."""
    if "ignore" in content.get("labels", ()):
        raise ValueError(
            f'{path}: the label "ignore" marks voxels that nobody labelled, which cannot be left out here; label them '
            "and remove it."
        )
    if "dataset" in content:
        named = content["dataset"]
        if not isinstance(named, dict) or not all(isinstance(item, dict) for item in named.values()):
            raise ValueError(f'{path}: dataset is not {{"case": {{"images": [...], "label": ...}}}}; correct the list.')
        return [
            ("dataset", {"image": item.get("images"), "label": item.get("label"), "case": case})
            for case, item in sorted(named.items())
        ]
    ending, folder = str(content["file_ending"]), path.parent
    items = []
    for label in (p for p in _visible(folder / "labelsTr") if p.name.endswith(ending)):
        case = label.name[: -len(ending)]
        images = sorted((folder / "imagesTr").glob(f"{glob.escape(case)}_[0-9][0-9][0-9][0-9]{glob.escape(ending)}"))
        if not images:
            raise FileNotFoundError(f"{folder / 'imagesTr' / case}_0000{ending}: missing; its label is there.")
        files = [_relative(image, folder) for image in images]
        items.append(("labelsTr", {"image": files, "label": _relative(label, folder), "case": case}))
    return items


def _one_channel(image: Any, section: str, path: PathLike, *, channel: int | None, names: Sequence[str]) -> str:
    """The image file of an item, which may have one a channel."""
    files = image if isinstance(image, list) else [image]
    if not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: {section} has the image {image!r}; an image is a path.")
    if len(files) > 1 and channel is None:
        known = f" ({', '.join(f'{number}: {name}' for number, name in enumerate(names))})" if names else ""
        raise ValueError(
            f"{path}: {section} has an item of {len(files)} image files; one file an item is read: give channel{known}."
        )
    if channel is not None and not 0 <= channel < len(files):
        raise ValueError(
            f"channel: {channel} asked for, an item of {path} has {len(files)} image files, counted from 0."
        )
    return files[channel or 0]


def _first_image(item: Any) -> str:
    """The first image of an item as a list has it; empty where the item is of another form, which is refused later."""
    image = item.get("image") if isinstance(item, dict) else None
    image = image[0] if isinstance(image, list) and image else image
    return image if isinstance(image, str) else ""


def _list_images(path: PathLike) -> dict[Path, str]:
    """The images at a path and their stems; where each folder in it holds one DICOM series, at any depth, its name.

    Likewise where folders hold one volume each themselves.
    """
    path = Path(path)
    if path.is_dir() and not any(map(_is_data, _visible(path))):
        folders = dicom.list_folders(path)
        stems = [folder.relative_to(path).parts[0] for folder in folders]
        if len(set(stems)) == len(stems) > 0:
            return dict(zip(folders, stems, strict=True))
        if not folders and (nested := _nested_volumes(path)):
            return nested
    return list_cases(path)


def _nested_volumes(path: Path) -> dict[Path, str]:
    """The one volume that each folder in a folder holds itself."""
    found: dict[Path, str] = {}
    for folder in (p for p in _visible(path) if p.is_dir()):
        held = [file for file in _visible(folder) if file.is_file() and volumes.is_volume(file)]
        if len(held) > 1:
            raise ValueError(
                f"{folder}: holds {len(held)} volumes, as {held[1].name}; keep one image a folder, or put all images "
                "into one folder."
            )
        found |= dict.fromkeys(held, folder.name)
    return found


def _check_single_series(path: PathLike, images: Iterable[Path]) -> None:
    """Raise where a folder of the folder holds several series: which of them is labelled cannot be told."""
    first_of: dict[str, Path] = {}
    for image in (p for p in images if p.is_dir() and p != Path(path)):
        top = image.relative_to(path).parts[0]
        first = first_of.setdefault(top, image)
        if first != image:
            both = " and ".join(sorted((first.relative_to(path).as_posix(), image.relative_to(path).as_posix())))
            raise ValueError(f"{Path(path, top)}: holds several image series, {both}; keep the labelled one there.")


def _have_channels(stems: Sequence[str], label_stems: Sequence[str]) -> bool:
    """Whether all stems end in a channel's number, without which they are those of labels."""
    ends = all(map(_CHANNEL.search, stems)) and not any(map(_CHANNEL.search, label_stems))
    return ends and bool({stem[:-5] for stem in stems} & set(label_stems))


def _choose_channel(
    files: Iterable[Path], stems: Sequence[str], folder: PathLike, channel: int | None
) -> tuple[dict[Path, str], list[str]]:
    """The files of one channel, and their stems without its number."""
    found = sorted({int(stem[-4:]) for stem in stems})
    if (len(found) > 1 and channel is None) or (channel is not None and channel not in found):
        asked = "give channel" if channel is None else f"channel {channel} asked for"
        raise ValueError(f"{folder}: the images have the channels {', '.join(map(str, found))}; {asked}.")
    chosen = found[0] if channel is None else channel
    kept = [(file, stem[:-5]) for file, stem in zip(files, stems, strict=True) if int(stem[-4:]) == chosen]
    return dict(kept), [stem for _, stem in kept]


def _by_stem(files: Iterable[Path], stems: Iterable[str]) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for file, stem in zip(files, stems, strict=True):
        if stem in result:
            raise ValueError(f"{file}: has the same stem as {result[stem].name}; rename one of them.")
        result[stem] = file
    return result


def _visible(path: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files; nothing if it is none."""
    return sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []


def _folders(path: Path) -> list[Path]:
    """A folder and all below it, sorted, without hidden ones."""
    below = [Path(folder) for folder, _, _ in os.walk(path)]
    return sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))


def _is_data(path: Path) -> bool:
    return path.is_file() and (pictures.is_picture(path) or volumes.is_volume(path) or dicom.is_dicom(path))


def _is_label(path: Path) -> bool:
    return path.is_file() and (pictures.is_picture(path) or volumes.is_volume(path) or _is_segments(path))


def _is_segments(path: Path) -> bool:
    """Whether a file is a DICOM SEG, a label map or an RTSTRUCT."""
    if not dicom.is_dicom(path):
        return False
    try:
        with dicom.quietly():
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID"])
    except (InvalidDicomError, EOFError, ValueError, KeyError, NotImplementedError):
        return False
    return header.get("SOPClassUID") in dicom_labels.SEGMENT_FILES


def _relative(file: Path, folder: PathLike) -> str:
    """Path of a file from a folder, with forward slashes, so that a list works on every system."""
    return Path(os.path.relpath(file, folder)).as_posix()
