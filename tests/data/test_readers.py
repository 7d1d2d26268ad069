"""Reading: upright, in colour, or refused with a reason."""

from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from blosam_monai.data.readers import list_images, read_image, read_label

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


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture_of_any_format_comes_out_upright(tmp_path, suffix):
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(corner_picture()))
    image = read_image(path)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == np.float32
    assert np.abs(image - corner_picture()).max() <= 8  # JPEG; the step at the corner is 224


OLD_PILLOW = pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12 does not read the YCbCr TIFF that it writes")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", pytest.param("YCbCr", marks=OLD_PILLOW)])
def test_every_kind_of_pixel_gives_the_colours_that_were_saved(tmp_path, mode):
    rgb = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    rgb[:] = (40, 40, 40) if mode in ("L", "LA") else (200, 40, 10)
    rgb[:8, 32:] = (250, 250, 250) if mode in ("L", "LA") else (10, 60, 250)
    path = save(tmp_path / "x.tif", Image.fromarray(rgb).convert(mode))
    difference = np.abs(read_image(path) - rgb.transpose(2, 0, 1)).max()
    assert difference <= (2 if mode in ("CMYK", "YCbCr") else 0)


def test_a_palette_picture_gives_its_colours_and_not_its_indices(tmp_path):
    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 0])
    picture.paste(2, (32, 0, WIDTH, 8))
    for options in ({}, {"transparency": bytes([0, 255, 128])}):
        image = read_image(save(tmp_path / "x.png", picture, **options))
        assert image[:, 0, -1].tolist() == [200, 100, 0]
        assert image[:, -1, 0].tolist() == [0, 0, 0]


def test_one_bit_is_black_and_white(tmp_path):
    image = read_image(save(tmp_path / "x.png", Image.fromarray(corner_picture() > 127)))
    assert np.array_equal(image[0], np.where(corner_picture() > 127, 255, 0))


def test_transparency_does_not_change_the_colours(tmp_path):
    rgba = np.full((HEIGHT, WIDTH, 4), 90, dtype=np.uint8)
    rgba[..., 3] = 0
    rgba[0, 0] = (1, 2, 3, 0)
    assert read_image(save(tmp_path / "x.png", Image.fromarray(rgba)))[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("suffix", "code"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("tif", "<i4"), ("tif", "<f4")]
)
def test_more_than_8_bits_are_stretched_from_minimum_to_maximum(tmp_path, suffix, code):
    values = np.linspace(1000, 5000, HEIGHT * WIDTH).round().reshape(HEIGHT, WIDTH)
    if code == ">u2":
        picture = Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(code).tobytes())
    else:
        picture = Image.fromarray(values.astype(code))
    image = read_image(save(tmp_path / f"x.{suffix}", picture))
    assert np.abs(image - (values - 1000) * 255 / 4000).max() < 1e-3


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
    image = read_image(save(tmp_path / "x.jpg", Image.fromarray(stored), exif=exif))
    assert image.shape == (3, HEIGHT, WIDTH)
    assert np.abs(image - corner_picture()).max() <= 8


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "bmp"])
def test_an_index_label_keeps_its_values_and_its_place(tmp_path, suffix):
    label = read_label(save(tmp_path / f"x.{suffix}", Image.fromarray(class_map())))
    assert label.dtype == np.int32
    assert np.array_equal(label, class_map())


def test_a_palette_label_gives_indices(tmp_path):
    picture = Image.fromarray(class_map())
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128])
    assert picture.mode == "P"
    assert np.array_equal(read_label(save(tmp_path / "x.png", picture)), class_map())


@pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
def test_a_gray_label_saved_with_more_channels_gives_its_values(tmp_path, mode):
    assert np.array_equal(read_label(save(tmp_path / "x.png", Image.fromarray(class_map()).convert(mode))), class_map())


def test_a_coloured_palette_in_a_gif_is_refused(tmp_path):
    """PIL writes the entries 0 and 3 of this palette as 0 and 1: the indices of a GIF are not the classes."""
    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    picture.paste(3, (32, 0, WIDTH, 8))
    with pytest.raises(ValueError, match=r"x\.gif: the label has colours"):
        read_label(save(tmp_path / "x.gif", picture))


def test_class_numbers_above_255_are_kept(tmp_path):
    label = class_map().astype(np.uint16) * 1000
    assert np.array_equal(read_label(save(tmp_path / "x.png", Image.fromarray(label))), label)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "16 bit", "16 bit full", "float"])
def test_a_mask_of_0_and_255_is_read_by_threshold(tmp_path, mode):
    mask = class_map() > 0
    picture = {
        "16 bit": lambda: Image.fromarray(mask.astype(np.uint16) * 255),
        "16 bit full": lambda: Image.fromarray(mask.astype(np.uint16) * 65535),
        "float": lambda: Image.fromarray(mask.astype(np.float32) * 255),
    }.get(mode, lambda: Image.fromarray(mask.astype(np.uint8) * 255).convert(mode))()
    assert np.array_equal(read_label(save(tmp_path / "x.tif", picture), "threshold"), mask)


def test_a_soft_edge_is_cut_at_the_middle(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    assert read_label(save(tmp_path / "x.png", Image.fromarray(ramp)), "threshold").sum() == 4 * 128


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_noise_does_not_change_a_mask(tmp_path, quality):
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[17:43, 30:71] = 255
    path = save(tmp_path / "x.jpg", Image.fromarray(mask), quality=quality)
    with Image.open(path) as stored:
        assert len(np.unique(np.asarray(stored))) > 2
    assert np.array_equal(read_label(path, "threshold"), mask == 255)


def test_a_preview_inside_a_tiff_is_not_a_page(tmp_path):
    preview = TiffImagePlugin.ImageFileDirectory_v2()
    preview[254] = 1  # NewSubfileType: a reduced copy of another page (TIFF 6.0)
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "x.tif"), True) as file:
        Image.fromarray(corner_picture()).save(file, format="TIFF")
        file.newFrame()
        Image.fromarray(corner_picture()[::4, ::4]).save(file, format="TIFF", tiffinfo=preview)
    image = read_image(tmp_path / "x.tif")
    assert np.array_equal(image[0], corner_picture())


def nan_picture() -> Image.Image:
    values = corner_picture().astype(np.float32)
    values[3, 3] = np.nan
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("suffix", "picture", "finding"),
    [
        ("tif", nan_picture, "NaN"),
        ("png", lambda: Image.new("RGB", (8, 8), (9, 9, 9)), "every pixel has the same value"),
        ("tif", lambda: Image.fromarray(np.full((8, 8), 7, dtype=np.uint16)), "every pixel has the same value"),
    ],
)
def test_an_image_that_shows_nothing_is_refused_by_name(tmp_path, suffix, picture, finding):
    path = save(tmp_path / f"film_07.{suffix}", picture())
    with pytest.raises(ValueError, match=rf"film_07\.{suffix}: .*{finding}.*; repair or leave out"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["tif", "gif"])
@pytest.mark.parametrize("read", [read_image, read_label])
def test_several_pages_are_refused(tmp_path, suffix, read):
    pages = [Image.fromarray(corner_picture()), Image.fromarray(class_map())]
    path = save(tmp_path / f"x.{suffix}", pages[0], save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=rf"x\.{suffix}: has 2 pages; save the wanted page"):
        read(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_picture_never_gives_other_pixels(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(noise))
    whole, content = read_image(path), path.read_bytes()
    refused = 0
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(read_image(path), whole)  # only the end mark of the file is missing
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
        with pytest.raises(ValueError, match=r"x\.tif: (cannot be read as a picture|has 2 pages)"):
            read_image(path)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        read_image(tmp_path / "x.png")


def test_a_picture_beyond_pils_size_limit_is_refused_by_name(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", Image.fromarray(corner_picture()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)  # PIL refuses twice this number
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_label])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file; check dataset_dir"):
        read(tmp_path / "gone.png")


def test_a_coloured_label_is_refused(tmp_path):
    rgb = np.zeros((8, 8, 3), dtype=np.uint8)
    rgb[2:4, 2:4, 0] = 200
    with pytest.raises(ValueError, match=r"x\.png: the label has colours; export a map of class numbers"):
        read_label(save(tmp_path / "x.png", Image.fromarray(rgb)))


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_label_of_fractions_is_refused(tmp_path, value):
    label = np.zeros((8, 8), dtype=np.float32)
    label[2, 2] = value
    with pytest.raises(ValueError, match=r"x\.tif: the label has fractional values"):
        read_label(save(tmp_path / "x.tif", Image.fromarray(label)))


def test_an_unknown_coding_is_refused(tmp_path):
    path = save(tmp_path / "x.png", Image.fromarray(class_map()))
    with pytest.raises(ValueError, match=r"label_coding: 'colour' is not one of index, threshold"):
        read_label(path, "colour")


def test_reading_leaves_no_file_open(tmp_path):
    """Open handles would raise a ResourceWarning, which the test run takes for an error."""
    for suffix in FORMATS:
        read_image(save(tmp_path / f"x.{suffix}", Image.fromarray(corner_picture())))
        (tmp_path / f"x.{suffix}").rename(tmp_path / f"y.{suffix}")


def test_a_folder_is_listed_sorted_and_without_other_files(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.tiff"):
        save(tmp_path / name, Image.fromarray(corner_picture()))
    (tmp_path / "notes.txt").touch()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.tiff"]
    assert list_images(tmp_path / "a.jpg") == [tmp_path / "a.jpg"]


def test_two_pictures_of_one_stem_are_refused_naming_both(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        save(tmp_path / name, Image.fromarray(corner_picture()))
    with pytest.raises(ValueError, match=r"a\.png: has the same stem as a\.jpg; rename or remove one of them"):
        list_images(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list_images(tmp_path / "gone")


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
    images, labels = list_images(real_data / name / "images"), list_images(real_data / name / "labels")
    assert (len(images), len(labels)) == (count, count)
    for image_path, label_path in zip(images, labels, strict=True):
        with Image.open(image_path) as picture:
            size = picture.size[::-1]
        image, label = read_image(image_path), read_label(label_path, coding)
        assert image.shape == (3, *size)
        assert label.shape == size
        assert image.min() >= 0
        assert image.max() <= 255
        assert least < (label > 0).mean() < greatest


def test_real_car_labels_hold_the_four_classes(real_data):
    values = {v for path in list_images(real_data / "car_parts" / "labels") for v in np.unique(read_label(path))}
    assert values == {0, 1, 2, 3, 4}


def test_real_pictures_of_every_pixel_format_show_the_same_scene(real_data):
    folder = real_data / "format_png_tif_variants"
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".tif"))
    assert len(paths) == 10
    reference = {}
    for path in paths:
        image = read_image(path)
        assert image.min() >= 0
        assert image.max() <= 255
        first = reference.setdefault(image.shape, image)
        assert np.corrcoef(image.mean(0).ravel(), first.mean(0).ravel())[0, 1] > 0.9
