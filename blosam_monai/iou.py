"""Intersection over union as the few-shot papers count it: the pixels of all episodes together, class by class.

Two numbers are usual. ``mean_iou``: true positives, false positives and false negatives of a class are summed over all
episodes of a fold, which gives one IoU a class; then the mean over the fold's classes, then over folds. ``binary_iou``:
the classes of a fold are pooled into one foreground; the mean of the IoU of foreground and background, then over folds.
Neither is the mean over images that ``monai.metrics.MeanIoU`` gives: a large object counts for more than a small one.
Sources: Shaban et al. 2017 (OSLSM), Rakelly et al. 2018 (co-FCN), Liu et al. 2020 (BiOpt), section 4.1.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

import numpy as np

from blosam_monai.files import PathLike
from blosam_monai.metrics import INTERVAL, RESAMPLES, write_rows

SCORES = ("mean_iou", "binary_iou")
_COUNTS = ("tp", "fp", "fn", "tn")


class IoUAccumulator:
    """Pixels of each class, kept by fold and by subject of the query as whole numbers: exact, however many there are.

    >>> iou = IoUAccumulator()
    >>> iou.add(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]), name="liver", subject="a")
    >>> iou.add(np.array([1, 1, 0, 0]), np.array([1, 1, 0, 0]), name="liver", subject="b")
    >>> iou.class_iou(), iou.binary_iou()  # 3 of 4 pixels; background 4 of 5
    ({'0': {'liver': 0.75}}, 0.775)
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], np.ndarray] = {}  # (fold, class, subject) -> _COUNTS

    def add(self, pred: Any, label: Any, *, name: str, subject: str, fold: str = "0") -> None:
        """Count the pixels of one query.

        Args:
            pred, label: binary, array or tensor of one shape.
            name: the class.
            subject: of the query, what a bootstrap draws.
            fold: name of the class's fold.

        Raises:
            ValueError: shapes differ.
        """
        given, true = (np.asarray(mask).astype(bool) for mask in (pred, label))
        if given.shape != true.shape:
            raise ValueError(f"pred: shape {given.shape}, label {true.shape}; count both on the same grid.")
        both, predicted, labelled = (int(np.count_nonzero(mask)) for mask in (given & true, given, true))
        counts = (both, predicted - both, labelled - both, true.size - predicted - labelled + both)
        key = fold, name, str(subject)
        self._counts[key] = self._counts.get(key, np.zeros(4, np.int64)) + np.array(counts, np.int64)

    def class_iou(self) -> dict[str, dict[str, float]]:
        """IoU of each class by fold; NaN of a class that is neither predicted nor labelled anywhere."""
        result: dict[str, dict[str, float]] = {}
        for (fold, name), counts in zip(self._columns(), self._table().sum(0), strict=True):
            result.setdefault(fold, {})[name] = float(_iou(counts))
        return result

    def mean_iou(self) -> float:
        """Mean over classes of a fold, then over folds."""
        return float(self._scores(self._table().sum(0))["mean_iou"])

    def binary_iou(self) -> float:
        """Mean of foreground, all classes of a fold pooled, and background; then over folds."""
        return float(self._scores(self._table().sum(0))["binary_iou"])

    def summary(self, *, seed: int = 0) -> dict[str, float]:
        """Both numbers, each with its 95 % bootstrap interval (``_low``, ``_high``), and the number of ``subjects``.

        As many subjects as there are, are drawn with replacement, the same ones for all folds; IoU is accumulated anew
        in every draw. Draws without a pixel of a class leave it out. Of one subject the interval is not a number. It
        covers the choice of queries, not that of supports: give another ``seed`` to the episodes for these.
        """
        table = self._table()
        drawn = np.random.default_rng(seed).multinomial(len(table), [1 / len(table)] * len(table), RESAMPLES)
        resampled = self._scores(np.tensordot(drawn, table, 1))
        result: dict[str, float] = {}
        for name, value in self._scores(table.sum(0)).items():
            low, high = np.nanpercentile(resampled[name], INTERVAL) if len(table) > 1 else (np.nan, np.nan)
            result |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
        return result | {"subjects": len(table)}

    def write(self, path: PathLike) -> None:
        """Write the counts as CSV, a line for each fold, class and subject."""
        keys = ("fold", "class", "subject")
        rows: list[Mapping[str, Any]] = [
            dict(zip((*keys, *_COUNTS), (*key, *counts.tolist()), strict=True)) for key, counts in self._counts.items()
        ]
        write_rows(path, rows)

    @classmethod
    def read(cls, *paths: PathLike) -> IoUAccumulator:
        """The counts of several files together, as of the folds of a cross-validation.

        Raises:
            ValueError: two files hold the same fold, class and subject.
        """
        result = cls()
        for path in paths:
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    key = row["fold"], row["class"], row["subject"]
                    if key in result._counts:
                        raise ValueError(f"{path}: fold {key[0]} and class {key[1]} are in another file too; drop one.")
                    result._counts[key] = np.array([int(row[name]) for name in _COUNTS], np.int64)
        return result

    def _columns(self) -> list[tuple[str, str]]:
        return sorted({(fold, name) for fold, name, _ in self._counts})

    def _table(self) -> np.ndarray:
        """Counts (subjects, classes of all folds, 4), int64."""
        if not self._counts:
            raise ValueError("IoU: nothing was counted; add an episode first.")
        columns = {key: n for n, key in enumerate(self._columns())}
        subjects = {name: n for n, name in enumerate(sorted({subject for _, _, subject in self._counts}))}
        table = np.zeros((len(subjects), len(columns), 4), np.int64)
        for (fold, name, subject), counts in self._counts.items():
            table[subjects[subject], columns[fold, name]] = counts
        return table

    def _scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Counts (..., classes of all folds, 4) -> score -> (...)."""
        folds = np.array([fold for fold, _ in self._columns()])
        own = [counts[..., folds == fold, :] for fold in np.unique(folds)]
        classes = [_mean(_iou(c)) for c in own]
        pooled = [c.sum(-2) for c in own]
        binary = [(_iou(c) + _iou(c[..., ::-1])) / 2 for c in pooled]  # tn fn fp tp: background's
        return {name: _mean(np.stack(v, -1)) for name, v in zip(SCORES, (classes, binary), strict=True)}


def _iou(counts: np.ndarray) -> np.ndarray:
    """Counts (..., 4) as ``_COUNTS`` -> IoU (...); 0 / 0 is not a number."""
    with np.errstate(invalid="ignore"):
        return counts[..., 0] / counts[..., :3].sum(-1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is a number; NaN without any."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)
