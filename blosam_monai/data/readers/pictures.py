"""Pictures and labels kept as pictures: upright, in colour or gray, or refused with a reason.

Pillow reads them; a TIFF of several equal pages is a volume without geometry.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from blosam_monai.data.geometry import Image, Label
from blosam_monai.files import PathLike

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp")
LABEL_CODINGS = ("index", "threshold", "colour")
THRESHOLD = 127  # of 0 to 255: soft edges and JPEG noise stay on their side of it
MOST_COLOURS = 256  # of a colour-coded label; drawings with soft edges have thousands
AFFINE_TOLERANCE = 1e-3  # mm
_NEW_SUBFILE_TYPE = 254  # TIFF 6.0 tag; its lowest bit marks a reduced copy of another page


def is_picture(path: PathLike) -> bool:
    """Whether a path is a file with the suffix of a picture."""
    return Path(path).suffix.lower() in SUFFIXES and Path(path).is_file()


def read_picture(path: PathLike) -> Image:
    """Read a picture, turned upright as its EXIF orientation says; its pages are the slices.

    Gray stays gray, everything else becomes RGB; transparency is dropped. Up to 8 bits a channel come as uint8, shown
    from 0 to 255. Gray of more bits keeps its numbers and is shown from its own minimum to its maximum; colours of 16
    bits are cut to their upper 8, which is noted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, truncated, several pages that are not those of an even TIFF, NaN, or the same value
            everywhere.
    """
    values = np.stack([_gray_or_rgb(page) for page in _open(path)])  # (D, H, W) or (D, H, W, 3)
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: holds NaN or infinite values; repair or leave out the image.")
    if (values == values[0, 0, 0]).all():
        raise ValueError(f"{path}: every pixel has the same value; repair or leave out the image.")
    full_range = (0.0, 255.0) if values.dtype == np.uint8 else (float(values.min()), float(values.max()))
    notes = ("16 bits a colour, of which the upper 8 are used",) if _has_deep_colours(path) else ()
    return Image(str(path), values, full_range=full_range, notes=notes)


def read_picture_label(path: PathLike, coding: str = "index") -> Label:
    """Read a label kept as a picture; its pages are the slices.

    Args:
        path: the file.
        coding: ``index``, the values as stored (of a palette picture, its indices, but of a GIF its gray values);
            ``threshold``, 1 where the picture is brighter than 127 of 255 (masks of 0 and 255, soft edges, JPEG noise),
            or, where it has more than 8 bits or no value above 1, brighter than half of its maximum, else 0;
            ``colour``, a mask for each colour but black, named ``#rrggbb`` in lower case, whatever its transparency.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, truncated, uneven pages, an unknown coding, or another coding than that of the file:
            colours or fractional values in an index map, soft or noisy colours.
    """
    if coding not in LABEL_CODINGS:
        raise ValueError(f"label_coding: {coding!r} is not one of {', '.join(LABEL_CODINGS)}.")
    if Path(path).is_dir():
        raise ValueError(f'{path}: is a folder; write "label_coding": "files" or "segments", or name a file in it.')
    read = {"index": _read_indices, "threshold": _read_foreground, "colour": _read_colours}[coding]
    return Label(str(path), read(path))


def read_label_folder(path: PathLike) -> Label:
    """Read a folder that holds one mask file a class or instance, pictures or volumes.

    Names are the files' stems without a number at the end: ``polyp_1.png`` and ``polyp-2.png`` are instances of
    ``polyp`` and united, which is noted; ``polyp_1`` alone is found by its full stem (``Label.parts``). Beside a
    ``polyp.png`` each goes by its full stem. Masks of 0 and 1 and masks of 0 and 255 both do (the coding
    ``threshold``).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file, no mask in it, or masks of different shapes or geometry.
    """
    from blosam_monai.data.readers import case_stem, volumes  # they import this module

    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: is a file; label_coding files reads a folder of masks: name its folder.")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; check dataset_dir and the data list.")
    parts: dict[str, Label] = {}
    files = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))  # macOS leaves ._ files
    for file in sorted(files):
        if is_picture(file):
            part = read_picture_label(file, "threshold")
        elif volumes.is_volume(file):
            part = volumes.read_label_volume(file, "threshold")
        else:
            continue
        stem = case_stem(file)
        if stem in parts:
            raise ValueError(
                f"{file}: has the same stem as {Path(parts[stem].path).name}; rename or remove one of them."
            )
        parts[stem] = part
        _check_same_grid(part, next(iter(parts.values())))
    if not parts:
        raise ValueError(f"{path}: holds no mask; export one file a class.")
    return _unite(path, parts)


def _unite(path: Path, parts: dict[str, Label]) -> Label:
    """Masks by stem -> a label whose names are without their numbers, where that is no stem itself."""
    stems_of: dict[str, list[str]] = {}
    for stem in parts:
        cut = re.sub(r"[_-]\d+$", "", stem)
        stems_of.setdefault(stem if cut in parts else cut, []).append(stem)
    masks = {stem: part.mask([1]) for stem, part in parts.items()}
    values = {
        name: masks[stems[0]] if len(stems) == 1 else np.logical_or.reduce([masks[stem] for stem in stems])
        for name, stems in stems_of.items()
    }
    notes = [
        f"{len(stems)} masks are united as {name!r}: {_list(stems)}" for name, stems in stems_of.items() if stems[1:]
    ]
    first = next(iter(parts.values()))
    numbered = {stem: mask for stem, mask in masks.items() if stem not in values}
    return Label(str(path), values, first.affine, tuple(notes), numbered)


def _list(names: list[str]) -> str:
    """Names, of many the first two and the last.

    >>> _list(["rib_1", "rib_2"]), _list(["rib_1", "rib_2", "rib_3", "rib_4"])
    ('rib_1, rib_2', 'rib_1, rib_2 ... rib_4')
    """
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} ... {names[-1]}"


def _read_indices(path: PathLike) -> np.ndarray:
    """(D, H, W) int32."""
    pages = _open(path)
    if _has_deep_colours(path):
        raise ValueError(f"{path}: the label has 16 bits a colour, of which 8 would be lost; save it as gray.")
    if Path(path).suffix.lower() == ".gif":
        pages = [page.convert("RGB") for page in pages]  # who writes a GIF renumbers its palette; what it shows is kept
    values = np.stack([np.asarray(page) for page in pages])
    if pages[0].mode in ("LA", "PA", "RGBA"):
        values = values[..., :-1]  # transparency says nothing about the class
    if values.ndim == 4:
        if (values != values[..., :1]).any():
            raise ValueError(
                f'{path}: the label has colours; write "label_coding": "colour" in the data list, or export a map of '
                "class numbers."
            )
        values = values[..., 0]
    if (values != np.floor(values)).any():
        raise ValueError(f"{path}: the label has fractional values; export a map of class numbers.")
    return values.astype(np.int32)


def _read_foreground(path: PathLike) -> np.ndarray:
    """(D, H, W) int32 of 0 and 1."""
    pages = _open(path)
    if not _is_deep(pages[0]):
        pages = [_without_palette(page).convert("L") for page in pages]
    values = np.stack([np.asarray(page) for page in pages])
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: the label holds NaN or infinite values; export it again.")
    greatest = float(values.max())
    level = THRESHOLD if values.dtype == np.uint8 and greatest > 1 else greatest / 2
    return (values > level).astype(np.int32)


def _read_colours(path: PathLike) -> dict[str, np.ndarray] | np.ndarray:
    """Colour -> (D, H, W) bool; or a map of background only, since masks need a name."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path}: JPEG changes the colours of a label; save as PNG without anti-aliasing.")
    pages = _open(path)
    if _is_deep(pages[0]):
        raise ValueError(f'{path}: the label has no colours; write "label_coding": "index" in the data list.')
    rgb = np.stack([np.asarray(_without_palette(page).convert("RGB"), dtype=np.int32) for page in pages])
    codes = rgb @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)  # (D, H, W), 0xrrggbb
    colours = np.unique(codes)
    if len(colours) > MOST_COLOURS:
        raise ValueError(f"{path}: the label has {len(colours)} colours; save as PNG without anti-aliasing.")
    return {f"#{colour:06x}": codes == colour for colour in colours if colour} or np.zeros_like(codes)


def _check_same_grid(part: Label, first: Label) -> None:
    if part.shape != first.shape:
        shapes = [str(p.shape[1:] if p.shape[0] == 1 else p.shape) for p in (part, first)]
        raise ValueError(
            f"{part.path}: mask has shape {shapes[0]}, {Path(first.path).name} has {shapes[1]}; export both again."
        )
    if part.affine is None and first.affine is None:
        return
    if part.affine is None or first.affine is None or not np.allclose(part.affine, first.affine, atol=AFFINE_TOLERANCE):
        raise ValueError(
            f"{part.path}: mask lies on another grid than {Path(first.path).name} (their affines differ); export both "
            "again."
        )


def _is_deep(page: PIL.Image.Image) -> bool:
    """Whether it is gray of more than 8 bits."""
    return page.mode.startswith(("I", "F"))


def _gray_or_rgb(page: PIL.Image.Image) -> np.ndarray:
    """(H, W) in the picture's own numbers, in the byte order of this machine; or (H, W, 3) uint8."""
    if _is_deep(page):
        values = np.asarray(page)
        return values.astype(values.dtype.newbyteorder("="))
    return np.asarray(page.convert("L") if page.mode in ("1", "L", "LA") else _without_palette(page).convert("RGB"))


def _without_palette(page: PIL.Image.Image) -> PIL.Image.Image:
    """Its colours; straight from a palette to RGB, PIL warns of transparent entries."""
    return page.convert("RGBA") if page.mode == "P" else page


def _has_deep_colours(path: PathLike) -> bool:
    """Whether the file has colours, or gray and alpha, of 16 bits, of which Pillow reads the upper 8."""
    with PIL.Image.open(path) as picture:
        return not _is_deep(picture) and any(";16" in str(tile[-1]) for tile in picture.tile)


def _open(path: PathLike) -> list[PIL.Image.Image]:
    """Open and fully decode the pages of a picture, all of one size and mode, turned as EXIF orientation says."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; check dataset_dir and the data list.")
    try:
        with PIL.Image.open(path) as picture:
            if isinstance(picture, TiffImageFile):
                count, pages = 1, _decode_pages(picture)
            else:
                count = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # phones add a preview
                pages = [ImageOps.exif_transpose(picture)]  # a copy, decoded
    except Exception as error:  # a damaged file meets PIL's decoders in their own ways: OSError, TypeError, EOFError
        raise ValueError(f"{path}: cannot be read as a picture ({error}); export it again.") from error
    if count > 1:
        raise ValueError(f"{path}: has {count} pages; save the wanted page as a file of its own.")
    if pages[0].mode == "LAB":  # Pillow converts it with a colour profile only
        raise ValueError(f"{path}: has CIE L*a*b* colours; save it as RGB.")
    kinds = list(dict.fromkeys((page.mode, *page.size) for page in pages))
    if len(kinds) > 1:
        found = " and ".join(f"{mode} {height} x {width}" for mode, width, height in kinds[:2])
        raise ValueError(
            f"{path}: has {len(pages)} pages of different kinds ({found}); save them as files of their own."
        )
    return pages


def _decode_pages(picture: TiffImageFile) -> list[PIL.Image.Image]:
    """The pages of a TIFF, but for its previews: later pages that are reduced copies of another one."""
    pages = []
    for number in range(picture.n_frames):
        picture.seek(number)
        if number == 0 or not picture.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1:
            pages.append(ImageOps.exif_transpose(picture))
    return pages
