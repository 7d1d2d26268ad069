"""Labels and tasks: each name of a data list's labels but background is a task, a binary segmentation of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from blosam_monai.data.geometry import Value
from blosam_monai.files import PathLike

# Name -> value, or values of a union: numbers of an index map, or names of segments, colours or files.
Labels = Mapping[str, Value | Sequence[Value]]

NUMBER_CODINGS = ("index", "threshold")  # the other codings know classes by names
_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")


def task_values(labels: Labels, tasks: Sequence[str] | None = None) -> dict[str, list[Value]]:
    """The label values of each task, in task order; without ``tasks``, of every label but background.

    >>> task_values({"background": 0, "wheel": 2, "glass": [3, 4]})
    {'wheel': [2], 'glass': [3, 4]}
    >>> task_values({"background": 0, "liver": "Liver", "vessel": ["#FF0000", "#0000FF"]}, ["vessel"])
    {'vessel': ['#ff0000', '#0000ff']}

    Raises:
        ValueError: a task that is not among the labels, none at all, or one twice; labels without a class.
    """
    values = {
        name: [_plain(v) for v in ([value] if isinstance(value, (int, str)) else value)]
        for name, value in labels.items()
    }
    values = {name: wanted for name, wanted in values.items() if name != "background" and wanted != [0]}
    if not values:
        raise ValueError('labels: no class beside background; give names and values, as {"background": 0, "lung": 1}.')
    chosen = list(values) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [name for name in chosen if name not in values]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"tasks: {chosen} must be some of the labels {', '.join(values)}, each once.")
    return {name: values[name] for name in chosen}


def known_values(labels: Labels) -> set[Value]:
    """All values that a data list knows, background included; others are refused, since they may be a mistake.

    >>> sorted(known_values({"background": [0, 6, 7], "liver": 5}))
    [0, 5, 6, 7]
    """
    return {_plain(v) for value in labels.values() for v in ([value] if isinstance(value, (int, str)) else value)} | {0}


def check_names(path: PathLike, described: Collection[Value], labels: Labels, coding: str) -> tuple[str, ...]:
    """Whether a label with names (segments, colours, files) has those of the list, or a misspelling of them.

    A name may be absent, as of a lesion that a patient does not have; then its mask is empty, which is noted where the
    label has names that the list does not know.

    Args:
        path: of the label, for messages.
        described: the names in it, also of empty masks.
        labels, coding: the data list's.

    Raises:
        ValueError: a name that differs from the list's only in capitals or blanks; or, of ``segments``, which name what
            they leave empty too, none of the list's names.
    """
    known = known_values(labels) - {0}
    missing, strange = known - set(described), {str(name) for name in described} - known
    spelt = {"".join(name.casefold().split()): name for name in strange}
    for name in sorted(map(str, missing)):
        if other := spelt.get("".join(name.casefold().split())):
            raise ValueError(f"{path}: has {other!r} and no {name!r}; write both names alike, or list both as a union.")
    if coding == "segments" and strange and missing == known:
        raise ValueError(
            f"{path}: has the names {', '.join(sorted(strange))} and none of the data list's labels "
            f"({', '.join(sorted(map(str, known)))}); correct the list, or leave the case out."
        )
    if strange and missing:
        return (
            f"{len(missing)} of {len(known)} names of the list are not in the label, which has {len(strange)} others",
        )
    return ()


def output_values(labels: Labels, tasks: Sequence[str] | None = None) -> dict[str, int]:
    """The number of each task in a label map that is written.

    It is the task's first value where that is a number, otherwise its place among the list's labels, counted from 1.

    >>> output_values({"background": 0, "wheel": 2, "glass": [3, 4]})
    {'wheel': 2, 'glass': 3}
    >>> output_values({"background": 0, "liver": "Liver", "spleen": "Spleen"}, ["spleen"])
    {'spleen': 2}

    Raises:
        ValueError: two tasks of one number, or tasks as in ``task_values``.
    """
    places = {name: place for place, name in enumerate(task_values(labels), start=1)}
    numbers: dict[str, int] = {}
    name_of: dict[int, str] = {}
    for name, values in task_values(labels, tasks).items():
        first = values[0]
        numbers[name] = first if isinstance(first, int) and first > 0 else places[name]
        other = name_of.setdefault(numbers[name], name)
        if other != name:
            raise ValueError(
                f"labels: {other} and {name} would both be written as {numbers[name]}; list another value first, or "
                "use merge=separate."
            )
    return numbers


def parse_labels(labels: Any) -> dict[str, Any]:
    """Name -> value(s) as in a data list, also from Decathlon's value -> name.

    >>> parse_labels({"0": "background", "1": "lung"})
    {'background': 0, 'lung': 1}

    Raises:
        ValueError: anything else, or two values of one name in Decathlon's form.
    """
    if isinstance(labels, dict) and labels and all(str(k).isdigit() and isinstance(v, str) for k, v in labels.items()):
        if len(set(labels.values())) < len(labels):
            raise ValueError(f'labels: {labels!r} has one name twice; write a union, as {{"lung": [1, 2]}}.')
        labels = {name: int(value) for value, name in labels.items()}
    valid = isinstance(labels, dict) and all(
        _is_value(v) or (isinstance(v, list) and v and all(map(_is_value, v))) for v in labels.values()
    )
    if not valid:
        raise ValueError(f'labels: {labels!r} is not names and values, as {{"background": 0, "lung": 1}}.')
    return dict(labels)


def check_values(labels: Labels, coding: str) -> None:
    """Raise where values are not of the kind that a coding has: numbers, or names of segments, colours or files.

    Raises:
        ValueError: the first label of the other kind; or several classes, of which ``threshold`` knows one.
    """
    wanted = int if coding in NUMBER_CODINGS else str
    classes = task_values(labels)
    if coding == "threshold" and len(classes) != 1:
        raise ValueError(
            f"label_coding: threshold tells one class from background, the list names {len(classes)}; name one, or "
            "choose another coding."
        )
    for name, values in classes.items():
        for value in values:
            if not isinstance(value, wanted):
                kind = "numbers" if wanted is int else 'names, as "Liver" or "#ff0000"'
                raise ValueError(f"labels: {name} is {value!r}, the values of label_coding {coding!r} are {kind}.")


def _is_value(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _plain(value: Value) -> Value:
    """A value as labels have it: colours in lower case."""
    if isinstance(value, str):
        return value.lower() if _COLOUR.fullmatch(value) else value
    return int(value)
