"""From a hospital's files to its files: real volumes and series through the command line, looked at by other libraries.

No accuracy is claimed, and none matters for where a voxel lies.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from safetensors.numpy import load_file

from blosam_monai.__main__ import main
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.transforms import LoadCased
from tests.data.dicom_files import write_series

FAST = ["--image_size", "64", "--max_epochs", "20", "--use_mlflow", "false"]
HIPPOCAMPUS = {"anterior": 1, "posterior": 2}
ORGANS = {"liver": 5, "spleen": 1}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A run sets up logging for its process; the next test has its own."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def blosam(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# ---- NIfTI in, NIfTI out --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hippocampus(real_data, tmp_path_factory) -> Path:
    """Two tasks trained on 4 slices of 4 volumes: ``list.json`` and ``run``."""
    folder, data = tmp_path_factory.mktemp("hippocampus"), real_data / "msd_hippocampus"
    names = ["--label_names", json.dumps(HIPPOCAMPUS), "--n_shot", 4, "--output", folder / "list.json"]
    blosam("datalist", "--images", data / "imagesTr", "--labels", data / "labelsTr", "--dataset_dir", data, *names)
    listed = ["--data_list", folder / "list.json", "--dataset_dir", data]
    blosam("train", *listed, "--output_dir", folder / "run", *FAST)
    return folder


@pytest.fixture(scope="module")
def volumes(hippocampus, real_data) -> Path:
    """The predictions of all volumes."""
    images = real_data / "msd_hippocampus" / "imagesTr"
    blosam("predict", "--model", hippocampus / "run", "--input", images, "--output_dir", hippocampus / "masks")
    return hippocampus / "masks"


def grid_fields(path: Path) -> dict[str, bytes]:
    """What a NIfTI-1 header says of the grid, as it stands in the file; offsets of nifti1.h."""
    header = gzip.decompress(path.read_bytes())[:348]
    places = {"dim": (40, 56), "pixdim": (76, 108), "xyzt_units": (123, 124), "codes": (252, 256)}
    places |= {"quatern, qoffset": (256, 280), "srow": (280, 328)}
    return {name: header[begin:end] for name, (begin, end) in places.items()}


@pytest.mark.slow
def test_every_volume_comes_out_on_the_grid_of_its_header_byte_for_byte(volumes, real_data):
    images = sorted((real_data / "msd_hippocampus" / "imagesTr").iterdir())
    assert len(images) == 20
    assert {nibabel.load(path).get_data_dtype().name for path in images} == {"float32", "uint8"}
    for path in images:
        assert grid_fields(volumes / path.name) == grid_fields(path), path.name


@pytest.mark.slow
def test_the_values_written_are_those_of_the_list(volumes):
    found = {int(value) for path in volumes.glob("*.nii.gz") for value in np.unique(nibabel.load(path).dataobj)}
    assert found == {0, *HIPPOCAMPUS.values()}


@pytest.mark.slow
def test_the_scores_of_a_volume_are_those_of_the_files_written(hippocampus, real_data):
    """Dice by hand from mask and label as nibabel reads them; of a uint8 image and of a label in float32."""
    data = real_data / "msd_hippocampus"
    listed = ["--data_list", hippocampus / "list.json", "--dataset_dir", data]
    blosam(*("evaluate", "--model", hippocampus / "run", *listed, "--output_dir", hippocampus / "ev"), *FAST[4:])
    with (hippocampus / "ev" / "cases.csv").open(newline="") as file:
        scores = {(row["case"], row["task"]): float(row["dice"]) for row in csv.DictReader(file)}
    assert len(scores) == 16 * 2
    for case in ("hippocampus_001", "hippocampus_243"):
        source = data / "imagesTr" / f"{case}.nii.gz"
        out = hippocampus / "separate"
        blosam(
            *("predict", "--model", hippocampus / "run", "--input", source), "--output_dir", out, "--merge", "separate"
        )
        label = nibabel.load(data / "labelsTr" / f"{case}.nii.gz").get_fdata()
        for task, value in HIPPOCAMPUS.items():
            mask = nibabel.load(out / f"{case}_{task}.nii.gz").get_fdata() > 0
            assert scores[case, task] == pytest.approx(dice(mask, label == value), abs=1e-6)


# ---- DICOM in, DICOM SEG and NIfTI out ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unlabelled(hippocampus, real_data) -> tuple[Path, Path]:
    """The series without label, and the folder of its prediction."""
    series = real_data / "msd_hippocampus" / "dicom_unlabelled"
    blosam("predict", "--model", hippocampus / "run", "--input", series, "--output_dir", hippocampus / "dicom")
    return series / "13_HCropVolume", hippocampus / "dicom"


@pytest.fixture(scope="module")
def organs(real_data, tmp_path_factory) -> tuple[Path, Path]:
    """Liver and spleen trained on 4 slices of a CT; its series, and the folder of its prediction."""
    folder, data = tmp_path_factory.mktemp("organs"), real_data / "dicom_totalseg_ct"
    names = ["--label_names", json.dumps(ORGANS), "--n_shot", 4, "--output", folder / "list.json"]
    window = ["--shared_subjects", "true", "--window", "[-160, 240]"]
    pair = ["--images", data / "image", "--labels", data / "label", "--dataset_dir", data]
    blosam("datalist", *pair, *names, *window)
    listed = ["--data_list", folder / "list.json", "--dataset_dir", data]
    blosam("train", *listed, "--output_dir", folder / "run", *FAST)
    blosam("predict", "--model", folder / "run", "--input", data / "image", "--output_dir", folder / "masks")
    return data / "image", folder / "masks"


def positions(series: Path) -> dict[str, tuple[float, ...]]:
    """SOPInstanceUID -> ImagePositionPatient of the slices of a series."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in series.iterdir()]
    return {  # anonymised: one of the two has it at the start of its files only
        header.get("SOPInstanceUID") or header.file_meta.MediaStorageSOPInstanceUID: tuple(
            map(float, header.ImagePositionPatient)
        )
        for header in headers
    }


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("unlabelled", 32), ("organs", 20)])
def test_every_frame_lies_on_a_slice_and_refers_to_it(case, count, request):
    """As highdicom and pydicom read it; which frames there are is told by the foreground of the NIfTI."""
    series, written = request.getfixturevalue(case)
    (path,) = written.glob("*.seg.dcm")
    known = positions(series)
    assert len(known) == count
    seg = highdicom.seg.segread(path)
    (referenced,) = seg.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == set(known)
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    (nifti,) = written.glob("*.nii.gz")
    values = np.asarray(nibabel.load(nifti).dataobj)
    assert len(frames) == sum(
        bool((plane == value).any()) for plane in values.T for value in set(np.unique(values)) - {0}
    )
    for frame in frames:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        found = tuple(map(float, frame.PlanePositionSequence[0].ImagePositionPatient))
        assert found == known[source.ReferencedSOPInstanceUID]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "labels"), [("unlabelled", HIPPOCAMPUS), ("organs", ORGANS)])
def test_seg_and_nifti_agree_voxel_by_voxel_in_the_patient(case, labels, request):
    """The voxels of a segment, placed by highdicom, are those of its value, placed by ITK."""
    _, written = request.getfixturevalue(case)
    (path,), (nifti,) = written.glob("*.seg.dcm"), written.glob("*.nii.gz")
    seg, image = highdicom.seg.segread(path), sitk.ReadImage(str(nifti))
    values = sitk.GetArrayFromImage(image)
    compared = 0
    for number in seg.segment_numbers:
        volume = seg.get_volume(segment_numbers=[number], allow_missing_positions=True)
        indices = np.argwhere(volume.array[..., 0])
        points = volume.map_indices_to_reference(indices)
        found = [image.TransformPhysicalPointToIndex(point) for point in points.tolist()]
        value = labels[seg.get_segment_description(number).segment_label]
        assert sorted(found) == sorted(map(tuple, np.argwhere(values == value)[:, ::-1].tolist()))
        compared += len(found)
    assert compared > 1000


@pytest.mark.slow
def test_a_flipped_label_is_trained_on_as_itk_resamples_it(real_data):
    """Liver and spleen of a NIfTI whose rows run the other way than those of its series: Dice 1.000."""
    data = real_data / "dicom_totalseg_ct"
    others = [value for value in range(256) if value not in ORGANS.values()]
    load = LoadCased({"background": others, **ORGANS})
    label = data / "label" / "example_seg_dicom.nii.gz"
    masks = load({"image": str(data / "image"), "label": str(label)})["label"].numpy() > 0  # (T, D, H, W), upright
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(data / "image")))
    resampled = sitk.Resample(sitk.ReadImage(str(label)), reader.Execute(), sitk.Transform(), sitk.sitkNearestNeighbor)
    expected = sitk.GetArrayFromImage(resampled)
    for mask, value in zip(masks, ORGANS.values(), strict=True):
        assert mask.sum() > 1000
        assert dice(mask, expected == value) == 1


# ---- encoded once ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_encoded_for_one_training_serves_every_other(hippocampus, real_data, tmp_path, monkeypatch):
    encoded = []
    encode = PromptSam.encode
    monkeypatch.setattr(PromptSam, "encode", lambda self, image: encoded.append(len(image)) or encode(self, image))
    listed = ["--data_list", hippocampus / "list.json", "--dataset_dir", real_data / "msd_hippocampus"]
    counts = []
    for name, options in (
        ("first", []),
        ("again", []),
        ("joint", ["--method", "joint"]),
        ("swap", ["--method", "swap", "--seed", 1]),
        ("one task", ["--tasks", '["anterior"]', "--lora_rank", 2]),
    ):
        cached = ["--cache_dir", tmp_path / "cache", *options]
        blosam("train", *listed, "--output_dir", tmp_path / name, *FAST[:2], "--max_epochs", 1, *FAST[4:], *cached)
        counts.append(sum(encoded))
    assert counts == [4, 4, 4, 4, 4]  # four slices, at the first training


@pytest.mark.slow
def test_two_trainings_started_together_on_an_empty_cache_give_the_same_model(hippocampus, real_data, tmp_path):
    listed = ["--data_list", hippocampus / "list.json", "--dataset_dir", real_data / "msd_hippocampus"]
    common = [*listed, *FAST, "--cache_dir", tmp_path / "cache"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "blosam_monai", "train", *map(str, common), "--output_dir", str(tmp_path / name)],
            stdout=subprocess.DEVNULL,
            env=ONE_THREAD,
        )
        for name in "ab"
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    a, b = (load_file(tmp_path / name / "models" / "model.safetensors") for name in "ab")
    assert list(a) == list(b)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


# ---- what never happens ---------------------------------------------------------------------------------------------

# Python tells an audit hook of every name that is resolved and every connection, also from C. An error alone could be
# swallowed, so it is counted too; the last lines show that the hook sees what it is there for.
GUARDED = """
import json, pickle, socket, sys

sys.stdout.reconfigure(line_buffering=True)
seen = []
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "pickle.find_class")

def forbid(event, args):
    if event in FORBIDDEN:
        seen.append(f"{event} {args!r}")
        raise PermissionError(event)

def counted(name):
    function = getattr(pickle, name)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if result is not None:  # which is what the thread pool of MONAI's CacheDataset tells itself
            seen.append(f"pickle.{name} from {sys._getframe(1).f_code.co_filename}")
        return result
    return call

for name in ("load", "loads"):
    setattr(pickle, name, counted(name))
from blosam_monai.__main__ import main
import monai.bundle, mlflow.tracking  # what a library does to itself while it loads is not asked

seen.clear()
sys.addaudithook(forbid)
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
print("SEEN", json.dumps(seen))
seen.clear()
for forbidden in (
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: pickle.loads(b"cpathlib\\nPath\\n."),  # a class
    lambda: pickle.loads(b"K\\x07."),  # a number
):
    try:
        forbidden()
    except PermissionError:
        pass
print("CAUGHT", len(seen))
"""


@pytest.mark.slow
def test_no_network_is_touched_and_nothing_is_unpickled(hippocampus, real_data, tmp_path):
    data = real_data / "msd_hippocampus"
    listed = ["--data_list", hippocampus / "list.json", "--dataset_dir", data]
    runs = [
        ["train", *listed, "--output_dir", tmp_path / "run", *FAST[:2], "--max_epochs", 2],
        ["train", *listed, "--output_dir", tmp_path / "run", *FAST[:2], "--max_epochs", 2, "--resume", "true"],
        ["evaluate", *listed, "--model", tmp_path / "run", "--output_dir", tmp_path / "ev", "--section", "lower"],
        ["predict", "--model", tmp_path / "run", "--input", data / "imagesTs", "--output_dir", tmp_path / "nifti"],
        [
            "predict",
            "--model",
            tmp_path / "run",
            "--input",
            data / "dicom_unlabelled",
            "--output_dir",
            tmp_path / "seg",
        ],
    ]
    text = json.dumps([[str(argument) for argument in arguments] for arguments in runs])
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, text], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SEEN []" in done.stdout.splitlines(), done.stdout[-2000:]
    assert "CAUGHT 3" in done.stdout.splitlines()


# ---- whose images they are ------------------------------------------------------------------------------------------

NAME, PATIENT_ID = "Verylongname^Nobody", "ID-4711-0815"
SECRETS = (b"verylongname", b"nobody", b"19700101", PATIENT_ID.lower().encode())


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> Path:
    """Six series of a patient with labels, below a folder that names the patient; one has a slice twice.

    The files of the slices are named after the patient, too.
    """
    folder = tmp_path_factory.mktemp("clinic") / "Verylongname_Nobody_19700101"
    (folder / "labels").mkdir(parents=True)
    rows, columns = np.mgrid[:32, :32]
    for number in range(1, 7):
        disc = np.hypot(rows - 14, columns - 12 - number) < 8
        values = np.random.default_rng(number).integers(0, 200, (6, 32, 32)) + 700 * disc
        offsets = (0, 2, 4, 6, 8, 8) if number == 1 else (0, 2, 4, 6, 8, 10)
        elements = {"PatientID": PATIENT_ID, "PatientBirthDate": "19700101", "SeriesDescription": f"Head of {NAME}"}
        case = folder / "images" / f"series_{number}"
        names = [f"Verylongname_Nobody_{place}.dcm" for place in range(len(values))]
        write_series(
            case,
            values.astype(np.int16),
            offsets=offsets,
            names=names,
            patient_name=NAME,
            elements=elements,
        )
        label = np.broadcast_to(disc.T[..., None], (32, 32, 6)).astype(np.uint8)
        nifti = nibabel.Nifti1Image(label, np.diag([-1.0, -1, 2, 1]))
        nibabel.save(nifti, folder / "labels" / f"series_{number}.nii.gz")
    return folder


def bytes_to_search(path: Path) -> bytes:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).lower()


def test_no_patient_is_named_in_what_is_written_or_logged(patient, tmp_path, monkeypatch, capfd):
    """Only a line of the terminal names the file that could not be used, and a DICOM SEG its patient, as it must."""
    logged = []
    handle = logging.Logger.handle

    def note(self, record):
        logged.append(f"{record.getMessage()} {record.exc_text} {record.exc_info}")
        handle(self, record)

    monkeypatch.setattr(logging.Logger, "handle", note)
    out = tmp_path / "out"
    folders = ["--images", patient / "images", "--labels", patient / "labels", "--dataset_dir", patient]
    allow = ["--allow", '["duplicate_positions"]']
    blosam("datalist", *folders, *allow, "--n_shot", 4, "--support", "series_[1-4]", "--output", out / "list.json")
    listed = ["--data_list", out / "list.json", "--dataset_dir", patient]
    (patient / "images" / "series_5" / "Verylongname_Nobody_1.dcm").unlink()  # now a slice is missing
    mixed = patient / "images" / "mixed"  # is told by its descriptions, which name the patient
    for number in (2, 3):
        for path in (patient / "images" / f"series_{number}").iterdir():
            mixed.mkdir(exist_ok=True)
            shutil.copy(path, mixed / f"{number}_{path.name}")
    capfd.readouterr()
    cached = ["--cache_dir", out / "cache"]
    blosam("train", *listed, "--output_dir", out / "run", *FAST[:2], "--max_epochs", 2, *cached)
    told = [main([str(a) for a in ("evaluate", *listed, "--model", out / "run", "--output_dir", out / "ev")])]
    cases = ["--input", patient / "images", "--output_dir", out / "masks", "--probabilities", "true", *allow]
    told.append(main([str(a) for a in ("predict", "--model", out / "run", *cases)]))
    assert told == [1, 1]
    said = capfd.readouterr()
    named = [line for line in said.err.splitlines() if line.startswith("blosam:") and str(patient) in line]
    assert [re.search("holds 2 series|slices are missing", line)[0] for line in named] == [
        *("slices are missing", "holds 2 series", "slices are missing")
    ]
    others = "\n".join([said.out, *(line for line in said.err.splitlines() if line not in named), *logged]).lower()
    assert not [secret for secret in SECRETS if secret.decode() in others]

    files = [path for path in out.rglob("*") if path.is_file()]
    segs = [path for path in files if path.name.endswith(".seg.dcm")]
    assert len(segs) == 5
    assert all(pydicom.dcmread(path).PatientName == NAME for path in segs)
    kinds = {"".join(path.suffixes[-2:]) for path in files}
    assert {".json", ".jsonl", ".csv", ".db", ".nii.gz", ".png", ".pt", ".safetensors"} <= kinds
    leaks = {
        f"{path.relative_to(out)}: {secret.decode()}"
        for path in set(files) - set(segs)
        for secret in SECRETS
        if secret in bytes_to_search(path) or secret.decode() in str(path.relative_to(out)).lower()
    }
    assert not leaks
    manifest = [json.loads(line) for line in (out / "masks" / "manifest.jsonl").read_text().splitlines()]
    failures = [line["error"] for line in manifest if line["status"] == "failed"]
    assert len(failures) == 2
    assert failures[1].startswith("<file>: 1 of 6 slices are missing (gap of 4.00 mm, step 2.00)")
