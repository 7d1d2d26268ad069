"""What MLflow keeps of a run, how runs end, and what never gets there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ignite.engine import Events
from mlflow import MlflowClient
from monai.bundle import ConfigWorkflow

from blosam_monai.methods import BUNDLE
from blosam_monai.networks.sam import TINY_SHA256


def train(phantoms: Path, output_dir: Path, store: Path, crash_at: int | None = None, **overrides) -> None:
    files = ["train.json", f"methods/{overrides.get('method', 'blosam')}.json"]
    flow = ConfigWorkflow(
        [str(BUNDLE / "configs" / file) for file in files],
        workflow_type="train",
        bundle_root=str(BUNDLE),
        logging_file=False,
        dataset_dir=str(phantoms),
        output_dir=str(output_dir),
        tracking_uri=f"sqlite:///{store}",
        **{"data_list": str(phantoms / "list.json"), "max_epochs": 2, "val_interval": 1, "image_size": 64, **overrides},
    )
    flow.initialize()
    if crash_at is not None:

        def crash(engine):
            if engine.state.epoch == crash_at:
                raise RuntimeError("power cut")

        flow.trainer.add_event_handler(Events.EPOCH_STARTED, crash)
    flow.run()
    flow.finalize()


def runs(store: Path) -> dict:
    client = MlflowClient(f"sqlite:///{store}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "blosam"]
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def tracked(phantoms, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs in one store: first order with seed 0, joint with seed 1. The first one's folder, and the store."""
    folder = tmp_path_factory.mktemp("tracked")
    train(phantoms, folder / "a", folder / "store.db", run_name="first")
    train(phantoms, folder / "b", folder / "store.db", run_name="first", method="joint", seed=1)
    return folder / "a", folder / "store.db"


def test_a_name_that_is_taken_gets_a_number_and_both_runs_finish(tracked):
    found = runs(tracked[1])
    assert sorted(found) == ["first", "first-2"]
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_two_runs_compare_by_method_shots_seed_and_draw(tracked):
    found = runs(tracked[1])
    keys = ("method", "n_shot", "seed", "draw", "sam_weights", "max_epochs")
    assert [found["first"].data.params[k] for k in keys] == ["blosam", "4", "0", "0", TINY_SHA256, "2"]
    assert [found["first-2"].data.params[k] for k in keys] == ["joint", "4", "1", "0", TINY_SHA256, "2"]


def test_both_levels_and_every_task_have_their_curves(tracked):
    _, store = tracked
    client, run = MlflowClient(f"sqlite:///{store}"), runs(store)["first"]
    steps = {k: [m.step for m in client.get_metric_history(run.info.run_id, k)] for k in run.data.metrics}
    for name in ("loss", "upper_loss", "lr_lower", "lr_upper", "prompt_norm", "hypergradient_norm"):
        assert steps[name] == [1, 2, 3, 4], name  # two epochs of two images
    assert len(run.data.params["supports"].split(",")) == 4
    assert steps["train_mean_dice"] == [1, 2]
    for task in ("lung", "heart"):
        assert steps[f"train_dice/{task}"] == [1, 2]
        assert steps[f"val_dice/{task}"] == [0, 1, 2]  # 0: before the first step
    rates = [m.value for m in client.get_metric_history(run.info.run_id, "lr_upper")]
    assert rates == pytest.approx([0.005 * (1 - i / 4) ** 0.9 for i in (0, 1, 2, 3)], abs=1e-9)


def test_joint_training_has_no_upper_loss(tracked):
    assert "upper_loss" not in runs(tracked[1])["first-2"].data.metrics


def test_the_artifacts_name_no_file_and_no_subject(tracked):
    output_dir, store = tracked
    (record,) = [p.parent for p in store.parent.rglob("artifacts/cases.csv") if _method(p.parent) == "blosam"]
    names = {str(p.relative_to(record)) for p in record.rglob("*") if p.is_file()}
    assert {
        "model.safetensors",
        "model.json",
        "options.json",
        "train.json",
        "data_list.json",
        "cases.csv",
        "summary.json",
    } <= names
    assert len([name for name in names if name.startswith("overlays/")]) == 6  # 4 supports, 2 for validation
    for path in record.rglob("*"):
        assert "phantom" not in path.name
        if path.suffix in (".json", ".csv"):
            assert "phantom_0" not in path.read_text(), path.name
    assert "\nphantom_0" in (output_dir / "cases.csv").read_text()  # the user's own table has the names


def test_log_paths_lets_the_names_in(phantoms, tmp_path):
    train(phantoms, tmp_path / "a", tmp_path / "store.db", max_epochs=1, log_paths=True)
    (table,) = tmp_path.rglob("artifacts/cases.csv")
    assert "phantom_0" in table.read_text()
    assert json.loads((table.parent / "data_list.json").read_text())["lower"][0]["image"].startswith("images/phantom_")


def test_a_crash_ends_the_run_as_failed_and_resume_goes_on_with_it(phantoms, tmp_path):
    store = tmp_path / "store.db"
    with pytest.raises(RuntimeError, match="train::trainer") as error:
        train(phantoms, tmp_path / "a", store, crash_at=2, run_name="one")
    assert str(error.value.__cause__) == "power cut"
    assert runs(store)["one"].info.status == "FAILED"
    train(phantoms, tmp_path / "a", store, run_name="two", resume=True)
    found = runs(store)
    assert list(found) == ["one"]
    assert found["one"].info.status == "FINISHED"
    history = MlflowClient(f"sqlite:///{store}").get_metric_history(found["one"].info.run_id, "loss")
    assert [m.step for m in history] == [1, 2, 3, 4]


def test_a_run_that_was_killed_between_saves_has_every_step_once(phantoms, tmp_path):
    store = tmp_path / "store.db"
    settings = {"max_epochs": 4, "val_interval": 3, "run_name": "one"}
    with pytest.raises(RuntimeError, match="train::trainer"):
        train(phantoms, tmp_path / "a", store, crash_at=4, **{**settings, "max_epochs": 4})
    train(phantoms, tmp_path / "a", store, resume=True, **settings)
    client, run = MlflowClient(f"sqlite:///{store}"), runs(store)["one"]
    for name, count in (("loss", 8), ("lr_lower", 8), ("train_dice/lung", 4)):
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert steps == list(range(1, count + 1)), name


def test_tracking_may_begin_with_a_resume(phantoms, tmp_path):
    store = tmp_path / "store.db"
    with pytest.raises(RuntimeError, match="train::trainer"):
        train(phantoms, tmp_path / "a", store, crash_at=2, use_mlflow=False)
    train(phantoms, tmp_path / "a", store, resume=True, run_name="late")
    assert runs(store)["late"].info.status == "FINISHED"


def test_a_task_may_have_a_name_that_mlflow_does_not_allow(phantoms, tmp_path):
    content = json.loads((phantoms / "list.json").read_text())
    content["labels"] = {"background": 0, "lung (L+R)": 1}
    for section in ("lower", "upper", "validation", "testing"):
        for item in content[section]:
            item |= {key: str(phantoms / item[key]) for key in ("image", "label")}
    content["labels"]["heart"] = 2
    content["testing"].append("images/unlabelled.png")  # as the Decathlon writes them
    content["validation"] = content["validation"] or None
    (tmp_path / "list.json").write_text(json.dumps(content))
    train(phantoms, tmp_path / "a", tmp_path / "store.db", data_list=str(tmp_path / "list.json"), run_name="one")
    assert "val_dice/lung _L_R_" in runs(tmp_path / "store.db")["one"].data.metrics


def test_an_explicit_store_beats_the_environment(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    train(phantoms, tmp_path / "a", tmp_path / "store.db", max_epochs=1, run_name="one")
    assert list(runs(tmp_path / "store.db")) == ["one"]
    assert not (tmp_path / "other.db").exists()


def test_the_adapters_are_kept_wherever_ckpt_dir_is_and_overlays_only_if_wanted(phantoms, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    train(phantoms, tmp_path / "a", tmp_path / "store.db", max_epochs=1, ckpt_dir=elsewhere, overlays=False)
    (table,) = tmp_path.rglob("artifacts/cases.csv")
    assert (table.parent / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("overlays/*.png"))


@pytest.mark.slow
def test_nothing_is_told_to_anybody_also_when_monai_came_first():
    """In a fresh process without the variables by which MLflow knows a test."""
    code = (
        "import monai.bundle, blosam_monai.transforms\n"
        "from mlflow.telemetry.client import get_telemetry_client\n"
        "assert get_telemetry_client() is None"
    )
    told = ("CI", "PYTEST", "MLFLOW", "DO_NOT_TRACK", "GITHUB")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=kept)


def _method(record: Path) -> str:
    return json.loads((record / "options.json").read_text())["method"]
