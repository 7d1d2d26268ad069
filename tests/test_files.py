"""Atomic writing and hashes."""

import hashlib
import json
from pathlib import Path

import pytest

from blosam_monai.files import atomic, check_output_dir, content_sha256, file_sha256, write_json


def write_half(path: Path) -> None:
    with atomic(path) as part:
        part.write_text("half")
        raise RuntimeError("halfway")


def test_a_failing_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(tmp_path / "new" / "x.txt")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failing_block_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("earlier")
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "x.txt"
    with atomic(path) as part:
        part.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_of_abc_is_the_one_of_the_standard(tmp_path):
    """FIPS 180-2, appendix B.1."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == expected


@pytest.fixture
def series(tmp_path):
    """A folder of two files, "abc" and the empty one."""
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"abc")
    (folder / "2.dcm").write_bytes(b"")
    return folder


def test_the_hash_of_a_folder_is_that_of_the_sorted_hashes_of_its_files(series):
    """The two hashes are those of FIPS 180-2 for "abc" and of the empty message."""
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert content_sha256(series) == hashlib.sha256(f"{abc}\n{empty}".encode()).hexdigest()


def test_the_hash_of_a_folder_does_not_depend_on_names_or_hidden_files(series):
    before = content_sha256(series)
    (series / "1.dcm").rename(series / "9.dcm")
    (series / ".DS_Store").write_bytes(b"hidden")
    assert content_sha256(series) == before


def test_the_hash_of_a_folder_changes_with_any_of_its_files(series):
    before = content_sha256(series)
    (series / "2.dcm").write_bytes(b"x")
    assert content_sha256(series) != before


def test_the_content_of_a_file_is_the_file(series):
    assert content_sha256(series / "1.dcm") == file_sha256(series / "1.dcm")


def test_a_path_with_nothing_there_has_no_hash(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        content_sha256(tmp_path / "gone")


def test_a_folder_that_cannot_be_written_to_is_refused_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir: .*file is a file; choose a folder"):
        check_output_dir(tmp_path / "file" / "out")
    check_output_dir(tmp_path / "a" / "b")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # we may be root, whom nothing stops
    with pytest.raises(ValueError, match=r"output_dir: .*a/b cannot be written to; choose another"):
        check_output_dir(tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_is_not_a_number_is_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5], "y": {"z": float("nan")}, "n": (2, "nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5], "y": {"z": None}, "n": [2, "nan"]}
