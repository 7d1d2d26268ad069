"""What a user gets wrong: one line with the file or argument, the finding and the remedy, and nothing left behind."""

import contextlib
import io
import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import monai.bundle  # noqa: F401  its log handlers keep the stream of this moment
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from PIL import Image

from blosam_monai.__main__ import main
from blosam_monai.data.readers import list_cases, read_label
from tests.data.dicom_files import write_series

FAST = ["--image_size", "64", "--max_epochs", "1"]


@pytest.fixture(autouse=True)
def _own_logging():
    """A run sets up logging for its process; the next test has its own."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture
def data(phantoms, tmp_path) -> Path:
    """A data set of its own to spoil; the list keeps no hashes, so that the spoilt file itself is found out."""
    folder = tmp_path / "data"
    shutil.copytree(phantoms, folder)
    write_list(folder, {**read_list(folder), "sha256": {}})
    return folder


@pytest.fixture(scope="module")
def model(phantoms, tmp_path_factory) -> Path:
    """A training that went well, with the options of the trainings below."""
    output_dir = tmp_path_factory.mktemp("model") / "train"
    listed = ["--data_list", str(phantoms / "list.json"), "--dataset_dir", str(phantoms)]
    assert main(["train", *listed, "--output_dir", str(output_dir), *FAST, "--use_mlflow", "false"]) == 0
    return output_dir


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail; returns the one line that it says, or one for each bad case before the last."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = end.code
        error = capsys.readouterr().err
        assert status not in (0, None)
        assert "Traceback" not in error
        said = [line for line in error.splitlines() if line.startswith("blosam:")]  # the others are progress bars
        assert said[-1] == error.splitlines()[-1]
        counted = re.search(r"(\d+) of \d+ cases failed", said[-1])
        assert len(said) == 1 + (int(counted[1]) if counted else 0)
        return "\n".join(said)

    return run


def read_list(folder: Path) -> dict:
    return json.loads((folder / "list.json").read_text(encoding="utf-8"))


def write_list(folder: Path, content: dict) -> None:
    (folder / "list.json").write_text(json.dumps(content), encoding="utf-8")


def support(folder: Path, key: str, section: str = "lower") -> Path:
    """The file of a section's first item, as ``<name of the file>`` in the messages below."""
    return folder / read_list(folder)[section][0][key]


def change_pixels(path: Path, change) -> None:
    with Image.open(path) as picture:
        pixels = np.array(picture)
    Image.fromarray(change(pixels)).save(path)


def cut_off(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:600])
    return path


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# Each spoils the data set and returns the name that the message must hold, and the options to train with.


def missing_file(folder):
    path = support(folder, "image", "upper")
    path.unlink()
    return path.name, []


def truncated_image(folder):
    return cut_off(support(folder, "image")).name, []


def truncated_validation_image(folder):
    return cut_off(support(folder, "image", "validation")).name, []


def truncated_label(folder):
    return cut_off(support(folder, "label")).name, []


def label_of_another_size(folder):
    path = support(folder, "label", "upper")
    change_pixels(path, lambda label: label[:, 32:])
    return path.name, []


def foreign_label_value(folder):
    path = support(folder, "label")
    change_pixels(path, lambda label: np.where(label == 2, 7, label).astype(np.uint8))
    return path.name, []


def empty_label(folder):
    path = support(folder, "label", "upper")
    change_pixels(path, np.zeros_like)
    return path.name, []


def subject_in_both_halves(folder):
    content = read_list(folder)
    content["upper"][0]["subject"] = content["lower"][0]["subject"]
    write_list(folder, content)
    return content["lower"][0]["subject"], []


def one_support(folder):
    content = read_list(folder)
    write_list(folder, {**content, "lower": [], "upper": content["upper"][:1]})
    return "list.json", []


def constant_image(folder):
    path = support(folder, "image")
    change_pixels(path, lambda film: np.full_like(film, 9))
    return path.name, []


def nan_image(folder):
    content = read_list(folder)
    path = folder / "images" / "film.tif"
    values = np.random.default_rng(0).uniform(0, 1, (224, 288)).astype(np.float32)
    values[5, 6] = np.nan
    Image.fromarray(values).save(path)
    content["lower"][0]["image"] = "images/film.tif"
    write_list(folder, content)
    return path.name, []


def text_as_checkpoint(folder):
    (folder / "sam.pth").write_text("not a checkpoint")
    return "sam.pth", ["--sam_checkpoint", folder / "sam.pth"]


def other_networks_checkpoint(folder):
    torch.save({"conv.weight": torch.zeros(2)}, folder / "unet.pth")
    return "unet.pth", ["--sam_checkpoint", folder / "unet.pth"]


def changed_since_listed(folder):
    content = read_list(folder)
    write_list(folder, {**content, "sha256": {content["lower"][0]["image"]: "0" * 64}})
    return support(folder, "image").name, []


BAD_DATA = {
    missing_file: "listed in .* but missing; check dataset_dir",
    truncated_image: "cannot be read as a picture .*; export it again",
    truncated_validation_image: "cannot be read as a picture .*; export it again",
    truncated_label: "cannot be read as a picture .*; export it again",
    label_of_another_size: r"label has shape \(224, 256\), its image \(224, 288\); export the label again",
    foreign_label_value: "label value 7 is not in the data list's labels .*; add it there",
    empty_label: r"the label is empty for lung, heart; replace this image \(upper set\)",
    subject_in_both_halves: "is in lower and in upper; keep it in one of them",
    one_support: "1 support images of 1 subjects; at least 2 of 2 subjects are needed",
    constant_image: "every pixel has the same value; repair or leave out the image",
    nan_image: "holds NaN or infinite values; repair or leave out the image",
    text_as_checkpoint: "sam_checkpoint: .* cannot be read as a SAM checkpoint .*; replace it",
    other_networks_checkpoint: "sam_checkpoint: .* is not a tiny: .* choose the sam_model",
    changed_since_listed: "has changed since .* was made; make the list again",
}


@pytest.mark.parametrize("spoil", BAD_DATA, ids=lambda spoil: spoil.__name__)
def test_bad_data_stop_a_training_before_it_writes(data, tmp_path, refused, spoil):
    name, options = spoil(data)
    output_dir = tmp_path / "out"
    listed = ["--data_list", data / "list.json", "--dataset_dir", data, "--output_dir", output_dir]
    said = refused("train", *listed, *FAST, *options)
    assert name in said
    assert re.search(BAD_DATA[spoil], said)
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        (["--tasks", '["liver"]'], r"tasks: \['liver'\] must be some of the labels lung, heart"),
        (["--tasks", "liver"], r"tasks: \['liver'\] must be some of the labels lung, heart"),
        (["--tasks", "[lung"], r"--tasks: '\[lung' is not JSON"),
        (["--max_epoch", "3"], "unknown option --max_epoch; did you mean --max_epochs"),
        (["--max_epochs", "0"], "--max_epochs: expected 1 or more, found '0'"),
        (["--batch_size", "0"], "--batch_size: expected 1 or more, found '0'"),
        (["--lower_lr=-1"], "--lower_lr: expected 0 or more, found '-1'"),
        (["--lower_lr", "nan"], "--lower_lr: expected 0 or more, found 'nan'"),
        (["--nsd_tolerance=-1"], "--nsd_tolerance: expected 0 or more, found '-1'"),
        (["--sam_model", "vit_x"], "sam_model: 'vit_x' is not one of vit_b, vit_l, vit_h, tiny"),
        (["--image_size", "65"], "image_size: 65 is not a positive multiple of 16 pixels"),
        (["--method", "bilevel"], "--method: there is no 'bilevel'; one of "),
        (["--method", "jiont"], "--method: there is no 'jiont'; did you mean joint"),
        (["--method", "dynunet", "--lora_rank", "2"], "lora_rank: the method dynunet does not use it; leave it out"),
        (["--weights", "x.pth"], "weights: the method blosam does not use it; leave it out"),
        (["--method", "joint", "--crossfit", "true"], "joint is joint training, without an upper level"),
        (["--method", "samed", "--cache_dir", "x"], "cache_dir: the method samed does not use it; leave"),
        (["--hypergradient", "second"], "hypergradient: 'second' is not one of first_order"),
        (["--selection", "best"], "selection: 'best' is not one of last, upper, validation"),
        (["--preprocess", "squash"], "preprocess: 'squash' is not one of sam, paper"),
        (["--head", "three"], "head: 'three' is not one of sam, two_token"),
        (["--prompt", "sparse:0"], "prompt: 'sparse:0' is not dense, none, sparse:n or both:n"),
        (["--lora_rank", "0"], "lora_rank: 0 must be at least 1"),
        (["--dice_weight", "2"], r"dice_weight: 2\.0 is not in \[0, 1\]"),
        (["--device", "abacus"], "--device: no device 'abacus' on this machine; see `blosam doctor`"),
        (["--tracking_uri", "abacus://x"], "abacus"),
        (["--data_list", "gone.json"], r"data_list: gone\.json does not exist; make one with `blosam datalist`"),
        (["--sam_checkpoint", "gone.pth"], r"sam_checkpoint: gone\.pth does not exist; give a SAM checkpoint file"),
        (["--resume", "true"], "resume: .* does not exist; start without resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_stops_a_training_before_it_writes(phantoms, tmp_path, refused, options, finding):
    output_dir = tmp_path / "out"
    listed = ["--data_list", phantoms / "list.json", "--dataset_dir", phantoms, "--output_dir", output_dir]
    said = refused("train", *listed, *FAST, *options)
    assert re.search(finding, said)
    assert not output_dir.exists() or not files_below(output_dir)


def test_a_published_model_without_its_file_says_where_to_get_it(phantoms, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path / "cache"))
    listed = ["--data_list", phantoms / "list.json", "--dataset_dir", phantoms, "--output_dir", tmp_path / "out"]
    said = refused("train", *listed, *FAST, "--sam_model", "vit_b")
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in said
    assert str(tmp_path / "cache" / "sam_vit_b_01ec64.pth") in said
    assert not (tmp_path / "out").exists()


def test_an_earlier_training_is_not_replaced(model, phantoms, refused):
    before = {path: path.read_bytes() for path in files_below(model)}
    listed = ["--data_list", phantoms / "list.json", "--dataset_dir", phantoms, "--output_dir", model]
    said = refused("train", *listed, *FAST, "--use_mlflow", "false")
    assert re.search("output_dir: .* holds an earlier training; choose another output_dir", said)
    assert {path: path.read_bytes() for path in files_below(model)} == before


# Predicting


@pytest.fixture
def films(phantoms, tmp_path) -> Path:
    """A folder of three films, sorted a, b, c."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name, path in zip("abc", list_cases(phantoms / "images"), strict=False):
        shutil.copy(path, folder / f"{name}.png")
    return folder


def test_without_a_model_nothing_is_predicted(films, tmp_path, refused):
    said = refused("predict", "--model", tmp_path / "gone", "--input", films, "--output_dir", tmp_path / "out")
    assert re.search(r"model: no model\.safetensors in .*gone or its folder models; give a training's output_dir", said)
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_named(model, films, tmp_path, refused):
    shutil.copytree(model / "models", tmp_path / "bad" / "models")
    cut_off(tmp_path / "bad" / "models" / "model.safetensors")
    said = refused("predict", "--model", tmp_path / "bad", "--input", films, "--output_dir", tmp_path / "out")
    assert re.search(r"model: .*bad/models/model\.safetensors is damaged", said)
    assert not (tmp_path / "out").exists()


def test_a_truncated_picture_is_named_and_the_other_masks_are_written(model, films, tmp_path, refused):
    cut_off(films / "b.png")
    said = refused("predict", "--model", model, "--input", films, "--output_dir", tmp_path / "out")
    assert re.search(r"films/b\.png: cannot be read as a picture .*; export it again", said)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in files_below(tmp_path / "out")) == [
        *("a.png", "c.png", "manifest.jsonl", "overlays/a.png", "overlays/c.png")
    ]
    assert read_label(tmp_path / "out" / "c.png").shape == (1, 224, 288)


def test_existing_masks_are_kept_and_that_is_no_failure(model, films, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"someone's work")
    arguments = ["--model", str(model), "--input", str(films), "--output_dir", str(tmp_path / "out")]
    assert main(["predict", *arguments]) == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == b"someone's work"
    assert read_label(tmp_path / "out" / "b.png").shape == (1, 224, 288)


def test_two_pictures_of_one_stem_are_named_before_either_is_predicted(model, films, tmp_path, refused):
    with Image.open(films / "a.png") as picture:
        picture.save(films / "a.jpg")
    said = refused("predict", "--model", model, "--input", films, "--output_dir", tmp_path / "out")
    assert re.search(r"films/a\.png: has the same stem as a\.jpg; rename or remove one of them", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        (["--input", "gone"], "gone: no such file or folder"),
        (["--merge", "vote"], "merge: 'vote' is not one of argmax, separate"),
        (["--threshold", "1.5"], "threshold: 1.5 is not a probability"),
        (["--treshold", "0.4"], "unknown option --treshold; did you mean --threshold"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_stops_a_prediction(model, films, tmp_path, refused, options, finding):
    said = refused("predict", "--model", model, "--input", films, "--output_dir", tmp_path / "out", *options)
    assert re.search(finding, said)
    assert not (tmp_path / "out").exists()


# Thirty kinds in one folder


def text_as(name):
    return lambda folder: (folder / name).write_text("a report, not an image")


def cut(name, write):
    """A file of which the first 40 percent are left."""

    def make(folder):
        write(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 5])

    return make


def noise(*shape, dtype=np.int16):
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def save_picture(path, values=None, **how):
    Image.fromarray(noise(24, 32, dtype=np.uint8) if values is None else values).save(path, **how)


def pages(name, *values):
    first, *others = [Image.fromarray(page) for page in values]
    return lambda folder: first.save(folder / name, save_all=True, append_images=others)


def save_nifti(path, values=None):
    nibabel.save(nibabel.Nifti1Image(noise(8, 8, 4) if values is None else values, np.eye(4)), path)


def save_itk(path, values, **how):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values, **how), str(path))


def series(name, values=None, *, spoil=None, **how):
    """A folder with a series; ``spoil`` changes its third file."""

    def make(folder):
        paths = write_series(folder / name, noise(5, 8, 8) if values is None else values, **how)
        if spoil is not None:
            header = pydicom.dcmread(paths[2])
            spoil(header)
            header.save_as(paths[2])

    return make


def cut_slice(folder):
    path = write_series(folder / "cut_slice", noise(5, 8, 8))[2]
    path.write_bytes(path.read_bytes()[:-64])


def two_series(folder):
    for letter in "ab":
        write_series(folder / "two_series", noise(3, 8, 8), names=[f"{letter}{d}" for d in range(3)])


def no_pixels(header):
    del header.PixelData


def turned(header):
    header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def wider(header):
    header.PixelSpacing = [3, 3]


def localiser(header):
    header.Rows, header.PixelData = 4, header.PixelData[:64]


RGB24 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
# name of the case -> what makes it in a folder, and what is said of it
THIRTY_KINDS = {
    "empty.png": (lambda folder: (folder / "empty.png").write_bytes(b""), "cannot be read as a picture"),
    "report.jpg": (text_as("report.jpg"), "cannot be read as a picture"),
    "cut_off.png": (cut("cut_off.png", save_picture), "cannot be read as a picture"),
    "cut_jpeg.jpg": (cut("cut_jpeg.jpg", save_picture), "cannot be read as a picture"),
    "cut_page.tif": (cut("cut_page.tif", save_picture), "cannot be read as a picture"),
    "black.png": (
        lambda folder: save_picture(folder / "black.png", np.zeros((24, 32), np.uint8)),
        "every pixel has the same value",
    ),
    "nan.tif": (lambda folder: save_picture(folder / "nan.tif", np.full((8, 8), np.nan, np.float32)), "holds NaN"),
    "film.gif": (pages("film.gif", noise(8, 8, dtype=np.uint8), noise(8, 8, dtype=np.uint8).T), "has 2 pages; save"),
    "pages.tif": (
        pages("pages.tif", noise(8, 8, dtype=np.uint8), noise(8, 9, dtype=np.uint8)),
        "has 2 pages of different kinds",
    ),
    "report_1.nii": (text_as("report_1.nii"), "cannot be read as NIfTI"),
    "cut_volume.nii.gz": (cut("cut_volume.nii.gz", save_nifti), "cannot be read as NIfTI"),
    "four.nii": (
        lambda folder: save_nifti(folder / "four.nii", noise(8, 8, 4, 2)),
        r"has shape \(8, 8, 4, 2\), a series of volumes",
    ),
    "complex.nii": (
        lambda folder: save_nifti(folder / "complex.nii", np.ones((4, 4, 4), np.complex64)),
        "holds complex numbers",
    ),
    "rgb.nii.gz": (lambda folder: save_nifti(folder / "rgb.nii.gz", np.zeros((4, 4, 4), RGB24)), "is an RGB24 NIfTI"),
    "flat_volume.nii": (
        lambda folder: save_nifti(folder / "flat_volume.nii", np.ones((4, 4, 4), np.int16)),
        "every voxel has the same value",
    ),
    "report_2.nrrd": (text_as("report_2.nrrd"), "cannot be read"),
    "vectors.mha": (
        lambda folder: save_itk(folder / "vectors.mha", noise(4, 8, 8, 2), isVector=True),
        "channels",
    ),
    "two_series": (two_series, "holds 2 series.* choose one with series=UID"),
    "missing": (series("missing", drop=[2]), "allowing missing_slices"),
    "doubled": (series("doubled", offsets=(0, 2, 2, 4, 6)), "allowing duplicate_positions"),
    "uneven": (series("uneven", offsets=(0, 2, 4.7, 6, 8)), "allowing uneven_spacing"),
    "tilted": (series("tilted", tilt=0.6), "allowing gantry_tilt"),
    "cut_slice": (cut_slice, r"slice_002\.dcm: .*copy"),
    "no_pixels": (series("no_pixels", spoil=no_pixels), r"slice_002\.dcm: holds no pixels"),
    "turned": (series("turned", spoil=turned), r"slice_002\.dcm has directions .* move localisers"),
    "wider": (series("wider", spoil=wider), r"slice_002\.dcm has pixel spacing .* move localisers"),
    "localiser": (
        series("localiser", spoil=localiser),
        r"slice_002\.dcm has rows x columns \(4, 8\), .* move localisers",
    ),
    "nowhere": (series("nowhere", elements={"ImagePositionPatient": None}), "no ImagePositionPatient to stack them by"),
    "no_spacing": (series("no_spacing", elements={"PixelSpacing": None}), "no orientation or PixelSpacing; repair"),
    "crooked": (
        series("crooked", elements={"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}),
        "ImageOrientationPatient is .*; repair the header",
    ),
    "one_value": (series("one_value", np.ones((5, 8, 8), np.int16)), "every pixel has the same value"),
    "deep_colours": (
        series("deep_colours", noise(3, 8, 8, 3, dtype=np.uint16), photometric="RGB"),
        "colours have 16 bits, not 8",
    ),
}


@pytest.fixture(scope="module")
def told(model, tmp_path_factory) -> tuple[list[str], Path]:
    """One folder of all these and one good picture, segmented in one run: its lines on stderr, and its output."""
    folder = tmp_path_factory.mktemp("kinds")
    for make, _ in THIRTY_KINDS.values():
        make(folder)
    save_picture(folder / "good.png")
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        assert (
            main(["predict", "--model", str(model), "--input", str(folder), "--output_dir", str(folder / "out")]) == 1
        )
    return error.getvalue().splitlines(), folder / "out"


@pytest.mark.parametrize("name", THIRTY_KINDS)
def test_each_of_thirty_kinds_of_bad_input_is_refused_in_one_line_of_one_run(told, name):
    (line,) = [line for line in told[0] if f"/kinds0/{name}" in line]
    assert re.search(rf"/kinds0/{re.escape(name)}(/\S+)?: ", line)
    assert re.search(THIRTY_KINDS[name][1], line)


def test_thirty_bad_cases_stop_no_good_one(told):
    lines, output_dir = told
    assert len(THIRTY_KINDS) >= 30
    assert lines[-1].startswith(f"blosam: {len(THIRTY_KINDS)} of {len(THIRTY_KINDS) + 1} cases failed")
    assert read_label(output_dir / "good.png").shape == (1, 24, 32)
    statuses = [json.loads(line)["status"] for line in (output_dir / "manifest.jsonl").read_text().splitlines()]
    assert Counter(statuses) == {"failed": len(THIRTY_KINDS), "done": 1}


# Evaluating


def evaluate(model: Path, data: Path, output_dir: Path) -> list[object]:
    listed = ["--data_list", data / "list.json", "--dataset_dir", data]
    return ["evaluate", "--model", model, *listed, "--output_dir", output_dir]


def test_a_list_without_test_images_is_not_evaluated(model, data, tmp_path, refused):
    write_list(data, {**read_list(data), "testing": []})
    said = refused(*evaluate(model, data, tmp_path / "out"))
    assert re.search(r"list\.json: testing is empty; choose one of lower, upper, validation, testing", said)
    assert not (tmp_path / "out").exists()


def test_an_unknown_section_is_refused(model, data, tmp_path, refused):
    said = refused(*evaluate(model, data, tmp_path / "out"), "--section", "tests")
    assert re.search("tests is empty; choose one of lower, upper, validation, testing", said)


def test_a_truncated_test_image_is_named_and_the_others_are_scored(model, data, tmp_path, refused):
    name = cut_off(support(data, "image", "testing")).name
    said = refused(*evaluate(model, data, tmp_path / "out"))
    assert re.search(rf"{name}: cannot be read as a picture", said)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["scores"]["testing"]["lung"]["cases"] == 3
    assert summary["settings"]["failed_cases"] == 1


def test_where_every_test_image_fails_nothing_is_scored(model, data, tmp_path, refused):
    for item in read_list(data)["testing"]:
        cut_off(data / item["image"])
    said = refused(*evaluate(model, data, tmp_path / "out"))
    assert said.splitlines()[-1].startswith("blosam: 4 of 4 cases failed")
    assert not list((tmp_path / "out").glob("cases.*"))


# Making a list


def test_a_list_that_cannot_be_drawn_is_not_written(data, tmp_path, refused):
    folders = ["--images", data / "images", "--labels", data / "labels", "--dataset_dir", data]
    said = refused("datalist", *folders, "--n_shot", "40", "--output", tmp_path / "new.json")
    assert re.search("n_shot: 40 asked for, 10 labelled images found", said)
    assert not (tmp_path / "new.json").exists()


def test_a_label_without_image_is_named(data, tmp_path, refused):
    support(data, "image").unlink()
    folders = ["--images", data / "images", "--labels", data / "labels", "--dataset_dir", data]
    said = refused("datalist", *folders, "--output", tmp_path / "new.json")
    assert re.search(rf"labels/{support(data, 'label').name}: has no partner of stem", said)
    assert not (tmp_path / "new.json").exists()


def test_masks_never_replace_their_own_images(model, films, refused):
    before = (films / "a.png").read_bytes()
    said = refused("predict", "--model", model, "--input", films, "--output_dir", films, "--overwrite", "true")
    assert "is the folder of the images; choose another" in said
    assert (films / "a.png").read_bytes() == before


def test_a_model_without_its_training_state_is_not_replaced_either(model, phantoms, tmp_path, refused):
    shutil.copytree(model / "models", tmp_path / "out" / "models")
    (tmp_path / "out" / "models" / "state.pt").unlink()
    listed = ["--data_list", phantoms / "list.json", "--dataset_dir", phantoms, "--output_dir", tmp_path / "out"]
    assert "holds an earlier training" in refused("train", *listed, *FAST)


@pytest.mark.parametrize("section", ["training", "labels", "lower_"])
def test_a_key_of_the_list_that_is_no_section_is_refused(section, model, phantoms, tmp_path, refused):
    listed = ["--data_list", phantoms / "list.json", "--dataset_dir", phantoms, "--output_dir", tmp_path / "out"]
    said = refused("evaluate", "--model", model, *listed, "--section", section, "--use_mlflow", "false")
    assert "choose one of lower, upper, validation, testing" in said


FROM = {"labels": {"background": 0, "lung": 1, "heart": 2}}
MADE_LISTS = {
    "modality text": ({**FROM, "modality": "MR", "training": []}, "holds no labelled image"),
    "modality list": ({**FROM, "modality": ["MR"], "training": [{"image": ["a", "b"], "label": "c"}]}, r"\(0: MR\)"),
    "channel_names": ({**FROM, "channel_names": "MR", "training": [{"image": ["a", "b"], "label": "c"}]}, "give chann"),
    "training": ({**FROM, "training": 5}, "training is 5, not a list"),
    "dataset": ({**FROM, "file_ending": ".png", "dataset": [1]}, "dataset is not "),
    "no images": ({**FROM, "file_ending": ".png", "dataset": {"a": {"label": "x"}}}, "an item of dataset is not"),
    "allow": ({**FROM, "allow": None, "training": []}, "holds no labelled image"),
    "allow text": (
        {**FROM, "allow": "tilt", "training": [{"image": "a", "label": "b"}]},
        "allow: 'tilt' is not a list",
    ),
    "no labels": ({"training": [{"image": "a", "label": "b"}]}, '"labels" is missing'),
}


@pytest.mark.parametrize("name", MADE_LISTS)
def test_a_list_of_another_form_makes_no_list(tmp_path, refused, name):
    content, finding = MADE_LISTS[name]
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    said = refused("datalist", "--from", tmp_path / "dataset.json", "--output", tmp_path / "new.json")
    assert re.search(finding, said)
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        (["--allow", "5"], "allow: 5 is not a list of names"),
        (["--snomed", "[1]"], r"snomed: \[1\] is not tasks and codes"),
        (["--snomed", '"x"'], "snomed: 'x' is not tasks and codes"),
        *(
            (["--label_names", text], "labels: .* is not names and values")
            for text in ('["lung"]', "5", '{"lung": null}', '{"lung": 1.5}', '{"lung": []}', "true")
        ),
        (["--label_names", "{}"], "labels: no class beside background"),
        (["--label_names", '{"lung": 1, "heart": 2}', "--label_coding", "threshold"], "threshold tells one class"),
        (["--n_testing", "-1"], "--n_testing: expected 0 or more, found '-1'"),
        (["--n_validation", "-1"], "--n_validation: expected 0 or more, found '-1'"),
        (["--seed", "-1"], "--seed: expected 0 or more, found '-1'"),
        (["--n_shot", "0"], "--n_shot: expected 1 or more, found '0'"),
        (["--slices_per_volume", "-2"], "--slices_per_volume: expected 1 or more, found '-2'"),
        (["--channel", "-1"], "--channel: expected 0 or more, found '-1'"),
        (["--from", "dataset.json"], "give either --images and --labels, or --from"),
    ],
    ids=str,
)
def test_a_bad_option_makes_no_list(phantoms, tmp_path, refused, options, finding):
    folders = ["--images", phantoms / "images", "--labels", phantoms / "labels"]
    assert re.search(finding, refused("datalist", *folders, *options, "--output", tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        (["--label_suffix", "_mask", "--output", "new.json"], "label_suffix: a list names its pairs"),
        ([], "output: name the JSON file to write"),
        (["--check", "true", "--n_shot", "2"], "n_shot: a check of the list as it is draws nothing"),
    ],
    ids=str,
)
def test_an_option_without_effect_on_a_list_is_refused(phantoms, refused, options, finding):
    assert re.search(finding, refused("datalist", "--from", phantoms / "list.json", *options))


def test_a_decathlon_form_of_label_names_is_read(phantoms, tmp_path):
    folders = ["--images", str(phantoms / "images"), "--labels", str(phantoms / "labels")]
    options = ["--label_names", '{"1": "lung", "2": "heart"}', "--output", str(tmp_path / "new.json")]
    assert main(["datalist", *folders, *options]) == 0
    assert json.loads((tmp_path / "new.json").read_text())["labels"] == {"background": 0, "lung": 1, "heart": 2}
