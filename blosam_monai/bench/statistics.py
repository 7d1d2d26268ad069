"""What scores of several draws on the same test images say of a method, and of two methods.

A mean varies for two reasons: other supports would have been drawn, and other subjects would have been tested. All
draws are tested on the same subjects, so neither draws nor (draw, case) pairs are independent, and both must be drawn
again: docs/explanation/statistics.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean, stdev
from typing import Any

import numpy as np

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
ENOUGH_DRAWS = 10  # from here on the type-I error is near 5 %: benchmarks/statistics_error.py
LOWER_IS_BETTER = ("hd95",)
_AT_ONCE = 1000  # resamples in memory


@dataclass(frozen=True)
class Scores:
    """One score of many methods on the same images.

    Attributes:
        draws: what the rows of a table stand for.
        cases: what its columns stand for: (subject, case).
        tables: (method, data, task) -> (draws, cases), NaN where a case was a support or has no score.
    """

    draws: list[int]
    cases: list[tuple[Hashable, Hashable]]
    tables: dict[tuple[str, str, str], np.ndarray]

    @property
    def subjects(self) -> list[Hashable]:
        """The subject of each column."""
        return [subject for subject, _ in self.cases]


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks: of a method's scores on a data set, or of its paired differences to another method.

    Attributes:
        mean: over tasks, of the mean over draws and cases.
        resampled: (resamples,) of that; NaN where fewer than two draws or two subjects are known.
        of_draw: the mean of each draw.
        cases: the different ones, over all draws.
        superiority: of differences, the share that speaks for the method, ties one half; over tasks, the mean.
    """

    mean: float
    resampled: np.ndarray
    of_draw: Mapping[int, float]
    cases: frozenset[tuple[Hashable, Hashable]]
    superiority: float

    @property
    def sd(self) -> float:
        """Standard deviation of the means of draws (n - 1); NaN of one."""
        return stdev(self.of_draw.values()) if len(self.of_draw) > 1 else float("nan")


def estimate_methods(
    rows: Iterable[Mapping[str, Any]], reference: str, *, score: str, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[dict[tuple[str, str], Estimate], dict[tuple[str, str], Estimate]]:
    """(method, data) -> its scores, and -> its differences to the reference in the cases of draws that both have.

    Rows are as in ``arrange_scores``. All methods get the same resamples, data sets without a common subject
    independent ones.
    """
    own: dict[tuple[str, str], Estimate] = {}
    gains: dict[tuple[str, str], Estimate] = {}
    for number, scores in enumerate(arrange_scores(rows, score)):
        tables = scores.tables
        differences = {
            (method, data, task): table - tables[reference, data, task]
            for (method, data, task), table in tables.items()
            if method != reference and (reference, data, task) in tables
        }
        stack = np.stack([*tables.values(), *differences.values()])
        resampled = two_way_bootstrap(stack, scores.subjects, resamples=resamples, seed=[seed, number]).T
        sign = -1 if score in LOWER_IS_BETTER else 1
        own |= _over_tasks(scores, tables, resampled[: len(tables)], sign)
        gains |= _over_tasks(scores, differences, resampled[len(tables) :], sign)
    return own, gains


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over data sets, each counting alike; draws are those that all of them have."""
    draws = reduce(lambda common, e: [d for d in common if d in e.of_draw], estimates[1:], list(estimates[0].of_draw))
    return Estimate(
        fmean(e.mean for e in estimates),
        np.mean([e.resampled for e in estimates], axis=0),
        {draw: fmean(e.of_draw[draw] for e in estimates) for draw in draws},
        frozenset().union(*(e.cases for e in estimates)),
        fmean(e.superiority for e in estimates),
    )


def arrange_scores(rows: Iterable[Mapping[str, Any]], score: str) -> list[Scores]:
    """Rows of one ``n_shot`` as tables: one ``Scores`` for the data sets that share subjects, one for each other set.

    Subjects of the same name are the same, and their cases of the same name too, in whatever data set they are.

    Args:
        rows: keys ``data method draw task case subject`` and the score.
        score: which of their numbers; NaN is none.

    Raises:
        ValueError: a case of a draw is there twice.
    """
    rows = list(rows)
    subjects_of: dict[str, set[Hashable]] = {}
    for row in rows:
        subjects_of.setdefault(row["data"], set()).add(row["subject"])
    return [_arrange([row for row in rows if row["data"] in group], score) for group in _sharing(subjects_of)]


def two_way_bootstrap(
    tables: np.ndarray, subjects: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """Means (resamples, N) of N tables (N, draws, cases) with draws and subjects drawn again, both with replacement.

    A subject comes with all of its cases, and all tables get the same draws and subjects, so that a table of paired
    differences can be one of them. What is NaN is left out: a mean is the sum over the count of what was drawn, exact
    with missing cells. It is NaN where nothing known was drawn. Source: Owen 2007, "The pigeonhole bootstrap".

    scipy.stats.bootstrap and those of other libraries draw along one axis.

    Args:
        tables: scores, or differences of scores of the same case in the same draw.
        subjects: of each case.
        resamples: number of times that is done.
        seed: of the drawing; data sets that share no subject need different ones.
    """
    number_of = {subject: n for n, subject in enumerate(dict.fromkeys(subjects))}
    own = np.zeros((len(subjects), len(number_of)))  # (cases, subjects), 1 where the case is the subject's
    own[np.arange(len(subjects)), [number_of[subject] for subject in subjects]] = 1
    known = ~np.isnan(tables)
    sums = np.where(known, tables, 0) @ own  # (N, draws, subjects)
    counts, same = np.unique(known @ own, axis=0, return_inverse=True)  # most tables lack the same cases
    _, draws, _ = tables.shape
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        draw_weights = rng.multinomial(draws, np.full(draws, 1 / draws), size).astype(float)
        subject_weights = rng.multinomial(own.shape[1], np.full(own.shape[1], 1 / own.shape[1]), size).astype(float)
        total, count = (
            np.stack([np.einsum("rs,rs->r", draw_weights @ table, subject_weights) for table in stack], axis=1)
            for stack in (sums, counts)
        )
        with np.errstate(invalid="ignore"):  # 0 / 0: nothing known was drawn
            means.append(total / count[:, same.ravel()])
    return np.concatenate(means)


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled means (resamples,); those that are NaN are left out, NaN if all are."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.percentile(known, INTERVAL) if known.size else (np.nan, np.nan)
    return float(low), float(high)


def p_value(resampled: np.ndarray) -> float:
    """Two-sided p of a mean difference of 0, from its resampled means (R,): min(1, 2 (1 + c) / (1 + R)).

    c is the number of resampled means on the rarer side of 0, those at 0 counting for both sides. So p < 0.05 where the
    percentile interval excludes 0, but for rounding; the smallest p is 2 / (1 + R), never 0; of methods that are equal
    in every case it is 1. NaN if all are NaN.
    """
    resampled = resampled[~np.isnan(resampled)]
    if not resampled.size:
        return float("nan")
    rarer = min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))
    return min(1.0, 2 * (1 + rarer) / (1 + len(resampled)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in their own order; NaN is no comparison. Source: Holm 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p == p)
    corrected, largest = [float("nan")] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected


def superiority(differences: np.ndarray) -> float:
    """P(A > B): share of the known differences A - B that are above 0, ties counting one half; NaN without one."""
    known = differences[~np.isnan(differences)]
    return float(np.mean((known > 0) + 0.5 * (known == 0))) if known.size else float("nan")


def few_draws_warning(draws: int) -> str | None:
    """What to say of fewer than ``ENOUGH_DRAWS`` draws; None of more."""
    if draws >= ENOUGH_DRAWS:
        return None
    if draws < 2:
        return f"{draws} draw: how much the choice of supports matters is unknown, no interval; ask for {ENOUGH_DRAWS}."
    smallest = 2.0 ** (1 - draws)  # all differences of one sign
    wilcoxon = f" A Wilcoxon test over {draws} draws cannot go below p = {smallest:.3g}." if smallest > 0.05 else ""
    return (
        f"{draws} draws, fewer than {ENOUGH_DRAWS}: intervals are too narrow. Of two equal methods, 3 draws call one "
        f"better in about 11 of 100 experiments, {ENOUGH_DRAWS} draws in the 5 that are promised.{wilcoxon}"
    )


def _sharing(subjects_of: Mapping[str, set[Hashable]]) -> list[set[str]]:
    """Names grouped so that two with a common subject are in one group."""
    groups: list[tuple[set[str], set[Hashable]]] = []
    for name, subjects in subjects_of.items():
        names, union = {name}, set(subjects)
        for group in [group for group in groups if group[1] & union]:
            groups.remove(group)
            names, union = group[0] | names, group[1] | union
        groups.append((names, union))
    return [names for names, _ in groups]


def _arrange(rows: Sequence[Mapping[str, Any]], score: str) -> Scores:
    draws = sorted({row["draw"] for row in rows})
    cases = list(dict.fromkeys((row["subject"], row["case"]) for row in rows))
    row_of, column_of = ({key: n for n, key in enumerate(keys)} for keys in (draws, cases))
    tables: dict[tuple[str, str, str], np.ndarray] = {}
    seen = set()
    for row in rows:
        key = row["method"], row["data"], row["task"]
        place = row_of[row["draw"]], column_of[row["subject"], row["case"]]
        if (key, place) in seen:
            raise ValueError(
                f"rows: {row['method']} on {row['data']}, draw {row['draw']}: a case is there twice; keep one row each."
            )
        seen.add((key, place))
        tables.setdefault(key, np.full((len(draws), len(cases)), np.nan))[place] = row[score]
    return Scores(draws, cases, tables)


def _over_tasks(
    scores: Scores, tables: Mapping[tuple[str, str, str], np.ndarray], resampled: np.ndarray, sign: int
) -> dict[tuple[str, str], Estimate]:
    """The estimates of tables, resampled to (tables, resamples); a task without anything known stays out."""
    tasks_of: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for ((method, data, _), table), means in zip(tables.items(), resampled, strict=True):
        if not np.isnan(table).all():
            tasks_of.setdefault((method, data), []).append((table, means))
    return {key: _estimate(scores, tasks, sign) for key, tasks in tasks_of.items()}


def _estimate(scores: Scores, tasks: Sequence[tuple[np.ndarray, np.ndarray]], sign: int) -> Estimate:
    """The mean over tasks, each a table and its resampled means."""
    tables = np.stack([table for table, _ in tasks])
    known = ~np.isnan(tables)  # (tasks, draws, cases)
    sums, counts = np.where(known, tables, 0).sum(2), known.sum(2)
    enough = [_enough(scores, of_task) for of_task in known]
    return Estimate(
        float(np.mean(sums.sum(1) / counts.sum(1))),
        np.mean([m if e else np.full_like(m, np.nan) for (_, m), e in zip(tasks, enough, strict=True)], axis=0),
        {draw: float(np.mean(sums[:, n] / counts[:, n])) for n, draw in enumerate(scores.draws) if counts[:, n].all()},
        frozenset(scores.cases[n] for n in np.flatnonzero(known.any((0, 1)))),
        float(np.mean([superiority(sign * table) for table in tables])),
    )


def _enough(scores: Scores, known: np.ndarray) -> bool:
    """Whether two draws and two subjects are known (draws, cases): else there is nothing to draw from."""
    subjects = {scores.subjects[n] for n in np.flatnonzero(known.any(0))}
    return bool(known.any(1).sum() > 1 and len(subjects) > 1)
