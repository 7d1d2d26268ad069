"""What a user reads, and what a log must not."""

import pytest

from blosam_monai.errors import one_line, root_cause, without_names


def test_the_innermost_of_what_monai_wraps_is_told():
    inner = ValueError("a.png: is cut short")
    outer = RuntimeError("applying transform <Compose>")
    outer.__cause__ = RuntimeError("applying transform <Load>")
    outer.__cause__.__cause__ = inner
    assert root_cause(outer) is inner
    assert one_line(outer) == "a.png: is cut short"


def test_a_message_of_several_lines_is_one():
    assert one_line(ValueError("first\n   second")) == "first second"


def test_a_fault_that_is_none_of_the_users_has_its_kind():
    assert one_line(KeyError("pred")) == "KeyError: 'pred'"
    assert one_line(MemoryError()) == "MemoryError: "


def test_no_name_of_a_file_of_the_series_or_of_the_folder_of_results_is_left(tmp_path):
    series = tmp_path / "Doe_Mary Ann" / "CT"
    series.mkdir(parents=True)
    (series / "Doe Mary 3.dcm").touch()
    (series / "IM_Doe_2").touch()
    text = f"{series}: Doe Mary 3.dcm has directions [1, 0], IM_Doe_2 [0, 1]; see {series / 'Doe Mary 3.dcm'}; CT alone"
    cleaned = without_names(text, series, tmp_path / "out_Doe")
    assert "Doe" not in cleaned
    assert "has directions [1, 0]" in cleaned
    assert "Doe" not in without_names("output_dir: out_Doe is the folder of the images", series, tmp_path / "out_Doe")


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("/data/Doe John/ct.nii.gz: is cut short", ["/data/Doe John/ct.nii.gz"]),
        ("Doe_John.png: label has shape (1, 2)", ["films/Doe_John.png"]),
        ("films/Doe_John.png: bad; the other is labels/Doe_John_mask.png.", ["films/Doe_John.png", "labels/x.png"]),
        ("cannot open '/mnt/Doe/IM001' (no such file)", ["/elsewhere/a.dcm"]),
        (r"C:\data\Doe\a.png: bad", ["b.png"]),
        ("series/Doe/IM1: truncated", ["series/Doe"]),
    ],
)
def test_no_name_is_left_in_a_message_for_the_record(text, paths):
    cleaned = without_names(text, *paths)
    assert "Doe" not in cleaned
    assert "<file>" in cleaned


def test_the_rest_of_a_message_stays():
    text = "a/Doe.png: label value 4 is not in the data list's labels (1, 2, 3); add it there, 1/2."
    assert without_names(text, "a/Doe.png").startswith(
        "<file>: label value 4 is not in the data list's labels (1, 2, 3);"
    )
