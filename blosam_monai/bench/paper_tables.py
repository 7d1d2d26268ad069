"""The numbers of the papers' tables, as data, and ours beside them.

A table is a JSON file of ``papers/``:

============ ==========================================================================================================
``title``    of the table, with its number where we know it
``source``   of its numbers
``unit``     of its numbers, as ``Dice, %``
``columns``  as the paper has them
``rows``     method of the paper -> column -> [mean, SD]; an SD that is not given is null, a number that is not
             available to us is null
``ours``     column -> ``data``, the name of a recipe of ``data_lists/``, and ``n_shot``: what a grid has to hold;
             empty where a table is not of data lists
``methods``  method of the paper -> our preset that comes nearest
``notes``    misprints, and in which way ours differs
============ ==========================================================================================================
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blosam_monai.files import PathLike, atomic

PAPERS = "papers.md"
_FOLDER = Path(__file__).resolve().parent / "papers"


def paper_tables() -> list[str]:
    """Names of the tables there are, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def paper_table(name: str) -> dict[str, Any]:
    """A table; see the module for its keys.

    >>> paper_table("blo_sam_medical")["rows"]["BLO-SAM"]["lungs, 2 shots"]
    [87.1, 0.3]

    Raises:
        ValueError: no such table.
    """
    known = paper_tables()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"table: no {name!r}; {f'did you mean {near[0]}?' if near else 'choose from ' + str(known)}")
    content: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def beside_papers(table: Iterable[Mapping[str, Any]]) -> str:
    """The papers' tables in which our numbers have a place, ours under the paper's, in Markdown; else nothing.

    Args:
        table: rows of ``blosam_monai.bench.tables.summarise_grid``; data sets are named as their recipes.
    """
    from blosam_monai.bench.tables import compare_with_paper

    table = list(table)
    run = {(row["data"], row["n_shot"]) for row in table if row["run"]}
    parts = []
    for name in paper_tables():
        paper = paper_table(name)
        columns = {column: (ours["data"], ours["n_shot"]) for column, ours in paper["ours"].items()}
        if run & set(columns.values()):
            parts.append(compare_with_paper(table, paper, columns=columns, methods=paper["methods"]))
    return "\n".join(parts)


def write_beside_papers(folder: PathLike, table: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Write ``PAPERS``, see ``beside_papers``, or remove it where no table has a place for ours; returns its path."""
    path, text = Path(folder, PAPERS), beside_papers(table)
    if not text:
        path.unlink(missing_ok=True)
        return []
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return [path]
