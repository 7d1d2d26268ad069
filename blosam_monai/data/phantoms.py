"""Procedurally generated labelled images for the demo and the tests: chest films, and CT of the abdomen.

A seed is a subject: anatomy, position, intensities, noise. No patient data went into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image as Pillow
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

from blosam_monai import __version__
from blosam_monai.data.geometry import Image
from blosam_monai.data.writers.nifti import write_nifti
from blosam_monai.data.writers.pictures import write_label
from blosam_monai.files import PathLike, atomic

PHANTOM_LABELS = {"background": 0, "lung": 1, "heart": 2}  # of the chest films
CT_LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3}
CT_WINDOW = (0, 255)  # HU shown as black and white: the gray values of an 8-bit picture are then HU

# HU: mean over subjects, standard deviation between them; some 70 s after contrast (portal venous phase).
_TISSUES = {
    "air": (-1000, 0),
    "fat": (-105, 6),
    "muscle": (58, 5),
    "marrow": (190, 25),
    "cortex": (480, 50),
    "spinal canal": (25, 5),
    "disc": (85, 8),
    "liver": (108, 9),
    "liver vein": (150, 10),
    "spleen": (124, 9),
    "kidney": (190, 14),
    "kidney marrow": (160, 10),
    "stomach": (28, 12),
    "gas": (-920, 20),
    "bowel": (70, 10),
    "bowel content": (18, 15),
    "aorta": (165, 12),
    "vena cava": (135, 12),
    "gallbladder": (8, 4),
}
_NUMBER = {name: number for number, name in enumerate(_TISSUES)}
_LABEL_OF = {"liver": 1, "liver vein": 1, "spleen": 2, "kidney": 3, "kidney marrow": 3}
_ENDLESS = 4000.0  # mm, half length of what runs through all slices
_LEVELS = (-12.0, 22.0)  # mm, where single slices are taken: most show all three organs


# ---- chest films ----------------------------------------------------------------------------------------------------


def chest_film(seed: int, height: int = 224, width: int = 288) -> tuple[np.ndarray, np.ndarray]:
    """One subject: film (H, W) and label (H, W), both uint8; label 1 lungs (dark), 2 heart, over the left lung.

    Not labelled are spine, ribs, clavicles, shoulders, and the gas in the stomach. Shapes, places, intensities, noise
    and exposure vary with the seed. The heart lies right of the centre line, as on a film seen from the front, so that
    a mirrored or turned picture is told from an upright one.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height - 0.5, x / width - 0.5  # -0.5 to 0.5, rows down, columns right
    for _ in range(2):  # everyone is shaped differently
        phase, wave, reach = rng.uniform(0, 6.3, 2), rng.uniform(4, 9, 2), rng.uniform(-0.012, 0.012, 2)
        y, x = y + reach[0] * np.sin(wave[0] * x + phase[0]), x + reach[1] * np.sin(wave[1] * y + phase[1])
    y, x, size = y - rng.uniform(-0.04, 0.04), x - rng.uniform(-0.04, 0.04), rng.uniform(0.9, 1.1)

    def ellipse(cy: float, cx: float, ry: float, rx: float, tilt: float = 0.0) -> np.ndarray:
        dy, dx = y - cy, x - cx
        along, across = dy * np.cos(tilt) + dx * np.sin(tilt), dx * np.cos(tilt) - dy * np.sin(tilt)
        return (along / (ry * size)) ** 2 + (across / (rx * size)) ** 2 < 1

    tilt = rng.uniform(0.05, 0.2)
    body = ellipse(0.08, 0.0, 0.56, 0.42) | ellipse(0.45, 0.0, 0.60, 0.38) | ellipse(-0.48, 0.0, 0.4, 0.09)
    body |= ellipse(-0.26, -0.36, 0.17, 0.22, -0.5) | ellipse(-0.26, 0.36, 0.17, 0.22, 0.5)  # shoulders
    right = ellipse(-0.02, -0.19, rng.uniform(0.28, 0.33), rng.uniform(0.11, 0.14), -tilt)
    left = ellipse(-0.02, 0.19, rng.uniform(0.28, 0.33), rng.uniform(0.11, 0.14), tilt)
    heart = ellipse(0.12, 0.07, rng.uniform(0.13, 0.17), rng.uniform(0.09, 0.12), rng.uniform(0.3, 0.7))
    lungs = (right | left) & ~heart
    film = np.where(body, np.float32(rng.uniform(130, 155)), 15)
    film[(ellipse(-0.28, -0.44, 0.08, 0.055) | ellipse(-0.28, 0.44, 0.08, 0.055)) & body] += 30  # heads of the arms
    film[(np.abs(x) < 0.075 * size) & body] += rng.uniform(12, 25)  # what lies between the lungs
    film[lungs] = rng.uniform(55, 80)
    film[heart] = rng.uniform(180, 205)
    film[ellipse(0.37, 0.17, rng.uniform(0.03, 0.06), rng.uniform(0.05, 0.08)) & ~lungs & ~heart] -= 45  # gas
    film += _draw_bones(y, x, body, rng)
    film = gaussian_filter(film, rng.uniform(0.8, 1.6) * height / 224)
    vessels = gaussian_filter(rng.standard_normal(film.shape, dtype=np.float32), 2 * height / 224)
    film += vessels * (rng.uniform(3, 6) / vessels.std()) * lungs
    film = 255 * (film.clip(0, 255) / 255) ** rng.uniform(0.85, 1.2)  # exposure
    film *= 1 + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.15, 0.15) * y
    film += rng.normal(0, rng.uniform(3, 7), film.shape)
    return film.clip(0, 255).astype(np.uint8), (lungs + 2 * heart).astype(np.uint8)


def _draw_bones(y: np.ndarray, x: np.ndarray, body: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness (H, W) of ribs, clavicles and vertebrae."""
    bright = np.zeros(y.shape, np.float32)
    step, bow = rng.uniform(0.07, 0.085), rng.uniform(0.9, 1.5)
    along = np.mod(y + bow * (np.abs(x) - 0.12) ** 2 * 2 - 0.18 * np.abs(x) + rng.uniform(0, step), step)
    bright[(along < 0.022) & body & (np.abs(x) < 0.33) & (y > -0.4) & (y < 0.25)] += rng.uniform(9, 16)  # ribs
    slope = rng.uniform(0.15, 0.4)
    clavicle = np.abs(y + 0.30 + slope * (np.abs(x) - 0.1)) < 0.014
    bright[clavicle & (np.abs(x) > 0.03) & (np.abs(x) < 0.33)] += rng.uniform(20, 32)
    vertebra = (np.abs(x) < 0.032) & (np.mod(y, 0.085) > 0.018)
    bright[vertebra & body] += rng.uniform(10, 18)
    return bright


def write_chest_films(folder: PathLike, count: int, *, seed: int = 0) -> None:
    """Write ``count`` subjects as ``images/phantom_<n>.png`` and ``labels/phantom_<n>.png`` (index coded)."""
    for number in range(count):
        film, label = chest_film(seed * 10_000 + number)
        path, label_path = _pair(folder, number)
        _write_picture(path, film)
        write_label(label_path, label)


# ---- CT of the abdomen ----------------------------------------------------------------------------------------------


def abdominal_ct(
    seed: int,
    *,
    shape: Sequence[int] = (32, 96, 136),
    spacing: Sequence[float] = (5.0, 2.6, 2.6),
    level: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One subject: HU (D, H, W) int16, label (D, H, W) uint8, and the affine (4, 4), indices -> mm LPS.

    Axial slices from the feet up, the patient's right at the left. Label 1 liver, 2 spleen, 3 both kidneys; not
    labelled are stomach and bowel with gas, gallbladder, great vessels, spine, ribs, muscles, fat. Shapes, places, HU
    and noise vary with the seed. The anatomy does not depend on the grid: a seed on a finer grid is the same subject.

    Args:
        seed: the subject.
        shape: (D, H, W).
        spacing: of d, h, w in mm.
        level: mm of the middle of the slices above the middle of the abdomen, where kidneys, liver and spleen are.
    """
    rng = np.random.default_rng(seed)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    axes[0] = axes[0] + level
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    abdomen = _Abdomen(z, y, x, rng)
    abdomen.draw_trunk()
    abdomen.draw_organs()
    hu_of = np.array([rng.normal(mean, deviation) for mean, deviation in _TISSUES.values()], np.float32)
    table = np.round(rng.uniform((-20, -250, -900), (20, -150, -700)), 1)  # mm LPS, where it stood
    hu = gaussian_filter(hu_of[abdomen.tissue], (0, 1.1 / spacing[1], 1.1 / spacing[2]))  # 2.6 mm at half height
    hu += _noise(shape, spacing, rng)
    label_of = np.array([_LABEL_OF.get(name, 0) for name in _TISSUES], np.uint8)
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (*spacing, 1)
    affine[:3, 3] = table + [axis[0] for axis in reversed(axes)]
    return np.rint(hu).clip(-1024, 3071).astype(np.int16), label_of[abdomen.tissue], affine


class _Abdomen:
    """The tissues of one subject on a grid; what is painted later lies over what was there.

    Args:
        z, y, x: mm of the voxels, to the head, to the back and to the left; (D, 1, 1), (1, H, 1) and (1, 1, W).
        rng: of the subject.
    """

    def __init__(self, z: np.ndarray, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> None:
        self.rng = rng
        self.x, self.y, self.z = _deform(z, y, x, rng)
        self.tissue = np.zeros(self.x.shape, np.uint8)
        self.spine = self.ellipsoid((0, 50, 0), (24, 19, _ENDLESS), spread=0.06)

    def ellipsoid(self, centre: ArrayLike, radii: ArrayLike, turn: float = 0.0, *, spread: float = 0.12) -> np.ndarray:
        """Squared distance (D, H, W) from about a centre in about these radii: below 1 inside; x, y, z in mm.

        It is turned by radians in the axial plane. The spread of the radii is a share of them, that of the place 4 mm.
        """
        middle = np.add(centre, self.rng.normal(0, 4, 3)).astype(np.float32)
        half = np.multiply(radii, self.rng.uniform(1 - spread, 1 + spread, 3)).astype(np.float32)
        dx, dy, dz = (axis - at for axis, at in zip((self.x, self.y, self.z), middle, strict=True))
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        across, along = dx * cos - dy * sin, dy * cos + dx * sin
        return (across / half[0]) ** 2 + (along / half[1]) ** 2 + (dz / half[2]) ** 2

    def paint(self, mask: np.ndarray, tissue: str) -> None:
        """Put a tissue where the mask (D, H, W) is."""
        self.tissue[mask] = _NUMBER[tissue]

    def draw_trunk(self) -> None:
        """Fat, muscles and bones; sets ``cavity``, where organs may be."""
        x, y, z, rng = self.x, self.y, self.z, self.rng
        trunk = np.sqrt((np.abs(x) / 150) ** 2.5 + (np.abs(y - 5) / 104) ** 2.5)  # 1 at the skin
        wall = rng.uniform(0.80, 0.92)  # where fat ends: stout to thin
        self.paint(trunk < 1, "fat")
        self.paint(trunk < wall, "muscle")
        rib = np.sin(np.arctan2(y - 5, x) * 9 + z / 9 + rng.uniform(0, 6)) > 0.55
        self.paint((np.abs(trunk - wall + 0.03) < 0.022) & rib & (y > -70), "cortex")
        self.paint(trunk < wall - 0.07, "fat")
        for side in (-1, 1):
            self.paint(self.ellipsoid((side * 34, 84, 0), (34, 20, _ENDLESS)) < 1, "muscle")  # behind the spine
            self.paint(self.ellipsoid((side * 34, 52, -60), (18, 17, 70)) < 1, "muscle")  # psoas
        self.paint(self.spine < 1, "cortex")
        self.paint(self.spine < 0.78, "marrow")
        self.paint((self.spine < 1) & (np.mod(z + rng.uniform(0, 34), 34) < 7), "disc")  # one every 34 mm
        self.paint(self.ellipsoid((0, 84, 0), (5, 24, _ENDLESS)) < 1, "cortex")
        self.paint(self.ellipsoid((0, 79, 0), (10, 8, _ENDLESS)) < 1, "spinal canal")
        self.cavity = (trunk < wall - 0.07) & (self.spine > 1.25)

    def draw_organs(self) -> None:
        """What lies in the cavity."""
        rng = self.rng
        self._draw_liver()
        stomach = self.ellipsoid((52, -38, 24), (46, 34, 38), turn=0.5) + 1e6 * ~self.cavity
        self.paint(stomach < 1, "bowel")  # its wall
        self.paint(stomach < 0.82, "stomach")
        self.paint((stomach < 0.82) & (self.y < rng.uniform(-62, -44)), "gas")  # on top, the patient lies on the back
        self.paint((self.ellipsoid((98, 26, 26), (25, 43, 42), turn=0.35) < 1) & self.cavity, "spleen")
        for _ in range(9):
            place, radii = rng.uniform((-95, -65, -80), (95, 5, -30)), rng.uniform(14, 26, 3)
            loop = self.ellipsoid(place, radii, turn=rng.uniform(-1, 1)) + 1e6 * ~self.cavity
            self.paint(loop < 1, "bowel")
            self.paint(loop < 0.6, "bowel content" if rng.random() < 0.7 else "gas")
        self.paint((self.ellipsoid((-48, -40, -18), (14, 20, 24)) < 1) & self.cavity, "gallbladder")
        self.paint(self.ellipsoid((10, 22, 0), (11, 11, _ENDLESS)) < 1, "aorta")
        self.paint(self.ellipsoid((-20, 20, 0), (13, 10, _ENDLESS)) < 1, "vena cava")
        self._draw_kidney(-1, -24)
        self._draw_kidney(1, -12)

    def _draw_liver(self) -> None:
        rng = self.rng
        lobes = self.ellipsoid((-66, 2, 12), (70, 74, 66), turn=0.2), self.ellipsoid((-8, -48, 26), (74, 27, 40), -0.15)
        self.paint((np.minimum(*lobes) < 1) & self.cavity, "liver")
        for _ in range(5):
            place, radii = rng.uniform((-100, -40, 0), (-40, 25, 50)), (rng.uniform(14, 30), 3.5, 5)
            vein = self.ellipsoid(place, radii, turn=rng.uniform(-1.5, 1.5)) < 1
            self.paint(vein & (self.tissue == _NUMBER["liver"]), "liver vein")

    def _draw_kidney(self, side: int, height: float) -> None:
        """A kidney in its fat, open towards the spine; side -1 is the right one."""
        place, turn = self.rng.normal((side * 62, 48, height), 4), side * self.rng.uniform(0.1, 0.6)
        kidney = self.ellipsoid(place, (28, 25, 48), turn) + 1e6 * ~self.cavity
        self.paint(kidney < 1.35, "fat")
        self.paint(kidney < 1, "kidney")
        self.paint(kidney < 0.45, "kidney marrow")
        self.paint((self.ellipsoid(place - (side * 22, 4, 0), (17, 9, 22), turn) < 1) & (kidney < 1.35), "fat")


def _deform(z: np.ndarray, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Where each voxel of this subject lies in the average one: x, y, z in mm, each (D, H, W) float32."""
    roll, size, shift = np.radians(rng.uniform(-5, 5)), rng.uniform(0.93, 1.07, 3), rng.uniform(-6, 6, 3)
    turned = np.cos(roll) * x + np.sin(roll) * y, np.cos(roll) * y - np.sin(roll) * x, z
    points = []
    for axis in range(3):
        bend: np.ndarray | float = 0.0
        for _ in range(3):  # smooth: waves of 140 to 320 mm
            reach, waves, phases = rng.uniform(1, 4), 2 * np.pi / rng.uniform(140, 320, 3), rng.uniform(0, 2 * np.pi, 3)
            a, b, c = (np.cos(w * at + p) for w, at, p in zip(waves, (x, y, z), phases, strict=True))
            bend = bend + reach * (a * b) * c
        points.append((turned[axis] / size[axis] - shift[axis] + bend).astype(np.float32))
    return points


def _noise(shape: Sequence[int], spacing: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Noise (D, H, W) of 9 to 15 HU in grains of 2 to 3 mm, as a soft reconstruction kernel leaves."""
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (0, 1 / spacing[1], 1 / spacing[2]))
    return noise * np.float32(rng.uniform(9, 15) / noise.std())


def write_ct_slices(folder: PathLike, count: int, *, seed: int = 0) -> None:
    """Write an axial slice of each of ``count`` subjects as pictures, named as by ``write_chest_films``."""
    for number in range(count):
        write_ct_slice(*_pair(folder, number), seed=seed * 10_000 + number)


def write_ct_slice(path: PathLike, label_path: PathLike, *, seed: int) -> None:
    """Write an axial slice of one subject and its label as PNG: gray values are HU, clipped to ``CT_WINDOW``."""
    level = float(np.random.default_rng([seed, 1]).uniform(*_LEVELS))
    hu, label, _ = abdominal_ct(seed, shape=(1, 200, 280), spacing=(5.0, 1.25, 1.25), level=level)
    _write_picture(path, hu[0].clip(*CT_WINDOW).astype(np.uint8))
    write_label(label_path, label[0])


def write_ct_volume(path: PathLike, label_path: PathLike, *, seed: int, **grid: Any) -> None:
    """Write one subject and its label as NIfTI, in HU; ``grid``: see ``abdominal_ct``."""
    hu, label, affine = abdominal_ct(seed, **grid)
    write_nifti(path, hu, Image("phantom", hu, affine), dtype=np.int16)
    write_nifti(label_path, label, Image("phantom", label, affine))


def write_ct_series(folder: PathLike, label_path: PathLike, *, seed: int, **grid: Any) -> None:
    """Write one subject as a DICOM series, ``slice_<n>.dcm``, and its label as NIfTI on the same grid.

    Patient, study, series and instances are named and numbered by the seed, so that the files are the same every time.
    ``grid``: see ``abdominal_ct``.
    """
    hu, label, affine = abdominal_ct(seed, **grid)
    for number, plane in enumerate(hu):
        dataset = _describe_slice(seed, number, affine)
        _set_pixels(dataset, plane)
        with atomic(Path(folder) / f"slice_{number:03d}.dcm") as part:
            dataset.save_as(part, enforce_file_format=True)
    write_nifti(label_path, label, Image("phantom", label, affine))


def _describe_slice(seed: int, number: int, affine: np.ndarray) -> Dataset:
    """What DICOM PS3.3 A.3 (CT image) asks of a slice: its type 1 elements, and type 2, which may be empty."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    dataset = Dataset()
    dataset.PatientName, dataset.PatientID = f"PHANTOM^{seed:02d}", f"PHANTOM-{seed:02d}"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
        _uid(seed, name) for name in ("study", "series", "frame of reference")
    )
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260101", "120000", "1"
    dataset.Modality, dataset.SeriesNumber, dataset.SeriesDescription = "CT", 1, "phantom of the abdomen"
    dataset.PatientPosition, dataset.PositionReferenceIndicator = "HFS", ""
    dataset.Manufacturer, dataset.SoftwareVersions = "blosam_monai", __version__
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, _uid(seed, f"slice {number}")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber, dataset.AcquisitionNumber, dataset.KVP = number + 1, 1, ""
    dataset.PixelSpacing, dataset.SliceThickness = [float(spacing[1]), float(spacing[2])], float(spacing[0])
    dataset.ImageOrientationPatient = [float(n) for n in (*affine[:3, 2] / spacing[2], *affine[:3, 1] / spacing[1])]
    dataset.ImagePositionPatient = np.round(affine[:3] @ (number, 0, 0, 1), 4).tolist()
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _set_pixels(dataset: Dataset, hu: np.ndarray) -> None:
    """Put HU (H, W) of -1024 to 3071 into a data set, in 12 bits as scanners store them."""
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = hu.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = (hu.astype(np.int32) - int(dataset.RescaleIntercept)).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"


def _uid(seed: int, name: str) -> str:
    return generate_uid(entropy_srcs=["blosam_monai phantom", str(seed), name])


def _pair(folder: PathLike, number: int) -> tuple[Path, Path]:
    """Where an image and its label are written."""
    name = f"phantom_{number:03d}.png"
    return Path(folder, "images", name), Path(folder, "labels", name)


def _write_picture(path: PathLike, image: np.ndarray) -> None:
    """Write gray values (H, W) uint8 as PNG."""
    with atomic(path) as part:
        Pillow.fromarray(image).save(part, format="PNG")
