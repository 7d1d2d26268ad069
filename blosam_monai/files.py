"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def check_output_dir(path: PathLike) -> None:
    """Raise where a folder cannot be written to or made; asked before the work, and nothing is made yet.

    Raises:
        ValueError: it is a file, or it or its nearest parent is not to be written to.
    """
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir: {there} is a file; choose a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: {path} cannot be written to; choose another, or ask for the right to.")


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


def case_hash(path: PathLike) -> str:
    """The first 12 digits of ``content_sha256``: what stands for an image where its name may not."""
    return content_sha256(path)[:12]


def write_json(path: PathLike, content: Any) -> None:
    """Write JSON, whole or not at all; what is not a number becomes null."""
    with atomic(path) as part:
        part.write_text(json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(content: Any) -> Any:
    """The content with None for what is not a number: JSON has no NaN."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
