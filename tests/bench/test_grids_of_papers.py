"""The grids of ``benchmarks/grids`` are sound, and between them hold every cell that a paper's table asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blosam_monai.bench.grid import load_grid
from blosam_monai.bench.paper_tables import paper_table, paper_tables

ROOT = Path(__file__).resolve().parents[2]
GRIDS = sorted((ROOT / "benchmarks" / "grids").glob("*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which every recipe finds its own folders, and a file in the place of ResNet-50's weights."""
    path = tmp_path_factory.mktemp("data")
    for name in ("images", "labels", "masks", "imagesTr", "labelsTr"):
        (path / name).mkdir()
    (path / "resnet50.pth").touch()
    return path


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def load(path, folder):
    data = [entry["name"] for entry in json.loads(path.read_text())["data"]]
    return load_grid(path, dataset_dirs=dict.fromkeys(data, str(folder)))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_of_a_paper_is_sound_and_named_as_its_file(path, folder):
    grid = load(path, folder)
    assert grid.name == path.stem
    assert grid.reference == ("random weights" if path.stem == "tiny_sam" else "blosam")
    # Fewer than 10 draws say little (docs/explanation/statistics.md); one grid shows that all methods run, no more.
    assert grid.draws == (1 if path.stem == "every_method" else 10)


@pytest.mark.parametrize("name", [name for name in paper_tables() if paper_table(name)["ours"]])
def test_every_cell_of_a_table_is_in_a_grid(name, folder):
    table = paper_table(name)
    asked = {(m, ours["data"], ours["n_shot"]) for m in table["methods"].values() for ours in table["ours"].values()}
    held = set()
    for grid in (load(path, folder) for path in GRIDS):
        held |= {(m.name, data.name, shots) for m in grid.methods for data in grid.data for shots in grid.shots}
    assert asked <= held


def test_the_grid_of_real_images_fits_them(real_data):
    folders = {"lungs": "lung_cxr", "teeth": "dental_panoramic", "polyps": "kvasir_seg_256"}
    path = ROOT / "benchmarks" / "grids" / "real_images.json"
    grid = load_grid(path, dataset_dirs={name: str(real_data / folder) for name, folder in folders.items()})
    assert len(grid.methods) == 12
    assert len(grid.data) * len(grid.shots) * grid.draws == 30
