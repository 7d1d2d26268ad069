"""The demo: every verb once, on generated CT of the abdomen; from labelled pictures to masks, scores and a report."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blosam_monai.data.phantoms import (
    CT_LABELS,
    CT_WINDOW,
    write_ct_series,
    write_ct_slice,
    write_ct_slices,
    write_ct_volume,
)
from blosam_monai.files import PathLike, check_output_dir

SLICES = 16  # one of each patient: 4 to train on, 2 to validate, 10 to test
SLICE, VOLUME, SERIES = 104, 102, 103  # seeds of three patients more
SLAB = {"shape": (24, 96, 136), "spacing": (2.5, 2.6, 2.6), "level": 6.0}  # mm, the heights of the pictures
METHODS = {"blosam": "BLO-SAM", "joint": "joint fine-tuning"}
MAX_EPOCHS = 40
FOLDERS = ("data", "train", "joint", "evaluate", "evaluate_joint", "masks")
FILES = ("mlruns.db", "report.html")


def run_demo(output_dir: PathLike, *, overwrite: bool, run: Callable[[list[str]], int]) -> str:
    """Generate data, train on four slices, evaluate, compare with joint fine-tuning, predict, report.

    Written are ``FOLDERS``: ``data`` (what is read), ``train`` and ``joint`` (the models), ``evaluate`` and
    ``evaluate_joint`` (their scores), ``masks``; and ``FILES``.

    Args:
        output_dir: folder for everything.
        overwrite: remove an earlier demo in it first.
        run: runs the verb that the arguments name, as ``["train", "--output_dir", ...]``, and returns its exit status.

    Returns:
        What to print at the end: the scores and where to go from here.

    Raises:
        FileExistsError: an earlier demo is there.
        ValueError: the folder cannot be written to.
        SystemExit: a verb failed, with its exit status.
    """
    root = Path(output_dir)
    check_output_dir(root)
    if (root / "data").exists() and not overwrite:
        raise FileExistsError(f"output_dir: {root} holds a demo; choose another folder or add --overwrite true.")
    if (root / "data" / "new_labels").is_dir():  # a demo's, and no folder of the user's own
        _remove(root)
    write_data(root / "data")
    for arguments in commands(root):
        if status := run(arguments):
            raise SystemExit(status)
    return summarise(root)


def _remove(root: Path) -> None:
    for name in FOLDERS:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
    for name in FILES:
        (root / name).unlink(missing_ok=True)


def write_data(folder: Path) -> None:
    """Write slices of 16 patients as PNG with labels, and three new patients as PNG, NIfTI and a DICOM series.

    The labels of the new ones are in ``new_labels``: nothing reads them, they are there to compare with.
    """
    new, labels = folder / "new", folder / "new_labels"
    write_ct_slices(folder, SLICES)
    write_ct_slice(new / "slice.png", labels / "slice.png", seed=SLICE)
    write_ct_volume(new / "volume.nii.gz", labels / "volume.nii.gz", seed=VOLUME, **SLAB)
    write_ct_series(new / "series", labels / "series.nii.gz", seed=SERIES, **SLAB)


def commands(root: Path) -> list[list[str]]:
    """The verbs of the demo in their order, as a user would type them after ``blosam``."""
    data, store = root / "data", ["--tracking_uri", _store(root)]
    listed = ["--data_list", str(data / "list.json"), "--dataset_dir", str(data)]
    names = {name: value for name, value in CT_LABELS.items() if value}
    draw = ["--images", str(data / "images"), "--labels", str(data / "labels"), "--dataset_dir", str(data)]
    draw += ["--label_names", json.dumps(names), "--window", json.dumps(CT_WINDOW)]
    draw += ["--n_shot", "4", "--n_validation", "2", "--output", str(data / "list.json")]
    result = [["datalist", *draw]]
    for method in METHODS:
        model, scores = _model(root, method), _scores(root, method)
        train = ["train", *listed, "--output_dir", str(model), "--method", method, "--max_epochs", str(MAX_EPOCHS)]
        result.append([*train, *store])
        result.append(["evaluate", "--model", str(model), *listed, "--output_dir", str(scores), *store])
    predict = ["predict", "--model", str(_model(root, "blosam")), "--input", str(data / "new")]
    if not importlib.util.find_spec("highdicom"):  # an extra, which writes DICOM SEG
        predict += ["--dicom_output", '["nifti"]']
    result.append([*predict, "--output_dir", str(root / "masks")])
    folders = [str(folder) for method in METHODS for folder in (_model(root, method), _scores(root, method))]
    result.append(["report", "--run", *folders, str(root / "masks"), "--output", str(root / "report.html")])
    return result


def summarise(root: Path) -> str:
    """The scores of both methods as a table, what was written, and the commands to look further."""
    summaries = {method: _read(_scores(root, method) / "summary.json") for method in METHODS}
    by_method = {method: summary["scores"]["testing"] for method, summary in summaries.items()}
    cases = max(numbers.get("cases", 0) for numbers in by_method["blosam"].values())
    weights = summaries["blosam"]["settings"]["sam_weights"]
    shown = weights if len(weights) < 64 else f"{weights[:12]}..."  # else a SHA-256
    lines = [
        "",
        f"Dice on {cases} test slices, mean (95 % interval); 4 labelled slices, SAM weights: {shown}",
        f"{'task':<10}" + "".join(f"{title:<24}" for title in METHODS.values()),
        *(
            f"{task:<10}" + "".join(f"{_interval(scores[task]):<24}" for scores in by_method.values())
            for task in by_method["blosam"]
        ),
        "One draw of generated images: it shows how to compare, not which method is better on yours.",
        "",
        f"masks of a PNG slice, a NIfTI volume and a DICOM series, each on its own grid: {root / 'masks'}",
        f"pictures of them: {root / 'masks' / 'overlays'}",
        "",
        "Look further:",
        f"  mlflow ui --backend-store-uri {shlex.quote(_store(root))}",
        f"  python -m webbrowser {(root / 'report.html').resolve().as_uri()}",
        "  blosam datalist --images IMAGES --labels LABELS --n_shot 4 --output my_list.json"
        " && blosam train --data_list my_list.json --output_dir my_run",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _interval(numbers: Mapping[str, Any]) -> str:
    mean, low, high = (numbers[f"dice_{name}"] for name in ("mean", "low", "high"))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _model(root: Path, method: str) -> Path:
    return root / ("train" if method == "blosam" else method)


def _scores(root: Path, method: str) -> Path:
    return root / ("evaluate" if method == "blosam" else f"evaluate_{method}")


def _store(root: Path) -> str:
    return f"sqlite:///{(root / 'mlruns.db').resolve()}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
