"""Results as NIfTI: on the grid of the image, in its header's words where the image was a NIfTI file."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from blosam_monai.data.geometry import GRID_TOLERANCE, Image, spacing
from blosam_monai.data.readers.volumes import NIFTI_SUFFIXES, is_nifti
from blosam_monai.files import PathLike, atomic

COMPRESSION = 1  # of gzip; label maps shrink a hundredfold at any level, and level 1 is the fastest
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SCANNER = 1  # NIfTI-1 code of an affine: scanner-based anatomical coordinates
# Fields of free text, or about the intensities of the image; NIfTI-2 has no data_type, glmax and glmin.
_CLEARED = (
    *("data_type", "db_name", "aux_file", "intent_name", "intent_code", "intent_p1", "intent_p2", "intent_p3"),
    *("cal_min", "cal_max", "glmin", "glmax"),
)


def write_nifti(path: PathLike, values: np.ndarray, image: Image, *, dtype: Any = None) -> None:
    """Write a label map or a probability map of an image, whole or not at all.

    Of a NIfTI image the result keeps version, byte order, shape (also (X, Y), (X, Y, 1), (X, Y, Z, 1)), both affines
    with their codes, voxel sizes and units, bit by bit, unless nibabel finds a field invalid and mends it. It does not
    keep what may name the patient: free text (``descrip`` says blosam_monai, ``db_name``, ``aux_file`` and
    ``intent_name`` are empty) and header extensions (they may hold a DICOM header). Of any other image it is NIfTI-1 in
    mm, both codes 1 (scanner); a sheared grid (tilted gantry) has the sform only, since a qform cannot express it.

    Args:
        path: ends in .nii.gz or .nii.
        values: (D, H, W) on the image's grid, in its file's order.
        image: as read; a NIfTI file is opened again for its header.
        dtype: of the file; None: float32 for floats, else the smallest integers that hold the values.

    Raises:
        ValueError: another suffix, another shape than the image's, an image without geometry, or values that do not
            fit in ``dtype``.
    """
    if not is_nifti(path):
        raise ValueError(f"{path}: a NIfTI file ends in {' or '.join(NIFTI_SUFFIXES)}; name it so.")
    if values.shape != image.shape:
        raise ValueError(f"values: have shape {values.shape}, their image {image.path} has {image.shape}.")
    dtype = _choose_dtype(values, dtype)
    header = _reopen(image) if is_nifti(image.path) else _make_header(image)
    header.set_data_dtype(dtype)
    header["descrip"] = b"blosam_monai"
    data = values.T.reshape(header.get_data_shape())  # (X, Y[, Z[, 1]]), a view; nibabel casts a slice at a time
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    nifti = kind(data, None, header)
    with atomic(path) as part, open(part, "wb") as file:
        if Path(path).suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", COMPRESSION, file, mtime=0) as zipped:  # the same bytes at every run
                nifti.to_stream(zipped)
        else:
            nifti.to_stream(file)


def _choose_dtype(values: np.ndarray, dtype: Any) -> np.dtype[Any]:
    if values.dtype == bool:
        fits: np.dtype[Any] = np.dtype(np.uint8)
    elif np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        fits = np.min_scalar_type(high if low >= 0 else min(low, -high - 1))
    else:
        fits = np.dtype(np.float32)
    if dtype is None:
        return fits
    if not np.can_cast(fits, dtype):
        raise ValueError(
            f"dtype: {np.dtype(dtype)} does not hold values of {values.min()} to {values.max()}; use {fits}."
        )
    return np.dtype(dtype)


def _reopen(image: Image) -> Any:
    """The header of the image's file without text and extensions."""
    nifti: Any = nibabel.load(image.path)
    header = nifti.header.copy()
    if (*header.get_data_shape()[:3], 1)[:3] != image.shape[::-1]:
        raise ValueError(f"{image.path}: has changed since it was read; run again.")
    header.extensions.clear()
    for field in _CLEARED:
        if field in header:
            header[field] = np.zeros((), header[field].dtype)
    return header


def _make_header(image: Image) -> Any:
    if image.affine is None:
        raise ValueError(f"{image.path}: has no geometry, a picture; write its result as PNG.")
    affine = (_LPS_TO_RAS @ image.affine)[:, [2, 1, 0, 3]]  # for (i, j, k, 1)
    header = nibabel.Nifti1Header()
    header.set_data_shape(image.shape[::-1])
    header.set_xyzt_units("mm")
    header.set_sform(affine, _SCANNER)
    header.set_qform(affine, _SCANNER)  # without its shears
    lost = np.abs(header.get_qform() - affine)[:3] @ [*image.shape[::-1], 1]  # mm, at the farthest voxel
    if lost.max() > GRID_TOLERANCE * min(spacing(image.affine)):
        header.set_qform(None, 0)
    return header
