"""The README's commands run as they stand, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_every_bash_block_runs_in_order(tmp_path):
    script = "set -e\n" + "\n".join(blocks("bash"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]


def test_the_python_example_runs_and_its_shapes_are_true():
    """Every line that ends in a shape comment is checked against what the line made."""
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    claims = re.findall(r"^(\w+) = .*#\s*\((\d[\d, ]*)\)", example, re.MULTILINE)
    assert claims
    for name, shape in claims:
        assert tuple(names[name].shape) == tuple(int(n) for n in shape.split(",")), name


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))
def test_every_link_of_the_readme_leads_somewhere(link):
    assert (README.parent / link).exists()
