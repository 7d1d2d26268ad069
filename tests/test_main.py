"""The command line: names, types, refusals, help, doctor, and one walk through all verbs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blosam_monai.__main__ import main
from blosam_monai.data import readers
from blosam_monai.data.embedding_cache import EmbeddingCache
from blosam_monai.methods import BUNDLE
from blosam_monai.networks import sam
from blosam_monai.networks.sam import TINY_FILE, TINY_SHA256, embeddings_dir
from blosam_monai.parser import (
    EVALUATE_KEYS,
    KEYS,
    LABEL_CODINGS,
    PREDICT_KEYS,
    PRESET_KEYS,
    TRAIN_KEYS,
)


def test_help_answers_in_under_a_second():
    best = min(_seconds([sys.executable, "-m", "blosam_monai", "--help"]) for _ in range(3))
    assert best < 1


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["train", "--max_epohcs", "3"], "--max_epochs"),
        (["predict", "--modle", "x"], "--model"),
        (["evaluate", "--data-list=x"], "--data_list"),
        (["datalist", "--nshot", "4"], "--n_shot"),
    ],
)
def test_a_misspelt_option_is_refused_naming_the_near_one(arguments, near, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"did you mean {near}?" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max_epochs", "many"], "--max_epochs: expected a whole number, found 'many'"),
        (["--lower_lr", "fast"], "--lower_lr: expected a number, found 'fast'"),
        (["--crossfit", "maybe"], "--crossfit: expected true or false, found 'maybe'"),
        (["--run_name", "$print(1)"], "begins with $"),  # a config would run it
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "keys"),
    [
        (["train.json", "methods/ssp.json", "methods/dynunet.json", "methods/med_sa.json"], TRAIN_KEYS),
        (["inference.json", "evaluate.json"], EVALUATE_KEYS),
        (["inference.json"], PREDICT_KEYS),
    ],
)
def test_every_option_is_a_key_of_its_config_and_has_its_help(files, keys):
    config = {}
    for file in files:
        config |= json.loads((BUNDLE / "configs" / file).read_text())
    assert set(keys) <= config.keys()
    assert set(keys) <= KEYS.keys()


def test_every_key_that_a_user_can_set_in_the_training_is_an_option():
    """Plain values of train.json are what a user sets; the rest are parts and expressions."""
    config = json.loads((BUNDLE / "configs" / "train.json").read_text())
    plain = {key for key, value in config.items() if not isinstance(value, (dict, list))} - {"bundle_root"}
    expressions = {"save_execute_config", "datalist", "settings", "task_names", "network", "theta", "phi", "iterations"}
    expressions |= {"preset", "one_set", "penalty"}
    assert plain - expressions == set(TRAIN_KEYS) - set(PRESET_KEYS)


def test_the_presets_that_have_keys_of_their_own_keep_them_with_the_options():
    for file in (BUNDLE / "configs" / "methods").glob("*.json"):
        preset = json.loads(file.read_text())
        assert preset.get("+options", {}) == {key: f"@{key}" for key in PRESET_KEYS if key in preset}, file.stem


def test_mlflow_and_resume_know_every_option():
    """`options` of a config is what MLflow keeps and what a resumed training compares."""
    train_keys = [key for key in TRAIN_KEYS if key not in PRESET_KEYS]
    for file, keys in (("train.json", train_keys), ("evaluate.json", [*EVALUATE_KEYS, "ckpt_dir"])):
        config = json.loads((BUNDLE / "configs" / file).read_text())
        assert config["options"] == {key: f"@{key}" for key in keys}, file


def test_doctor_says_where_everything_is_and_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path))
    (tmp_path / "sam_vit_l_0b3195.pth").touch()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch " in out
    assert str(tmp_path) in out
    assert "sam_vit_b_01ec64.pth: missing" in out
    assert "sam_vit_l_0b3195.pth: here" in out


def test_doctor_says_that_tiny_is_in_the_package_and_is_the_published_one(capsys):
    assert main(["doctor"]) == 0
    digest = hashlib.sha256(TINY_FILE.read_bytes()).hexdigest()
    assert f"tiny.safetensors: in the package, SHA-256 {digest}, as published\n" in capsys.readouterr().out


def test_doctor_says_that_tiny_was_altered(capsys, monkeypatch, tmp_path):
    (tmp_path / "tiny.safetensors").write_bytes(b"altered")
    monkeypatch.setattr(sam, "TINY_FILE", tmp_path / "tiny.safetensors")
    assert main(["doctor"]) == 0
    found = hashlib.sha256(b"altered").hexdigest()
    message = f"tiny.safetensors: altered, SHA-256 {found}, published {TINY_SHA256}; reinstall blosam_monai\n"
    assert message in capsys.readouterr().out


def test_doctor_says_that_tiny_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sam, "TINY_FILE", tmp_path / "tiny.safetensors")
    assert main(["doctor"]) == 0
    assert "tiny.safetensors: missing from the package; reinstall blosam_monai\n" in capsys.readouterr().out


def test_the_codings_offered_are_those_that_are_read():
    assert LABEL_CODINGS == readers.LABEL_CODINGS


def test_doctor_counts_the_encoded_images_and_clears_them(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path))
    cache = EmbeddingCache(embeddings_dir())
    for number in range(3):
        cache.put(EmbeddingCache.key({"number": number}), torch.zeros(250))  # 1000 bytes and a header
    assert main(["doctor"]) == 0
    assert "encoded images: 3, 0.0 MiB of at most 10 GiB" in capsys.readouterr().out
    assert main(["doctor", "--clear_cache", "true"]) == 0
    assert "encoded images: 3 removed" in capsys.readouterr().out
    assert cache.stats() == (0, 0)


def test_values_without_a_name_become_background_and_that_is_said(phantoms, tmp_path, capsys):
    folders = ["--images", str(phantoms / "images"), "--labels", str(phantoms / "labels"), "--n_shot", "4"]
    target = str(tmp_path / "l.json")
    assert main(["datalist", *folders, "--label_names", '{"heart": 2}', "--output", target]) == 0
    assert "label values that have no name are background: 1" in capsys.readouterr().out
    assert json.loads(Path(target).read_text())["labels"] == {"background": [0, 1], "heart": 2}


def test_check_shows_every_pair_and_a_bad_one_prevents_the_list(phantoms, tmp_path, capsys):
    shutil.copytree(phantoms, tmp_path / "data")
    folders = ["--images", str(tmp_path / "data" / "images"), "--labels", str(tmp_path / "data" / "labels")]
    named = ["--label_names", '{"lung": 1, "heart": 2}', "--label_coding", "index"]
    given = ["datalist", *folders, *named, "--check", "true"]
    assert main([*given, "--output", str(tmp_path / "good.json")]) == 0
    assert "10 checked: 0 with errors" in capsys.readouterr().out
    Image.fromarray(np.ones((9, 9), np.uint8)).save(tmp_path / "data" / "labels" / "phantom_004.png")
    assert main([*given, "--output", str(tmp_path / "bad.json")]) == 1
    said = capsys.readouterr()
    assert "label has shape (9, 9), its image (224, 288)" in said.out
    assert "check: 1 of 10 pairs cannot be used, see above; no list is written." in said.err
    assert not (tmp_path / "bad.json").exists()


def test_from_two_folders_to_masks(phantoms, tmp_path, capsys, monkeypatch):
    """datalist, train, evaluate, predict on pictures that are not square, with the values of the list in the masks."""
    monkeypatch.chdir(tmp_path)
    images, labels = str(phantoms / "images"), str(phantoms / "labels")
    names = '{"lung": 1, "heart": 2}'
    assert main(["datalist", "--images", images, "--labels", labels, "--label_names", names, "--output", "l.json"]) == 0
    assert "lower 2, upper 2, validation 0, testing 6" in capsys.readouterr().out
    shared = ["--data_list", "l.json", "--use_mlflow", "false"]
    assert main(["train", *shared, "--output_dir", "run", "--max_epochs", "15", "--tasks", '["heart"]']) == 0
    assert main(["evaluate", *shared, "--model", "run", "--output_dir", "scores"]) == 0
    assert main(["predict", "--model", "run", "--input", images, "--output_dir", "masks"]) == 0
    scores = json.loads(Path("scores/summary.json").read_text())
    assert scores["scores"]["testing"]["heart"]["cases"] == 6
    assert scores["settings"]["sam_weights"] == TINY_SHA256
    masks = [np.asarray(Image.open(p)) for p in sorted(Path("masks").glob("*.png"))]
    assert len(masks) == 10
    assert {m.shape for m in masks} == {(224, 288)}
    assert set(np.unique(masks)) == {0, 2}  # the heart's value in the list
    assert len(list(Path("masks/overlays").glob("*.png"))) == 10


def test_separate_masks_are_one_file_a_task(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ["--data_list", str(phantoms / "list.json"), "--dataset_dir", str(phantoms), "--use_mlflow", "false"]
    assert main(["train", *shared, "--output_dir", "run", "--max_epochs", "1"]) == 0
    image = str(phantoms / "images" / "phantom_003.png")
    assert main(["predict", "--model", "run", "--input", image, "--output_dir", "m", "--merge", "separate"]) == 0
    assert sorted(p.name for p in Path("m").glob("*.png")) == ["phantom_003_heart.png", "phantom_003_lung.png"]


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.fixture
def spoilt(phantoms, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the films of which one label is cut short, and the options that name its folders."""
    shutil.copytree(phantoms, tmp_path / "data")
    path = tmp_path / "data" / "labels" / "phantom_004.png"
    path.write_bytes(path.read_bytes()[:60])
    return path, ["--images", str(tmp_path / "data" / "images"), "--labels", str(tmp_path / "data" / "labels")]


@pytest.mark.parametrize("named", [[], ["--label_names", '{"heart": 2}']])
def test_check_shows_every_pair_where_a_damaged_label_leaves_a_guess(spoilt, named, tmp_path, capsys):
    _, folders = spoilt
    assert main(["datalist", *folders, *named, "--check", "true", "--output", str(tmp_path / "l.json")]) == 1
    said = capsys.readouterr()
    assert "labels/phantom_004.png: cannot be read as a picture" in said.out
    assert "10 checked: 1 with errors" in said.out
    assert "check: 1 of 10 pairs cannot be used" in said.err


def test_check_shows_every_pair_where_drawing_fails(phantoms, tmp_path, capsys):
    folders = ["--images", str(phantoms / "images"), "--labels", str(phantoms / "labels")]
    options = ["--n_shot", "40", "--check", "true", "--output", str(tmp_path / "l.json")]
    assert main(["datalist", *folders, *options]) == 1
    said = capsys.readouterr()
    assert "10 checked: 0 with errors" in said.out
    assert "n_shot: 40 asked for" in said.err


def test_a_list_is_checked_as_it_is(phantoms, capsys):
    before = sorted(phantoms.rglob("*"))
    assert main(["datalist", "--from", str(phantoms / "list.json"), "--check", "true"]) == 0
    out = capsys.readouterr().out
    assert [sum(f" {section} " in line for line in out.splitlines()) for section in ("lower", "validation")] == [2, 2]
    assert sorted(phantoms.rglob("*")) == before


def test_values_that_become_background_join_those_that_are(phantoms, tmp_path):
    folders = ["--images", str(phantoms / "images"), "--labels", str(phantoms / "labels")]
    target = tmp_path / "l.json"
    options = ["--label_names", '{"background": [0, 6], "heart": 2}', "--output", str(target)]
    assert main(["datalist", *folders, *options]) == 0
    assert json.loads(target.read_text())["labels"]["background"] == [0, 1, 6]
