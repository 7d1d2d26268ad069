"""The bundle as MONAI's own tools use it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, load, verify_metadata, verify_net_in_out
from PIL import Image

from blosam_monai.methods import BUNDLE
from blosam_monai.networks.adapters import export_model_pt, load_network

CONFIGS = BUNDLE / "configs"


def workflow(files, kind, **overrides) -> ConfigWorkflow:
    paths = [str(CONFIGS / file) for file in files]
    return ConfigWorkflow(paths, workflow_type=kind, bundle_root=str(BUNDLE), logging_file=False, **overrides)


def run(files, kind, **overrides) -> ConfigWorkflow:
    flow = workflow(files, kind, **overrides)
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory) -> Path:
    """Output folder of a short training of two tasks."""
    output_dir = tmp_path_factory.mktemp("trained")
    run(
        ["train.json"],
        "train",
        dataset_dir=str(phantoms),
        data_list=str(phantoms / "list.json"),
        output_dir=str(output_dir),
        max_epochs=15,
        val_interval=5,
    )
    return output_dir


def test_no_property_of_the_training_is_missing_or_misspelt(phantoms, tmp_path):
    flow = workflow(
        ["train.json"],
        "train",
        dataset_dir=str(phantoms),
        data_list=str(phantoms / "list.json"),
        output_dir=str(tmp_path),
        use_mlflow=False,
    )
    flow.initialize()
    assert flow.check_properties() == []


@pytest.mark.parametrize("files", [["inference.json"], ["inference.json", "evaluate.json"]])
def test_no_property_of_the_inference_is_missing_or_misspelt(files, trained, phantoms, tmp_path):
    given = {"dataset_dir": str(phantoms / "images")}
    if files[1:]:
        given = {"dataset_dir": str(phantoms), "data_list": str(phantoms / "list.json"), "use_mlflow": False}
    flow = workflow(files, "infer", output_dir=str(tmp_path), ckpt_dir=str(trained / "models"), **given)
    flow.initialize()
    assert flow.check_properties() == []


def test_metadata_has_the_keys_that_the_model_zoo_asks_for(tmp_path):
    required = [
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
        *("task", "description", "authors", "copyright", "network_data_format"),
    ]
    tensor = {"required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"]}
    schema = {
        "type": "object",
        "required": required,
        "properties": {
            "required_packages_version": {"type": "object"},
            "network_data_format": {
                "required": ["inputs", "outputs"],
                "properties": {
                    "inputs": {"required": ["image"], "properties": {"image": tensor}},
                    "outputs": {"required": ["pred"], "properties": {"pred": tensor}},
                },
            },
        },
    }
    file = tmp_path / "schema.json"  # a schema that is there is not downloaded
    file.write_text(json.dumps(schema))
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(file), hash_val=digest)
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert meta["version"] in meta["changelog"]
    assert meta["schema"].endswith("meta_schema_20240725.json")


def test_the_network_takes_and_gives_what_the_metadata_says():
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        device="cpu",
    )


def test_training_tells_lung_and_heart_of_unseen_films_apart(trained, phantoms, tmp_path):
    run(
        ["inference.json", "evaluate.json"],
        "infer",
        dataset_dir=str(phantoms),
        data_list=str(phantoms / "list.json"),
        ckpt_dir=str(trained / "models"),
        output_dir=str(tmp_path / "scores"),
        use_mlflow=False,
    )
    scores = json.loads((tmp_path / "scores" / "summary.json").read_text())["scores"]["testing"]
    tests = json.loads((phantoms / "list.json").read_text())["testing"]
    labels = [np.asarray(Image.open(phantoms / item["label"])) for item in tests]
    for task, value in (("lung", 1), ("heart", 2)):
        shares = np.array([(label == value).mean() for label in labels])
        everything = (2 * shares / (1 + shares)).mean()  # Dice of calling all of it foreground
        assert scores[task]["dice_mean"] > 2 * everything, task
        assert scores[task]["cases"] == 4
    assert (tmp_path / "scores" / "cases.csv").read_text().count("\n") == 1 + 4 * 2


def test_inference_writes_upright_masks_of_native_size_with_the_values_of_the_list(trained, phantoms, tmp_path):
    run(
        ["inference.json"],
        "infer",
        dataset_dir=str(phantoms / "images"),
        ckpt_dir=str(trained / "models"),
        output_dir=str(tmp_path),
    )
    names = sorted(p.stem for p in (phantoms / "images").iterdir())
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == names
    overlap = []
    for name in names:
        mask = np.asarray(Image.open(tmp_path / f"{name}.png"))
        label = np.asarray(Image.open(phantoms / "labels" / f"{name}.png"))
        assert mask.shape == label.shape == (224, 288)
        assert set(np.unique(mask)) <= {0, 1, 2}
        overlap.append([(mask == label).mean(), (mask[:, ::-1] == label).mean(), (mask[::-1] == label).mean()])
    upright, mirrored, upside_down = np.mean(overlap, axis=0)
    assert upright > max(mirrored, upside_down)


def test_load_gives_the_trained_network(trained, tmp_path):
    bundle = tmp_path / "blosam"
    shutil.copytree(BUNDLE, bundle)
    shutil.copy(trained / "models" / "model.safetensors", bundle / "models")
    expected = load_network(bundle / "models" / "model.safetensors")
    export_model_pt(bundle / "models" / "model.pt", expected)
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"bundle_root": str(bundle)}))
    network = load("blosam", bundle_dir=str(tmp_path), workflow_type="inference", device="cpu", args_file=str(args))
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(network(image), expected(image))


@pytest.mark.slow
def test_it_runs_from_a_foreign_folder_with_tracking_by_monai(phantoms, tmp_path):
    """As a user would: `python -m monai.bundle run ... --tracking mlflow`; MONAI's handler and ours share one run."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "train.json")]
    command += [
        "--bundle_root",
        str(BUNDLE),
        "--dataset_dir",
        str(phantoms),
        "--data_list",
        str(phantoms / "list.json"),
    ]
    command += ["--output_dir", f"$'{out}'", "--max_epochs", "2", "--tracking", "mlflow"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out / 'mlruns.db'}")
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert {"train_loss", "loss", "upper_loss", "val_dice/lung"} <= runs[0].data.metrics.keys()
    assert (out / "models" / "model.safetensors").is_file()
    kept = [path for path in (out / "mlruns").rglob("*") if path.suffix in (".json", ".csv")]
    assert kept
    for path in kept:
        assert str(phantoms) not in path.read_text(), path
