"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PathLike = str | os.PathLike[str]


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """A path to write to that becomes ``path`` when the block ends well, and vanishes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part{path.suffix}")  # unique on a shared drive too
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_sha256(path: PathLike) -> str:
    """SHA-256 of a file's bytes; of a folder, of the sorted hashes of its files, at any depth.

    Names do not matter; hidden files and folders are left out.
    """
    path = Path(path)
    if not path.is_dir():
        return file_sha256(path)
    hashes = sorted(
        file_sha256(file)
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
