"""Cases one after another: what is written, what is kept, what fails, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.data.utils import no_collation
from monai.transforms import Compose
from PIL import Image

from blosam_monai.data.readers import read_label
from blosam_monai.engines.case_evaluator import CaseEvaluator
from blosam_monai.handlers import ManifestHandler
from blosam_monai.inferers import SliceStreamInferer
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.outputs import PlanOutputd, SavePredictiond
from blosam_monai.transforms import DecideTasksd, LoadCased

LABELS = {"background": 0, "lung": 1}


@pytest.fixture(scope="module")
def network():
    return PromptSam("tiny", 64, "random", ["lung"])


@pytest.fixture
def films(tmp_path) -> list[Path]:
    """Four pictures below a folder named like a patient; the second is cut short."""
    folder = tmp_path / "Doe_John_19700101"
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"film_{n}.png" for n in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 30)).astype(np.uint8)).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    return paths


def predict(paths, network, folder: Path, *, overwrite=False, log_paths=False) -> CaseEvaluator:
    data = Dataset([{"image": str(path)} for path in paths])
    evaluator = CaseEvaluator(
        "cpu",
        DataLoader(data, batch_size=1, num_workers=0, collate_fn=no_collation),
        network,
        SliceStreamInferer(64),
        preprocessing=Compose([LoadCased(LABELS), PlanOutputd(folder, ["lung"], overwrite=overwrite)]),
        case_postprocessing=Compose([DecideTasksd("argmax"), SavePredictiond(LABELS)]),
        val_handlers=[ManifestHandler(folder, log_paths=log_paths)],
    )
    evaluator.run()
    return evaluator


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_a_bad_case_is_told_and_the_others_are_written(films, network, tmp_path, capsys):
    out = tmp_path / "out"
    evaluator = predict(films, network, out)
    assert [case.status for case in evaluator.cases] == ["done", "failed", "done", "done"]
    assert sorted(path.name for path in out.glob("*.png")) == ["film_0.png", "film_2.png", "film_3.png"]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "blosam:" in line]
    assert "film_1.png: cannot be read as a picture" in said
    with pytest.raises(ValueError, match=r"1 of 4 cases failed, see above and manifest\.jsonl"):
        evaluator.raise_failures()


def test_the_manifest_says_of_every_case_what_became_of_it_without_a_name(films, network, tmp_path):
    import hashlib

    predict(films, network, tmp_path / "out")
    found = lines(tmp_path / "out")
    assert [line["number"] for line in found] == [1, 2, 3, 4]
    assert [line["case_id"] for line in found] == [hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in films]
    outputs = [{key: output[key] for key in ("content", "format", "task")} for output in found[0]["outputs"]]
    assert outputs == [{"content": content, "format": "picture", "task": None} for content in ("label", "overlay")]
    assert found[0]["outputs"][0]["name_id"] == hashlib.sha256(b"film_0.png").hexdigest()[:12]
    assert found[0]["seconds"] > 0
    assert found[1]["error"].startswith("<file>: cannot be read as a picture")
    text = (tmp_path / "out" / "manifest.jsonl").read_text()
    assert not any(name in text for name in ("Doe", "film_", str(tmp_path)))


def test_names_are_in_the_manifest_if_asked_for(films, network, tmp_path):
    predict(films, network, tmp_path / "out", log_paths=True)
    found = lines(tmp_path / "out")
    assert found[0]["image"] == str(films[0])
    assert found[0]["outputs"][0]["path"] == str(tmp_path / "out" / "film_0.png")
    assert "film_1.png" in found[1]["error"]


def test_a_second_run_does_what_the_first_left_and_keeps_the_rest(films, network, tmp_path):
    out = tmp_path / "out"
    predict(films[:2], network, out)
    before = (out / "film_0.png").stat().st_mtime_ns
    Image.fromarray(np.eye(20, dtype=np.uint8)).save(films[1])
    evaluator = predict(films, network, out)
    assert [case.status for case in evaluator.cases] == ["kept", "done", "done", "done"]
    assert (out / "film_0.png").stat().st_mtime_ns == before
    evaluator.raise_failures()
    assert [case.status for case in predict(films, network, out, overwrite=True).cases] == ["done"] * 4
    assert [line["status"] for line in lines(out)] == ["done", "failed", "kept", *["done"] * 7]


def test_a_line_that_a_killed_run_tore_spoils_no_other(films, network, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.jsonl").write_text('{"number": 1, "sta')
    predict(films[:1], network, tmp_path / "out")
    torn, whole = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert torn == '{"number": 1, "sta'
    assert json.loads(whole)["status"] == "done"


def test_a_fault_of_the_program_is_told_by_its_kind(films, network, tmp_path, capsys):
    def broken(item):
        raise KeyError("embedding")

    evaluator = predict(films[:1], network, tmp_path / "out", overwrite=True)
    evaluator.case_postprocessing = broken
    evaluator.run()
    assert evaluator.cases[0].status == "failed"
    assert "blosam: KeyError: 'embedding'" in capsys.readouterr().err


def test_the_network_is_evaluated_and_left_as_it_was(films, network, tmp_path):
    network.train()
    seen = []
    evaluator = predict(films[:1], network, tmp_path / "out")
    inferer = evaluator.inferer
    evaluator.inferer = lambda *args, **options: (seen.append(network.training), inferer(*args, **options))[1]
    evaluator.case_postprocessing = dict
    evaluator.preprocessing = LoadCased(LABELS)
    evaluator.run()
    assert seen == [False]
    assert network.training
    network.eval()


def test_what_is_written_is_what_the_network_says(films, network, tmp_path):
    predict(films[2:3], network, tmp_path / "out")
    logits = SliceStreamInferer(64)(LoadCased(LABELS)({"image": str(films[2])})["image"], network)
    assert np.array_equal(read_label(tmp_path / "out" / "film_2.png").values, (logits[0] > 0).to(torch.uint8))
