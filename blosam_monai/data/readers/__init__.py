"""The one door for reading images and labels, whatever the format.

Why not MONAI's readers: they swap the axes of pictures, read palettes as indices, ignore EXIF, take the first of
several DICOM series silently, and fall through to other readers on an error (docs/explanation/differences.md).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from blosam_monai.data.geometry import Image, Label
from blosam_monai.data.readers import dicom, dicom_labels, pictures, volumes
from blosam_monai.files import PathLike

LABEL_CODINGS = ("index", "threshold", "colour", "segments", "files")


def read_image(path: PathLike, *, series: str | None = None, allow: Collection[str] = ()) -> Image:
    """Read a picture, a NIfTI, NRRD or MetaImage file, a DICOM file or the folder of a DICOM series.

    Args:
        path: file or folder.
        series: SeriesInstanceUID, needed where a folder holds several.
        allow: flaws of a DICOM series to accept, see ``dicom.FLAWS``.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: what is wrong with the file, and the remedy.
    """
    path = Path(path)
    _check_exists(path)
    if series is not None and (pictures.is_picture(path) or volumes.is_volume(path)):
        raise ValueError(f"series: {series} asked for, but {path} is no DICOM; leave series out.")
    if pictures.is_picture(path):
        return pictures.read_picture(path)
    if volumes.is_volume(path):
        return volumes.read_volume(path)
    return dicom.read_dicom(path, series=series, allow=allow)


def read_label(path: PathLike, coding: str = "index", *, image: Image | None = None) -> Label:
    """Read a label; with its image, on that image's grid.

    Args:
        path: file or, for the coding ``files``, a folder.
        coding: ``index``: values as stored (of a palette picture, its indices, but of a GIF its gray values);
            ``threshold``: 1 where a picture is brighter than 127 of 255, or a volume than half of its maximum, else 0;
            ``colour``: names are the colours ``#rrggbb``; ``segments``: a DICOM SEG or RTSTRUCT, names are its segment
            labels or ROI names; ``files``: a folder with one mask a class or instance, names are the files' stems
            without a number at the end.
        image: the image it belongs to; RTSTRUCT needs it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: unreadable, fractional values, an unknown coding or one of other files, or no overlap with the
            image.
    """
    path = Path(path)
    if coding not in LABEL_CODINGS:
        raise ValueError(f"label_coding: {coding!r} is not one of {', '.join(LABEL_CODINGS)}.")
    _check_exists(path)
    if coding == "segments":
        return dicom_labels.read_segments(path, image=image)
    if dicom_labels.is_segments(path):
        raise ValueError(
            f'{path}: is a DICOM SEG or RTSTRUCT, not a label of label_coding {coding!r}; write "label_coding": '
            '"segments" in the data list.'
        )
    if coding == "files":
        label = pictures.read_label_folder(path)
    elif volumes.is_volume(path):
        label = volumes.read_label_volume(path, coding)
    else:
        label = pictures.read_picture_label(path, coding)
    return label if image is None else label.on(image)


def list_cases(path: PathLike) -> dict[Path, str]:
    """The cases at a path and their names, sorted: a file; the images of a folder and the DICOM series below it.

    A folder of DICOM images is one case, unless none of its series is a stack of slices, as of X-rays: then each file
    is one. A case is named by its stem;
    series in folders of the same name, as ``patient_1/CT`` and ``patient_2/CT``, by their way from the path
    (``patient_1_CT``).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no image, DICOM images beside other images or above other series, or two cases of the same name.
    """
    path = Path(path)
    _check_exists(path)
    if path.is_file():
        return {path: case_stem(path)}
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))  # macOS leaves ._ files
    cases = [p for p in files if pictures.is_picture(p) or volumes.is_volume(p)]
    folders = dicom.list_folders(path)
    loose = next((p for p in files if p not in cases and dicom.is_dicom(p)), None)
    if loose and cases:
        raise ValueError(f"{path}: holds DICOM files, as {loose.name}, beside other images; give each a folder.")
    if loose and not folders:
        cases = _list_films(path)
    elif loose and dicom.holds_images(path):
        raise ValueError(
            f"{path}: holds DICOM images itself, as {loose.name}, and series in folders, as "
            f"{folders[0].relative_to(path)}; give its own a folder, or name one of them."
        )
    if not cases and not folders:
        known = " ".join((*pictures.SUFFIXES, *volumes.SUFFIXES))
        raise ValueError(f"{path}: holds no image ({known}, DICOM).")
    same = len({folder.name for folder in folders}) < len(folders)
    names = {case: case_stem(case) for case in cases}
    names |= {folder: "_".join(folder.relative_to(path).parts) if same else case_stem(folder) for folder in folders}
    first_of: dict[str, Path] = {}
    for case, name in sorted(names.items()):
        if first_of.setdefault(name, case) != case:
            raise ValueError(f"{case}: has the same stem as {first_of[name].name}; rename or remove one of them.")
    return dict(sorted(names.items()))


def _list_films(path: Path) -> list[Path]:
    """The files of a folder of X-rays, each a case; else the folder, whose series is one."""
    held = dicom.list_series(path)
    films = sorted(file for series in held for file in series.files)
    return [path] if len(films) == 1 or any(series.is_stack for series in held) else films


def case_stem(path: PathLike) -> str:
    """Name of a case: of its file without suffix, or of its folder.

    >>> case_stem("a/hippocampus_001.nii.gz"), case_stem("b/film.1.png"), case_stem("CT.1.2.840.113")
    ('hippocampus_001', 'film.1', 'CT.1.2.840.113')
    """
    name = Path(path).name
    for suffix in sorted((*pictures.SUFFIXES, *volumes.SUFFIXES, ".dcm"), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; check dataset_dir and the data list.")
