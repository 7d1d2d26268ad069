"""The bundle of few-shot heads as MONAI's own tools use it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from ignite.engine import Events
from monai.bundle import ConfigWorkflow, verify_metadata
from PIL import Image
from safetensors import safe_open

from blosam_monai.data.pairing import pair_folders
from blosam_monai.data.phantoms import PHANTOM_LABELS, write_chest_films

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "biopt"
CONFIGS = BUNDLE / "configs"
FAST = {"image_size": 64, "use_mlflow": False}


def workflow(file, kind, **overrides) -> ConfigWorkflow:
    path = str(CONFIGS / file)
    return ConfigWorkflow(path, workflow_type=kind, bundle_root=str(BUNDLE), logging_file=False, **overrides)


def run(file, kind, **overrides) -> ConfigWorkflow:
    flow = workflow(file, kind, **overrides)
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, str]:
    """Eight chest films of eight subjects, four to train and four to test; lung and heart are on every one."""
    folder = tmp_path_factory.mktemp("films")
    write_chest_films(folder, 8)
    items = pair_folders(folder / "images", folder / "labels", folder)
    content = {"name": "films", "labels": PHANTOM_LABELS, "training": items[:4], "testing": items[4:]}
    (folder / "list.json").write_text(json.dumps(content))
    (folder / "supports.json").write_text(json.dumps({"labels": PHANTOM_LABELS, "training": items[:4]}))
    return {"dataset_dir": str(folder), "data_list": str(folder / "list.json")}


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    """A short training on lungs, and its output folder."""
    output_dir = tmp_path_factory.mktemp("trained")
    flow = run(
        "train.json",
        "train",
        **films,
        **FAST,
        output_dir=str(output_dir),
        novel=["heart"],
        exclude_novel=False,
        train_episodes=16,
        max_epochs=3,
    )
    return flow, output_dir


@pytest.fixture(scope="module")
def evaluated(films, trained, tmp_path_factory):
    """Eight episodes of hearts at two scales, their predictions and labels, and the output folder."""
    output_dir = tmp_path_factory.mktemp("scores")
    flow = workflow(
        "evaluate.json",
        "infer",
        **films,
        output_dir=str(output_dir),
        ckpt_dir=str(trained[1] / "models"),
        n_shot=2,
        n_episodes=8,
        scales=[1, 1.5],
        use_mlflow=False,
    )
    flow.initialize()
    seen = []
    keep = lambda engine: seen.append(
        (engine.state.batch[0]["query"]["source"], engine.state.output["pred"][0].numpy())
    )
    flow.evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
    flow.run()
    flow.finalize()
    return flow, output_dir, seen


def test_no_property_of_the_training_is_missing_or_misspelt(trained):
    assert trained[0].check_properties() == []


def test_no_property_of_the_evaluation_is_missing_or_misspelt(evaluated):
    assert evaluated[0].check_properties() == []


def test_training_lowers_the_loss_of_its_episodes(trained):
    lines = (trained[1] / "curves.csv").read_text().splitlines()[1:]
    losses = [float(line.split(",")[1]) for line in lines]
    assert losses[-1] < losses[0]


def test_the_trained_head_says_what_it_was_trained_on(trained):
    with safe_open(trained[1] / "models" / "model.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["blosam_monai"])
        names = set(file.keys())
    assert (settings["base"], settings["novel"], settings["n_shot"]) == (["lung"], ["heart"], 1)
    assert names == {"head.projection.weight", "head.weight_generator.weight", "head.weight_generator.bias"}
    assert str(trained[1]) not in json.dumps(settings)


def test_mean_iou_is_that_of_a_recount_of_the_predictions(films, evaluated):
    """Against the label files themselves: 2 is the heart."""
    _, output_dir, seen = evaluated
    right = either = 0
    for source, pred in seen:
        label = np.asarray(Image.open(Path(films["dataset_dir"], "labels", Path(source).name))) == 2
        right += sum(bool(p and t) for p, t in zip(pred.flat, label.flat, strict=True))
        either += sum(bool(p or t) for p, t in zip(pred.flat, label.flat, strict=True))
    assert len(seen) == 8
    assert json.loads((output_dir / "iou.json").read_text())["mean_iou"] == right / either


def test_no_subject_of_the_training_is_in_an_episode_of_the_test(trained, evaluated):
    both = [
        {item["subject"] for item in flow.parser.get_parsed_content("listed").items}
        for flow in (trained[0], evaluated[0])
    ]
    assert [len(subjects) for subjects in both] == [4, 4]
    assert not both[0] & both[1]


def test_scores_of_another_head_than_was_trained_are_refused(films, trained, tmp_path):
    flow = workflow(
        "evaluate.json", "infer", **films, output_dir=str(tmp_path), ckpt_dir=str(trained[1] / "models"), head="panet"
    )
    with pytest.raises(RuntimeError) as error:
        flow.initialize()
    assert "was trained with 'biopt', found 'panet'; drop head" in str(error.value.__cause__)


def test_heads_without_training_are_evaluated_as_they_are(films, tmp_path):
    """BiOpt's weights of 0.5 and PANet; the steps of BiOpt start from the mean of both prototypes, so they differ."""
    scores = []
    for head in ("biopt", "panet"):
        run(
            "evaluate.json",
            "infer",
            **films,
            **FAST,
            output_dir=str(tmp_path / head),
            train_free=True,
            head=head,
            folds=[["lung"], ["heart"]],
            fold=1,
            n_episodes=4,
            scales=[1],
        )
        found = json.loads((tmp_path / head / "iou.json").read_text())
        assert list(found["classes"]) == ["heart"]
        scores.append(found["mean_iou"])
    assert scores[0] != scores[1]


def test_a_head_that_must_be_trained_is_not_used_without(films, tmp_path):
    flow = workflow(
        "evaluate.json",
        "infer",
        **films,
        **FAST,
        output_dir=str(tmp_path),
        train_free=True,
        head="rpmms",
        novel=["heart"],
    )
    with pytest.raises(RuntimeError) as error:
        flow.initialize()
    assert str(error.value.__cause__).startswith("train_free: rpmms has 246")


def test_a_training_without_novel_classes_says_what_to_name(films, tmp_path):
    flow = workflow("train.json", "train", **films, **FAST, output_dir=str(tmp_path))
    with pytest.raises(RuntimeError) as error:
        flow.initialize()
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert str(cause) == "novel: name the classes that are kept for testing, or give folds and fold."


def test_inference_writes_masks_of_the_supports_classes_on_the_queries_own_grid(films, trained, tmp_path):
    folder = Path(films["dataset_dir"])
    run(
        "inference.json",
        "infer",
        dataset_dir=str(folder / "images"),
        support_dir=str(folder),
        data_list=str(folder / "supports.json"),
        ckpt_dir=str(trained[1] / "models"),
        output_dir=str(tmp_path),
    )
    overlap = []
    for path in sorted((folder / "labels").iterdir()):
        mask, label = np.asarray(Image.open(tmp_path / path.name)), np.asarray(Image.open(path))
        assert mask.shape == label.shape
        assert set(np.unique(mask)) <= {0, 1, 2}
        overlap.append([(mask == label).mean(), (mask[::-1] == label).mean()])
    upright, upside_down = np.mean(overlap, axis=0)
    assert upright > upside_down


def test_metadata_has_the_keys_that_the_model_zoo_asks_for(tmp_path):
    required = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"]
    required += ["task", "description", "authors", "copyright", "network_data_format"]
    file = tmp_path / "schema.json"  # a schema that is there is not downloaded
    file.write_text(json.dumps({"type": "object", "required": required}))
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(file), hash_val=digest)
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert meta["version"] in meta["changelog"]
