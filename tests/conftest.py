"""Shared by all tests: one torch thread, no MLflow server, small networks, generated pictures."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ.pop("MLFLOW_TRACKING_URI", None)  # it would beat every store that a test names
_CACHE = tempfile.TemporaryDirectory(prefix="blosam_cache_")  # the user's own is not a test's business
os.environ["BLOSAM_CACHE"] = _CACHE.name
torch.set_num_threads(1)

REAL_DATA = Path(os.environ.get("BLOSAM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def tiny_sam():
    """The tiny SAM at 64 pixels, random weights: an embedding (128, 8, 8). Shared: tests must not change it."""
    from blosam_monai.networks.sam import build_sam

    return build_sam("tiny", 64, "random")


@pytest.fixture
def small_vit(monkeypatch) -> str:
    """Name of a ``sam_model`` built as Meta's are: 256 channels, of two blocks one with windows and one global."""
    return _offer_small_vit(monkeypatch)


@pytest.fixture(scope="session")
def small_sam():
    """``small_vit`` at 64 pixels, random weights: an embedding (256, 4, 4). Shared: tests must not change it."""
    from blosam_monai.networks.sam import build_sam

    with pytest.MonkeyPatch.context() as patch:
        return build_sam(_offer_small_vit(patch), 64, "random")


def _offer_small_vit(patch: pytest.MonkeyPatch) -> str:
    from blosam_monai.networks.sam import SAM_SIZES, SamSize

    patch.setitem(SAM_SIZES, "small_vit", SamSize(128, 2, 4, global_blocks=(1,)))
    return "small_vit"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real labelled images; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real images at {REAL_DATA}; set BLOSAM_TEST_DATA to their folder")
    return REAL_DATA


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Ten chest films with labels (lung 1, heart 2) and ``list.json``: 4 shots, 2 for validation, 4 for testing."""
    from blosam_monai.data.datalist import make_datalist, write_datalist
    from blosam_monai.data.pairing import pair_folders
    from blosam_monai.data.phantoms import PHANTOM_LABELS, write_chest_films

    folder = tmp_path_factory.mktemp("phantoms")
    write_chest_films(folder, 10)
    items = pair_folders(folder / "images", folder / "labels", folder)
    datalist = make_datalist(
        items, PHANTOM_LABELS, dataset_dir=folder, n_shot=4, seed=0, n_validation=2, name="phantoms"
    )
    write_datalist(folder / "list.json", datalist)
    return folder
