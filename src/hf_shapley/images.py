"""Reading pictures: any file or Pillow image in, an upright 8-bit RGB image out, with clear refusals."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from stat import S_ISREG
from typing import Any, BinaryIO, cast

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .checks import check_count

MAX_PIXELS = 64_000_000
"""Largest picture that `load_image` accepts by default, in pixels."""

# Only plain raster formats: some of Pillow's others start an external program (EPS) or are rarely exercised parsers.
READABLE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any Pillow image to the form models see: upright, 8 bits per channel, RGB.

    EXIF orientation is applied, 16-bit grey levels are divided by 257 (not cut off at 255), and transparency is
    composited over white.

    Args:
        image: of any mode but "F" (floats have no agreed range). Mode "I" is read as 16-bit, as PNG and PPM give it.

    Returns:
        A new image of mode "RGB".

    Raises:
        TypeError: not a Pillow image.
        ValueError: no pixels, or floats.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"`image` must be a PIL.Image.Image, got {type(image).__name__}: open it with `load_image`.")
    if 0 in image.size:
        raise ValueError(f"`image` must have at least one pixel, got width {image.width} and height {image.height}.")
    if image.mode == "F":
        raise ValueError('`image` must hold integers, got mode "F" (floats): scale to 0 ... 255 and convert to "L".')
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes "I" and "I;16*" with values 0 ... 65535 -> mode "L"."""
    raw = bytearray(image.convert("I").tobytes())  # int32, native byte order
    levels = torch.frombuffer(raw, dtype=torch.int32).clamp(0, 65535)
    # 65535 = 255 * 257, so adding 128 rounds to the nearest of the 256 levels.
    return Image.frombytes("L", image.size, bytes(((levels + 128) // 257).to(torch.uint8).numpy()))


def load_image(
    source: str | os.PathLike | bytes | Image.Image | dict[str, Any], *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read one picture from a file, from bytes or from Pillow, and refuse what cannot be a picture of sane size.

    The size is checked from the header, before any pixel is decoded. Of an animation the first frame is read.

    Args:
        source: path, encoded bytes, a Pillow image, or a dict with "bytes" or "path" as data sets hand out what they
            did not decode. URLs are not fetched.
        max_pixels: largest width x height accepted.

    Returns:
        Upright RGB image, as `to_rgb` gives it.

    Raises:
        FileNotFoundError: no such file.
        OSError: empty, truncated or corrupt file, or none of the `READABLE_FORMATS`.
        ValueError: a URL, or more than `max_pixels` pixels.
        TypeError: any other `source`.
    """
    check_count(max_pixels, "max_pixels")
    if isinstance(source, Image.Image):
        _check_pixels(source.size, max_pixels, "the image")
        return to_rgb(source)
    name = "the image given as bytes"
    if isinstance(source, dict) and {"bytes", "path"} & source.keys():
        path, data = source.get("path"), source.get("bytes")
        name, source = (repr(path) if path else name), cast("str | bytes", path if data is None else data)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), max_pixels, name)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"`source` must be a path, bytes or a PIL.Image.Image, got {type(source).__name__}.")
    return _load_file(os.fsdecode(source), max_pixels)


def _load_file(path: str, max_pixels: int) -> Image.Image:
    if not path:
        raise ValueError("`source` must be the path of a picture, got an empty text.")
    if path.startswith(("http://", "https://")):
        raise ValueError(f"`source` must be a local file, got the URL {path!r}: download it first.")
    # A folder, device or pipe is refused before it is opened: reading it might never end.
    if not S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path!r} is not a regular file: give the path of one picture.")
    with open(path, "rb") as stream:
        return _decode(stream, max_pixels, repr(path))


def _decode(stream: BinaryIO, max_pixels: int, name: str) -> Image.Image:
    """Decode an encoded picture; `name` says in messages which one failed."""
    if not stream.read(1):
        raise OSError(f"Cannot read {name}: it is empty (0 bytes).")
    Image.init()
    formats = [name for name in READABLE_FORMATS if name in Image.OPEN]
    with _readable(name, formats):
        image = Image.open(stream, formats=formats)
    with image:
        _check_pixels(image.size, max_pixels, name)
        with _readable(name, formats):
            return to_rgb(image)


@contextmanager
def _readable(name: str, formats: list[str]) -> Iterator[None]:
    """Turn whatever Pillow raises on a bad picture into ValueError (too large) or OSError (not a picture)."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"Cannot read {name}: Pillow refuses its size ({error}). Downscale the picture.") from error
    except Exception as error:  # its parsers raise many types on corrupt files: SyntaxError, struct.error, ...
        # Pillow's own words for "no parser took it" name a memory address.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise OSError(
            f"Cannot read {name} as a picture ({reason}): it must be a complete file in one of {', '.join(formats)}."
        ) from error


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"Cannot read {name}: at most {max_pixels} pixels are accepted, got {width} x {height}. "
            "Downscale the picture, or raise `max_pixels`."
        )
