"""Embeddings that outlive a run: a folder of safetensors files, named by what they were computed from.

Processes share a folder without locks. A file appears whole, by a rename; a file that another process has removed is a
miss; and what is stored under a key depends on nothing but the key, so that it does not matter who writes it last.
joblib.Memory and MONAI's PersistentDataset would pickle and grow without bound; diskcache keeps its index in SQLite,
which network drives do not lock reliably.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from blosam_monai.files import PathLike, atomic
from blosam_monai.networks.sam import embeddings_dir

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 10 * 2**30  # some 2500 embeddings (256, 64, 64) in float32, the size of SAM at 1024 pixels
KEPT_SHARE = 0.9  # of the bound: what remains after an eviction, so that not every put evicts
RESCAN_SHARE = 0.05  # of the bound: what one process writes before it looks again at what the others have written
LEFTOVER_AGE = 3600.0  # seconds; no write takes as long, so an older unfinished file is of a process that was killed

NO_CACHE = "none"

_KEY = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(rf"{_KEY.pattern}\.safetensors")
_UNFINISHED = re.compile(rf"\.{_KEY.pattern}\.[0-9a-f]{{32}}\.part\.safetensors")


class EmbeddingCache:
    """Tensors by key in a folder, bounded in size: the least recently used go first.

    One process keeps the folder within ``max_bytes``. P processes may exceed it by P (``max_bytes`` / 20 + one entry),
    as each looks at the others' files only after it has written a twentieth of the bound. Files that the cache has not
    named are never touched. Where the folder cannot be written, one warning is logged and nothing more is stored: a
    cache never ends a run.

    Args:
        folder: where the files lie, as ``<key[:2]>/<key>.safetensors``; made when the first is written.
        max_bytes: of all files together; a single larger entry is not stored.

    Attributes:
        hits, misses: how often ``get`` found an entry, and did not.

    Raises:
        ValueError: ``folder`` is a file or lies in one; ``max_bytes`` is not positive.
    """

    def __init__(self, folder: PathLike, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = Path(folder)
        file = next((path for path in (self.folder, *self.folder.parents) if os.path.isfile(path)), None)
        if file is not None:
            raise ValueError(f"cache_dir: {file} is a file; give a folder.")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes: {max_bytes} must be positive.")
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._writable = True
        self._counted: int | None = None  # bytes in the folder when this process last looked
        self._written = 0  # bytes that this process has written since

    @staticmethod
    def key(parts: Mapping[str, str | int | float | None]) -> str:
        """SHA-256, as 64 hexadecimal digits, of all that decides an embedding, whatever the order of ``parts``.

        >>> EmbeddingCache.key({"image": "ab12", "size": 1024}) == EmbeddingCache.key({"size": 1024, "image": "ab12"})
        True
        """
        text = json.dumps(dict(parts), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor stored under a key, on the CPU, or None; a damaged entry is removed."""
        path = self._path(key)
        tensor = None
        with suppress(OSError):  # not there, removed a moment ago, or unreadable: a miss in every case
            tensor = _unpack(path.read_bytes(), key)
            if tensor is None:
                logger.warning("An entry of the embedding cache was damaged; it is removed and computed again.")
                path.unlink(missing_ok=True)
        if tensor is None:
            self.misses += 1
            return None
        self.hits += 1
        with suppress(OSError):  # a folder that may only be read serves all the same
            os.utime(path)
        return tensor

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Store a tensor under a key, then remove the least recently used entries if the bound is exceeded."""
        path = self._path(key)
        data = _pack(tensor, key)
        if not self._writable or len(data) > self.max_bytes:
            return
        try:
            with atomic(path) as part:
                part.write_bytes(data)
            self._written += len(data)
            self._keep_bound()
        except OSError as error:  # disk full, quota, no permission
            self._writable = False
            logger.warning(
                "The embedding cache cannot be written (%s); this run stores no more embeddings. "
                "Free space, or set cache_dir to another folder.",
                error.strerror,
            )

    def stats(self) -> tuple[int, int]:
        """Number of entries, and their bytes."""
        sizes = [stat.st_size for _, stat in self._files(_ENTRY)]
        return len(sizes), sum(sizes)

    def clear(self) -> int:
        """Remove all entries, and what killed processes left; returns the number of entries removed.

        Raises:
            OSError: an entry may not be removed.
        """
        entries = [path for path, _ in self._files(_ENTRY)]
        for path in entries:
            path.unlink(missing_ok=True)
        self._remove_leftovers()
        self._counted = None
        return len(entries)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key: {key!r} is not 64 hexadecimal digits; make it by EmbeddingCache.key.")
        return self.folder / key[:2] / f"{key}.safetensors"

    def _files(self, name: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        """The cache's own files whose name matches, as they are now; other processes may come and go."""
        for number in range(256):
            files: list[os.DirEntry[str]] = []
            with suppress(FileNotFoundError):
                files = list(os.scandir(self.folder / f"{number:02x}"))
            for file in files:
                with suppress(FileNotFoundError):
                    if name.fullmatch(file.name):
                        yield Path(file.path), file.stat()

    def _keep_bound(self) -> None:
        """Look at the folder and evict, if this process has not looked for long or knows the bound to be exceeded."""
        known = self._counted is not None and self._counted + self._written <= self.max_bytes
        if known and self._written <= RESCAN_SHARE * self.max_bytes:
            return
        self._remove_leftovers()
        oldest_first = sorted(self._files(_ENTRY), key=lambda file: file[1].st_mtime_ns)
        total = sum(stat.st_size for _, stat in oldest_first)
        if total > self.max_bytes:
            for path, stat in oldest_first[:-1]:  # the newest fits, as ``put`` has checked
                if total <= KEPT_SHARE * self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size
        self._counted, self._written = total, 0

    def _remove_leftovers(self) -> None:
        for path, stat in self._files(_UNFINISHED):
            if time.time() - stat.st_mtime > LEFTOVER_AGE:
                path.unlink(missing_ok=True)


def open_cache(cache_dir: PathLike | None = None) -> EmbeddingCache | None:
    """The cache in a folder; None: ``embeddings`` in the cache of the package; ``none``: there is no cache."""
    if cache_dir == NO_CACHE:
        return None
    return EmbeddingCache(Path(cache_dir).expanduser() if cache_dir else embeddings_dir())


def _pack(tensor: torch.Tensor, key: str) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return save({"embedding": tensor}, metadata={"sha256": _digest(tensor, key)})


def _unpack(data: bytes, key: str) -> torch.Tensor | None:
    """The tensor of a file's bytes; None if they are not what was stored under the key."""
    try:
        tensor = load(data)["embedding"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # ``load`` has checked it
        return tensor if header["__metadata__"]["sha256"] == _digest(tensor, key) else None
    except (SafetensorError, KeyError, TypeError):  # no safetensors, or not of this cache
        return None


def _digest(tensor: torch.Tensor, key: str) -> str:
    """SHA-256 of an entry: safetensors itself notices a file that is too short, but no flipped bit."""
    digest = hashlib.sha256(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
