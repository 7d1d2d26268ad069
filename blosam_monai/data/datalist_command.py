"""The verb ``blosam datalist``: from folders, or a list of someone else's, to a drawn and checked data list."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blosam_monai.data.coding import count_values, find_coding, readable_labels
from blosam_monai.data.datalist import (
    check_allow,
    check_settings,
    check_subjects,
    make_datalist,
    parse_datalist,
    write_datalist,
)
from blosam_monai.data.datalist_check import check_datalist, format_table
from blosam_monai.data.pairing import SECTIONS, items_of_list, pair_folders
from blosam_monai.data.recipes import read_recipe
from blosam_monai.data.tasks import check_values, known_values, parse_labels


def run(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Run the verb.

    Args:
        options: as parsed.
        defaults: of the options, to tell what was asked for.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: what does not hold, and the remedy.
    """
    recipe = _apply_recipe(options, defaults)
    _check_sources(options, defaults)
    if options.output is None:
        _check_list(options)
        return
    if Path(options.output).exists() and not options.overwrite:
        raise FileExistsError(f"output: {options.output} exists; choose another or add --overwrite true.")
    if options.label_names is not None:
        options.label_names = parse_labels(options.label_names)
    items, content, folder = _read_items(options)
    kept = {name: _first(getattr(options, name), content.get(name)) for name in ("slice_axis", "window", "snomed")}
    kept["allow"] = _first(options.allow, content.get("allow"), [])
    kept["shared_subjects"] = options.shared_subjects or content.get("shared_subjects", False)
    check_allow(kept["allow"])
    labels, coding = _name_labels(options, items, content, folder, kept)
    check_values(labels, coding)
    check_settings(labels, kept)
    content |= recipe  # only now: a list's content would also say how its labels are coded
    rows = []
    if options.check:  # before drawing, which stops at the first bad file
        pairs = {**kept, "labels": labels, "label_coding": coding, "testing": items}
        rows = _check_pairs(pairs, folder, show=False)
    try:
        datalist = make_datalist(
            items,
            labels,
            dataset_dir=folder,
            n_shot=options.n_shot,
            seed=options.seed,
            label_coding=coding,
            n_validation=options.n_validation,
            n_testing=options.n_testing,
            support=options.support,
            slices_per_volume=options.slices_per_volume,
            **kept,
            name=options.name or content.get("name", ""),
            description=content.get("description", ""),
            license=content.get("license", content.get("licence", "unknown")),
        )
    except ValueError:
        _show_rows(rows)
        raise
    if options.check:
        _check_pairs(datalist, folder)
    write_datalist(options.output, datalist)
    sizes = ", ".join(f"{section} {len(datalist[section])}" for section in ("lower", "upper", "validation", "testing"))
    print(f"{options.output}: {sizes}; labels {datalist['labels']}, coded by {coding}; dataset_dir {folder}")


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next((value for value in values if value is not None), None)


def _apply_recipe(options: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, str]:
    """Fill in the options that a recipe sets and nobody gave; what it says of the data set is handed on to the list."""
    path = options.recipe
    if path is None:
        return {}
    if options.source:
        raise ValueError("recipe: says how two folders pair; leave it out with --from.")
    recipe = read_recipe(path, options.dataset_dir or ".")
    told: dict[str, str] = {key: recipe.pop(key) for key in ("description", "license") if key in recipe}
    for name, value in recipe.items():
        if getattr(options, name) == defaults[name]:
            setattr(options, name, value)
    return told


def _check_sources(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Either two folders or a list, and no option that the list would leave without effect."""
    folders = options.images, options.labels
    if not (options.source or all(folders)) or (options.source and any(folders)):
        raise ValueError("datalist: give either --images and --labels, or --from, or --recipe.")
    for name in ("image_suffix", "label_suffix"):
        if options.source and getattr(options, name):
            raise ValueError(f"{name}: a list names its pairs; leave it out with --from.")
    if options.output is None:
        if not (options.source and options.check):
            raise ValueError("output: name the JSON file to write; only --from with --check true does without.")
        others = {name for name, value in vars(options).items() if value != defaults[name]}
        for name in sorted(others - {"source", "dataset_dir", "check", "run"}):
            raise ValueError(f"{name}: a check of the list as it is draws nothing; leave it out or give --output.")


def _check_list(options: argparse.Namespace) -> None:
    """Check the sections of an existing list; write nothing."""
    folder = options.dataset_dir or str(Path(options.source).parent)
    content = parse_datalist(options.source)
    if any(content[section] for section in (*SECTIONS, "training")):
        _check_pairs(content, folder)
        check_subjects(content, options.source, folder)
    else:  # nnU-Net's raw folder
        _check_pairs({**content, "testing": items_of_list(options.source)[0]}, folder)


def _read_items(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Labelled items, the rest of the list that they are from, and the folder that their paths are relative to."""
    picked = {"subject": options.subject, "channel": options.channel}
    if options.source:
        return *items_of_list(options.source, **picked), options.dataset_dir or str(Path(options.source).parent)
    folder = options.dataset_dir or "."
    cut = {"image_suffix": options.image_suffix, "label_suffix": options.label_suffix}
    return pair_folders(options.images, options.labels, folder, **cut, **picked), {}, folder


def _name_labels(
    options: argparse.Namespace, items: list[dict[str, Any]], content: dict[str, Any], folder: str, kept: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Labels and their coding: as asked for, else as the list has them, else guessed from all files.

    With a check, from those that can be read: the check names the others.
    """
    labels = _first(options.label_names, content.get("labels"))
    if options.source and labels is None:
        raise ValueError(f'{options.source}: "labels" is missing; add names and values, or give --label_names.')
    coding = _first(options.label_coding, content.get("label_coding", "index") if content else None)
    counted = options.label_names and coding in (None, "index")
    if labels is not None and coding is not None and not counted:
        return {"background": 0, **labels}, coding
    images, files = ([Path(folder, item[key]) for item in items] for key in ("image", "label"))
    if options.check:
        sound = readable_labels(files, images=images, coding=coding, allow=kept["allow"])
        if not sound:
            unknown = {"labels": labels or {"foreground": 1}, "label_coding": coding or "index", "testing": items}
            _check_pairs({**kept, **unknown}, folder)
        images, files = ([paths[number] for number in sound] for paths in (images, files))
    if labels is None or coding is None:
        known = {"coding": coding, "labels": labels}
        coding, found = find_coding(files, images=images, allow=kept["allow"], **known)
        labels = _first(labels, found)
    labels = {"background": 0, **labels}
    if coding == "index" and options.label_names:
        counts = count_values(files, coding)
        if others := sorted(set(counts) - known_values(labels)):
            print(f"label values that have no name are background: {', '.join(map(str, others))}")
            own = labels["background"] if isinstance(labels["background"], list) else [labels["background"]]
            labels["background"] = sorted({0, *own, *others})
    return labels, coding


def _check_pairs(content: dict[str, Any], folder: str, *, show: bool = True) -> list[Any]:
    """Read every pair of a list; print the table if asked to or if there is an error, then a ValueError."""
    rows = check_datalist(content, folder)
    bad = sum(bool(row.error) for row in rows)
    if show or bad:
        _show_rows(rows)
    if bad:
        raise ValueError(f"check: {bad} of {len(rows)} pairs cannot be used, see above; no list is written.")
    return rows


def _show_rows(rows: list[Any]) -> None:
    if rows:
        print(format_table(rows))
