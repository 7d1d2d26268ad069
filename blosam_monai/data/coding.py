"""How label files are coded, guessed from all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blosam_monai.data.geometry import Value
from blosam_monai.data.readers import pictures, read_image, read_label, volumes
from blosam_monai.data.tasks import Labels, task_values
from blosam_monai.files import PathLike

MANY = 32  # gray values or colours: more are no classes
_FEW = 8  # gray values: so many are classes rather than the soft edges of a mask
_NOISE = 16  # gray values off 0 or 255 that compression makes
_SOFT_EDGE = 0.3  # share of the foreground that may lie between 0 and 255 at the edges of a mask


def find_coding(
    files: Sequence[PathLike],
    *,
    images: Sequence[PathLike] | None = None,
    allow: Collection[str] = (),
    coding: str | None = None,
    labels: Labels | None = None,
) -> tuple[str, dict[str, Any]]:
    """Guess how label files are coded, from all of them: the coding and the labels, background first.

    ======================================  ================  =========================================
    labels                                  coding            names
    ======================================  ================  =========================================
    pictures of one class, 0 and 255        ``threshold``     ``foreground``
    gray or palette pictures, volumes       ``index``         ``foreground`` or ``class_<value>``
    pictures in up to 32 colours            ``colour``        ``colour_<rrggbb>``
    DICOM SEG and RTSTRUCT                  ``segments``      those of the segments or regions
    folders of one mask a class             ``files``         those of the files
    ======================================  ================  =========================================

    Masks with soft edges or JPEG noise are ``threshold`` too: many gray values, or all near 0 and 255. A few distinct
    values, as 128 and 255, are classes.

    Args:
        files: the labels.
        images: their images; needed for RTSTRUCT only.
        allow: see ``read_image``.
        coding: where it is known; the labels are then guessed for it.
        labels: where they are known; several numbers are then values of ``index``.

    Raises:
        ValueError: labels of several kinds, too many colours, or every label is empty.
    """
    kind = coding or _common_kind(files)
    if kind == "threshold":
        return "threshold", {"background": 0, "foreground": 255}
    if kind in ("segments", "files"):
        return kind, {"background": 0, **_names(files, kind, images, allow)}
    if kind == "colour":
        return "colour", {"background": 0, **_colours(files)}
    if labels and sum(isinstance(value, int) for wanted in task_values(labels).values() for value in wanted) > 1:
        return "index", dict(labels)
    try:
        counts = count_values(files, "index")
    except ValueError:
        if kind != "pictures":
            raise
        return "colour", {"background": 0, **_colours(files)}
    values = sorted(value for value in counts if isinstance(value, int))
    if not values:
        raise ValueError("labels: every label file is empty.")
    if kind == "pictures" and _is_mask(values, counts):
        return "threshold", {"background": 0, "foreground": 255}
    single = values == [1] or (kind != "pictures" and len(values) == 1)
    named: dict[str, Value] = {("foreground" if single else f"class_{value}"): value for value in values}
    return "index", {"background": 0, **named}


def readable_labels(
    files: Sequence[PathLike], *, images: Sequence[PathLike], coding: str | None = None, allow: Collection[str] = ()
) -> list[int]:
    """Numbers of the labels that can be read, so that a check can name the others beside them.

    Args:
        files, images: the labels and their images.
        coding: default: one that reads every sound label of its kind.
        allow: see ``read_image``.
    """
    sound = []
    for number, (file, path) in enumerate(tqdm(list(zip(files, images, strict=True)), "reading labels")):
        try:
            known = coding or {"pictures": "threshold", "volumes": "index"}.get(_kind(Path(file)), _kind(Path(file)))
            read_label(file, known, image=read_image(path, allow=allow) if known == "segments" else None)
        except (ValueError, OSError):
            continue
        sound.append(number)
    return sound


def _common_kind(files: Sequence[PathLike]) -> str:
    """The kind that all labels are of."""
    kind_of = {_kind(Path(file)): file for file in reversed(files)}
    if "threshold" in kind_of:
        kind_of.pop("pictures", None)  # saved beside JPEG, they are masks as well
    if len(kind_of) > 1:
        found = ", ".join(f"{Path(file).name} ({kind})" for kind, file in kind_of.items())
        raise ValueError(f"labels: are of several kinds: {found}; keep one kind.")
    return next(iter(kind_of))


def _kind(file: Path) -> str:
    """What a label is, from its name or, of a folder, from its files' names."""
    if file.is_dir():
        masks = [p for p in file.iterdir() if not p.name.startswith(".")]
        return "files" if any(pictures.is_picture(p) or volumes.is_volume(p) for p in masks) else "segments"
    if file.suffix.lower() in (".jpg", ".jpeg"):
        return "threshold"  # nothing else survives the compression
    if pictures.is_picture(file):
        return "pictures"
    return "volumes" if volumes.is_volume(file) else "segments"


def _names(
    files: Sequence[PathLike], coding: str, images: Sequence[PathLike] | None, allow: Collection[str]
) -> dict[str, Value]:
    """The names of masks, each standing for itself."""
    names: set[str] = set()
    paths: Sequence[PathLike | None] = images if images and coding == "segments" else [None] * len(files)
    for file, path in tqdm(list(zip(files, paths, strict=True)), "reading labels"):
        image = None if path is None else read_image(path, allow=allow)
        names.update(str(name) for name in read_label(file, coding, image=image).counts())
    if not names:
        raise ValueError("labels: every label file is empty.")
    return {name: name for name in sorted(names)}


def _colours(files: Sequence[PathLike]) -> dict[str, Value]:
    colours = sorted(str(colour) for colour in count_values(files, "colour"))
    if len(colours) > MANY:
        raise ValueError(f"labels: have {len(colours)} colours, too many to be classes; export maps of class numbers.")
    return {f"colour_{colour[1:]}": colour for colour in colours}


def count_values(files: Sequence[PathLike], coding: str) -> Counter[Value]:
    """Pixels or voxels of each value, background left out, over all labels."""
    counts: Counter[Value] = Counter()
    for file in tqdm(files, "reading labels"):
        counts.update(read_label(file, coding).counts())
    return counts


def _is_mask(values: list[int], counts: Counter[Value]) -> bool:
    """Whether gray values are those of one class in 0 and 255, with soft edges or noise between."""
    if all(value < _NOISE or value > 255 - _NOISE for value in values):
        dark = sum(counts[value] for value in values if value < _NOISE)
        return values[-1] > 255 - _NOISE and dark < _SOFT_EDGE * counts.total()
    between = sum(counts[value] for value in values[:-1])
    soft = len(values) > _FEW and between < _SOFT_EDGE * counts.total()
    return values[-1] > 255 - _NOISE and (len(values) > MANY or soft)
