"""The bundle for organs in volumes as MONAI's own tools use it, on real volumes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from safetensors.torch import save_file

from blosam_monai.methods import BUNDLE as BLOSAM_BUNDLE
from blosam_monai.networks.volume_segmenter import VolumeSegmenter, check_roi, load_volume_segmenter

BUNDLE = BLOSAM_BUNDLE.parent / "arena"
CONFIGS = BUNDLE / "configs"
SMALL = {"roi_size": 64, "feature_size": 12, "crops": 1, "max_epochs": 2, "alternate": False, "use_mlflow": False}
CASES = ("hippocampus_001", "hippocampus_014", "hippocampus_038")


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
def given(real_data, tmp_path_factory) -> dict[str, str]:
    """Two volumes to train on and one to test, of MR: the window is of percentiles."""
    folder = tmp_path_factory.mktemp("arena")
    items = [
        {"image": f"imagesTr/{c}.nii.gz", "label": f"labelsTr/{c}.nii.gz", "subject": c, **more}
        for c, more in zip(CASES, ({"slice": 10}, {}, {}), strict=True)
    ]
    content = {
        "labels": {"background": 0, "hippocampus": [1, 2]},
        "slice_axis": "axial",
        "window": {"percentiles": [0.5, 99.5]},
        "lower": items[:1],
        "upper": items[1:2],
        "testing": items[2:],
    }
    (folder / "list.json").write_text(json.dumps(content))
    return {"dataset_dir": str(real_data / "msd_hippocampus"), "data_list": str(folder / "list.json")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights to start from, of another organ's network: they stand for a foundation model's."""
    path = tmp_path_factory.mktemp("weights") / "pretrained.safetensors"
    save_file(VolumeSegmenter(["liver", "spleen"], feature_size=12, seed=7).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(given, checkpoint, tmp_path_factory):
    """Output folder of a short training of ARENA."""
    output_dir = tmp_path_factory.mktemp("trained")
    run(["train.json"], "train", output_dir=str(output_dir), checkpoint=str(checkpoint), **given, **SMALL)
    return output_dir


def test_no_property_of_the_training_is_missing_or_misspelt(given, tmp_path):
    flow = workflow(["train.json"], "train", output_dir=str(tmp_path), **given, **SMALL)
    flow.initialize()
    assert flow.check_properties() == []


def test_no_property_of_the_inference_is_missing_or_misspelt(given, tmp_path):
    flow = workflow(
        ["inference.json"], "infer", dataset_dir=given["dataset_dir"] + "/imagesTr", output_dir=str(tmp_path)
    )
    flow.initialize()
    assert flow.check_properties() == []


def test_patches_hold_a_channel_for_each_task(given, tmp_path):
    two = json.loads(Path(given["data_list"]).read_text())
    two["labels"] = {"background": 0, "anterior": 1, "posterior": 2}
    (tmp_path / "list.json").write_text(json.dumps(two))
    options = {**SMALL, "crops": 2, "data_list": str(tmp_path / "list.json"), "dataset_dir": given["dataset_dir"]}
    flow = workflow(["train.json"], "train", output_dir=str(tmp_path / "out"), **options)
    flow.initialize()
    patches = flow.train_dataset[0]
    assert [patch["image"].shape for patch in patches] == [(1, 64, 64, 64)] * 2
    assert [patch["label"].shape for patch in patches] == [(2, 64, 64, 64)] * 2
    assert all(patch["label"].sum((1, 2, 3)).min() > 0 for patch in patches)  # the whole volume fits into a patch


def test_every_key_of_the_configs_is_read_somewhere():
    for name in ("train", "inference"):
        parser = ConfigParser.load_config_file(CONFIGS / f"{name}.json")
        text = json.dumps({key: value for key, value in parser.items() if key != "options"})
        read_by_monai = {
            "imports",
            "initialize",
            "run",
            "finalize",
            "bundle_root",
            "save_execute_config",
            "train",
            "report",
        }
        read_by_monai |= {"evaluator", "network_def", "network", "log_paths"}  # the last: by the tracker, from options
        assert [key for key in parser if f"@{key}" not in text and key not in read_by_monai] == []


@pytest.mark.slow
def test_it_trains_on_real_volumes_and_says_what_ranks_are_left(trained, checkpoint):
    settings = json.loads((trained / "summary.json").read_text())["settings"]
    assert len(settings["effective_ranks"]) == 8
    assert all(0 <= rank <= 16 for rank in settings["effective_ranks"].values())
    assert settings["method"] == "arena"
    assert settings["gate_penalty"] > 0
    assert settings["pretrained"] != "scratch"
    # Of feature size 12, decoder tuned: A and B 16 x 4 x 12 x (1 + 2 + 4 + 8) x 2 blocks, 8 x 16 gates; head 12 + 1.
    assert settings["parameters"]["adapter"] == 2 * 16 * 4 * 180 + 128
    assert settings["parameters"]["head"] == 13
    with open(trained / "cases.csv", newline="", encoding="utf-8") as file:
        assert [(row["case"], row["task"]) for row in csv.DictReader(file)] == [(c, "hippocampus") for c in CASES[:2]]
    with open(trained / "curves.csv", newline="", encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.slow
def test_only_what_was_trained_is_kept(trained):
    kept = (trained / "models" / "model.safetensors").stat().st_size
    assert kept < 1.1 * 4 * 1_250_000  # bytes of head, decoder and updates, of 4.1 million numbers in all


@pytest.mark.slow
def test_the_model_is_refused_on_other_weights(trained):
    from blosam_monai.networks.volume_segmenter import build_volume_segmenter, read_volume_settings

    settings = read_volume_settings(trained / "models" / "model.safetensors")
    with pytest.raises(ValueError, match="trained on weights"):
        build_volume_segmenter(settings)


@pytest.mark.slow
def test_it_scores_and_predicts_volumes_on_their_own_grid(trained, given, checkpoint, tmp_path):
    model = {"ckpt_dir": str(trained / "models"), "checkpoint": str(checkpoint)}
    run(
        ["inference.json", "evaluate.json"],
        "infer",
        output_dir=str(tmp_path / "scores"),
        use_mlflow=False,
        largest_component=True,
        **model,
        **given,
    )
    image = f"{given['dataset_dir']}/imagesTr/{CASES[2]}.nii.gz"
    run(["inference.json"], "infer", output_dir=str(tmp_path), dataset_dir=image, largest_component=True, **model)
    written = nibabel.load(tmp_path / f"{CASES[2]}.nii.gz")
    label = nibabel.load(image.replace("imagesTr", "labelsTr"))
    assert written.shape == label.shape
    np.testing.assert_allclose(written.affine, label.affine, atol=1e-5)
    pred, truth = np.asarray(written.dataobj) > 0, np.asarray(label.dataobj) > 0
    with open(tmp_path / "scores" / "cases.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["dice"]) == pytest.approx(2 * (pred & truth).sum() / (pred.sum() + truth.sum()))


# --- the network


@pytest.mark.slow
def test_the_network_takes_and_gives_what_the_metadata_says(tmp_path):
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    for part in ("inputs", "outputs"):  # the side of a patch is a key; 96 takes a minute here
        for tensor in meta["network_data_format"][part].values():
            tensor["spatial_shape"] = [64, 64, 64]
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(tmp_path / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        device="cpu",
        network_def={
            "_target_": "blosam_monai.networks.volume_segmenter.VolumeSegmenter",
            "tasks": ["organ"],
            "feature_size": 12,
        },
    )


def test_all_but_the_head_is_taken_from_a_checkpoint(checkpoint):
    network, other = (VolumeSegmenter(["organ"], feature_size=12, checkpoint=c) for c in (checkpoint, None))
    pretrained = VolumeSegmenter(["liver", "spleen"], feature_size=12, seed=7).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, (other.state_dict() if name.startswith("out.") else pretrained)[name]), name


def test_a_checkpoint_of_another_size_is_refused(checkpoint):
    with pytest.raises(ValueError, match="is not of this network"):
        VolumeSegmenter(["organ"], feature_size=24, checkpoint=checkpoint)


@pytest.mark.parametrize("side", [32, 80])
def test_patches_that_the_network_cannot_halve_five_times_are_refused(side):
    with pytest.raises(ValueError, match=f"roi_size: {side} voxels"):
        check_roi(side)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load_volume_segmenter(tmp_path / "none.safetensors", into=VolumeSegmenter(["organ"], feature_size=12))
