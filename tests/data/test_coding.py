"""The coding of labels is found from all of them, whatever their format."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from blosam_monai.data.coding import find_coding, readable_labels


def disc_edge() -> np.ndarray:
    """Distance from the edge of a disc of radius 20 in (64, 64), pixels: positive inside."""
    y, x = np.mgrid[:64, :64]
    return 20 - np.hypot(y - 32, x - 32)


@pytest.mark.parametrize(
    ("name", "pixels", "coding", "labels"),
    [
        ("x.png", lambda d: (d > 0) * 1, "index", {"background": 0, "foreground": 1}),
        ("x.png", lambda d: (d > 0) * 1 + (d > 9) * 2, "index", {"background": 0, "class_1": 1, "class_3": 3}),
        ("x.png", lambda d: (d > 0) * 255, "threshold", {"background": 0, "foreground": 255}),
        ("x.png", lambda d: (d * 20 + 127).clip(0, 255), "threshold", {"background": 0, "foreground": 255}),
        ("x.jpg", lambda d: (d > 0) * 255, "threshold", {"background": 0, "foreground": 255}),
    ],
    ids=["one class", "two classes", "0 and 255", "soft edge", "jpeg"],
)
def test_the_coding_of_labels_is_found(tmp_path, name, pixels, coding, labels):
    Image.fromarray(pixels(disc_edge()).astype(np.uint8)).save(tmp_path / name)
    assert find_coding([tmp_path / name]) == (coding, labels)


def test_the_coding_is_found_from_all_labels_and_not_from_the_first(tmp_path):
    for value in (0, 1, 4):
        Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(tmp_path / f"{value}.png")
    files = sorted(tmp_path.iterdir())
    assert find_coding(files) == ("index", {"background": 0, "class_1": 1, "class_4": 4})
    with pytest.raises(ValueError, match="every label file is empty"):
        find_coding(files[:1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lung_cxr", ("threshold", {"background": 0, "foreground": 255})),
        ("kvasir_seg_256", ("threshold", {"background": 0, "foreground": 255})),
        ("dental_panoramic", ("threshold", {"background": 0, "foreground": 255})),
        ("drive_vessels", ("threshold", {"background": 0, "foreground": 255})),
        ("car_parts", ("index", {"background": 0, "class_1": 1, "class_2": 2, "class_3": 3, "class_4": 4})),
    ],
)
def test_the_coding_of_real_labels_is_found(real_data, name, expected):
    assert find_coding(sorted((real_data / name / "labels").iterdir())) == expected


def save_volume(path, values, dtype=np.uint8):
    nibabel.save(nibabel.Nifti1Image(np.asarray(values, dtype=dtype), np.eye(4)), path)
    return path


def test_the_values_of_volumes_are_those_of_all_of_them(tmp_path):
    """One is stored as float, and a label value of 255 is a class like others."""
    first, second = np.zeros((2, 4, 4, 4))
    first[0], second[1], second[2] = 2, 7, 255
    files = [save_volume(tmp_path / "a.nii.gz", first, np.float32), save_volume(tmp_path / "b.nii", second)]
    labels = {"background": 0, "class_2": 2, "class_7": 7, "class_255": 255}
    assert find_coding(files) == ("index", labels)
    assert find_coding(files[:1]) == ("index", {"background": 0, "foreground": 2})


def test_colours_are_classes_by_their_code(tmp_path):
    """Also where one picture shows gray only: white is a colour then."""
    first, second = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    first[:2], first[2:4], second[5:] = (255, 0, 0), (0, 128, 255), 255
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.fromarray(first).save(files[0])
    Image.fromarray(second).save(files[1])
    expected = {"colour_0080ff": "#0080ff", "colour_ff0000": "#ff0000", "colour_ffffff": "#ffffff"}
    assert find_coding(files) == ("colour", {"background": 0, **expected})


def test_too_many_colours_are_no_classes(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(64).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="labels: have 63 colours, too many to be classes"):
        find_coding([tmp_path / "a.png"])


def test_the_masks_of_folders_are_classes_by_their_names(tmp_path):
    mask = np.zeros((4, 4, 4))
    mask[1] = 1
    for name in ("p1/liver", "p1/spleen", "p2/spleen", "p2/tumour"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_volume(tmp_path / f"{name}.nii.gz", mask)
    names = {name: name for name in ("liver", "spleen", "tumour")}
    assert find_coding([tmp_path / "p1", tmp_path / "p2"]) == ("files", {"background": 0, **names})


def test_the_segments_of_a_dicom_seg_are_classes_by_their_labels(real_data):
    """The five labels are those in the file's Segment Sequence."""
    root = real_data / "dicom_seg_dcmqi_ct3"
    names = {name: name for name in ("DARK_BLUE", "GREEN", "LIGHT_BLUE", "ORANGE", "PURPLE")}
    assert find_coding([root / "seg" / "partial_overlaps.dcm"], images=[root / "image"]) == (
        "segments",
        {"background": 0, **names},
    )


def test_labels_of_several_kinds_are_named(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "a.png")
    files = [tmp_path / "a.png", save_volume(tmp_path / "b.nii.gz", np.eye(4)[None])]
    with pytest.raises(ValueError, match=r"labels: are of several kinds: .*a\.png \(pictures\).*; keep one kind"):
        find_coding(files)


@pytest.mark.parametrize("values", [(128, 255), (85, 170, 255), (1, 255)])
def test_a_few_distinct_gray_values_are_classes(tmp_path, values):
    """As the disc and the cup of REFUGE; the brightest class is the largest."""
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[4:] = values[-1]
    for row, value in enumerate(values[:-1]):
        pixels[row, : 16 if value > 1 else 0] = value
    pixels[0, 0] = values[0]
    if values[0] == 1:
        pixels[2:10] = 1
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = {"background": 0, **{f"class_{value}": value for value in values}}
    assert find_coding([tmp_path / "x.png"]) == ("index", expected)


def test_several_numbers_that_are_named_are_an_index(tmp_path):
    Image.fromarray(((disc_edge() * 20 + 127).clip(0, 255)).astype(np.uint8)).save(tmp_path / "x.png")
    several, one = {"disc": 128, "cup": 255}, {"disc": 255}
    assert find_coding([tmp_path / "x.png"], labels=several) == ("index", several)
    assert find_coding([tmp_path / "x.png"], labels=one)[0] == "threshold"


def test_labels_are_guessed_for_the_coding_that_is_asked_for(tmp_path):
    Image.fromarray(((disc_edge() > 0) * 255).astype(np.uint8)).save(tmp_path / "x.png")
    labels = {
        coding: find_coding([tmp_path / "x.png"], coding=coding)[1] for coding in ("index", "threshold", "colour")
    }
    assert labels == {
        "index": {"background": 0, "foreground": 255},
        "threshold": {"background": 0, "foreground": 255},
        "colour": {"background": 0, "colour_ffffff": "#ffffff"},
    }


def test_labels_that_cannot_be_read_are_told_from_the_others(tmp_path):
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    save_volume(tmp_path / "c.nii.gz", np.eye(4)[None])
    files = [tmp_path / name for name in ("a.png", "b.png", "c.nii.gz", "gone.png")]
    assert readable_labels(files, images=files) == [0, 2]
