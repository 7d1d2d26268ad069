"""One self-contained HTML file of what was trained on what, how it went and how good it is: collect, draw, render.

All is read from the tables that ``train``, ``evaluate`` and ``predict`` leave, see docs/reference/formats.md; the page
loads nothing from anywhere.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from blosam_monai import __version__
from blosam_monai.data.writers.pictures import COLOURS
from blosam_monai.figures import MAX_CURVES, draw_curves, shrink
from blosam_monai.files import PathLike, atomic

logger = logging.getLogger(__name__)

MAX_PICTURES = 60  # of one folder's cases, the worst ones
HELD_OUT = {"testing": "not used in training", "validation": "not trained on, watched during training"}
TRAINED_ON = {"upper": "upper set D2, part of the training", "lower": "lower set D1, part of the training"}
FEW_SHOT = "Each of them in turn is segmented by comparison with the others, which trains the head that compares"
HOW_TRAINED = {  # by the levels of the method
    "bilevel": "D1, the lower set, trains what adapts the network; D2, the upper set, trains the prompt and gates, "
    "if any",
    "swap": "D1, the lower set, trains the prompt; D2, the upper set, trains what adapts the network",
    "joint": "Joint fine-tuning: all of them train everything",
    "alternate": "Joint fine-tuning, one kind of variable after the other: all of them train everything",
}
_UNITS = {"pixel": "px"}
_SCORES = ("dice_mean", "dice_low", "dice_high", "iou_mean", "hd95_mean", "nsd_mean", "volume_error_ml_mean")


@dataclass(frozen=True)
class Run:
    """What one folder holds.

    Attributes:
        folder: where it is.
        kind: ``training``, ``evaluation`` or ``prediction``.
        settings: as its tables say them.
        scores: section -> task -> numbers; none for a prediction, nor where every case failed.
        rows: an entry for each case and task, with ``section``.
        curves: a line an epoch, of a training.
        cases: lines of the last run in its manifest.
        outputs: ``case_id`` -> hash of the name of each of its files -> model that wrote it, by all of the manifest.
        model: SHA-256 of the model; of a prediction, of the last one that wrote.
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    curves: Sequence[Mapping[str, float]]
    cases: Sequence[Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, str]]
    model: str


def write_report(
    folders: Sequence[PathLike],
    output: PathLike | None = None,
    *,
    overwrite: bool = False,
    overlays: bool = True,
    log_paths: bool = False,
) -> Path:
    """Write the report of trainings, evaluations and predictions side by side; returns its path.

    Args:
        folders: their ``output_dir``, in any mix and order.
        output: the HTML file; default: ``report.html`` in the first folder.
        overwrite: replace an earlier one.
        overlays: put the pictures that the folders keep into the report; they are of patients.
        log_paths: name cases and subjects as the tables do, and folders.

    Raises:
        ValueError: a folder is none of the three, or its tables are damaged.
        FileExistsError: ``output`` is there.
    """
    path = Path(output) if output else Path(folders[0]) / "report.html"
    if path.exists() and not overwrite:
        raise FileExistsError(f"output: {path} exists; choose another, or add overwrite=true.")
    runs = [collect(folder) for folder in folders]
    described, subjects = [], dict[str, str]()
    for run, titles in zip(runs, _titles(runs), strict=True):
        with _tables_of(run.folder):
            described.append(describe(run, titles, subjects, overlays=overlays, log_paths=log_paths))
    page = render(described)
    with atomic(path) as part:
        part.write_text(page, encoding="utf-8")
    logger.info("report of %d folders, %.1f MB", len(runs), len(page) / 1e6)
    return path


def collect(folder: PathLike) -> Run:
    """Read the tables of a folder.

    Raises:
        ValueError: it has none, or one is damaged.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("summary.json", "manifest.jsonl")):
        raise ValueError(
            f"run: {folder} has no summary.json and no manifest.jsonl; give the output_dir of a training that has "
            "ended, of an evaluation or of a prediction."
        )
    with _tables_of(folder):
        lines = list(_manifest_lines(folder / "manifest.jsonl"))
        starts = [i for i, line in enumerate(lines) if line["number"] == 1]
        cases = lines[starts[-1] :] if starts else lines
        outputs: dict[str, dict[str, str]] = {}
        for line in lines:
            made = {output["name_id"]: line.get("model_sha256", "") for output in line["outputs"]}
            outputs.setdefault(line["case_id"], {}).update(made)
        scored = (folder / "summary.json").is_file()
        settings, scores, rows = _scores_in(folder) if scored else (_settings_of(lines, cases), {}, [])
        kind = "evaluation" if "section" in settings else "training" if scored else "prediction"
        curves = _read_curves(folder / "curves.csv") if kind == "training" else []
        return Run(folder, kind, settings, scores, rows, curves, cases, outputs, settings.get("model_sha256", ""))


@contextmanager
def _tables_of(folder: Path) -> Iterator[None]:
    """Say in one line that what was found in a folder is not what was looked for."""
    try:
        yield
    except (AttributeError, LookupError, OSError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"run: {folder}: its tables are damaged or of another version ({type(error).__name__}: {error}); "
            "run it again."
        ) from error


def _scores_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Settings, scores and rows."""
    summary, rows = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("summary", "cases"))
    return dict(summary["settings"]), dict(summary["scores"]), list(rows)


def _manifest_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # a line that a killed run tore
            logger.warning("a torn line of manifest.jsonl is left out")


def _settings_of(lines: Sequence[Mapping[str, Any]], cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a manifest says: of an evaluation its last line, of a prediction the last that tells of a written file."""
    known = ("section", "sam_model", "sam_weights", "model_sha256", "blosam_monai_version")
    written = [line for line in lines if line["outputs"]]
    last = cases[-1] if "section" in cases[-1] or not written else written[-1]
    return {name: last[name] for name in known if name in last}


def _read_curves(path: Path) -> list[dict[str, float]]:
    """Lines of ``curves.csv``; what was not measured at an epoch is left out."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _titles(runs: Sequence[Run]) -> list[dict[str, str]]:
    """For each run what its model and itself are called; models of one method are numbered."""
    keys = [run.model or str(run.folder) for run in runs]
    method_of = {
        key: run.settings["method"] + (" (oracle)" if run.settings.get("oracle") else "")
        for key, run in zip(keys, runs, strict=True)
        if "method" in run.settings
    }
    alike: dict[str, list[str]] = {}
    for key in dict.fromkeys(keys):
        alike.setdefault(method_of.get(key, "model"), []).append(key)  # a prediction alone does not know it
    model_of = {
        key: f"{method} {number}" if len(own) > 1 else method
        for method, own in alike.items()
        for number, key in enumerate(own, start=1)
    }
    kinds = [f"Evaluation ({r.settings['section']})" if r.kind == "evaluation" else r.kind.capitalize() for r in runs]
    repeats, seen = Counter(zip(kinds, keys, strict=True)), Counter[tuple[str, str]]()
    titles = []
    for kind, key in zip(kinds, keys, strict=True):
        seen[kind, key] += 1
        number = f" {seen[kind, key]}" if repeats[kind, key] > 1 else ""
        titles.append({"model": model_of[key], "run": f"{kind}{number}: {model_of[key]}"})
    return titles


def describe(
    run: Run, titles: Mapping[str, str], subjects: dict[str, str], *, overlays: bool, log_paths: bool
) -> dict[str, Any]:
    """What the template shows of a run. ``subjects``: name -> number of those on the page so far; more are added."""
    tasks = list(run.settings["tasks"]) if run.scores else []
    pictures = sorted((run.folder / "overlays").glob("*.png")) if overlays else []
    cases = _scored_cases(run, tasks, {path.stem: path for path in pictures}, subjects, log_paths=log_paths)
    trained_on = Counter(case["section"] for case in cases if case["trained_on"])
    failed = [line for line in run.cases if line["status"] == "failed"]
    described = {
        **titles,
        "kind": run.kind,
        "folder": str(run.folder) if log_paths else None,
        "settings": {**run.settings, "model_sha256": run.model},
        "tasks": tasks,
        "colours": [f"rgb{tuple(int(v) for v in COLOURS[t % len(COLOURS)])}" for t in range(len(tasks))],
        "summary": [line | dict(titles) for line in _summary_lines(run, tasks, trained_on)],
        "supports": [case for case in cases if case["support"]],
        "cases": [case for case in cases if not case["support"]],
        "trained_on": trained_on.total(),
        "subjects_repeat": len({case["subject"] for case in cases}) < len(cases),
        "predicted": _predicted_cases(run, pictures, log_paths=log_paths) if run.kind == "prediction" else [],
        "models": sorted({model for models in run.outputs.values() for model in models.values()}),
        "failed": [_failure(line, log_paths=log_paths) for line in failed],
        "n_failed": run.settings.get("failed_cases", len(failed)),
        "has_pictures": bool(pictures),
        "overlays": overlays,
        "figures": draw_curves(run.curves, tasks, name=titles["run"]),
        "held_out": any(name.startswith("validation_") for row in run.curves for name in row),
    }
    if run.kind == "training":
        method = run.settings["method"]  # of a training of before there were levels, what they were
        described |= {"n_shot": run.settings["n_shot"], "crossfit": run.settings.get("crossfit", False)}
        levels = run.settings.get("levels", "bilevel" if method == "blosam" else method)
        described["how_trained"] = FEW_SHOT if "head_options" in run.settings else HOW_TRAINED[levels]
    return described


def _summary_lines(run: Run, tasks: Sequence[str], trained_on: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    units = sorted({_UNITS.get(row["unit"], row["unit"]) for row in run.rows})
    for section in run.scores:
        for task in tasks if len(tasks) == 1 else [*tasks, "all"]:
            numbers = run.scores[section][task]
            scores = {name: None if numbers[name] is None else float(numbers[name]) for name in _SCORES}
            line = {"section": section, "task": task, "overall": task == "all" or len(tasks) == 1}
            yield numbers | scores | line | {"unit": " and ".join(units), "trained_on": trained_on[section]}


def _scored_cases(
    run: Run, tasks: Sequence[str], pictures: Mapping[str, Path], subjects: dict[str, str], *, log_paths: bool
) -> list[dict[str, Any]]:
    """The cases of all sections, worst mean Dice first; pictures of the worst ones and of all supports."""
    supports = {case_id[:12] for case_id in run.settings.get("supports", ())}  # images, whichever slice of them
    cases = []
    for name, group in groupby(run.rows, key=lambda row: row["case"]):
        rows = list(group)
        first, dice = rows[0], {row["task"]: row["dice"] for row in rows}
        subject = subjects.setdefault(first["subject"], f"subject {len(subjects) + 1}")
        cases.append(
            {
                "name": name if log_paths else first["case_id"],
                "subject": first["subject"] if log_paths else subject,
                "section": first["section"],
                "support": run.kind == "training" and first["section"] in TRAINED_ON,
                "trained_on": first["section"] in HELD_OUT and first["case_id"][:12] in supports,
                "unit": _UNITS.get(first["unit"], first["unit"]),
                **{score: _mean(row[score] for row in rows) for score in ("dice", "hd95", "nsd")},
                "by_task": {task: dice[task] for task in tasks},
                "flags": [
                    f"{row['task']}: {what} empty"
                    for row in rows
                    for key, what in (("label_empty", "label"), ("pred_empty", "prediction"))
                    if row[key]
                ],
                "path": pictures.get(name),
            }
        )
    cases.sort(key=lambda case: (case["dice"] is not None, case["dice"] or 0.0))
    shown = 0
    for case in cases:
        shown += not case["support"]
        path = case.pop("path")
        case["picture"] = shrink(path) if path and (case["support"] or shown <= MAX_PICTURES) else None
    return cases


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _predicted_cases(run: Run, pictures: Sequence[Path], *, log_paths: bool) -> list[dict[str, Any]]:
    """The cases of a prediction, those that failed first; their pictures are found by the hash of their name."""
    by_name_id = {hashlib.sha256(path.name.encode()).hexdigest()[:12]: path for path in pictures}
    cases: list[dict[str, Any]] = []
    for line in sorted(run.cases, key=lambda line: line["status"] != "failed"):
        models = run.outputs[line["case_id"]]
        own = sorted(models.keys() & by_name_id.keys())
        others = [f"by model {model[:12]}" for model in sorted({*models.values()} - {run.model})]
        cases.append(
            {
                "name": Path(line["image"]).name if log_paths and "image" in line else line["case_id"] or "unreadable",
                "status": line["status"],
                "seconds": float(line["seconds"]),
                "notes": [*line["notes"], *others],
                "picture": shrink(by_name_id[own[0]]) if own and len(cases) < MAX_PICTURES else None,
            }
        )
    return cases


def _failure(line: Mapping[str, Any], *, log_paths: bool) -> str:
    """Why a case failed. A manifest written with ``log_paths`` says it with names."""
    said = line["error"] if log_paths or "image" not in line else "see manifest.jsonl"
    return f"case {line['number']} ({line['case_id'] or 'unreadable'}): {said}"


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page. Every text is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "shown": _shown}
    lines = [line for run in runs for line in run["summary"]]
    alike = Counter((line["model"], line["section"], line["task"]) for line in lines)
    lines = [
        line | {"model": line["run"]} if alike[line["model"], line["section"], line["task"]] > 1 else line
        for line in lines
    ]
    held_out, trained_on = (_by_section(lines, sections) for sections in (HELD_OUT, TRAINED_ON))
    return environment.get_template("report.html.j2").render(
        runs=runs,
        title=runs[0]["settings"].get("data_list_name") or ", ".join(runs[0]["tasks"]),
        headline=[line for line in next(iter(held_out.values()), []) if line["overall"]],
        held_out=held_out,
        trained_on=trained_on,
        section_texts=HELD_OUT | TRAINED_ON,
        weights={(run["settings"].get("sam_model"), run["settings"].get("sam_weights")): None for run in runs},
        oracle=any(run["settings"].get("oracle") for run in runs),
        settings=_side_by_side([run["settings"] for run in runs]),
        max_pictures=MAX_PICTURES,
        max_curves=MAX_CURVES,
        version=__version__,
        time=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _by_section(lines: Sequence[dict[str, Any]], sections: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Section -> its lines, by task, so that models stand side by side."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    ordered = sorted(lines, key=lambda line: tasks.index(line["task"]))
    found = {section: [line for line in ordered if line["section"] == section] for section in sections}
    return {section: own for section, own in found.items() if own}


def _side_by_side(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, list[str | None], bool]]]:
    """Group -> setting, its value in each run, and whether they differ."""
    groups: dict[str, list[tuple[str, list[str | None], bool]]]
    groups = {"Settings": [], "Hashes": [], "Versions, machine": []}
    for name in dict.fromkeys(name for of_run in settings for name in of_run):
        values = [_shown(of_run[name]) if name in of_run else None for of_run in settings]
        group = "Settings"
        if "sha256" in name or name in ("sam_weights", "supports"):
            group = "Hashes"
        elif name.endswith("_version") or name in ("device", "cpu_count"):
            group = "Versions, machine"
        groups[group].append((name, values, len({value for value in values if value is not None}) > 1))
    return groups


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001 (a dash for what is not a number)
