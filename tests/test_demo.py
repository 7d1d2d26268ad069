"""The demo: every verb once, three kinds of input, two methods in one store."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path
from statistics import fmean

import mlflow
import nibabel
import numpy as np
import pydicom
import pytest

from blosam_monai.__main__ import main
from blosam_monai.data.phantoms import abdominal_ct
from blosam_monai.data.readers import read_image, read_label
from blosam_monai.demo import FILES, FOLDERS, SLAB, commands, run_demo, summarise, write_data
from blosam_monai.parser import build_parser

TASKS = ("liver", "spleen", "kidneys")


def shorter(arguments: list[str]) -> list[str]:
    """A verb's arguments, for a small network and two epochs."""
    return [*arguments, "--image_size", "64", "--max_epochs", "2"] if arguments[0] == "train" else arguments


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a short demo, and what it says at its end."""
    root = tmp_path_factory.mktemp("demo")
    said = run_demo(root, overwrite=True, run=lambda arguments: main(shorter(arguments)))
    return root, said


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_command_is_one_that_the_parser_takes():
    parser, _ = build_parser()
    for arguments in commands(Path("demo")):
        assert parser.parse_args(arguments).verb == arguments[0]


def test_four_slices_are_trained_on_and_ten_patients_are_new(demo):
    root, _ = demo
    content = json.loads((root / "data" / "list.json").read_text())
    assert [len(content[section]) for section in ("lower", "upper", "validation", "testing")] == [2, 2, 2, 10]
    assert list(content["labels"]) == ["background", *TASKS]


def test_a_picture_a_volume_and_a_series_become_masks_on_their_own_grids(demo):
    root, _ = demo
    new = root / "data" / "new"
    assert read_label(root / "masks" / "slice.png").shape == read_image(new / "slice.png").shape == (1, 200, 280)
    volume, mask = (nibabel.load(folder / "volume.nii.gz") for folder in (new, root / "masks"))
    assert mask.shape == volume.shape
    np.testing.assert_array_equal(mask.affine, volume.affine)
    series = read_image(new / "series")
    np.testing.assert_allclose(read_label(root / "masks" / "series.nii.gz").affine, series.affine, atol=1e-3)


def test_the_dicom_seg_refers_to_the_patient_and_the_slices_of_the_series(demo):
    root, _ = demo
    slices = [pydicom.dcmread(path) for path in sorted((root / "data" / "new" / "series").iterdir())]
    seg = pydicom.dcmread(root / "masks" / "series.seg.dcm")
    assert seg.Modality == "SEG"
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == list(TASKS)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert (seg.PatientName, seg.StudyInstanceUID) == (slices[0].PatientName, slices[0].StudyInstanceUID)
    named = {
        instance.ReferencedSOPInstanceUID for instance in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert named <= {header.SOPInstanceUID for header in slices}


def test_both_methods_are_trained_and_evaluated_in_one_store(demo):
    root, _ = demo
    runs = mlflow.MlflowClient(f"sqlite:///{root / 'mlruns.db'}").search_runs(["1"])
    found = sorted((run.data.params["method"], "loss" in run.data.metrics) for run in runs)
    assert found == [("blosam", False), ("blosam", True), ("joint", False), ("joint", True)]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_table_at_the_end_has_the_mean_of_the_cases_of_both_methods(demo):
    root, said = demo
    for task in TASKS:
        means = [
            fmean(float(row["dice"]) for row in rows(root / folder) if row["task"] == task)
            for folder in ("evaluate", "evaluate_joint")
        ]
        (line,) = re.findall(rf"^{task} .*$", said, re.MULTILINE)
        assert re.findall(r"(\d\.\d{3}) \(", line) == [f"{mean:.3f}" for mean in means]


def test_the_end_says_which_weights_the_model_stands_on(demo):
    root, said = demo
    settings = json.loads((root / "train" / "models" / "model.json").read_text())
    (weights,) = re.findall(r"SAM weights: (\w+)", said)
    assert settings["sam_weights"].startswith(weights)


def test_the_report_shows_both_trainings_their_scores_and_the_masks(demo):
    root, _ = demo
    page = (root / "report.html").read_text(encoding="utf-8")
    for folder in ("train", "joint"):
        settings = json.loads((root / folder / "models" / "model.json").read_text())
        assert settings["method"] in page
    for task in TASKS:
        assert task in page
    assert page.count("data:image") > 16  # of the cases


def test_the_end_names_three_commands(demo):
    root, said = demo
    further = said.split("Look further:\n")[1].splitlines()
    assert [line.split()[0] for line in further] == ["mlflow", "python", "blosam"]
    assert str(root / "mlruns.db") in further[0]


def test_a_second_demo_into_the_same_folder_is_refused_and_nothing_is_run(demo):
    root, _ = demo
    with pytest.raises(FileExistsError, match="holds a demo; choose another folder or add --overwrite true"):
        run_demo(root, overwrite=False, run=lambda arguments: pytest.fail("a verb was run"))


def with_a_file_each(root: Path) -> Path:
    """A folder with all that a demo writes, and a file of the user's own."""
    for name in (*(f"{folder}/old" for folder in FOLDERS), *FILES, "mine.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old")
    return root


def files_at_the_first_verb(root: Path) -> set[str]:
    """Files that an overwriting demo has kept, of those that it has not written itself."""
    with pytest.raises(SystemExit):
        run_demo(root, overwrite=True, run=lambda arguments: 1)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.read_bytes() == b"old"}


def test_overwriting_removes_all_of_the_former_demo_and_nothing_else(tmp_path):
    (with_a_file_each(tmp_path) / "data" / "new_labels").mkdir()
    assert files_at_the_first_verb(tmp_path) == {"mine.txt"}


def test_what_no_demo_has_written_is_never_removed(tmp_path):
    with_a_file_each(tmp_path)
    assert files_at_the_first_verb(tmp_path) == {*(f"{folder}/old" for folder in FOLDERS), *FILES, "mine.txt"}


def test_the_commands_at_the_end_stand_a_folder_with_a_space(tmp_path):
    root = tmp_path / "my demo"
    numbers = {"dice_mean": 0.5, "dice_low": 0.5, "dice_high": 0.5, "cases": 10}
    summary = {"scores": {"testing": {"liver": numbers}}, "settings": {"sam_weights": "random"}}
    for folder in ("evaluate", "evaluate_joint"):
        (root / folder).mkdir(parents=True)
        (root / folder / "summary.json").write_text(json.dumps(summary))
    further = summarise(root).split("Look further:\n")[1].splitlines()
    assert shlex.split(further[0])[-1] == f"sqlite:///{root / 'mlruns.db'}"
    assert len(shlex.split(further[1])) == 4


def test_a_verb_that_fails_ends_the_demo_with_its_status(tmp_path):
    seen = []
    with pytest.raises(SystemExit) as stopped:
        run_demo(tmp_path, overwrite=False, run=lambda arguments: seen.append(arguments[0]) or len(seen) // 2 * 3)
    assert stopped.value.code == 3
    assert seen == ["datalist", "train"]


def test_without_highdicom_the_series_becomes_nifti(monkeypatch):
    assert not any("--dicom_output" in arguments for arguments in commands(Path("demo")))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highdicom" else find(name))
    (predict,) = [arguments for arguments in commands(Path("demo")) if "--dicom_output" in arguments]
    assert predict[predict.index("--dicom_output") + 1] == '["nifti"]'


def test_the_new_patients_are_none_of_those_of_the_pictures(tmp_path):
    write_data(tmp_path)
    known = [abdominal_ct(seed, **SLAB)[1] for seed in range(16)]
    assert len(list((tmp_path / "images").iterdir())) == len(known)
    volume, series = (read_label(tmp_path / "new_labels" / f"{name}.nii.gz").values for name in ("volume", "series"))
    assert volume.shape == series.shape == known[0].shape
    assert not any(np.array_equal(volume, other) for other in (*known, series))
    assert not any(np.array_equal(series, other) for other in known)


@pytest.mark.slow
def test_the_masks_of_all_three_kinds_of_input_fit(tmp_path, capsys):
    """Calling the whole image an organ gives less than 0.3: liver is a sixth of it, spleen and kidneys a fortieth."""
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 0
    assert capsys.readouterr().out.count("\n$ blosam ") == len(commands(tmp_path))
    for name in ("slice.png", "volume.nii.gz", "series.nii.gz"):
        label, pred = (read_label(tmp_path / "demo" / folder / name).values for folder in ("data/new_labels", "masks"))
        for value in (1, 2, 3):
            both = ((pred == value) & (label == value)).sum()
            assert 2 * both / ((pred == value).sum() + (label == value).sum()) > 0.5, (name, value)
    summary = json.loads((tmp_path / "demo" / "evaluate" / "summary.json").read_text())
    assert summary["scores"]["testing"]["all"]["dice_mean"] > 0.7
