"""The README's commands run as they stand, in order, in an empty folder; `make` and `pip` are what CI itself runs."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory) -> Path:
    """The folder in which every ``bash`` block has run; the bundle command finds ``bundles`` as in a checkout."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "bundles").symlink_to(ROOT / "bundles")
    script = "set -e\n" + "\n".join(blocks("bash"))
    result = subprocess.run(["bash", "-c", script], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_commands_leave_a_model_scores_masks_and_a_report(after_the_readme):
    assert (after_the_readme / "my_run" / "models" / "model.safetensors").is_file()
    assert (after_the_readme / "my_scores" / "cases.csv").is_file()
    assert len(list((after_the_readme / "my_masks").glob("*.png"))) == 16
    assert (after_the_readme / "my_run" / "report.html").is_file()
    assert (after_the_readme / "bundle_run" / "models" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_leave_another_methods_model_and_a_table_of_three(after_the_readme):
    assert (after_the_readme / "my_linear_probe" / "models" / "model.safetensors").is_file()
    with (after_the_readme / "study" / "table.csv").open(newline="", encoding="utf-8") as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    assert methods == {"blosam", "joint", "linear_probe"}


@pytest.mark.slow
def test_mlflow_ui_shows_the_runs_of_the_demo(after_the_readme):
    (command,) = [
        line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines() if "mlflow" in line
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=after_the_readme,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        body = json.dumps({"experiment_ids": ["1"], "max_results": 10}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"}
        )
        runs = json.loads(_ask(request, seconds=60))["runs"]
    finally:
        os.killpg(server.pid, 15)
        server.wait(10)
    assert sorted(run["info"]["run_name"].split("_")[0] for run in runs) == ["blosam", "evaluate", "evaluate", "joint"]


def test_the_python_example_runs_and_its_shapes_are_true():
    """Every line that ends in a shape comment is checked against what the line made."""
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    claims = re.findall(r"^(\w+) = .*#\s*\((\d[\d, ]*)\)", example, re.MULTILINE)
    assert claims
    for name, shape in claims:
        assert tuple(names[name].shape) == tuple(int(n) for n in shape.split(",")), name


def _ask(request: urllib.request.Request, *, seconds: float) -> bytes:
    """The answer of a server that may still be starting."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.read()
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
