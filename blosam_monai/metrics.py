"""Scores of one case on its own grid, and their summary.

Empty masks: label and prediction both empty is a perfect answer (Dice, IoU, NSD 1, HD95 0); only one of them empty is a
complete miss (0; HD95 the diagonal of the image, the largest distance there is). So no case drops out of a mean.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.metrics.meandice import compute_dice
from monai.metrics.meaniou import compute_iou
from torch import Tensor

from blosam_monai.files import PathLike, atomic

SCORES = ("dice", "iou", "hd95", "nsd")


def case_scores(pred: Tensor, label: Tensor, *, nsd_tolerance: float = 2.0) -> dict[str, np.ndarray]:
    """Scores of each task: binary ``pred`` and ``label`` (T, H, W) -> ``dice iou hd95 nsd``, each (T,).

    ``hd95``: 95th percentile of the symmetric surface distance, in pixels. ``nsd``: share of both surfaces within
    ``nsd_tolerance`` pixels of the other. MONAI computes them; its rules for empty masks (dropped, so that missing a
    structure improves HD95) are replaced by those of this module.
    """
    pred, label = pred.bool(), label.bool()
    in_pred, in_label = pred.flatten(1).any(1), label.flatten(1).any(1)
    both = in_pred & in_label
    diagonal = float(np.hypot(*label.shape[1:]))
    hd95 = torch.where(in_pred == in_label, 0.0, diagonal).double()
    nsd = torch.where(in_pred == in_label, 1.0, 0.0).double()
    if both.any():
        pair = pred[both].float()[None], label[both].float()[None]  # (1, tasks in both, H, W)
        tolerances = [nsd_tolerance] * int(both.sum())
        with warnings.catch_warnings():  # MONAI 1.6.1 warns of its own deprecated argument
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
            hd95[both] = compute_hausdorff_distance(*pair, include_background=True, percentile=95)[0].double()
            nsd[both] = compute_surface_dice(*pair, tolerances, include_background=True)[0].double()
    pair = pred.float()[None], label.float()[None]
    return {
        "dice": compute_dice(*pair, include_background=True, ignore_empty=False)[0].numpy(),
        "iou": compute_iou(*pair, include_background=True, ignore_empty=False)[0].numpy(),
        "hd95": hd95.numpy(),
        "nsd": nsd.numpy(),
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation and counts over cases: section -> task -> numbers; ``all`` is the mean over tasks."""
    return {
        section: _summarise_section([row for row in rows if row["section"] == section])
        for section in dict.fromkeys(row["section"] for row in rows)
    }


def write_table(folder: PathLike, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``cases.csv`` (a row for each case and task) and ``summary.json``; returns the scores of the summary."""
    write_rows(Path(folder) / "cases.csv", rows)
    scores = summarise(rows)
    with atomic(Path(folder) / "summary.json") as part:
        part.write_text(json.dumps({"scores": scores, "settings": dict(settings)}, indent=1) + "\n", encoding="utf-8")
    return scores


def write_rows(path: PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys as CSV."""
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _summarise_section(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    summary: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        summary[task] = {f"{s}_mean": float(np.mean([row[s] for row in own])) for s in SCORES}
        summary[task] |= {f"{s}_sd": float(np.std([row[s] for row in own], ddof=1)) if own[1:] else 0.0 for s in SCORES}
        summary[task] |= {
            "cases": len(own),
            "empty_labels": sum(row["label_empty"] for row in own),
            "empty_predictions": sum(row["pred_empty"] for row in own),
        }
    return summary | {"all": {f"{s}_mean": float(np.mean([v[f"{s}_mean"] for v in summary.values()])) for s in SCORES}}
