"""Volumes: NIfTI through nibabel, NRRD and MetaImage through SimpleITK.

Arrays come out in the file's own order, slowest axis first (k, j, i), and in its own integers: a CT of 16 bits takes 16
bits a voxel in memory. Two libraries, since ITK refuses sheared NIfTI files and nibabel reads neither of the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from blosam_monai.data.geometry import Image, Label
from blosam_monai.files import PathLike

NIFTI_SUFFIXES = (".nii", ".nii.gz")
_ITK_READERS = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
SUFFIXES = (*NIFTI_SUFFIXES, *_ITK_READERS)
WHOLE = 1e-3  # how far a label stored as float may be from a whole number: float32 of a scaled label rounds
NO_GEOMETRY = "no geometry: voxel sizes only"
_MM_PER_UNIT = {1: 1e3, 2: 1.0, 3: 1e-3}  # NIfTI-1 xyzt_units: metre, millimetre, micrometre
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_KJI = [2, 1, 0, 3]  # columns of an affine for (k, j, i, 1) from those for (i, j, k, 1), and back


def is_volume(path: PathLike) -> bool:
    """Whether a path ends like a volume's, in small or capital letters."""
    return str(path).lower().endswith(SUFFIXES)


def is_nifti(path: PathLike) -> bool:
    """Whether a path ends like a NIfTI file's, in small or capital letters."""
    return str(path).lower().endswith(NIFTI_SUFFIXES)


def read_volume(path: PathLike) -> Image:
    """Read an image: integers as stored where the file scales nothing, else float32; 2-D files as one slice.

    Voxels that are NaN or infinite, as outside the field of view of a registered image, become the minimum, noted.

    Raises:
        ValueError: unreadable, a time series, complex or RGB NIfTI, or the same value everywhere; with the remedy.
    """
    values, affine, notes = _read(Path(path))
    if np.issubdtype(values.dtype, np.floating):
        values, replaced = _fill(values)
        if replaced:
            notes = (*notes, f"{replaced} voxels are NaN or infinite: read as the minimum, {values.min():g}")
    if values.max() == values.min():
        raise ValueError(f"{path}: every voxel has the same value; repair or leave out the image.")
    full_range = (0.0, 255.0) if values.ndim == 4 else None
    return Image(str(path), values, affine, full_range, notes=notes, placed=NO_GEOMETRY not in notes)


def read_label_volume(path: PathLike, coding: str) -> Label:
    """Read a label: integers as stored, or 0 and 1.

    A label that says nothing of where it lies (NIfTI with both codes 0, NRRD without a space) has no affine: it must
    have its image's shape.

    Args:
        path: the file.
        coding: ``index``, whole numbers, also stored as float; or ``threshold``, 1 above half of the maximum.

    Raises:
        ValueError: unreadable, colours, fractional values or NaN, or another coding.
    """
    if coding not in ("index", "threshold"):
        raise ValueError(f"{path}: label_coding {coding!r} does not fit a volume; use 'index' or 'threshold'.")
    values, affine, notes = _read(Path(path))
    if values.ndim == 4:
        raise ValueError(f"{path}: the label has colours; export a map of class numbers.")
    if np.issubdtype(values.dtype, np.floating) and not all(np.isfinite(part).all() for part in values):
        raise ValueError(f"{path}: the label holds NaN or infinite values; export a map of class numbers.")
    if coding == "threshold":
        values = (values > values.max() / 2).view(np.uint8)
    elif np.issubdtype(values.dtype, np.floating):
        values = _whole(path, values)
    return Label(str(path), values, None if NO_GEOMETRY in notes else affine, notes)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Values (D, H, W) or (D, H, W, 3), affine to mm LPS, notes."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the file in it, or rename the folder.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty; export it again.")
    values, affine, notes = _read_nifti(path) if is_nifti(path) else _read_itk(path)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(f"{path}: its header places all voxels in one plane; export it again with its orientation.")
    return values, affine, notes


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    try:
        nifti: Any = nibabel.load(path, mmap=False)
        affine = nifti.affine
    except Exception as error:  # damaged headers meet nibabel in many ways: ImageFileError, ValueError, EOFError
        raise _unreadable(path, "NIfTI", error) from error
    _check_nifti(path, nifti)
    try:
        values = nifti.dataobj.get_unscaled()
    except Exception as error:  # truncated and damaged data: OSError, EOFError, zlib.error
        raise _unreadable(path, "NIfTI", error) from error
    values = values.reshape(_pad(nifti.shape), order="F").T  # (D, H, W), a view
    values = _scale(values, nifti.dataobj.slope, nifti.dataobj.inter)
    notes: tuple[str, ...] = ()
    if nifti.header["qform_code"] == 0 and nifti.header["sform_code"] == 0:
        notes = (NO_GEOMETRY,)
    mm = _MM_PER_UNIT.get(int(nifti.header["xyzt_units"]) & 7, 1.0)
    if mm != 1:
        notes = (*notes, f"units are {nifti.header.get_xyzt_units()[0]}: converted to mm")
    return values, np.diag([mm, mm, mm, 1]) @ _RAS_TO_LPS @ affine[:, _KJI], notes


def _check_nifti(path: Path, nifti: Any) -> None:
    """Refuse what is not one volume of real numbers."""
    if not isinstance(nifti, nibabel.Nifti1Image):  # CIFTI files end in .nii, too
        raise ValueError(f"{path}: is a {type(nifti).__name__}, not a volume; export it as NIfTI.")
    dtype = nifti.get_data_dtype()
    if dtype.names:
        kind = "RGB24" if len(dtype.names) == 3 else "RGBA32"
        raise ValueError(f"{path}: is an {kind} NIfTI, one colour a voxel; export scalar images.")
    if np.issubdtype(dtype, np.complexfloating):
        raise ValueError(f"{path}: holds complex numbers; export the magnitude.")
    shape = nifti.shape
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{path}: has shape {shape}, no picture or volume; export it again.")
    if any(n > 1 for n in shape[3:]):
        raise ValueError(
            f"{path}: has shape {shape}, a series of volumes (time, channels); export one volume a file, of 3 "
            "dimensions."
        )


def _pad(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:3], 1)[:3]


def _scale(values: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Apply a NIfTI file's slope and intercept in place or on one float32 copy; native byte order."""
    if not values.dtype.isnative:
        values = values.byteswap(inplace=True).view(values.dtype.newbyteorder("="))
    if slope == 1 and inter == 0:
        return _single(values)
    values = values.astype(np.float32, copy=False)
    values *= np.float32(slope)
    values += np.float32(inter)
    return values


def _single(values: np.ndarray) -> np.ndarray:
    """Floats as float32: images carry no more, and half the memory does."""
    return values.astype(np.float32, copy=False) if np.issubdtype(values.dtype, np.floating) else values


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    kind = "NRRD" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImage"
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_ITK_READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, kind, error) from error
    _check_itk(path, reader)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(path, kind, error) from error
    values = sitk.GetArrayFromImage(image)
    n = image.GetDimension()
    affine = np.eye(4)
    affine[:n, :n] = np.array(image.GetDirection()).reshape(n, n) * image.GetSpacing()
    affine[:n, 3] = image.GetOrigin()
    placed = kind == "MetaImage" or image.HasMetaDataKey("NRRD_space") or not _is_default(image)
    return _single(values if n == 3 else values[None]), affine[:, _KJI], () if placed else (NO_GEOMETRY,)


def _is_default(image: sitk.Image) -> bool:
    """Whether an image lies where ITK puts one whose file does not say."""
    n = image.GetDimension()
    return not any(image.GetOrigin()) and np.array_equal(np.reshape(image.GetDirection(), (n, n)), np.eye(n))


def _check_itk(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse what is neither one volume of real numbers nor one of 8-bit colours."""
    size, channels, pixel = reader.GetSize(), reader.GetNumberOfComponents(), reader.GetPixelID()
    if (len(size) > 3 or channels > 1) and "Segment0_ID" in reader.GetMetaDataKeys():
        raise ValueError(
            f"{path}: is a 3D Slicer segmentation with overlapping segments in layers; export it from 3D Slicer as a "
            "label map, or as DICOM SEG."
        )
    if len(size) > 3:
        raise ValueError(
            f"{path}: has size {size}, a series of volumes (time, channels); export one volume a file, of 3 dimensions."
        )
    if pixel in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise ValueError(f"{path}: holds complex numbers; export the magnitude.")
    if channels > 1 and (channels, pixel) != (3, sitk.sitkVectorUInt8):
        what = sitk.GetPixelIDValueAsString(pixel)
        raise ValueError(f"{path}: has {channels} channels ({what}), 3 of 8 bits are RGB; export one volume a file.")


def _fill(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Replace NaN and infinity by the least finite value, in place, a slice at a time; and their number."""
    damaged = [d for d, part in enumerate(values) if not np.isfinite(part).all()]
    if not damaged:
        return values, 0
    low = min(float(part.min(initial=np.inf, where=np.isfinite(part))) for part in values)
    replaced = 0
    for d in damaged:
        holes = ~np.isfinite(values[d])
        replaced += int(holes.sum())
        values[d][holes] = low
    return values, replaced


def _whole(path: PathLike, values: np.ndarray) -> np.ndarray:
    """Floats that are whole numbers as int32; rounds ``values`` in place."""
    for part in values:
        whole = np.rint(part)
        off = float(np.abs(part - whole).max())
        if off > WHOLE:
            raise ValueError(
                f"{path}: the label has fractional values (up to {off:.3g} from a whole number); export a map of class "
                "numbers, or set label_coding to threshold."
            )
        part[:] = whole
    if np.abs(values).max() > np.iinfo(np.int32).max:
        raise ValueError(f"{path}: the label has values up to {values.max():g}; export a map of class numbers.")
    return values.astype(np.int32)


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    why = said[0] if kind == "NIfTI" else said[-1]  # nibabel gives the cause first, ITK last
    if why.startswith("Reason:"):  # "Success" is all that MetaIO knows
        why = "truncated, or of another format"
    return ValueError(f"{path}: cannot be read as {kind} ({why}); export it again.")
