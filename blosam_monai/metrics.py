"""Scores of one case on its own grid, and their summary.

Empty masks, so that no case drops out of a mean and missing a structure never improves a score:

===================  ===========  ==================================================================
score                both empty   only one of them empty
===================  ===========  ==================================================================
``dice`` ``iou``     1            0
``nsd``              1            0
``hd95``             0            the diagonal of the image in mm, more than any distance inside it
``volume_error_ml``  0            the volume that is there: + when predicted, - when missed
===================  ===========  ==================================================================

Not a number, and counted as such, are only volumes of what has none: a picture, or an image without spacing.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import find_objects
from torch import Tensor

from blosam_monai.files import PathLike, atomic, write_json

SCORES = ("dice", "iou", "hd95", "nsd", "volume_error_ml")  # those a summary speaks of
TABLES = ("cases.csv", "cases.json", "summary.json")
RESAMPLES = 2000  # of subjects; Efron and Tibshirani 1993 ask for 1000 or more where the ends of an interval matter
INTERVAL = (2.5, 97.5)  # percentiles of the resampled means: 95 %
ROUNDING = 1e-5  # of a distance: headers hold spacings in float32, and a surface just at the tolerance is within it


def case_scores(
    pred: Tensor, label: Tensor, *, spacing: Sequence[float] | None = None, nsd_tolerance: float = 2.0
) -> dict[str, np.ndarray]:
    """Scores of each task: binary ``pred`` and ``label`` (T, H, W) or (T, D, H, W) -> name -> (T,).

    ``dice iou``; ``hd95``: the larger of the two directed 95th percentiles of surface distance; ``nsd``: share of both
    surfaces within ``nsd_tolerance`` of the other; ``volume_error_ml``: prediction minus label; ``label_volume_ml``.
    A surface is the voxels of a mask with a face to the outside, and every voxel of it counts alike, whatever its
    sides; what is outside the image is outside the mask. A volume with an axis of length 1 has a picture's surface.

    MONAI measures the distances, once for both scores and on the box that holds both masks, which changes none of them.
    Its ``compute_hausdorff_distance`` and ``compute_surface_dice`` each measure anew, copy all tasks as float, take no
    percentile of more than 2^24 distances, and drop empty masks. Its Dice sums in float32, exact to 2^24 voxels only.

    Args:
        pred, label: binary, of the same shape.
        spacing: mm along each axis after T; None: distances and tolerance are in pixels, volumes are not a number.
        nsd_tolerance: mm.

    Raises:
        ValueError: shapes differ, or ``spacing`` is not one positive number an axis, or the tolerance is negative.
    """
    _check(pred, label, spacing, nsd_tolerance)
    tasks = [  # one by one: the copies a score needs are those of a single mask
        _task_scores(p.bool().cpu().numpy(), t.bool().cpu().numpy(), spacing, nsd_tolerance)
        for p, t in zip(pred, label, strict=True)
    ]
    return {name: np.array([scores[name] for scores in tasks]) for name in tasks[0]}


def summarise(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Numbers over cases: section -> task -> numbers.

    For each score its mean, standard deviation (``_sd``), the cases that are not a number and left out of both
    (``_nan``), and the 95 % bootstrap interval of the mean (``_low``, ``_high``). ``all`` is the mean over tasks.

    The interval is of percentiles, by subject: as many subjects as the section has are drawn with replacement, each
    with all of its cases and tasks, since cases of one subject say little more than one of them. Draws without any case
    of a task say nothing of it and are left out. Fewer than two subjects with a score: not a number, for ``all`` too.

    Args:
        rows: keys ``section task subject label_empty pred_empty`` and ``SCORES``; the subject is any key.
        seed: of the drawing; sections are drawn alone, so that none changes another.
    """
    return {
        section: _summarise_section([row for row in rows if row["section"] == section], seed)
        for section in dict.fromkeys(row["section"] for row in rows)
    }


def write_table(folder: PathLike, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``cases.csv``, ``cases.json`` (an entry for each case and task) and ``summary.json``; returns its scores.

    What is not a number is ``nan`` in the CSV, ``null`` in the JSON, NaN in the scores returned.
    """
    table, entries, summary = (Path(folder) / name for name in TABLES)
    write_rows(table, rows)
    write_json(entries, list(rows))
    scores = summarise(rows)
    write_json(summary, {"scores": scores, "settings": settings})
    return scores


def write_rows(path: PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys as CSV."""
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _check(pred: Tensor, label: Tensor, spacing: Sequence[float] | None, nsd_tolerance: float) -> None:
    if pred.shape != label.shape:
        raise ValueError(f"pred: shape {tuple(pred.shape)}, label {tuple(label.shape)}; score both on the same grid.")
    if spacing is not None and (len(spacing) != label.ndim - 1 or not all(0 < s < math.inf for s in spacing)):
        raise ValueError(f"spacing: {tuple(spacing)}; give {label.ndim - 1} positive numbers, the mm along each axis.")
    if not nsd_tolerance >= 0:
        raise ValueError(f"nsd_tolerance: {nsd_tolerance}; give 0 or more mm.")


def _task_scores(
    pred: np.ndarray, label: np.ndarray, spacing: Sequence[float] | None, nsd_tolerance: float
) -> dict[str, float]:
    """Scores of one task from bool masks ([D,] H, W)."""
    in_pred, in_label = int(np.count_nonzero(pred)), int(np.count_nonzero(label))
    voxel_ml = math.prod(spacing) / 1000 if spacing is not None and label.ndim == 3 else math.nan
    volumes = {"volume_error_ml": (in_pred - in_label) * voxel_ml, "label_volume_ml": in_label * voxel_ml}
    mm = tuple(spacing) if spacing is not None else (1.0,) * label.ndim
    if 1 in label.shape and label.ndim == 3:  # else every voxel of a single slice would be surface
        single = label.shape.index(1)
        pred, label, mm = pred.squeeze(single), label.squeeze(single), mm[:single] + mm[single + 1 :]
    if not in_pred or not in_label:
        right = float(in_pred == in_label)
        missed = 0.0 if right else math.hypot(*(n * s for n, s in zip(label.shape, mm, strict=True)))
        return {"dice": right, "iou": right, "hd95": missed, "nsd": right} | volumes
    box = find_objects(pred | label, max_label=1)[0]
    pred, label = pred[box], label[box]  # beyond it is background for both, as beyond the image
    common = int(np.count_nonzero(pred & label))
    distances = _surface_distances(pred, label, mm)
    return {
        "dice": 2 * common / (in_pred + in_label),
        "iou": common / (in_pred + in_label - common),
        "hd95": float(max(np.percentile(d, 95) for d in distances)),
        "nsd": float(np.mean(np.concatenate(distances) <= nsd_tolerance * (1 + ROUNDING))),
    } | volumes


def _surface_distances(pred: np.ndarray, label: np.ndarray, mm: tuple[float, ...]) -> list[np.ndarray]:
    """Distance of every surface voxel of one mask to the surface of the other, in mm: from pred, from label."""
    pred, label = get_mask_edges(pred, label, crop=False)
    return [
        get_surface_distance(*pair, spacing=mm).astype(float)  # MONAI gives float32, to 7 digits
        for pair in ((pred, label), (label, pred))
    ]


def _summarise_section(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, float]]:
    tasks, task_of = _numbered([row["task"] for row in rows])
    subjects, subject_of = _numbered([row["subject"] for row in rows])
    values = np.array([[row[s] for s in SCORES] for row in rows], dtype=float)  # (cases, scores)
    known = ~np.isnan(values)
    sums, counts = np.zeros((2, len(subjects), len(tasks), len(SCORES)))
    np.add.at(sums, (subject_of, task_of), np.where(known, values, 0))
    np.add.at(counts, (subject_of, task_of), known)
    drawn = np.random.default_rng(seed).multinomial(len(subjects), [1 / len(subjects)] * len(subjects), RESAMPLES)
    with np.errstate(invalid="ignore"):  # 0 / 0: no case has the score
        means = sums.sum(0) / counts.sum(0)  # (tasks, scores)
        resampled = np.tensordot(drawn, sums, 1) / np.tensordot(drawn, counts, 1)  # (resamples, tasks, scores)
    two_subjects = (counts > 0).sum(0) >= 2
    low, high = _interval(resampled, two_subjects)
    summary: dict[str, dict[str, float]] = {}
    for t, task in enumerate(tasks):
        own = [row for row, of in zip(rows, task_of, strict=True) if of == t]
        deviations = [_deviation(v[~np.isnan(v)]) for v in values[task_of == t].T]
        summary[task] = _named(mean=means[t], sd=deviations, low=low[t], high=high[t])
        summary[task] |= {f"{s}_nan": int(n) for s, n in zip(SCORES, (~known[task_of == t]).sum(0), strict=True)}
        summary[task] |= {
            "cases": len(own),
            "empty_labels": sum(row["label_empty"] for row in own),
            "empty_predictions": sum(row["pred_empty"] for row in own),
        }
    scored = ~np.isnan(means)  # a task without any number stays out of the mean over tasks
    low, high = _interval(_over_tasks(resampled, scored), (two_subjects | ~scored).all(0) & scored.any(0))
    return summary | {"all": _named(mean=_over_tasks(means, scored), low=low, high=high)}


def _numbered(keys: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """The different keys in their order, and for each key its place among them."""
    place = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return list(place), np.array([place[key] for key in keys])


def _over_tasks(means: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Mean (..., tasks, scores) -> (..., scores) over the tasks that are scored; NaN without one."""
    with np.errstate(invalid="ignore"):
        return np.where(scored, means, 0).sum(-2) / scored.sum(-2)


def _interval(resampled: np.ndarray, enough: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over the first axis; NaN where there is not ``enough`` to draw from."""
    low, high = np.nanpercentile(np.where(enough, resampled, 0), INTERVAL, axis=0)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def _deviation(values: np.ndarray) -> float:
    """Standard deviation of a sample: n - 1; 0 of one value, NaN of none."""
    if len(values) < 2:
        return 0.0 if len(values) else math.nan
    return float(np.std(values, ddof=1))


def _named(**numbers: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Numbers in the order of ``SCORES`` by the name of the score and their own."""
    return {f"{s}_{name}": float(v) for name, values in numbers.items() for s, v in zip(SCORES, values, strict=True)}
