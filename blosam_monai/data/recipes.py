"""Recipes: how a public data set is laid out, paired and tested, as options of ``blosam datalist`` in a JSON file."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from blosam_monai.files import PathLike

# Options of `blosam datalist` that a recipe sets, and two keys that it hands on to the data list.
_OPTIONS: dict[str, type] = {
    **dict.fromkeys(("name", "description", "license"), str),
    **dict.fromkeys(("images", "labels", "image_suffix", "label_suffix", "subject", "support", "label_coding"), str),
    **dict.fromkeys(("label_names", "snomed"), dict),
    **dict.fromkeys(("n_testing", "n_validation", "slices_per_volume", "channel"), int),
    **{"slice_axis": str, "window": object, "allow": list, "shared_subjects": bool},
}
# Keys that are for people: where the data are, what the folders must hold, and what the paper did with them.
_INFORMATION: dict[str, type] = {"url": str, "layout": list, "prepare": str, "paper": dict, "folds": dict}
_NEEDED = ("name", "images", "labels")
_KINDS = {str: "text", dict: "an object", int: "a whole number", list: "a list", bool: "true or false"}


_PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in a checkout, inside it when installed.
RECIPES = next(p for p in (_PACKAGE / "data_lists", _PACKAGE.parent / "data_lists") if p.is_dir())


def read_recipe(path: PathLike, dataset_dir: PathLike = ".") -> dict[str, Any]:
    """The options of ``blosam datalist`` that a recipe stands for, and its ``description`` and ``license``.

    Args:
        path: the JSON file, or the name of one of ours, as ``kvasir_seg``; the keys are described in
            ``data_lists/README.md``.
        dataset_dir: folder that the recipe's ``images`` and ``labels`` are in; they come back joined to it.

    Raises:
        FileNotFoundError, ValueError: no such file, not JSON, a key that is unknown, of another type or missing.
    """
    if not Path(path).is_file() and Path(path).name in (str(path), f"{path}.json"):
        path = RECIPES / f"{Path(path).stem}.json"  # one of ours, by its name
    if not Path(path).is_file():
        ours = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.json")))
        raise FileNotFoundError(f"recipe: {path} does not exist; give a file, or one of {ours}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe: {path} holds no JSON object.")
    _check_keys(content, path)
    recipe = {key: value for key, value in content.items() if key in _OPTIONS}
    for key in ("images", "labels"):
        recipe[key] = str(Path(dataset_dir, recipe[key]))
    return recipe


def _check_keys(content: dict[str, Any], path: PathLike) -> None:
    """A recipe's keys are a closed list: one that is passed over would change the draw unseen."""
    known = {**_OPTIONS, **_INFORMATION}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
            raise ValueError(f"{path}: a recipe has no key {key!r}; {hint}")
        if known[key] is not object and type(value) is not known[key]:
            raise ValueError(f"{path}: {key} is {value!r}, not {_KINDS[known[key]]}; correct the recipe.")
    for key in _NEEDED:
        if not content.get(key):
            raise ValueError(f"{path}: {key} is missing; a recipe needs {', '.join(_NEEDED)}.")
    for key in ("subject", "support"):
        try:
            re.compile(content.get(key, ""))
        except re.error as error:
            raise ValueError(f"{path}: {key} {content[key]!r} is not a regular expression ({error}).") from None
