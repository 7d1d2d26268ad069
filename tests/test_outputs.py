"""What predictions become on disk."""

import hashlib
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from blosam_monai.data.readers import read_label
from blosam_monai.outputs import Output, PlanOutputd, ResultExistsError, SavePredictiond
from blosam_monai.transforms import DecideTasksd, LoadCased
from tests.data.dicom_files import write_series

LABELS = {"background": 0, "body": 1, "wheel": 2, "glass": [3, 4]}
TASKS = ["body", "wheel", "glass"]
ROW = [[1, 1, 2, 2, 2, 2, 0, 3, 3, 0]]  # of the merged map, by hand


def prediction(path: Path, depth: int = 1) -> dict:
    """A case of (depth, 6, 10) and its logits: tasks in columns 0 to 2, 2 to 5, 7 to 8; the second is the surest."""
    item = LoadCased(LABELS)({"image": str(path)})
    logits = torch.full((3, depth, 6, 10), -4.0)
    logits[0, ..., :3] = 1
    logits[1, ..., 2:6] = 2
    logits[2, ..., 7:9] = 3
    return {**item, "pred": logits}


def save(item: dict, folder: Path, tasks=TASKS, *, merge="argmax", threshold=0.5, overlays=False, **plan) -> list[str]:
    """Decide, plan and write as the bundle does; returns the names of what is in the folder."""
    item = PlanOutputd(folder, tasks, merge=merge, overlays=overlays, **plan)(item)
    item = DecideTasksd(merge, threshold)(item)
    SavePredictiond(LABELS, tasks)(item)
    assert item["written"] == item["outputs"]
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def film(tmp_path) -> Path:
    image = np.zeros((6, 10), dtype=np.uint8)
    image[0] = 255
    Image.fromarray(image).save(tmp_path / "film_07.jpg")
    return tmp_path / "film_07.jpg"


@pytest.fixture
def volume(tmp_path) -> Path:
    """A NIfTI volume of four upright axial slices of 6 x 10, anisotropic, off centre."""
    values = np.random.default_rng(0).integers(0, 900, (10, 6, 4)).astype(np.int16)
    affine = np.diag([-0.7, -0.9, 2.5, 1.0])
    affine[:3, 3] = 31, 17, -5
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "ct_3.nii.gz")
    return tmp_path / "ct_3.nii.gz"


@pytest.fixture
def series(tmp_path) -> Path:
    values = np.random.default_rng(0).integers(0, 900, (4, 6, 10)).astype(np.int16)
    write_series(tmp_path / "series_1", values)
    return tmp_path / "series_1"


def labels_of(path: Path) -> list:
    return read_label(path).values[0].tolist()


def test_argmax_writes_one_map_of_the_lists_values_named_by_the_stem(film, tmp_path):
    assert save(prediction(film), tmp_path / "out") == ["film_07.png"]
    assert labels_of(tmp_path / "out" / "film_07.png") == ROW * 6


def test_separate_writes_one_mask_a_task_that_may_overlap(film, tmp_path):
    save(prediction(film), tmp_path / "out", merge="separate")
    assert {p.name: labels_of(p)[0] for p in (tmp_path / "out").iterdir()} == {
        "film_07_body.png": [255] * 3 + [0] * 7,
        "film_07_wheel.png": [0] * 2 + [255] * 4 + [0] * 4,
        "film_07_glass.png": [0] * 7 + [255] * 2 + [0],
    }


def test_the_threshold_is_a_probability(film, tmp_path):
    """The logits 1, 2, 3 are probabilities of 0.73, 0.88, 0.95."""
    save(prediction(film), tmp_path / "out", threshold=0.9)
    assert labels_of(tmp_path / "out" / "film_07.png") == [[0, 0, 0, 0, 0, 0, 0, 3, 3, 0]] * 6


def test_only_the_tasks_trained_are_written_with_their_values(film, tmp_path):
    item = prediction(film)
    item["pred"] = item["pred"][1:]
    save(item, tmp_path / "out", ["glass", "wheel"])
    assert set(np.unique(labels_of(tmp_path / "out" / "film_07.png"))) == {0, 2, 3}


def test_probabilities_are_written_beside_the_labels(film, tmp_path):
    """The logit 2 is a probability of 0.880797."""
    names = save(prediction(film), tmp_path / "out", probabilities=True)
    assert names == ["film_07.png", *(f"film_07_{task}_probability.png" for task in ("body", "glass", "wheel"))]
    with Image.open(tmp_path / "out" / "film_07_wheel_probability.png") as picture:
        assert np.asarray(picture)[0, 4] == round(0.880797 * 65535)


def test_an_overlay_of_the_pictures_own_size_is_written(film, tmp_path):
    save(prediction(film), tmp_path / "out", overlays=True)
    with Image.open(tmp_path / "out" / "overlays" / "film_07.png") as picture:
        assert picture.size == (10, 6)


def test_a_picture_of_several_pages_becomes_one_of_as_many(tmp_path):
    pages = [Image.fromarray(np.full((6, 10), 20 * n, np.uint8)) for n in range(4)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert save(prediction(tmp_path / "stack.tif", 4), tmp_path / "out") == ["stack.tif"]
    assert read_label(tmp_path / "out" / "stack.tif").values.tolist() == [ROW * 6] * 4


def test_a_nifti_volume_becomes_a_nifti_volume_on_its_grid(volume, tmp_path):
    """The volume is stored as (x, y, z) with x to the left and y to the back: columns are x, rows are y."""
    names = save(prediction(volume, 4), tmp_path / "out", probabilities=True)
    assert names[0] == "ct_3.nii.gz"
    written, given = nibabel.load(tmp_path / "out" / "ct_3.nii.gz"), nibabel.load(volume)
    assert np.array_equal(written.affine, given.affine)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), np.broadcast_to(np.array(ROW[0])[:, None, None], (10, 6, 4)))
    probability = nibabel.load(tmp_path / "out" / "ct_3_wheel_probability.nii.gz")
    assert np.allclose(probability.get_fdata()[4], 0.880797, atol=1e-5)


def test_a_series_becomes_a_dicom_seg_and_a_nifti_of_the_same_voxels(series, tmp_path):
    assert save(prediction(series, 4), tmp_path / "out") == ["series_1.nii.gz", "series_1.seg.dcm"]
    item = LoadCased(LABELS)({"image": str(series)})
    from blosam_monai.data.readers import read_image

    image = read_image(series)
    seg = read_label(tmp_path / "out" / "series_1.seg.dcm", "segments", image=image)
    nifti = read_label(tmp_path / "out" / "series_1.nii.gz", image=image)
    for task, number in zip(TASKS, (1, 2, 3), strict=True):
        upright = item["orientation"].apply(seg.mask([task]))
        assert np.array_equal(upright, np.broadcast_to(np.array(ROW[0]) == number, (4, 6, 10)))
        assert np.array_equal(seg.mask([task]), nifti.mask([number]))


def test_in_a_dicom_seg_separate_tasks_overlap(series, tmp_path):
    names = save(prediction(series, 4), tmp_path / "out", merge="separate", dicom_output=["seg"])
    assert names == ["series_1.seg.dcm"]
    seg = read_label(tmp_path / "out" / "series_1.seg.dcm", "segments")
    assert (seg.mask(["body"]) & seg.mask(["wheel"])).sum() == 4 * 6  # column 2
    assert pydicom.dcmread(tmp_path / "out" / "series_1.seg.dcm").SegmentsOverlap == "YES"


def test_an_existing_result_is_kept_unless_overwriting_is_asked_for(film, tmp_path):
    item, out = prediction(film), tmp_path / "out"
    out.mkdir()
    (out / "film_07.png").write_bytes(b"someone's work")
    with pytest.raises(ResultExistsError, match=r"film_07\.jpg: has its result already; add overwrite=true"):
        save(item, out)
    assert (out / "film_07.png").read_bytes() == b"someone's work"
    save(item, out, overwrite=True)
    assert labels_of(out / "film_07.png") == ROW * 6


def test_an_empty_file_is_no_result(film, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "film_07.png").touch()
    save(prediction(film), tmp_path / "out")
    assert labels_of(tmp_path / "out" / "film_07.png") == ROW * 6


def test_the_result_of_another_image_of_the_same_name_is_not_taken_for_this_ones(film, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "film_07.png").write_bytes(b"of another patient")
    output = Output("label", "picture", None, out / "film_07.png")
    line = {"case_id": "0" * 12, "outputs": [{"name_id": output.name_id}]}
    (out / "manifest.jsonl").write_text(json.dumps(line) + "\n" + '{"torn')
    with pytest.raises(ValueError, match=r"film_07\.png: is the result of another image of the same name"):
        save(prediction(film), out)
    line["case_id"] = hashlib.sha256(film.read_bytes()).hexdigest()[:12]
    (out / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ResultExistsError):
        save(prediction(film), out)


def test_a_lost_overlay_is_drawn_again(film, tmp_path):
    save(prediction(film), tmp_path / "out", overlays=True)
    (tmp_path / "out" / "overlays" / "film_07.png").unlink()
    save(prediction(film), tmp_path / "out", overlays=True)
    assert (tmp_path / "out" / "overlays" / "film_07.png").is_file()


def test_tasks_whose_files_would_have_one_name_are_refused(tmp_path):
    for tasks in (["a/b", "a:b"], ["Lung", "lung"]):
        with pytest.raises(ValueError, match="would give files of one name; rename a label"):
            PlanOutputd(tmp_path, tasks)


def test_what_a_killed_run_left_out_is_written_and_what_is_there_stays(film, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "film_07_glass.png").write_bytes(b"someone's work")
    names = save(prediction(film), tmp_path / "out", merge="separate")
    assert names == ["film_07_body.png", "film_07_glass.png", "film_07_wheel.png"]
    assert (tmp_path / "out" / "film_07_glass.png").read_bytes() == b"someone's work"


def test_results_never_lie_among_the_images(film, series, tmp_path):
    for path, out in ((film, tmp_path), (series, series), (series, series / "masks")):
        item = prediction(path, 4 if path == series else 1)
        with pytest.raises(ValueError, match="is the folder of the images; choose another"):
            save(item, out, overwrite=True)


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"merge": "vote"}, "merge: 'vote' is not one of argmax, separate"),
        ({"dicom_output": ["rtstruct"]}, r"dicom_output: \['rtstruct'\] is not a list of seg, nifti"),
        ({"dicom_output": []}, "dicom_output"),
    ],
)
def test_options_of_the_plan_are_checked(tmp_path, options, finding):
    with pytest.raises(ValueError, match=finding):
        PlanOutputd(tmp_path, TASKS, **options)


@pytest.mark.parametrize("threshold", [0, 1.5])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold: {threshold} is not a probability between 0 and 1"):
        DecideTasksd(threshold=threshold)
