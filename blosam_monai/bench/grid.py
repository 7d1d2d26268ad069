"""Grids: which methods run on which data, with how many labelled images and draws. See docs/reference/grid.md.

Everything that a grid asks for is checked, and every data list of it drawn, before anything is trained.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blosam_monai.bench.runner import FINGERPRINT_DIGITS, Cell, slug
from blosam_monai.bench.tables import SCORE_NAMES
from blosam_monai.data.recipes import read_recipe
from blosam_monai.files import PathLike, atomic, content_sha256
from blosam_monai.methods import CONFIGS, compose_config, list_methods, read_method
from blosam_monai.networks.sam import DOWNLOAD, RANDOM, SAM_FILES, TINY_SHA256
from blosam_monai.parser import TRAIN_KEYS, build_parser

logger = logging.getLogger(__name__)

LISTS = "lists"  # folder in output_dir
DRAWN_WITH = "drawn_with"  # key of a list drawn for a grid: hash of the options
GRID_KEYS = (
    *("name", "methods", "data", "shots", "draws"),
    *("first_seed", "settings", "reference", "test_curve", "score"),
)
_NEEDED = ("name", "methods", "data", "shots", "draws")
# Config keys that the grid itself sets, cell by cell, and those of a single training's output.
_OWN_KEYS = (
    *("data_list", "dataset_dir", "output_dir", "ckpt_dir", "device", "seed", "tasks", "method"),
    *("overlays", "resume", "overwrite", "use_mlflow", "log_paths", "tracking_uri", "experiment_name", "run_name"),
)
# Options of `blosam datalist` that the grid sets, and that of a section which no cell uses.
_NO_DATA_KEYS = ("output", "overwrite", "n_shot", "seed", "check", "help", "recipe", "n_validation")
_UNDECISIVE = ("cache_dir", "about")  # keys of settings and presets that change no result
_FILES = ("sam_checkpoint", "weights")  # settings that name a file
_NAMING = "give one with a letter a to z or a digit 0 to 9, which names of files are made of"
_NO_FILES = (None, DOWNLOAD, RANDOM)  # their values that do not


@dataclass(frozen=True)
class Method:
    """A preset under the name it is shown by, with overrides of its config keys."""

    name: str
    preset: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """A data set to draw lists from.

    Args:
        name: as shown.
        dataset_dir: its folder.
        options: of ``blosam datalist``, parsed, paths absolute.
        tasks: labels to train; None: all.
        told: of the recipe, for the lists: description and licence.
    """

    name: str
    dataset_dir: Path
    options: Mapping[str, Any]
    tasks: Sequence[str] | None
    told: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A checked grid; see docs/reference/grid.md."""

    name: str
    methods: Sequence[Method]
    data: Sequence[DataSet]
    shots: Sequence[int]
    draws: int
    first_seed: int
    settings: Mapping[str, Any]
    reference: str
    test_curve: int
    score: str


def load_grid(path: PathLike, *, dataset_dirs: Mapping[str, str] | None = None) -> Grid:
    """Read and check a grid.

    Args:
        path: the JSON file; the folders of data sets, recipes and checkpoints in it are relative to its own.
        dataset_dirs: name of a data set -> its folder, instead of the one that the grid names.

    Raises:
        FileNotFoundError, ValueError: what does not hold, and the remedy.
    """
    path, dataset_dirs = Path(path), dataset_dirs or {}
    content = _read_object(path, "grid")
    _check_keys(content, GRID_KEYS, str(path), needed=_NEEDED)
    if not isinstance(content["name"], str) or not slug(content["name"]):
        raise ValueError(f"{path}: name is {content['name']!r}; {_NAMING}.")
    for key, least in (("draws", 1), ("first_seed", 0), ("test_curve", 0)):
        _check_number(content.get(key, least), least, f"{path}: {key}")
    shots = _list(content["shots"], f"{path}: shots")
    for number in shots:
        _check_number(number, 2, f"{path}: shots")
    _check_doubles([str(number) for number in shots], f"{path}: shots")
    settings = _settings(content.get("settings", {}), f"{path}: settings", path.parent)
    methods = [_method(entry, path) for entry in _list(content["methods"], f"{path}: methods")]
    _check_doubles([method.name for method in methods], f"{path}: methods")
    for key in settings:
        if not any(_settings_for(method.preset, {key: None}) for method in methods):
            raise ValueError(f"{path}: settings: {key} changes none of the methods; leave it out, or give it to one.")
    entries = _list(content["data"], f"{path}: data")
    _check_doubles([_data_name(entry, path) for entry in entries], f"{path}: data")
    for name in dataset_dirs:
        _check_known(name, [entry["name"] for entry in entries], "dataset_dir")
    reference = content.get("reference", methods[0].name)
    _check_known(reference, [method.name for method in methods], f"{path}: reference")
    score = content.get("score", "dice")
    _check_known(score, list(SCORE_NAMES), f"{path}: score")
    return Grid(
        name=content["name"],
        methods=methods,
        data=[_data_set(entry, path, dataset_dirs.get(entry["name"])) for entry in entries],
        shots=shots,
        draws=content["draws"],
        first_seed=content.get("first_seed", 0),
        settings=settings,
        reference=reference,
        test_curve=content.get("test_curve", 0),
        score=score,
    )


def draw_lists(grid: Grid, output_dir: PathLike) -> dict[tuple[str, int, int], Path]:
    """Draw the data list of each data set, number of shots and draw; (data, n_shot, draw) -> its file.

    A list that was drawn with the same options stays as it is, whatever has come to the folder since, unless a labelled
    image of it, or its label, has been changed: then it is drawn anew, and its cells are others.

    Raises:
        FileNotFoundError, ValueError: what cannot be drawn, and of which data set.
    """
    wanted = [(data, n_shot, draw) for data in grid.data for n_shot in grid.shots for draw in range(grid.draws)]
    lists = {}
    hash_of = functools.cache(content_sha256)  # draws share their images; another call looks again
    for data, n_shot, draw in tqdm(wanted, "data lists"):
        path = Path(output_dir, LISTS, f"{slug(data.name)}_{n_shot}shot_draw{draw}.json")
        try:
            _draw_list(data, path, n_shot=n_shot, seed=grid.first_seed + draw, hash_of=hash_of)
        except (ValueError, OSError) as error:
            raise ValueError(f"data {data.name}, {n_shot} shots, draw {draw}: {error}") from error
        lists[data.name, n_shot, draw] = path
    return lists


def grid_cells(grid: Grid, lists: Mapping[tuple[str, int, int], Path]) -> list[Cell]:
    """The cells of a grid, those of one data set together, since they share its encoded images.

    Args:
        grid: checked.
        lists: see ``draw_lists``.
    """
    cells = []
    for data in grid.data:
        tasks = {} if data.tasks is None else {"tasks": list(data.tasks)}
        for n_shot in grid.shots:
            for draw in range(grid.draws):
                data_list, seed = lists[data.name, n_shot, draw], grid.first_seed + draw
                drawn = content_sha256(data_list)
                for method in grid.methods:
                    overrides = {**_settings_for(method.preset, grid.settings), **method.overrides, **tasks}
                    cells.append(
                        Cell(
                            method=method.name,
                            preset=method.preset,
                            overrides=overrides,
                            data=data.name,
                            dataset_dir=str(data.dataset_dir),
                            data_list=str(data_list),
                            n_shot=n_shot,
                            draw=draw,
                            seed=seed,
                            fingerprint=_fingerprint(method.preset, overrides, drawn, seed, grid.test_curve),
                            test_curve=grid.test_curve,
                        )
                    )
    return cells


def _settings_for(preset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a grid's settings that a method uses; what the preset itself says makes the method, and stays."""
    own = read_method(preset)
    return {key: value for key, value in settings.items() if key not in own and _uses(preset, key)}


@functools.cache
def _uses(preset: str, key: str) -> bool:
    """Whether anything in a method's configuration reads a key."""
    try:
        compose_config(preset, {key: None})
    except ValueError:
        return False
    return True


def _fingerprint(preset: str, overrides: Mapping[str, Any], drawn: str, seed: int, test_curve: int) -> str:
    """First digits of a SHA-256 over what decides a cell's result: settings with their defaults, preset, list, seed.

    Not over the version of this package, which is noted with each result: an update alone makes none invalid.
    """
    defaults = {key: value for key, value in _defaults().items() if _uses(preset, key)}
    settings = {**defaults, **read_method(preset), **overrides}
    decisive = {key: value for key, value in settings.items() if key not in _UNDECISIVE}
    decisive |= {key: _hash_of(decisive[key]) for key in _FILES if decisive.get(key) not in _NO_FILES}
    if "sam_model" in decisive and decisive.get("features", "sam") == "sam":
        decisive["sam_checkpoint"] = _published(decisive["sam_model"], decisive.get("sam_checkpoint"))
    return _digest([decisive, drawn, seed, test_curve])[:FINGERPRINT_DIGITS]


def _published(model: str, checkpoint: str | None) -> str | None:
    """The hash of the published weights, where these are asked for without their file: they are the same weights."""
    if checkpoint not in (None, DOWNLOAD) or model not in (*SAM_FILES, "tiny"):  # an unknown model is refused later
        return checkpoint
    return TINY_SHA256 if model == "tiny" else SAM_FILES[model].sha256


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _hash_of(file: str) -> str:
    return content_sha256(file)


@functools.cache
def _defaults() -> dict[str, Any]:
    """Defaults of the config keys that a grid may set."""
    content = json.loads((CONFIGS / "train.json").read_text(encoding="utf-8"))
    return {key: content.get(key) for key in TRAIN_KEYS if key not in _OWN_KEYS}


@functools.cache
def _options_of(verb: str) -> dict[str, argparse.Action]:
    """The options of a verb of the command line by their names there, without dashes."""
    actions = build_parser()[1][verb]._actions
    return {action.option_strings[-1].lstrip("-"): action for action in actions if action.option_strings}


def _method(entry: Any, path: Path) -> Method:
    entry = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise ValueError(f'{path}: methods has {entry!r}; write a name, or {{"method": name, ...}}.')
    preset = entry["method"]
    _check_known(preset, list_methods(), f"{path}: methods")
    name = entry.get("name", preset)
    if not isinstance(name, str) or not slug(name):
        raise ValueError(f"{path}: methods has the name {name!r}; {_NAMING}.")
    own = {key for key in read_method(preset) if key.isidentifier() and key not in ("about", "preset")}
    given = {key: value for key, value in entry.items() if key not in ("method", "name")}
    return Method(name, preset, _settings(given, f"{path}: method {name}", path.parent, also=own))


def _settings(given: Any, where: str, folder: Path, *, also: Collection[str] = ()) -> dict[str, Any]:
    """Values of config keys as the command line would take them; ``also``: the preset's own keys."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} is not config keys and values.")
    for key in given:
        if key in _OWN_KEYS:
            raise ValueError(f"{where}: {key} is set by the grid for each cell; leave it out.")
    known = _options_of("train")
    _check_keys(given, (*_defaults(), *(key for key in also if key not in _OWN_KEYS)), where)
    values = {key: _value(known.get(key), value, f"{where}: {key}") for key, value in given.items()}
    for key in (key for key in _FILES if values.get(key) not in _NO_FILES):
        beside = folder / str(values[key])
        found = beside if beside.exists() else _existing(Path(str(values[key])), f"{where}: {key}")
        values[key] = str(found.resolve())
    return values


def _data_name(entry: Any, path: Path) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f'{path}: data has {entry!r}; write {{"name": ..., "dataset_dir": ..., ...}}.')
    if not slug(entry["name"]):
        raise ValueError(f"{path}: data has the name {entry['name']!r}; {_NAMING}.")
    return str(entry["name"])


def _data_set(entry: Mapping[str, Any], path: Path, dataset_dir: str | None) -> DataSet:
    """An entry of ``data``, filled up from its recipe.

    Args:
        entry: named.
        path: of the grid.
        dataset_dir: as the command line has it, relative to the working folder.
    """
    where = f"{path}: data {entry['name']}"
    given, told = _with_recipe(entry, path.parent, where)
    known = [name for name in _options_of("datalist") if name not in _NO_DATA_KEYS]
    _check_keys(given, (*known, "tasks"), where)
    if dataset_dir is None and "dataset_dir" not in given:
        raise ValueError(f"{where}: has no dataset_dir; add it, or give --dataset_dir {entry['name']}=FOLDER.")
    folder = Path(dataset_dir) if dataset_dir is not None else path.parent / str(given["dataset_dir"])
    folder = _existing(folder, f"{where}: dataset_dir")
    options = {}
    for key in (key for key in given if key not in ("dataset_dir", "tasks")):
        action = _options_of("datalist")[key]
        value = _value(action, given[key], f"{where}: {key}")
        options[action.dest] = str(_existing(folder / value, f"{where}: {key}")) if key in _PATHS else value
    if not ("source" in options) ^ ("images" in options and "labels" in options):
        raise ValueError(f"{where}: give either images and labels, or from, or a recipe.")
    tasks = given.get("tasks")
    if tasks is not None and (not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks)):
        raise ValueError(f"{where}: tasks is {tasks!r}; give a list of labels.")
    return DataSet(str(entry["name"]), folder, options, tasks, told)


def _with_recipe(entry: Mapping[str, Any], folder: Path, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of an entry, those of its recipe where it has none; what the recipe tells of the data set."""
    given = {key: value for key, value in entry.items() if key != "recipe"}
    if "recipe" not in entry:
        return given, {}
    if not isinstance(entry["recipe"], str) or "from" in given:
        raise ValueError(f"{where}: recipe is the path of a file, and goes without from.")
    recipe = read_recipe(folder / entry["recipe"])
    told: dict[str, str] = {key: recipe.pop(key) for key in ("description", "license") if key in recipe}
    return {**recipe, **given}, told


_PATHS = ("images", "labels", "from")


def _draw_list(data: DataSet, path: Path, *, n_shot: int, seed: int, hash_of: Callable[[Path], str]) -> None:
    """Draw a list as ``blosam datalist`` does, unless it is there, drawn with the same options from the same images."""
    from blosam_monai.data.datalist import parse_datalist, write_datalist
    from blosam_monai.data.datalist_command import run
    from blosam_monai.data.tasks import task_values

    defaults = {action.dest: action.default for action in _options_of("datalist").values() if action.dest != "help"}
    options = {**defaults, **data.options, "n_shot": n_shot, "seed": seed}
    relative = {key: _relative(value, data.dataset_dir) for key, value in options.items()}
    drawn_with = _digest(relative)
    there = _read_object(path, "list") if path.is_file() else {}
    changed = _changed_supports(there, data.dataset_dir, hash_of)
    if there.get(DRAWN_WITH) == drawn_with and changed:
        logger.warning(
            "data %s, %d shots, seed %d: %d files of labelled images have changed since the list was drawn; it is "
            "drawn anew, and its cells are run again.",
            *(data.name, n_shot, seed, changed),
        )
    if there.get(DRAWN_WITH) != drawn_with or changed:
        with atomic(path) as part:
            output = {"output": str(part), "overwrite": True, "dataset_dir": str(data.dataset_dir)}
            with contextlib.redirect_stdout(io.StringIO()):
                run(argparse.Namespace(**{**options, **output}), defaults)
            write_datalist(part, {**_read_object(part, "list"), **data.told, DRAWN_WITH: drawn_with})
    content = parse_datalist(path)
    task_values(content["labels"], data.tasks)
    if not content["testing"]:
        raise ValueError("no image is left to test on; ask for fewer shots, or for a larger n_testing.")


def _changed_supports(content: Mapping[str, Any], folder: Path, hash_of: Callable[[Path], str]) -> int:
    """How many files of a list's supports are not what they were when it was drawn; missing ones apart."""
    items = [*content.get("lower", []), *content.get("upper", [])]
    known = content.get("sha256", {})
    files = {item[key] for item in items for key in ("image", "label")}
    return sum(hash_of(folder / file) != known.get(file) for file in files if (folder / file).exists())


def _relative(value: Any, folder: Path) -> Any:
    """A path in a folder without it, so that data may move; anything else as it is."""
    inside = isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(folder)
    return Path(value).relative_to(folder).as_posix() if inside else value


def _value(action: argparse.Action | None, value: Any, where: str) -> Any:
    """A value as the command line's option would take it; without one, any that is no code of a config."""
    if value is None:
        raise ValueError(f"{where}: is null; leave it out.")
    text = value if isinstance(value, str) else json.dumps(value)
    if any(part[:1] in ("$", "@", "%") for part in _texts(value)):
        raise ValueError(f"{where}: {text} holds $, @ or % at a beginning, which a config would take for code.")
    if action is None:
        return value
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{where}: {text} is not one of {', '.join(action.choices)}.")
    if action.type is None:
        if not isinstance(value, str):
            raise ValueError(f"{where}: {text} is no text.")
        return value
    take: Callable[[str], Any] = action.type  # type: ignore[assignment]
    try:
        return take(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where}: {error}.") from None


def _texts(value: Any) -> list[str]:
    """All text in a value, keys included."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _read_object(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {path} holds no JSON object.")
    return content


def _existing(path: Path, where: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{where}: {path} does not exist.")
    return path.resolve()


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {value!r}; give a list of at least one.")
    return value


def _check_number(value: Any, least: int, where: str) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{where} is {value!r}; give a whole number, {least} or more.")


def _check_keys(found: Mapping[str, Any], known: Sequence[str], where: str, *, needed: Sequence[str] = ()) -> None:
    """Raise where a key is unknown, or a needed one is missing."""
    for key in found:
        _check_known(key, known, f"{where}: key")
    for key in needed:
        if key not in found:
            raise ValueError(f"{where}: {key} is missing; add it.")


def _check_known(name: Any, known: Sequence[str], where: str) -> None:
    """Raise where a name is not among those known, with the near one."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        raise ValueError(f"{where}: {name!r} is unknown; {hint}")


def _check_doubles(names: Sequence[str], where: str) -> None:
    """Raise where two names would be one in names of files."""
    first_of: dict[str, str] = {}
    for name in names:
        if slug(name) in first_of:
            raise ValueError(f"{where}: {first_of[slug(name)]!r} and {name!r} are one name; give each its own.")
        first_of[slug(name)] = name
