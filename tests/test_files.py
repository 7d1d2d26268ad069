"""Atomic writing and hashes."""

from pathlib import Path

import pytest

from blosam_monai.files import atomic, file_sha256


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
