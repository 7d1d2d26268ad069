"""Make overview.png for the README from generated phantoms: run ``python docs/images/make_overview.py``.

It runs ``blosam demo`` in a temporary folder (a minute on two cores) and lays out what the demo read and wrote.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blosam_monai.__main__ import main
from blosam_monai.data.phantoms import CT_LABELS
from blosam_monai.data.writers.pictures import write_overlay
from blosam_monai.files import PathLike
from blosam_monai.transforms import LoadCased, SliceToPictured

TARGET = Path(__file__).with_name("overview.png")
COLUMNS = 4
TILE = 207, 148  # pixels, width and height: the proportions of a phantom
GAP, TITLE = 6, 26  # pixels
COLOURS = 128  # of the palette, so that the file stays under 300 kB


def make_overview(target: PathLike) -> None:
    """Draw four support images with their labels, then four test images with label and prediction."""
    with tempfile.TemporaryDirectory() as folder:
        if main(["demo", "--output_dir", folder]):
            raise SystemExit("the demo failed")
        data, masks = Path(folder, "data"), Path(folder, "test_masks")
        predict = ["predict", "--model", str(Path(folder, "train")), "--input", str(data / "images")]
        if main([*predict, "--output_dir", str(masks)]):
            raise SystemExit("the prediction failed")
        content = json.loads((data / "list.json").read_text(encoding="utf-8"))
        supports = content["lower"] + content["upper"]
        tests = content["testing"][:COLUMNS]
        names = [Path(item["image"]).name for item in tests]
        rows = [
            (
                "Four labelled images: all that the training sees",
                [_tinted(data / i["image"], data / i["label"]) for i in supports],
            ),
            ("Test images with their labels", [_tinted(data / i["image"], data / i["label"]) for i in tests]),
            (
                "Predictions on the test images, no prompt given, outlined in colour; dashed: the label",
                [
                    _tinted(data / i["image"], masks / n, outline=data / i["label"])
                    for i, n in zip(tests, names, strict=True)
                ],
            ),
        ]
    height, width = len(rows) * (TILE[1] + TITLE + GAP), COLUMNS * (TILE[0] + GAP) - GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for number, (title, tiles) in enumerate(rows):
        top = number * (TILE[1] + TITLE + GAP)
        draw.text((2, top + 4), title, fill="black", font=font)
        for column, tile in enumerate(tiles):
            canvas.paste(tile, (column * (TILE[0] + GAP), top + TITLE))
    canvas.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def _tinted(image: Path, mask: Path, *, outline: Path | None = None) -> Image.Image:
    """One tile: the image with the classes of a label map tinted and those of another outlined."""
    item = _read(image, mask)
    with tempfile.TemporaryDirectory() as folder:
        tile = Path(folder, "tile.png")
        write_overlay(tile, item["image"], item["label"], None if outline is None else _read(image, outline)["label"])
        return Image.open(tile).convert("RGB").resize(TILE, Image.Resampling.LANCZOS)


def _read(image: Path, mask: Path) -> dict[str, np.ndarray]:
    """``image`` (3, H, W), 0 to 255, and ``label``: binary masks (T, H, W)."""
    item = SliceToPictured()(LoadCased(CT_LABELS)({"image": str(image), "label": str(mask)}))
    return {key: item[key].numpy() for key in ("image", "label")}


if __name__ == "__main__":
    make_overview(TARGET)
