"""Pictures of every usual kind come in upright, 8-bit and RGB; everything else is refused with a reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hf_shapley.models.images import load_image, to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def png_header(width, height):
    """A PNG that announces a size and holds no pixels."""
    fields = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((name + data, len(data)) for name, data in ((b"IHDR", fields), (b"IDAT", b"")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk, size in chunks
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L"])
def test_usual_modes_become_rgb_of_equal_size(mode):
    """A picture of every usual mode becomes RGB of the same size."""
    converted = to_rgb(Image.new(mode, (3, 2)))
    assert (converted.mode, converted.size) == ("RGB", (3, 2))


def test_grey_levels_are_repeated_in_each_channel():
    assert to_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("level, expected", [(0, 0), (257, 1), (128 * 257, 128), (65535, 255), (128, 0), (129, 1)])
def test_sixteen_bit_levels_are_scaled_not_clipped(mode, level, expected):
    """Sixteen-bit levels are scaled and not cut off at 255."""
    image = Image.new("I", (2, 1), level).convert(mode)
    assert to_rgb(image).getpixel((1, 0)) == (expected, expected, expected)


def test_a_sixteen_bit_png_file_is_scaled():
    image = Image.new("I;16", (2, 2), 32896)
    assert load_image(encoded(image, format="PNG")).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "pixel, expected",
    [((255, 0, 0, 255), RED), ((255, 0, 0, 0), WHITE), ((0, 0, 0, 51), (204, 204, 204))],
    ids=["opaque", "transparent", "a fifth of black"],
)
def test_transparency_is_composited_over_white(pixel, expected):
    assert to_rgb(Image.new("RGBA", (1, 1), pixel)).getpixel((0, 0)) == expected


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image, format="PNG", transparency=0))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


def png(bits, colour_type, row, transparent):
    """A PNG of 2 x 1 pixels with a transparent colour, written by hand: Pillow writes few of these depths."""
    fields = struct.pack(">IIBBBBB", 2, 1, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", fields), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize(
    "bits, colour_type, row, transparent, other",
    [
        (16, 0, struct.pack(">HH", 1000, 40000), struct.pack(">H", 1000), (156, 156, 156)),
        (8, 0, bytes([10, 200]), struct.pack(">H", 10), (200, 200, 200)),
        (4, 0, bytes([0x15]), struct.pack(">H", 1), (85, 85, 85)),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), (170, 170, 170)),
        (1, 0, bytes([0b10000000]), struct.pack(">H", 1), (0, 0, 0)),
        (
            16,
            2,
            struct.pack(">6H", 1000, 2000, 3000, 40000, 257, 0),
            struct.pack(">3H", 1000, 2000, 3000),
            (156, 1, 0),
        ),
        (8, 2, bytes([1, 2, 3, 200, 1, 0]), struct.pack(">3H", 1, 2, 3), (200, 1, 0)),
    ],
)
def test_a_transparent_colour_of_any_depth_becomes_white(bits, colour_type, row, transparent, other):
    """PNG names the colour in the file's own bits per channel; pixels of it are white, others stay (PNG, 11.3.2.1)."""
    data = png(bits, colour_type, row, transparent)
    for image in (load_image(data), load_image(Image.open(io.BytesIO(data)))):
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, other]


ARRAYS = {
    "grey": ((2, 3), "L"),
    "one channel": ((2, 3, 1), "L"),
    "red, green, blue": ((2, 3, 3), "RGB"),
    "with transparency": ((2, 5, 4), "RGBA"),
    "ambiguous": ((3, 5, 3), "RGB"),
}


@pytest.mark.parametrize("shape, mode", ARRAYS.values(), ids=ARRAYS)
def test_arrays_and_tensors_are_pictures(shape, mode):
    """NumPy's have channels last, as Pillow's; tensors have them first, as torchvision's."""
    levels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = to_rgb(Image.frombytes(mode, shape[1::-1], levels.tobytes())).tobytes()
    assert load_image(levels).tobytes() == expected
    levels.setflags(write=False)
    assert load_image(levels).tobytes() == expected
    tensor = torch.tensor(levels)
    assert load_image(tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor).tobytes() == expected


def test_channels_of_an_array_may_come_first():
    levels = np.random.default_rng(0).integers(0, 256, (3, 6, 7), dtype=np.uint8)
    assert load_image(levels).tobytes() == levels.transpose(1, 2, 0).tobytes()


def test_sixteen_bit_arrays_are_scaled():
    assert load_image(np.full((2, 2), 32896, dtype=np.uint16)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2)), torch.rand(3, 4, 4), np.zeros((2, 2), dtype=np.int64), np.zeros((9, 9, 9), dtype=np.uint8),
        np.zeros((1, 3, 4, 4), dtype=np.uint8), np.zeros((0, 4, 3), dtype=np.uint8), np.zeros(5, dtype=np.uint8),
        np.array([[None]]), np.zeros((4, 4, 3), dtype=np.uint16),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_told_are_refused(array):
    with pytest.raises(ValueError, match=r"must be \(H, W\), .* got"):
        load_image(array)


def test_open_files_are_read_from_their_start(tmp_path):
    """Open files and streams are read from their start; empty ones and text files are refused."""
    data = encoded(Image.new("RGB", (2, 2), RED), format="PNG")
    stream = io.BytesIO()
    stream.write(data)  # as `image.save(stream)` leaves it, at its end
    (tmp_path / "red.png").write_bytes(data)
    with open(tmp_path / "red.png", "rb") as file, open(tmp_path / "red.png", encoding="latin-1") as text:
        for source in (stream, file, bytearray(data), memoryview(data)):
            assert load_image(source).getpixel((0, 0)) == RED
        with pytest.raises(TypeError, match="mode 'rb'"):
            load_image(text)
    with pytest.raises(OSError, match="0 bytes"):
        load_image(io.BytesIO())


def test_huge_pictures_opened_by_pillow_stay_undecoded():
    """A huge picture that Pillow has opened is refused and not decoded."""
    with pytest.raises(ValueError, match="at most 64000000 pixels are accepted, got 8001 x 8000"):
        load_image(Image.open(io.BytesIO(png_header(8001, 8000))))


def test_broken_pictures_opened_by_pillow_are_refused():
    """A broken picture that Pillow has opened is refused."""
    data = encoded(Image.effect_noise((64, 64), 90), format="PNG")
    with pytest.raises(OSError, match="as a picture"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2] + bytes(100))))


def test_refusals_name_no_option_that_others_lack():
    with pytest.raises(ValueError, match="Downscale the picture") as refused:
        load_image(png_header(8001, 8000))
    assert "max_pixels" not in str(refused.value)


# The eight EXIF orientations: where the stored top-left pixel belongs in the upright picture (Exif 2.32, tag 0x0112).
@pytest.mark.parametrize(
    "orientation, corner, size",
    [
        (1, (0, 0), (3, 2)),
        (2, (2, 0), (3, 2)),
        (3, (2, 1), (3, 2)),
        (4, (0, 1), (3, 2)),
        (5, (0, 0), (2, 3)),
        (6, (1, 0), (2, 3)),
        (7, (1, 2), (2, 3)),
        (8, (0, 2), (2, 3)),
    ],
)
def test_exif_rotation_is_applied(orientation, corner, size):
    image = Image.new("RGB", (3, 2), GREEN)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(image, format="PNG", exif=exif))
    assert loaded.size == size
    red = [(x, y) for x in range(size[0]) for y in range(size[1]) if loaded.getpixel((x, y)) == RED]
    assert red == [corner]


def test_the_image_given_is_not_changed():
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    to_rgb(image).putpixel((0, 0), RED)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (1, 2, 3, 4)
    plain = Image.new("RGB", (1, 1))
    to_rgb(plain).putpixel((0, 0), RED)
    assert plain.getpixel((0, 0)) == (0, 0, 0)


def test_floats_are_refused_because_their_range_is_unknown():
    with pytest.raises(ValueError, match='mode "F"'):
        to_rgb(Image.new("F", (1, 1), 0.5))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="at least one pixel"):
        to_rgb(Image.new("RGB", (0, 4)))


def test_something_else_than_an_image_is_refused():
    with pytest.raises(TypeError, match="got list"):
        to_rgb([[0, 1]])


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG"])
def test_path_bytes_and_pillow_give_the_same_picture(tmp_path, file_format):
    data = encoded(Image.new("RGB", (16, 16), (255, 255, 255)), format=file_format, **{"quality": 100})
    path = tmp_path / "picture.of_any_suffix"
    path.write_bytes(data)
    pictures = [load_image(path), load_image(str(path)), load_image(data), load_image(Image.open(io.BytesIO(data)))]
    assert {picture.tobytes() for picture in pictures} == {bytes([255]) * 16 * 16 * 3}


def test_the_file_is_closed_again(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (2, 2)).save(path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    load_image(path)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        load_image(tmp_path / "nowhere.png")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(OSError, match="not a regular file"):
        load_image(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(OSError, match=r"empty.jpg.*\(0 bytes\)"):
        load_image(tmp_path / "empty.jpg")


def test_empty_bytes_are_refused():
    with pytest.raises(OSError, match="0 bytes"):
        load_image(b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_a_truncated_file_is_refused(file_format):
    noise = Image.effect_noise((64, 64), 90)
    data = encoded(noise, format=file_format)
    with pytest.raises(OSError, match="as a picture"):
        load_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"not a picture", b"\x00" * 100, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF0000WEBP"])
def test_corrupt_bytes_are_refused(data):
    with pytest.raises(OSError, match="complete file in one of .*JPEG.*PNG"):
        load_image(data)


def test_formats_that_start_other_programs_are_refused():
    with pytest.raises(OSError, match="as a picture"):
        load_image(encoded(Image.new("RGB", (4, 4)), format="EPS"))


def test_huge_pictures_are_refused_by_their_header():
    """A huge picture is refused from its header alone."""
    with pytest.raises(ValueError, match="at most 64000000 pixels are accepted, got 8001 x 8000"):
        load_image(png_header(8001, 8000))


@pytest.mark.parametrize("side", [10_000, 100_000], ids=["Pillow warns", "Pillow refuses"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(side):
    with pytest.raises(ValueError, match="Downscale"):
        load_image(png_header(side, side))


def test_pillow_images_obey_the_inclusive_pixel_limit():
    """The pixel limit is inclusive and holds for Pillow's images as for encoded ones."""
    image = Image.new("RGB", (10, 10))
    assert load_image(image, max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="at most 99 pixels"):
        load_image(image, max_pixels=99)
    with pytest.raises(ValueError, match="at most 99 pixels"):
        load_image(encoded(image, format="PNG"), max_pixels=99)


def test_undecoded_rows_are_read_and_named(tmp_path):
    """What a data set did not decode is read by its bytes or its path, and named by its path."""
    data = encoded(Image.new("RGB", (2, 1), RED), format="PNG")
    (tmp_path / "red.png").write_bytes(data)
    for source in ({"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": str(tmp_path / "red.png")}):
        assert load_image(source).getpixel((0, 0)) == RED
    with pytest.raises(OSError, match=r"'elsewhere\.png' as a picture"):
        load_image({"bytes": data[:20], "path": "elsewhere.png"})
    with pytest.raises(TypeError, match="got NoneType"):
        load_image({"bytes": None, "path": None})
    with pytest.raises(TypeError, match="got dict"):
        load_image({"image": data})


def test_urls_are_not_fetched():
    with pytest.raises(ValueError, match="download it first"):
        load_image("https://example.org/cat.png")


def test_other_sources_are_refused():
    with pytest.raises(TypeError, match="got int"):
        load_image(3)
