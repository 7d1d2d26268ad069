"""The one door for reading images and labels. Whatever the file, what comes out is upright: rows down, columns right.

MONAI's readers give pictures with swapped axes, read palette pictures as indices, ignore EXIF rotation and fall through
other readers on an error; a frozen SAM encoder needs upright RGB, hence our own (docs/explanation/differences.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from blosam_monai.files import PathLike

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp")
LABEL_CODINGS = ("index", "threshold")
THRESHOLD = 127  # of 0 to 255: soft edges and JPEG noise stay on their side of it
_NEW_SUBFILE_TYPE = 254  # TIFF 6.0 tag; its lowest bit marks a reduced copy of another page


def list_images(path: PathLike) -> list[Path]:
    """A file, or the pictures of a folder sorted by name; raises where there are none, or two of one stem."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    pictures = (p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    files = sorted(p for p in pictures if not p.name.startswith("."))  # macOS puts ._ files beside pictures
    if not files:
        raise ValueError(f"{path}: holds no picture ({' '.join(PICTURE_SUFFIXES)}).")
    first_of: dict[str, Path] = {}
    for file in files:
        if first_of.setdefault(file.stem, file) != file:
            raise ValueError(f"{file}: has the same stem as {first_of[file.stem].name}; rename or remove one of them.")
    return files


def read_image(path: PathLike) -> np.ndarray:
    """Read an image as upright RGB: float32 (3, H, W), intensities 0 to 255.

    Gray becomes three equal channels, transparency is dropped. Pictures of more than 8 bits a channel are gray and
    mapped linearly from their own minimum and maximum to 0 to 255.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, truncated, several pages, NaN, or the same value everywhere.
    """
    picture = _open(path)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: holds NaN or infinite values; repair or leave out the image.")
        low, high = float(values.min()), float(values.max())
        rgb = np.repeat((values - low)[None] * (255 / (high - low) if high > low else 0), 3, axis=0)
    else:
        if picture.mode == "P":
            picture = picture.convert("RGBA")  # straight to RGB, PIL warns of palettes with transparent entries
        rgb = np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
    if rgb.max() == rgb.min():
        raise ValueError(f"{path}: every pixel has the same value; repair or leave out the image.")
    return np.ascontiguousarray(rgb, dtype=np.float32)


def read_label(path: PathLike, coding: str = "index") -> np.ndarray:
    """Read a label map: int32 (H, W).

    Args:
        path: the file.
        coding: ``index``, the values as stored (of a palette picture, its indices, but of a GIF its gray values); or
            ``threshold``, 1 where the picture is brighter than 127 of 255, else 0 (masks of 0 and 255, soft edges, JPEG
            noise).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, truncated, several pages, coloured, fractional values, or an unknown coding.
    """
    if coding not in LABEL_CODINGS:
        raise ValueError(f"label_coding: {coding!r} is not one of {', '.join(LABEL_CODINGS)}.")
    picture = _open(path)
    if coding == "threshold":
        return (np.asarray(picture.convert("L")) > THRESHOLD).astype(np.int32)
    if picture.mode == "P" and Path(path).suffix.lower() == ".gif":
        picture = picture.convert("RGB")  # who writes a GIF renumbers its palette; what it shows is kept
    values = np.asarray(picture)
    if picture.mode in ("LA", "PA", "RGBA"):
        values = values[..., :-1]  # transparency says nothing about the class
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise ValueError(f"{path}: the label has colours; export a map of class numbers.")
        values = values[..., 0]
    if (values != np.floor(values)).any():
        raise ValueError(f"{path}: the label has fractional values; export a map of class numbers.")
    return values.astype(np.int32)


def _open(path: PathLike) -> Image.Image:
    """Open and fully decode a one-page picture, turned as its EXIF orientation says."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; check dataset_dir and the data list.")
    try:
        with Image.open(path) as picture:
            pages = _count_pages(picture)
            upright = ImageOps.exif_transpose(picture)  # a copy, decoded
    except Exception as error:  # a damaged file meets PIL's decoders in their own ways: OSError, TypeError, EOFError
        raise ValueError(f"{path}: cannot be read as a picture ({error}); export it again.") from error
    if pages > 1:
        raise ValueError(f"{path}: has {pages} pages; save the wanted page as a file of its own.")
    return upright


def _count_pages(picture: Image.Image) -> int:
    """Number of pages; previews are not counted: a TIFF's pages of reduced resolution, those of phones' MPO."""
    if picture.format == "MPO":
        return 1
    pages = getattr(picture, "n_frames", 1)
    if not isinstance(picture, TiffImageFile):
        return pages
    previews = 0
    for page in range(1, pages):
        picture.seek(page)
        previews += picture.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1
    picture.seek(0)
    return pages - previews
