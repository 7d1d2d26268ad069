"""A finished grid as tables: each method on each data set, with what the numbers are worth; beside a paper's numbers.

How they are reckoned and what they mean: docs/explanation/statistics.md.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from blosam_monai.bench.statistics import (
    LOWER_IS_BETTER,
    RESAMPLES,
    Estimate,
    estimate_methods,
    few_draws_warning,
    holm,
    mean_estimate,
    p_value,
    percentile_interval,
)
from blosam_monai.files import PathLike, atomic
from blosam_monai.networks.sam import SAM_FILES, TINY_SHA256

ALL_SETS = "all sets"
NOT_RUN = "not run"
NOT_KNOWN = "n/a"  # in tables to read; "nan" in CSV
ALPHA = 0.05  # of a corrected p, for a mean in bold
TABLES = ("table.md", "table.tex", "table.csv")
SCORE_NAMES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (mm or pixels)", "nsd": "NSD"}
RESEARCH = "Research use only."
_ORACLE = "(oracle)"
_OF_CELLS = ("seconds", "trained_parameters", "total_parameters")
_OF_GAINS = ("difference", "difference_low", "difference_high", "p", "p_holm", "superiority")
_COLUMNS = (
    *("method", "draws", "cases", "mean", "SD", "95 % interval", "difference", "95 % interval", "p (Holm)", "P(A>B)"),
    *("training (s)", "trained parameters"),
)
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}
_NUMBERS = ("draws", "cases", "mean", "sd", "low", "high", *_OF_GAINS, *_OF_CELLS)


def summarise_grid(
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    reference: str,
    *,
    planned: Iterable[Mapping[str, Any]] = (),
    score: str = "dice",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each data set, ``n_shot`` and method, and for ``ALL_SETS`` of an ``n_shot`` that has several.

    What is not known is None:

    =============================== ==============================================================================
    ``data n_shot method``          as given; an oracle's name with "(oracle)"
    ``run oracle reference``        whether it was; whether it is prompted with the label; the reference's name
    ``draws cases``                 draws that were run; different test cases, over all draws
    ``mean sd low high``            mean over tasks; SD of the means of draws; 95 % two-way bootstrap interval
    ``difference``                  to the reference, over the cases of draws that both have
    ``difference_low .._high``      its interval
    ``p p_holm comparisons``        two-sided; corrected for all comparisons of the grid; how many these are
    ``superiority``                 P(A>B): share of the cases of draws scored better than the reference's
    ``seconds .._parameters``       means over cells
    ``sam_weights``                 of the cells, each once
    ``score resamples``             as asked for
    =============================== ==============================================================================

    Of ``ALL_SETS`` each set counts alike; ``draws`` are those that all sets have, and ``sd`` is of a draw's mean over
    sets. A method that lacks one of the sets was not run there. Intervals need two draws and two subjects.

    Args:
        rows: one for each cell, case and task: ``data n_shot method draw task case subject oracle`` and scores.
        cells: those that finished: ``data n_shot method draw seconds trained_parameters total_parameters sam_weights``.
        reference: method that the others are compared with, named as in ``rows``.
        planned: the grid's cells, ``data n_shot method`` and, of an oracle, ``oracle``: shown even if not run, in
            their order.
        score: ``dice``, ``iou``, ``hd95`` or ``nsd``.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: the reference is not a method of the grid, or a case of a draw is there twice.
    """
    everything = [*planned, *cells, *rows]
    names = shown_names(everything)
    if reference not in names:
        raise ValueError(f"reference: {reference} is not a method of the grid; choose from {', '.join(names)}.")
    table = []
    for n_shot in sorted({entry["n_shot"] for entry in everything}):
        rows_of, cells_of = ([entry for entry in of if entry["n_shot"] == n_shot] for of in (rows, cells))
        own, gains = estimate_methods(rows_of, reference, score=score, resamples=resamples, seed=seed)
        sets = list(dict.fromkeys(entry["data"] for entry in everything if entry["n_shot"] == n_shot))
        blocks = {data: [data] for data in sets} | ({ALL_SETS: sets} if len(sets) > 1 else {})
        for (data, of), method in ((block, method) for block in blocks.items() for method in names):
            finished = [cell for cell in cells_of if cell["method"] == method and cell["data"] in of]
            row = {"data": data, "n_shot": n_shot, "method": names[method], "reference": names[reference]}
            row |= {"oracle": names[method].endswith(_ORACLE), "score": score, "resamples": resamples}
            table.append(row | _numbers(_over_sets(own, method, of), _over_sets(gains, method, of), finished))
    corrected = holm([math.nan if row["p"] is None else row["p"] for row in table])
    for row, p in zip(table, corrected, strict=True):
        row |= {"p_holm": _known(p), "comparisons": sum(p == p for p in corrected)}
    return table


def shown_names(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Method -> its name as shown, in their order: with "(oracle)" where an entry says that it is one."""
    entries = list(entries)
    oracles = {entry["method"] for entry in entries if entry.get("oracle")}
    methods = dict.fromkeys(entry["method"] for entry in entries)
    return {m: f"{m} {_ORACLE}" if m in oracles and not m.endswith(_ORACLE) else m for m in methods}


def caption(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know of a table: sentences."""
    first, run = table[0], [row for row in table if row["run"]]
    if not run:
        return [f"No cell has been run. {RESEARCH}"]
    draws = sorted({row["draws"] for row in run})
    sets = _listed(row["data"] for row in run if row["data"] != ALL_SETS)
    return [
        f"{SCORE_NAMES[first['score']]} of test cases: mean over draws and cases, then over tasks, then over data "
        f"sets; data: {sets}; {_listed(row['n_shot'] for row in run)} labelled images, "
        f"{draws[0] if len(draws) == 1 else f'{draws[0]} to {draws[-1]}'} draws of them; SD: of the means of draws.",
        f"Intervals: 95 %, percentile, two-way bootstrap over draws and subjects, {first['resamples']} resamples"
        f"{_smallest_p(first)}.",
        f"Differences: to {first['reference']}, over the same cases of the same draws; p: two-sided, from the same "
        f"bootstrap, Holm-corrected for {first['comparisons']} comparisons; P(A>B): share of cases of draws scored "
        "better than by the reference, ties one half.",
        f"Bold: better than {first['reference']}, corrected p < {ALPHA}. The others are not shown to be better than "
        "it, which does not show that they are equal; they are not compared with each other.",
        *_remarks(run),
        weights_line(weight for row in run for weight in row["sam_weights"]),
        RESEARCH,
    ]


def write_tables(folder: PathLike, table: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write ``TABLES``: Markdown, LaTeX (booktabs) and CSV; returns their paths."""
    paths = [Path(folder, name) for name in TABLES]
    for path, render in zip(paths, (as_markdown, as_latex, as_csv), strict=True):
        with atomic(path) as part:
            part.write_text(render(table), encoding="utf-8", newline="")
    return paths


def as_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """A table for each data set and ``n_shot``, then the caption."""
    parts = []
    for (data, n_shot), rows in _blocks(table):
        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *(_line(row, bold="**{}**") for row in rows)]
        body = "\n".join(_piped(line) for line in lines)
        parts.append(f"**{data}, {n_shot} shots**\n\n{body}")
    return "\n\n".join([*parts, "\n".join(caption(table))]) + "\n"


def as_latex(table: Sequence[Mapping[str, Any]]) -> str:
    """One table with a block for each data set and ``n_shot``; it needs the package booktabs."""
    lines = [
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape_latex(' '.join(caption(table)))}}}",
    ]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(_COLUMNS) - 1)}}}", r"\toprule", _ended(map(escape_latex, _COLUMNS))]
    for (data, n_shot), rows in _blocks(table):
        title = escape_latex(f"{data}, {n_shot} shots")
        lines += [r"\midrule", rf"\multicolumn{{{len(_COLUMNS)}}}{{l}}{{\textit{{{title}}}}} \\"]
        lines += [_ended(_line(row, bold=r"\textbf{{{}}}", escape=escape_latex)) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """All numbers, unrounded: "not run" of what was not, ``nan`` of what is not known."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(table[0]))
    writer.writeheader()
    for row in table:
        missing = math.nan if row["run"] else NOT_RUN
        weights = " ".join(row["sam_weights"]) or missing
        writer.writerow(
            {key: missing if value is None else value for key, value in row.items()} | {"sam_weights": weights}
        )
    return file.getvalue()


def compare_with_paper(
    table: Iterable[Mapping[str, Any]],
    paper: Mapping[str, Any],
    *,
    columns: Mapping[str, tuple[str, int]],
    methods: Mapping[str, str],
) -> str:
    """A paper's table in Markdown, our numbers under the paper's, method by method.

    Args:
        table: rows of ``summarise_grid``, of shares such as Dice: they are shown in %, as papers do.
        paper: ``title source unit columns rows notes``, see ``blosam_monai.bench.paper_tables``.
        columns: column of the paper -> our data set and ``n_shot``.
        methods: method of the paper -> ours, as in the grid.
    """
    found, shown, used = {}, {}, []
    for row in table:
        own = row["method"].removesuffix(f" {_ORACLE}")
        shown[own] = row["method"]
        if row["run"]:
            found[own, row["data"], row["n_shot"]] = row
    lines = [["method", "", *paper["columns"]], ["---"] * (2 + len(paper["columns"]))]
    for name, printed in paper["rows"].items():
        own = methods.get(name, "none")
        ours = [found.get((own, *columns.get(column, ()))) for column in paper["columns"]]
        used += [row for row in ours if row]
        lines.append([name, "paper", *(_as_printed(printed.get(column)) for column in paper["columns"])])
        lines.append(["", f"ours: {shown.get(own, own)}", *map(_as_ours, ours)])
    said = [
        f"Source: {paper['source']}: {paper['unit']}, mean ± SD as printed.",
        *paper["notes"],
        *(_ours_said(used) if used else [f"Ours: {NOT_RUN}."]),
        RESEARCH,
    ]
    return "\n".join([f"**{paper['title']}**", "", *map(_piped, lines), "", *said]) + "\n"


def _ours_said(used: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has to be known of our numbers beside a paper's."""
    draws = sorted({row["draws"] for row in used})
    return [
        f"Ours: {SCORE_NAMES[used[0]['score']]}, %, mean ± SD over {_listed(draws)} draws (95 % two-way bootstrap "
        "interval over draws and subjects).",
        weights_line(weight for row in used for weight in row["sam_weights"]),
    ]


def _as_printed(value: Sequence[float | None] | None) -> str:
    """Mean and SD of a paper."""
    if value is None:
        return "not available"
    mean, sd = value
    return str(mean) if sd is None else f"{mean} ± {sd}"


def _as_ours(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NOT_RUN
    mean, sd, low, high = (
        _number(None if row[key] is None else 100 * row[key], ".1f") for key in ("mean", "sd", "low", "high")
    )
    return f"{mean} ± {sd} ({_interval(low, high)})"


def escape_latex(text: str) -> str:
    r"""Text with what LaTeX would take for a command written out.

    >>> escape_latex("50 % of A_1 & B")
    '50 \\% of A\\_1 \\& B'
    """
    return "".join(_LATEX.get(character, character) for character in text)


def weights_line(weights: Iterable[str]) -> str:
    """Which SAM weights numbers were made with, and whether they may be held against a paper's."""
    published = {file.sha256: f"Meta's {model}" for model, file in SAM_FILES.items()}
    different = list(dict.fromkeys(weights))
    if not different:
        return "SAM weights: not known."
    names = {TINY_SHA256: "the tiny SAM of this package", "none": "none (networks without SAM)"} | published
    shown = [names.get(weight, f"{weight[:12]}..." if len(weight) == 64 else weight) for weight in different]
    line = f"SAM weights: {_listed(shown)}."
    if set(different) <= set(published):
        return line
    return f"{line} Tiny, random and scratch weights are NOT comparable with the tables of a paper."


def _numbers(own: Estimate | None, gain: Estimate | None, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of numbers of a row, and whether it was run."""
    numbers: dict[str, Any] = dict.fromkeys(_NUMBERS)
    if own is not None:
        low, high = map(_known, percentile_interval(own.resampled))
        numbers |= {"draws": len(own.of_draw), "cases": len(own.cases), "mean": own.mean, "sd": _known(own.sd)}
        numbers |= {"low": low, "high": high}
        numbers |= {key: fmean(cell[key] for cell in cells) if cells else None for key in _OF_CELLS}
    if gain is not None:
        low, high = map(_known, percentile_interval(gain.resampled))
        numbers |= {"difference": gain.mean, "difference_low": low, "difference_high": high}
        numbers |= {"p": _known(p_value(gain.resampled)), "superiority": gain.superiority}
    weights = {cell["sam_weights"] for cell in cells} if own is not None else set()
    return {"run": own is not None, **numbers, "sam_weights": sorted(weights)}


def _over_sets(estimates: Mapping[tuple[str, str], Estimate], method: str, sets: Sequence[str]) -> Estimate | None:
    """The mean over sets; None where one is missing."""
    found = [estimates[method, data] for data in sets if (method, data) in estimates]
    return mean_estimate(found) if len(found) == len(sets) else None


def _remarks(run: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be said of some tables only."""
    draws = {row["draws"] for row in run}
    warning = few_draws_warning(min(draws))
    said = [f"Warning: {warning}"] if warning else []
    if len(draws) > 1:
        said.append("Rows differ in their draws: means of different draws are of different supports.")
    if any(row["oracle"] for row in run):
        said.append(f"{_ORACLE}: prompted with the label of the test case; it shows what a perfect prompt is worth.")
    return said


def _smallest_p(row: Mapping[str, Any]) -> str:
    """What the resamples do to p."""
    smallest = min(1.0, 2 / (1 + row["resamples"]) * row["comparisons"])
    return f", with which the smallest corrected p is {smallest:.2g}" if smallest else ""


def _listed(values: Iterable[Any]) -> str:
    """Each value once, with commas."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _blocks(table: Iterable[Mapping[str, Any]]) -> list[tuple[tuple[str, int], list[Mapping[str, Any]]]]:
    return [(key, list(rows)) for key, rows in groupby(table, key=lambda row: (row["data"], row["n_shot"]))]


def _line(row: Mapping[str, Any], *, bold: str, escape: Callable[[str], str] = str) -> list[str]:
    """The cells of a row as text; ``bold``: how it is marked."""
    if not row["run"]:
        return [escape(text) for text in (row["method"], *[NOT_RUN] * (len(_COLUMNS) - 1))]
    digits = 1 if row["score"] == "hd95" else 3
    mean, sd, low, high = (_number(row[key], f".{digits}f") for key in ("mean", "sd", "low", "high"))
    if row["method"] == row["reference"]:
        compared = ["reference"] * 4
    else:
        gain, gain_low, gain_high = (_number(row[key], f"+.{digits}f") for key in _OF_GAINS[:3])
        p = "< 0.001" if row["p_holm"] is not None and row["p_holm"] < 0.001 else _number(row["p_holm"], ".3f")
        compared = [gain, _interval(gain_low, gain_high), p, _number(row["superiority"], ".2f")]
    counts = [row["method"], str(row["draws"]), str(row["cases"])]
    cost = [_number(row["seconds"], ".1f"), _number(row["trained_parameters"], ",.0f").replace(",", " ")]
    marked = bold.format(escape(mean)) if is_better(row) else escape(mean)
    return [*map(escape, counts), marked, *map(escape, [sd, _interval(low, high), *compared, *cost])]


def is_better(row: Mapping[str, Any]) -> bool:
    """Whether a method is shown to be better than the reference; an oracle, which sees the label, never is."""
    if row["oracle"] or row["p_holm"] is None or row["p_holm"] >= ALPHA:
        return False
    return (row["difference"] < 0) == (row["score"] in LOWER_IS_BETTER)


def _number(number: float | None, form: str) -> str:
    return NOT_KNOWN if number is None else format(number, form)


def _interval(low: str, high: str) -> str:
    return low if low == NOT_KNOWN else f"{low} to {high}"


def _piped(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _ended(cells: Iterable[str]) -> str:
    """A line of a LaTeX table."""
    return rf"{' & '.join(cells)} \\"
