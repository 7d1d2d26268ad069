"""Peak memory and time of segmenting a CT of 512 x 512 x 400 voxels on the CPU, as one Markdown table.

    python benchmarks/inference_memory.py             # ten minutes on two idle cores
    python benchmarks/inference_memory.py --quick     # 40 slices

The case is a phantom of a body with five organs and noise, as NIfTI (int16, .nii.gz) and as a DICOM series. The tiny
SAM is trained on four slices of another one first, so that masks have the size of organs; ViT-B has random weights and
untrained adapters, for the time only. Each row is a process of its own that runs the chain of the bundle's
``inference.json``: NIfTI in, NIfTI out; DICOM in, DICOM SEG and NIfTI out. ``above_model_gb`` is its peak resident
memory less what was resident once imports and network were loaded, in GB of 1e9 bytes; ``seconds`` is reading, network
and writing; ``foreground`` is the share of the voxels that were written as an organ, summed over the files. Linux,
since peaks are read from /proc. On a busy machine OMP_NUM_THREADS=1 gives steadier times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIDE, SLICES = 512, 400  # pixels, of a CT of the trunk
QUICK_SLICES = 40
VIT_B_SLICES = 20  # ViT-B takes half a second a slice
SUPPORTS = 4
# name -> HU, centre (d, h, w) and half axes as shares of the volume, -1 to 1.
ORGANS = {
    "liver": (110, (0.1, -0.15, -0.35), (0.5, 0.4, 0.3)),
    "spleen": (160, (0.1, 0.2, 0.5), (0.35, 0.2, 0.15)),
    "lung": (-800, (-0.55, 0.0, 0.4), (0.4, 0.4, 0.25)),
    "kidney": (220, (0.4, 0.35, -0.3), (0.4, 0.12, 0.12)),
    "bone": (500, (0.0, 0.5, 0.0), (0.95, 0.12, 0.12)),
}
LABELS = {"background": 0} | {name: value for value, name in enumerate(ORGANS, start=1)}
NIFTI, DICOM = "NIfTI", "DICOM"
ROWS = [
    {"source": NIFTI, "classes": 1},
    {"source": NIFTI, "classes": 5},
    {"source": NIFTI, "classes": 5, "half_depth": True},
    {"source": DICOM, "classes": 1},
    {"source": DICOM, "classes": 5},
    {"source": DICOM, "classes": 5, "half_depth": True},
    {"source": NIFTI, "classes": 5, "options": {"merge": "separate"}},
    {"source": DICOM, "classes": 5, "options": {"merge": "separate"}},
    {"source": DICOM, "classes": 5, "options": {"merge": "separate", "threshold": 0.01}},  # segments overlap
    {"source": NIFTI, "classes": 1, "options": {"probabilities": True}},
    {"source": NIFTI, "classes": 5, "options": {"probabilities": True}},
    {"source": NIFTI, "classes": 1, "options": {"average_axes": True}},
    {"source": NIFTI, "classes": 5, "options": {"average_axes": True}},
    {"source": NIFTI, "classes": 1, "model": "vit_b"},
    {"source": NIFTI, "classes": 5, "model": "vit_b"},
]
COLUMNS = (
    *("model", "source", "slices", "classes", "options", "threads", "above_model_gb", "seconds", "ms_per_slice"),
    "foreground",
)


def phantom(depth: int, chosen: range | None = None, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The chosen slices of a phantom: HU (D, H, W) int16 and label (D, H, W) uint8."""
    rng = np.random.default_rng(seed)
    chosen = range(depth) if chosen is None else chosen
    rows, columns = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)
    hu = np.empty((len(chosen), SIDE, SIDE), np.int16)
    label = np.zeros(hu.shape, np.uint8)
    for place, d in enumerate(chosen):
        along = 2 * (d + 0.5) / depth - 1
        plane = np.where((rows / 0.7) ** 2 + (columns / 0.9) ** 2 < 1, 40.0, -1000.0)
        for value, (gray, centre, half) in enumerate(ORGANS.values(), start=1):
            offsets = ((position - c) / h for position, c, h in zip((along, rows, columns), centre, half, strict=True))
            inside = sum(offset**2 for offset in offsets) < 1
            plane[inside], label[place][inside] = gray, value
        hu[place] = np.rint(plane + rng.normal(0, 20, plane.shape))
    return hu, label


def prepare(folder: Path, depth: int) -> None:
    """Write the phantom in both formats at full and half depth, and train on slices of another one."""
    import nibabel

    from blosam_monai.__main__ import main

    def write(path: Path, values: np.ndarray, step: float = 1.5) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.Nifti1Image(values.T, np.diag([-0.8, -0.8, step, 1])).to_filename(path)

    for slices in {depth, depth // 2, VIT_B_SLICES}:
        hu, _ = phantom(slices)
        write(folder / f"ct_{slices}.nii.gz", hu)
        write_series(folder / f"ct_{slices}", hu)
    for d in np.linspace(0.3 * depth, 0.6 * depth, SUPPORTS).astype(int):
        hu, label = phantom(depth, range(d, d + 1), seed=1)
        write(folder / "images" / f"{d:03d}.nii.gz", hu, step=5)
        write(folder / "labels" / f"{d:03d}.nii.gz", label, step=5)
    names = json.dumps({name: value for name, value in LABELS.items() if value})
    listed = ["--label_names", names, "--output", str(folder / "list.json"), "--window", "[-1000, 600]"]
    parts = ["--images", str(folder / "images"), "--labels", str(folder / "labels")]
    training = ["--data_list", str(folder / "list.json"), "--output_dir", str(folder / "train")]
    training += ["--dataset_dir", str(folder), "--max_epochs", "60", "--use_mlflow", "false", "--cache_dir", "none"]
    if main(["datalist", *parts, "--dataset_dir", str(folder), *listed]) or main(["train", *training]):
        raise SystemExit("the training of the benchmark has failed")


def write_series(folder: Path, hu: np.ndarray) -> None:
    """One uncompressed CT file a slice, with what a DICOM SEG refers to."""
    from pydicom import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    study, series, frame = (generate_uid() for _ in range(3))
    for d, plane in enumerate(hu):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CTImageStorage
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
        header.Modality, header.InstanceNumber = "CT", d + 1
        header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 1.5 * d]
        header.PixelSpacing, header.SliceThickness = [0.8, 0.8], 1.5
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
        header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
        header.Rows, header.Columns = plane.shape
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelData = (plane + 1024).clip(0).astype(np.uint16).tobytes()
        header["PixelData"].VR = "OW"
        header.save_as(folder / f"{d:03d}.dcm", enforce_file_format=True)


def measure(
    folder: str, source: str, slices: int, classes: int, model: str = "tiny", options: dict[str, Any] | None = None
) -> dict:
    """One case through the chain of ``inference.json``; bytes and seconds."""
    import nibabel
    import torch
    from monai.bundle import ConfigParser

    from blosam_monai.methods import BUNDLE
    from blosam_monai.networks.adapters import load_network

    given = Path(folder, f"ct_{slices}" + (".nii.gz" if source == NIFTI else ""))
    with tempfile.TemporaryDirectory(dir=folder) as output:
        adapters = Path(output, "model.safetensors")
        write_adapters(adapters, Path(folder, "train", "models", "model.safetensors"), model, classes)
        config = ConfigParser()
        config.read_config(BUNDLE / "configs" / "inference.json")
        config.update({"dataset_dir": str(given), "output_dir": output, "ckpt_path": str(adapters), "device": "cpu"})
        config.update(options or {})
        evaluator = config.get_parsed_content("evaluator")
        load_network(adapters, into=evaluator.network)
        before, start = _resident("VmRSS"), time.perf_counter()
        evaluator.run()
        seconds, peak = time.perf_counter() - start, _resident("VmHWM")
        evaluator.raise_failures()
        written = [o.path for o in evaluator.cases[0].outputs if o.content == "label" and o.format == "nifti"]
        foreground = sum(np.count_nonzero(nibabel.load(path).dataobj) for path in written) / (slices * SIDE**2)
    return {
        "model": model,
        "source": source,
        "slices": slices,
        "classes": classes,
        "options": ", ".join(f"{k}={str(v).lower()}" for k, v in (options or {}).items()),
        "threads": torch.get_num_threads(),
        "above_model_gb": round((peak - before) / 1e9, 2),
        "seconds": round(seconds, 1),
        "ms_per_slice": round(1000 * seconds / slices, 1),
        "foreground": f"{foreground:.1%}",
    }


def write_adapters(path: Path, trained: Path, model: str, classes: int) -> None:
    """The first classes of the trained adapters; of ViT-B, untrained ones."""
    from blosam_monai.networks.adapters import read_adapters, save_adapters
    from blosam_monai.networks.prompt_sam import PromptSam

    state, settings = read_adapters(trained)
    tasks = settings["tasks"][:classes]
    if model != settings["sam_model"]:
        network = PromptSam(model, settings["image_size"], "random", tasks)
        state = network.decoder.adapter_state()
        settings = settings | {"sam_weights": network.sam_weights}
    save_adapters(path, {k: v[:classes] for k, v in state.items()}, settings | {"sam_model": model, "tasks": tasks})


def _resident(field: str) -> int:
    """Bytes: VmRSS, resident now; VmHWM, at the peak. ``ru_maxrss`` would count the parent's before this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _in_process(*arguments: str) -> str:
    """Run this file in a process of its own; its last line."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return output.splitlines()[-1]


def main() -> None:
    """Measure every row in a process of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(Path(options.prepare[0]), int(options.prepare[1]))
        return
    if options.row:
        print(json.dumps(measure(**options.row)))
        return
    depth = QUICK_SLICES if options.quick else SLICES
    with tempfile.TemporaryDirectory() as folder:
        _in_process("--prepare", folder, str(depth))
        print(f"CPU, {os.cpu_count()} cores\n\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
        for row in ROWS:
            wanted = dict(row)
            slices = depth // 2 if wanted.pop("half_depth", False) else depth
            slices = VIT_B_SLICES if row.get("model") else slices
            values = json.loads(_in_process("--row", json.dumps({"folder": folder, "slices": slices, **wanted})))
            print("| " + " | ".join(str(values[c]) for c in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
