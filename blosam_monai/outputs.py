"""What a prediction becomes on disk: the format follows the input's, the name the case's; nothing lost or half there.

A picture becomes a PNG (several pages a TIFF), a NIfTI, NRRD or MetaImage volume a NIfTI on the same grid, a DICOM
series a DICOM SEG and a NIfTI.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform

from blosam_monai.data.geometry import Image, Orientation
from blosam_monai.data.readers import case_stem
from blosam_monai.data.tasks import Labels, output_values, task_values
from blosam_monai.data.writers.dicom_seg import check_dicom_seg, write_dicom_seg
from blosam_monai.data.writers.nifti import write_nifti
from blosam_monai.data.writers.pictures import write_label, write_overlay, write_probability
from blosam_monai.files import PathLike, case_hash
from blosam_monai.transforms import MERGE_RULES, picture_of

MANIFEST = "manifest.jsonl"
DICOM_OUTPUTS = ("seg", "nifti")
_SUFFIX = {"picture": ".png", "pages": ".tif", "nifti": ".nii.gz", "seg": ".seg.dcm"}


class Output(NamedTuple):
    """One file of a case: ``label`` or ``probability``, in which format, of which task (or all), where."""

    content: str
    format: str
    task: str | None
    path: Path

    @property
    def name_id(self) -> str:
        """What the manifest calls the file: 12 digits of the SHA-256 of its name, which may be a patient's."""
        return hashlib.sha256(self.path.name.encode()).hexdigest()[:12]


class ResultExistsError(FileExistsError):
    """A case has been written before and is kept."""


class PlanOutputd(Transform):
    """Set an item's ``outputs``, before the work is done: what cannot or must not be written is said at once.

    Args:
        output_dir: folder of the files.
        tasks: names of the tasks.
        merge: ``argmax``: one map of label values; ``separate``: a mask a task (of 255 in a picture, 1 in a NIfTI; in a
            DICOM SEG the segments then may overlap).
        probabilities: also a map of probabilities a task.
        dicom_output: what a DICOM series becomes: ``seg``, ``nifti`` or both.
        snomed: task -> (code, meaning) for DICOM SEG, see ``write_dicom_seg``.
        overlays: also the slice with the most foreground as a picture, tinted, in the subfolder ``overlays``.
        overwrite: replace existing files.

    Raises:
        ValueError: an unknown option, or tasks whose files would have one name.
    """

    def __init__(
        self,
        output_dir: PathLike,
        tasks: Sequence[str],
        *,
        merge: str = "argmax",
        probabilities: bool = False,
        dicom_output: Collection[str] = DICOM_OUTPUTS,
        snomed: Mapping[str, Sequence[str]] | None = None,
        overlays: bool = True,
        overwrite: bool = False,
    ) -> None:
        if merge not in MERGE_RULES:
            raise ValueError(f"merge: {merge!r} is not one of {', '.join(MERGE_RULES)}.")
        self.dicom_output = [dicom_output] if isinstance(dicom_output, str) else list(dicom_output)
        if not self.dicom_output or set(self.dicom_output) - set(DICOM_OUTPUTS):
            raise ValueError(f"dicom_output: {dicom_output!r} is not a list of {', '.join(DICOM_OUTPUTS)}.")
        plain = [_plain(task).casefold() for task in tasks]  # some disks do not tell Lung from lung
        if len(set(plain)) < len(plain):
            raise ValueError(f"tasks: {', '.join(tasks)} would give files of one name; rename a label.")
        self.output_dir, self.tasks, self.merge = Path(output_dir), list(tasks), merge
        self.probabilities, self.snomed, self.overlays = probabilities, snomed or {}, overlays
        self.overwrite = overwrite

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Plan one item.

        Raises:
            ResultExistsError: all files are there and stay.
            ValueError: the output would lie among the images, a DICOM SEG cannot be written, or what is there is the
                result of another image.
        """
        source, grid = Path(data["source"]), data["grid"]
        folder = (source if source.is_dir() else source.parent).resolve()
        if folder in (self.output_dir.resolve(), *(self.output_dir.resolve().parents if source.is_dir() else ())):
            raise ValueError(f"output_dir: {self.output_dir} is the folder of the images; choose another.")
        outputs = list(self._outputs(grid, _name(data)))
        if not self.overwrite:
            outputs = self._missing(outputs, source)
        if any(output.format == "seg" for output in outputs):
            check_dicom_seg(self.tasks, snomed=self.snomed, image=grid)
        notes = data.get("notes", ())
        if grid.files and grid.affine is None:
            notes = (*notes, "a DICOM image without geometry: the result is a picture")
        return dict(data) | {"outputs": outputs, "written": [], "notes": notes}

    @cached_property
    def _made_from(self) -> dict[str, str]:
        """Of earlier runs; this one gives no name twice."""
        return sources_by_name(self.output_dir)

    def _missing(self, outputs: Sequence[Output], source: Path) -> list[Output]:
        """The outputs that are still to be written; those that are there must be of this image by the manifest."""
        there = [output for output in outputs if output.path.exists() and output.path.stat().st_size]
        known = [output for output in there if output.name_id in self._made_from]
        identity = case_hash(source) if known else None
        for output in known:
            if self._made_from[output.name_id] != identity:
                raise ValueError(
                    f"{output.path}: is the result of another image of the same name; choose another output_dir, or "
                    "add overwrite=true to replace it."
                )
        if len(there) == len(outputs):
            raise ResultExistsError(f"{source}: has its result already; add overwrite=true to replace it.")
        return [output for output in outputs if output not in there]

    def _outputs(self, grid: Image, stem: str) -> Any:
        formats = ["pages" if grid.shape[0] > 1 else "picture"]
        if grid.affine is not None:
            formats = self.dicom_output if grid.files else ["nifti"]
        for form in formats:
            apart = self.merge == "separate" and form != "seg"
            for task in self.tasks if apart else [None]:
                name = stem if task is None else f"{stem}_{_plain(task)}"
                yield Output("label", form, task, self.output_dir / f"{name}{_SUFFIX[form]}")
        form = "nifti" if grid.affine is not None else formats[0]
        for task in self.tasks if self.probabilities else []:
            path = self.output_dir / f"{stem}_{_plain(task)}_probability{_SUFFIX[form]}"
            yield Output("probability", form, task, path)
        if self.overlays:
            yield Output("overlay", "picture", None, self.output_dir / "overlays" / f"{stem}.png")


def sources_by_name(output_dir: PathLike) -> dict[str, str]:
    """``Output.name_id`` -> ``case_id`` of the image that a manifest says it was made from."""
    known: dict[str, str] = {}
    path = Path(output_dir) / MANIFEST
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):  # a line that a killed run tore
            case = json.loads(line)
            known |= {output["name_id"]: case["case_id"] for output in case["outputs"] if case["case_id"]}
    return known


class SavePredictiond(MapTransform):
    """Write an item's ``outputs`` from its prediction, each file whole or not at all; ``written`` says which are done.

    Args:
        labels, tasks: see ``task_values``.
        snomed: see ``PlanOutputd``.
    """

    def __init__(
        self,
        labels: Labels,
        tasks: Sequence[str] | None = None,
        *,
        snomed: Mapping[str, Sequence[str]] | None = None,
        keys: KeysCollection = "pred",
    ) -> None:
        super().__init__(keys)
        self.tasks = list(task_values(labels, tasks))
        numbers = [0, *output_values(labels, self.tasks).values()]
        self.table = np.array(numbers, np.uint8 if max(numbers) < 256 else np.uint16)
        self.snomed = snomed or {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one item: task numbers (D, H, W) or masks (T, D, H, W); probabilities are of its ``logits``."""
        pred = data[self.keys[0]].numpy()
        for output in data["outputs"]:
            if output.format == "seg":
                by_task = _Masks(pred, self.tasks, data["orientation"])
                write_dicom_seg(output.path, by_task, data["grid"], snomed=self.snomed)
            elif output.content == "overlay":
                self._draw(output, pred, data)
            else:
                self._write(output, self._values(output, pred, data), data)
            data["written"].append(output)
        return dict(data)

    def _draw(self, output: Output, pred: np.ndarray, data: Mapping[Hashable, Any]) -> None:
        shown = _fullest_slice(pred)
        masks = np.concatenate([_mask(pred[..., [shown], :, :], t) for t in range(len(self.tasks))])  # (T, H, W)
        write_overlay(output.path, picture_of(data["image"][:, shown]).numpy(), masks)

    def _values(self, output: Output, pred: np.ndarray, data: Mapping[Hashable, Any]) -> np.ndarray:
        """What one file holds, (D, H, W)."""
        if output.task is None:
            return self.table[pred]
        t = self.tasks.index(output.task)
        if output.content == "label":
            mask = _mask(pred, t)
            return mask if output.format == "nifti" else mask * np.uint8(255)
        values = np.empty(data["logits"].shape[1:], np.float32)
        for plane, logits in zip(values, data["logits"][t], strict=True):
            plane[:] = logits.float().sigmoid().numpy()
        return values

    def _write(self, output: Output, values: np.ndarray, data: Mapping[Hashable, Any]) -> None:
        if output.format == "picture":
            values = values[0]
        if output.format == "nifti":
            write_nifti(output.path, data["orientation"].invert(values), data["grid"])
        elif output.content == "probability":
            write_probability(output.path, values)
        else:
            write_label(output.path, values)


class _Masks(Mapping[str, np.ndarray]):
    """Task -> mask (D, H, W) in the file's order, made when asked for: together they may be larger than the image."""

    def __init__(self, pred: np.ndarray, tasks: Sequence[str], orientation: Orientation) -> None:
        self.pred, self.tasks, self.orientation = pred, list(tasks), orientation

    def __getitem__(self, task: str) -> np.ndarray:
        return self.orientation.invert(_mask(self.pred, self.tasks.index(task)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


def _mask(pred: np.ndarray, t: int) -> np.ndarray:
    """The mask (D, H, W) of one task, from task numbers (D, H, W) or masks (T, D, H, W)."""
    return pred == t + 1 if pred.ndim == 3 else pred[t] > 0


def _fullest_slice(pred: np.ndarray) -> int:
    """The slice with the most foreground; the middle one of an empty prediction."""
    areas = [np.count_nonzero(plane.any(axis=0)) for plane in np.moveaxis(pred.reshape(-1, *pred.shape[-3:]), 1, 0)]
    return int(np.argmax(areas)) if any(areas) else len(areas) // 2


def _name(data: Mapping[Hashable, Any]) -> str:
    """What the files of a case are called: its name in ``list_cases``, or its stem."""
    return data["name"] if "name" in data else case_stem(data["source"])


def _plain(name: str) -> str:
    """A task's name as part of a file name on any system."""
    return re.sub(r"[^\w\-. ]", "_", name)
