"""Reading pictures: upright, gray or in colour, or refused with a reason."""

from pathlib import Path

import nibabel
import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from blosam_monai.data import geometry
from blosam_monai.data.readers.pictures import SUFFIXES, is_picture, read_label_folder, read_picture, read_picture_label

HEIGHT, WIDTH = 24, 40
FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "bmp": "BMP"}


def corner_picture() -> np.ndarray:
    """Gray (24, 40): dark but for the bright top right corner, rows 0 to 7, columns 32 to 39."""
    gray = np.full((HEIGHT, WIDTH), 16, dtype=np.uint8)
    gray[:8, 32:] = 240
    return gray


def class_map() -> np.ndarray:
    """Label (24, 40) of the classes 0, 1, 2, 5; class 5 in the top right corner only."""
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    label[10:20, 4:12] = 1
    label[18:, 20:30] = 2
    label[:8, 32:] = 5
    return label


def save(path: Path, picture: Image.Image, **options) -> Path:
    picture.save(path, **options)
    return path


def shown(image: geometry.Image) -> np.ndarray:
    """The one slice of a picture as shown, 0 to 255: (H, W), or (H, W, 3) of a picture in colour."""
    assert image.shape[0] == 1
    low, high = image.full_range
    return (image.values[0].astype(np.float64) - low) * 255 / (high - low)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture_of_any_format_comes_out_upright(tmp_path, suffix):
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(corner_picture()))
    image = read_picture(path)
    assert image.shape == (1, HEIGHT, WIDTH)
    assert image.affine is None
    gray = shown(image) if suffix != "gif" else shown(image).mean(-1)  # a GIF is a palette picture, hence RGB
    assert np.abs(gray - corner_picture()).max() <= 8  # JPEG; the step at the corner is 224


OLD_PILLOW = pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12 does not read the YCbCr TIFF that it writes")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", pytest.param("YCbCr", marks=OLD_PILLOW)])
def test_every_kind_of_pixel_gives_the_colours_that_were_saved(tmp_path, mode):
    rgb = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    rgb[:] = (40, 40, 40) if mode in ("L", "LA") else (200, 40, 10)
    rgb[:8, 32:] = (250, 250, 250) if mode in ("L", "LA") else (10, 60, 250)
    path = save(tmp_path / "x.tif", Image.fromarray(rgb).convert(mode))
    image = read_picture(path)
    assert image.values.dtype == np.uint8
    assert image.values.shape == ((1, HEIGHT, WIDTH) if mode in ("L", "LA") else (1, HEIGHT, WIDTH, 3))
    difference = np.abs(shown(image) - (rgb[..., 0] if mode in ("L", "LA") else rgb)).max()
    assert difference <= (2 if mode in ("CMYK", "YCbCr") else 0)


def test_a_palette_picture_gives_its_colours_and_not_its_indices(tmp_path):
    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 0])
    picture.paste(2, (32, 0, WIDTH, 8))
    for options in ({}, {"transparency": bytes([0, 255, 128])}):
        image = read_picture(save(tmp_path / "x.png", picture, **options))
        assert image.values[0, 0, -1].tolist() == [200, 100, 0]
        assert image.values[0, -1, 0].tolist() == [0, 0, 0]


def test_one_bit_is_black_and_white(tmp_path):
    image = read_picture(save(tmp_path / "x.png", Image.fromarray(corner_picture() > 127)))
    assert np.array_equal(shown(image), np.where(corner_picture() > 127, 255, 0))


def test_transparency_does_not_change_the_colours(tmp_path):
    rgba = np.full((HEIGHT, WIDTH, 4), 90, dtype=np.uint8)
    rgba[..., 3] = 0
    rgba[0, 0] = (1, 2, 3, 0)
    assert read_picture(save(tmp_path / "x.png", Image.fromarray(rgba))).values[0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("suffix", "code"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("tif", "<i4"), ("tif", "<f4")]
)
def test_more_than_8_bits_are_stretched_from_minimum_to_maximum(tmp_path, suffix, code):
    values = np.linspace(1000, 5000, HEIGHT * WIDTH).round().reshape(HEIGHT, WIDTH)
    if code == ">u2":
        picture = Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(code).tobytes())
    else:
        picture = Image.fromarray(values.astype(code))
    image = read_picture(save(tmp_path / f"x.{suffix}", picture))
    assert image.full_range == (1000, 5000)
    assert image.values.dtype == np.dtype(code).newbyteorder("=")
    assert np.array_equal(image.values[0], values)
    assert np.abs(shown(image) - (values - 1000) * 255 / 4000).max() < 1e-3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_undone(tmp_path, orientation):
    # How a viewer turns the stored pixels, by EXIF 2.3, tag 0x0112: (swap axes, then mirror rows, mirror columns).
    stored_from_upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: a.T[::-1],
        7: lambda a: a.T[::-1, ::-1],
        8: lambda a: a.T[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(stored_from_upright[orientation](corner_picture()))
    image = read_picture(save(tmp_path / "x.jpg", Image.fromarray(stored), exif=exif))
    assert image.shape == (1, HEIGHT, WIDTH)
    assert np.abs(shown(image) - corner_picture()).max() <= 8


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "bmp"])
def test_an_index_label_keeps_its_values_and_its_place(tmp_path, suffix):
    label = read_picture_label(save(tmp_path / f"x.{suffix}", Image.fromarray(class_map())), "index")
    assert label.values.dtype == np.int32
    assert np.array_equal(label.values, class_map()[None])


def test_a_palette_label_gives_indices(tmp_path):
    picture = Image.fromarray(class_map())
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128])
    assert picture.mode == "P"
    assert np.array_equal(read_picture_label(save(tmp_path / "x.png", picture)).values[0], class_map())


@pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
def test_a_gray_label_saved_with_more_channels_gives_its_values(tmp_path, mode):
    path = save(tmp_path / "x.png", Image.fromarray(class_map()).convert(mode))
    assert np.array_equal(read_picture_label(path).values[0], class_map())


def test_a_coloured_palette_in_a_gif_is_refused(tmp_path):
    """PIL writes the entries 0 and 3 of this palette as 0 and 1: the indices of a GIF are not the classes."""
    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    picture.paste(3, (32, 0, WIDTH, 8))
    with pytest.raises(ValueError, match=r"x\.gif: the label has colours"):
        read_picture_label(save(tmp_path / "x.gif", picture))


def test_class_numbers_above_255_are_kept(tmp_path):
    label = class_map().astype(np.uint16) * 1000
    assert np.array_equal(read_picture_label(save(tmp_path / "x.png", Image.fromarray(label))).values[0], label)


@pytest.mark.parametrize(
    "mode", ["L", "RGB", "RGBA", "P", "1", "16 bit", "16 bit full", "float", "float of 0 and 1", "8 bit of 0 and 1"]
)
def test_a_mask_of_two_values_is_read_by_threshold(tmp_path, mode):
    mask = class_map() > 0
    picture = {
        "16 bit": lambda: Image.fromarray(mask.astype(np.uint16) * 255),
        "16 bit full": lambda: Image.fromarray(mask.astype(np.uint16) * 65535),
        "float": lambda: Image.fromarray(mask.astype(np.float32) * 255),
        "float of 0 and 1": lambda: Image.fromarray(mask.astype(np.float32)),
        "8 bit of 0 and 1": lambda: Image.fromarray(mask.astype(np.uint8)),
    }.get(mode, lambda: Image.fromarray(mask.astype(np.uint8) * 255).convert(mode))()
    label = read_picture_label(save(tmp_path / "x.tif", picture), "threshold")
    assert np.array_equal(label.values[0], mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_soft_edge_is_cut_at_the_middle(tmp_path, dtype):
    full = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]  # 255 of 255, 65535 of 65535, 1 of 1
    ramp = (np.tile(np.arange(256), (4, 1)) * full).astype(dtype)
    label = read_picture_label(save(tmp_path / "x.tif", Image.fromarray(ramp)), "threshold")
    assert np.array_equal(label.values[0], np.tile(np.arange(256) >= 128, (4, 1)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_black_mask_has_no_foreground(tmp_path, dtype):
    path = save(tmp_path / "x.tif", Image.fromarray(np.zeros((8, 8), dtype)))
    assert read_picture_label(path, "threshold").counts() == {}


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_noise_does_not_change_a_mask(tmp_path, quality):
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[17:43, 30:71] = 255
    path = save(tmp_path / "x.jpg", Image.fromarray(mask), quality=quality)
    with Image.open(path) as stored:
        assert len(np.unique(np.asarray(stored))) > 2
    assert np.array_equal(read_picture_label(path, "threshold").values[0], mask == 255)


def test_a_preview_inside_a_tiff_is_not_a_page(tmp_path):
    preview = TiffImagePlugin.ImageFileDirectory_v2()
    preview[254] = 1  # NewSubfileType: a reduced copy of another page (TIFF 6.0)
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "x.tif"), True) as file:
        Image.fromarray(corner_picture()).save(file, format="TIFF")
        file.newFrame()
        Image.fromarray(corner_picture()[::4, ::4]).save(file, format="TIFF", tiffinfo=preview)
    assert np.array_equal(read_picture(tmp_path / "x.tif").values, corner_picture()[None])


def nan_picture() -> Image.Image:
    values = corner_picture().astype(np.float32)
    values[3, 3] = np.nan
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("suffix", "picture", "finding"),
    [
        ("tif", nan_picture, "NaN"),
        ("png", lambda: Image.new("RGB", (8, 8), (9, 9, 9)), "every pixel has the same value"),
        ("png", lambda: Image.new("RGB", (8, 8), (9, 90, 200)), "every pixel has the same value"),
        ("tif", lambda: Image.fromarray(np.full((8, 8), 7, dtype=np.uint16)), "every pixel has the same value"),
    ],
)
def test_an_image_that_shows_nothing_is_refused_by_name(tmp_path, suffix, picture, finding):
    path = save(tmp_path / f"film_07.{suffix}", picture())
    with pytest.raises(ValueError, match=rf"film_07\.{suffix}: .*{finding}.*; repair or leave out"):
        read_picture(path)


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("png", {"default_image": False})])
@pytest.mark.parametrize("read", [read_picture, read_picture_label])
def test_an_animation_is_refused(tmp_path, suffix, options, read):
    pages = [Image.fromarray(corner_picture()), Image.fromarray(class_map())]
    path = save(tmp_path / f"x.{suffix}", pages[0], save_all=True, append_images=pages[1:], **options)
    with pytest.raises(ValueError, match=rf"x\.{suffix}: has 2 pages; save the wanted page"):
        read(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_pages_of_a_tiff_are_the_slices_of_a_volume(tmp_path, dtype):
    slices = np.random.default_rng(0).integers(0, 256, (5, 8, 12)).astype(dtype)
    pages = [Image.fromarray(page) for page in slices]
    image = read_picture(save(tmp_path / "x.tif", pages[0], save_all=True, append_images=pages[1:]))
    assert np.array_equal(image.values, slices)
    assert image.affine is None
    assert image.full_range == ((0, 255) if dtype == np.uint8 else (slices.min(), slices.max()))


def test_the_pages_of_a_label_are_its_slices(tmp_path):
    slices = np.stack([class_map(), class_map()[::-1], class_map() * 0])
    pages = [Image.fromarray(page) for page in slices]
    path = save(tmp_path / "x.tif", pages[0], save_all=True, append_images=pages[1:])
    assert np.array_equal(read_picture_label(path).values, slices)


@pytest.mark.parametrize(("mode", "size", "second"), [("L", (9, 8), "L 8 x 9"), ("RGB", (12, 8), "RGB 8 x 12")])
def test_pages_of_different_kinds_are_refused(tmp_path, mode, size, second):
    path = save(tmp_path / "x.tif", Image.new("L", (12, 8)), save_all=True, append_images=[Image.new(mode, size)])
    with pytest.raises(ValueError, match=rf"x\.tif: has 2 pages of different kinds \(L 8 x 12 and {second}\); save"):
        read_picture(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_picture_never_gives_other_pixels(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(noise))
    whole, content = read_picture(path).values, path.read_bytes()
    refused = 0
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(read_picture(path).values, whole)  # only the end mark of the file is missing
        except ValueError as error:
            assert str(error).startswith(f"{path}: cannot be read as a picture")  # noqa: PT017
            refused += 1
    assert refused >= len(range(0, len(content), 61)) - 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_a_truncated_tiff_of_two_pages_is_refused(tmp_path):
    pages = [Image.fromarray(corner_picture()), Image.fromarray(class_map())]
    path = save(tmp_path / "x.tif", pages[0], save_all=True, append_images=pages[1:])
    content = path.read_bytes()
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.tif: cannot be read as a picture"):
            read_picture(path)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        read_picture(tmp_path / "x.png")


def test_a_picture_beyond_pils_size_limit_is_refused_by_name(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", Image.fromarray(corner_picture()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)  # PIL refuses twice this number
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        read_picture(path)


@pytest.mark.parametrize("read", [read_picture, read_picture_label])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file; check dataset_dir"):
        read(tmp_path / "gone.png")


def test_a_coloured_label_is_refused(tmp_path):
    rgb = np.zeros((8, 8, 3), dtype=np.uint8)
    rgb[2:4, 2:4, 0] = 200
    with pytest.raises(ValueError, match=r'x\.png: the label has colours; write "label_coding": "colour" in the data'):
        read_picture_label(save(tmp_path / "x.png", Image.fromarray(rgb)))


@pytest.mark.parametrize("read", [read_picture, read_picture_label])
def test_colours_that_cannot_be_shown_are_refused_by_name(tmp_path, read):
    path = save(tmp_path / "x.tif", Image.new("LAB", (8, 8)))
    with pytest.raises(ValueError, match=r"x\.tif: has CIE L\*a\*b\* colours; save it as RGB"):
        read(path)


def test_a_mask_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.tif: the label holds NaN or infinite values; export it again"):
        read_picture_label(save(tmp_path / "x.tif", nan_picture()), "threshold")


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_label_of_fractions_is_refused(tmp_path, value):
    label = np.zeros((8, 8), dtype=np.float32)
    label[2, 2] = value
    with pytest.raises(ValueError, match=r"x\.tif: the label has fractional values"):
        read_picture_label(save(tmp_path / "x.tif", Image.fromarray(label)))


def test_an_unknown_coding_is_refused(tmp_path):
    path = save(tmp_path / "x.png", Image.fromarray(class_map()))
    with pytest.raises(ValueError, match=r"label_coding: 'rgb' is not one of index, threshold, colour\."):
        read_picture_label(path, "rgb")


def test_a_folder_is_no_label_picture(tmp_path):
    with pytest.raises(ValueError, match=r'is a folder; write "label_coding": "files" or "segments"'):
        read_picture_label(tmp_path)


def test_reading_leaves_no_file_open(tmp_path):
    """Open handles would raise a ResourceWarning, which the test run takes for an error."""
    for suffix in FORMATS:
        read_picture(save(tmp_path / f"x.{suffix}", Image.fromarray(corner_picture())))
        (tmp_path / f"x.{suffix}").rename(tmp_path / f"y.{suffix}")


def test_a_picture_is_known_by_its_suffix_and_is_a_file(tmp_path):
    for name in ("a.PNG", "b.jpg", "c.tiff", "d.nii.gz", "e.dcm", "f"):
        (tmp_path / name).touch()
    (tmp_path / "g.png").mkdir()
    assert [p.name for p in sorted(tmp_path.iterdir()) if is_picture(p)] == ["a.PNG", "b.jpg", "c.tiff"]
    assert not is_picture(tmp_path / "gone.png")
    assert {f".{suffix}" for suffix in FORMATS} <= set(SUFFIXES)


def colour_map() -> np.ndarray:
    """Label (24, 40, 3): the classes 1, 2, 5 of ``class_map`` in red, an orange and blue on black."""
    rgb = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for number, colour in {1: (255, 0, 0), 2: (250, 165, 10), 5: (0, 0, 255)}.items():
        rgb[class_map() == number] = colour
    return rgb


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P", "gif", "tif", "bmp"])
def test_each_colour_of_a_label_but_black_is_a_mask(tmp_path, kind):
    picture = Image.fromarray(colour_map())
    if kind in ("RGBA", "P"):
        picture = picture.convert(kind, palette=Image.Palette.ADAPTIVE, colors=4)
    if kind == "RGBA":
        picture.putalpha(Image.fromarray(corner_picture()))
    path = save(tmp_path / (f"x.{kind}" if kind in FORMATS else "x.png"), picture)
    label = read_picture_label(path, "colour")
    assert label.shape == (1, HEIGHT, WIDTH)
    assert sorted(label.values) == ["#0000ff", "#faa50a", "#ff0000"]
    for name, number in {"#ff0000": 1, "#faa50a": 2, "#0000ff": 5}.items():
        assert np.array_equal(label.mask([name])[0], class_map() == number)


def test_a_colour_label_without_any_colour_is_background(tmp_path):
    label = read_picture_label(save(tmp_path / "x.png", Image.new("RGB", (12, 8))), "colour")
    assert label.shape == (1, 8, 12)
    assert label.counts() == {}
    assert not label.mask(["#ff0000"]).any()


def test_colours_on_the_pages_of_a_tiff_are_masks_of_a_volume(tmp_path):
    pages = [Image.fromarray(colour_map()), Image.new("RGB", (WIDTH, HEIGHT)), Image.fromarray(colour_map()[::-1])]
    path = save(tmp_path / "x.tif", pages[0], save_all=True, append_images=pages[1:])
    red = read_picture_label(path, "colour").mask(["#ff0000"])
    assert np.array_equal(red, np.stack([class_map() == 1, class_map() == 9, class_map()[::-1] == 1]))


@pytest.mark.parametrize(("count", "refused"), [(256, False), (257, True)])
def test_more_colours_than_any_table_has_are_refused(tmp_path, count, refused):
    rgb = np.zeros((1, count, 3), dtype=np.uint8)
    rgb[0, :, 0], rgb[0, :, 1] = np.arange(count) % 256, np.arange(count) // 256
    path = save(tmp_path / "x.png", Image.fromarray(rgb))
    if refused:
        with pytest.raises(ValueError, match=r"x\.png: the label has 257 colours; save as PNG without anti-aliasing"):
            read_picture_label(path, "colour")
    else:
        assert len(read_picture_label(path, "colour").values) == 255  # all but black


@pytest.mark.parametrize(
    ("name", "picture", "finding"),
    [
        ("x.jpg", lambda: Image.fromarray(colour_map()), "JPEG changes the colours of a label; save as PNG"),
        (
            "x.tif",
            lambda: Image.fromarray(class_map().astype(np.uint16)),
            'has no colours; write "label_coding": "index"',
        ),
    ],
)
def test_a_colour_label_is_refused_where_colours_are_not_kept(tmp_path, name, picture, finding):
    with pytest.raises(ValueError, match=finding):
        read_picture_label(save(tmp_path / name, picture()), "colour")


def box(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((16, 20), dtype=np.uint8)
    mask[rows, columns] = 1
    return mask


LEFT, RIGHT, BOTH = (box(slice(2, 9), c) for c in (slice(1, 8), slice(12, 19), slice(5, 15)))


def test_a_folder_of_masks_gives_a_class_a_stem_and_unites_instances(tmp_path):
    save(tmp_path / "polyp_1.png", Image.fromarray(LEFT * 255))
    save(tmp_path / "polyp-02.PNG", Image.fromarray(RIGHT))  # masks of 0 and 1, and of 0 and 255
    save(tmp_path / "instrument.tif", Image.fromarray(BOTH * np.uint16(65535)))
    (tmp_path / "notes.txt").write_text("read by A")
    (tmp_path / "._polyp_1.png").write_text("left by macOS")
    label = read_label_folder(tmp_path)
    assert sorted(label.values) == ["instrument", "polyp"]
    assert label.affine is None
    assert np.array_equal(label.mask(["polyp"]), (LEFT | RIGHT)[None].astype(bool))
    assert np.array_equal(label.mask(["instrument"]), BOTH[None].astype(bool))  # overlaps both of them
    assert label.counts() == {"polyp": 2 * 7 * 7, "instrument": 7 * 10}
    assert label.notes == ("2 masks are united as 'polyp': polyp-02, polyp_1",)


def test_a_numbered_mask_is_found_by_its_full_stem(tmp_path):
    """Each box has 7 x 7 pixels."""
    save(tmp_path / "class_1.png", Image.fromarray(LEFT * 255))
    save(tmp_path / "class_2.png", Image.fromarray(RIGHT * 255))
    save(tmp_path / "lobe_1.png", Image.fromarray(LEFT * 255))
    label = read_label_folder(tmp_path)
    assert np.array_equal(label.mask(["class_1"])[0], LEFT)
    assert np.array_equal(label.mask(["class_2"])[0], RIGHT)
    assert np.array_equal(label.mask(["lobe_1"]), label.mask(["lobe"]))
    assert label.counts() == {"class": 2 * 7 * 7, "lobe": 7 * 7}


def test_a_numbered_mask_beside_one_of_its_name_is_not_united_with_it(tmp_path):
    save(tmp_path / "polyp.png", Image.fromarray(LEFT * 255))
    save(tmp_path / "polyp_1.png", Image.fromarray(RIGHT * 255))
    label = read_label_folder(tmp_path)
    assert label.counts() == {"polyp": 7 * 7, "polyp_1": 7 * 7}
    assert label.notes == ()


def test_masks_of_one_stem_are_refused(tmp_path):
    save(tmp_path / "polyp.png", Image.fromarray(LEFT * 255))
    save(tmp_path / "polyp.tif", Image.fromarray(RIGHT * 255))
    with pytest.raises(ValueError, match=r"polyp\.tif: has the same stem as polyp\.png; rename or remove one of them"):
        read_label_folder(tmp_path)


@pytest.mark.parametrize("name", ["1.png", "t1.png", "lobe_2b.png"])
def test_a_number_that_is_no_instance_stays_in_the_name(tmp_path, name):
    save(tmp_path / name, Image.fromarray(LEFT))
    assert list(read_label_folder(tmp_path).values) == [name[:-4]]


def save_nifti(path: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), affine), path)


def test_a_folder_of_volumes_gives_masks_with_their_geometry(tmp_path):
    volume = np.zeros((6, 5, 4), dtype=np.uint8)
    volume[1:3, 2:4, 1] = 1
    save_nifti(tmp_path / "liver.nii.gz", volume, np.diag([2, 3, 4, 1]))
    save_nifti(tmp_path / "tumour_1.nii", np.flip(volume, 0), np.diag([2, 3, 4, 1]))
    label = read_label_folder(tmp_path)
    assert label.counts() == {"liver": 4, "tumour": 4}
    assert sorted(geometry.spacing(label.affine)) == [2, 3, 4]


def test_masks_of_different_shapes_are_refused_naming_both(tmp_path):
    save(tmp_path / "a.png", Image.fromarray(LEFT))
    save(tmp_path / "b.png", Image.fromarray(LEFT[:, :-1]))
    with pytest.raises(
        ValueError, match=r"b\.png: mask has shape \(16, 19\), a\.png has \(16, 20\); export both again"
    ):
        read_label_folder(tmp_path)


def test_masks_on_different_grids_are_refused_naming_both(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", np.ones((4, 5, 6)), np.eye(4))
    save_nifti(tmp_path / "b.nii.gz", np.ones((4, 5, 6)), np.diag([1, 1, 1.01, 1]))
    with pytest.raises(ValueError, match=r"b\.nii\.gz: mask lies on another grid than a\.nii\.gz"):
        read_label_folder(tmp_path)


def test_a_folder_without_masks_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds no mask; export one file a class"):
        read_label_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone: no such folder; check dataset_dir"):
        read_label_folder(tmp_path / "gone")


# Folder, coding of its labels, least and greatest share of foreground that its labels should have, number of pairs.
REAL = [
    ("lung_cxr", "threshold", 0.10, 0.50, 40),
    ("kvasir_seg_256", "threshold", 0.003, 0.80, 40),
    ("dental_panoramic", "threshold", 0.10, 0.35, 24),
    ("car_parts", "index", 0.05, 0.80, 20),
    ("drive_vessels", "threshold", 0.05, 0.15, 2),
]


@pytest.mark.parametrize(("name", "coding", "least", "greatest", "count"), REAL, ids=[row[0] for row in REAL])
def test_real_images_and_labels_are_read_in_their_own_size(real_data, name, coding, least, greatest, count):
    images, labels = (sorted((real_data / name / kind).iterdir()) for kind in ("images", "labels"))
    assert (len(images), len(labels)) == (count, count)
    for image_path, label_path in zip(images, labels, strict=True):
        with Image.open(image_path) as picture:
            size = picture.size[::-1]
        image, label = read_picture(image_path), read_picture_label(label_path, coding)
        assert image.shape == (1, *size)
        assert label.shape == (1, *size)
        assert shown(image).min() >= 0
        assert shown(image).max() <= 255
        assert least < (label.values > 0).mean() < greatest


def test_real_car_labels_hold_the_four_classes(real_data):
    paths = sorted((real_data / "car_parts" / "labels").iterdir())
    assert {value for path in paths for value in read_picture_label(path).counts()} == {1, 2, 3, 4}


def test_real_pictures_of_every_pixel_format_are_the_same_picture(real_data):
    """Ten files, gray or gray in three channels, of 8 or 16 bits; 257 of 65535 is 1 of 255. Tolerance: 1 of 255."""
    folder = real_data / "format_png_tif_variants"
    paths = sorted(p for p in folder.iterdir() if is_picture(p))
    assert len(paths) == 10
    with Image.open(folder / "sub-png_sample-8gray_SEM.png") as picture:
        scene = np.asarray(picture, dtype=np.float64)
    for path in paths:
        image = read_picture(path)
        gray = image.values[0] / (257 if image.values.dtype == np.uint16 else 1)  # (H, W) or (H, W, 3)
        expected = scene[: image.shape[1], : image.shape[2]]  # seven of them lack the last 10 rows and 22 columns
        assert np.abs(gray - (expected if gray.ndim == 2 else expected[..., None])).max() <= 1, path.name
        assert shown(image).min() >= 0
        assert shown(image).max() <= 255


def test_real_colours_of_16_bits_are_cut_and_said(real_data):
    notes = {
        bits: read_picture(real_data / "format_png_tif_variants" / f"sub-png_sample-{bits}rgb_SEM.png").notes
        for bits in (8, 16)
    }
    assert notes == {8: (), 16: ("16 bits a colour, of which the upper 8 are used",)}


def test_a_real_label_of_16_bits_a_colour_is_refused(real_data):
    """Class 1 of 65535 would be read as 0."""
    path = real_data / "format_png_tif_variants" / "sub-png_sample-16rgb_SEM.png"
    with pytest.raises(ValueError, match=r"16rgb_SEM\.png: the label has 16 bits a colour.*; save it as gray"):
        read_picture_label(path)
