"""What the documents say of tests, keys and files is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blosam_monai.parser import KEYS

ROOT = Path(__file__).resolve().parents[2]
GLOBS = ("*.md", "*/README.md", "docs/**/*.md", "bundles/**/*.md")
PAGES = sorted(page for glob in GLOBS for page in ROOT.glob(glob))


def test_every_row_of_differences_names_a_test_that_exists():
    lines = (ROOT / "docs/explanation/differences.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 20
    for row in rows:
        references = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert references, row
        for file, name in references:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_key_has_its_row_in_the_reference():
    text = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert set(KEYS) <= rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("mailto:"):
            assert (page.parent / link).exists(), link
