"""Reading pictures: any file or Pillow image in, an upright 8-bit RGB image out, with clear refusals."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from stat import S_ISREG
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .checks import check_count, describe

MAX_PIXELS = 64_000_000
"""Largest picture that `load_image` accepts by default, in pixels."""

# Only plain raster formats: some of Pillow's others start an external program (EPS) or are rarely exercised parsers.
READABLE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# What arrays are taken for, by their type and channels.
MODES = {
    (torch.uint8, 1): "L",
    (torch.uint8, 2): "LA",
    (torch.uint8, 3): "RGB",
    (torch.uint8, 4): "RGBA",
    (torch.uint16, 1): "I;16",
}


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
    _check_image(image)
    transparent = _transparent_colour(image)
    image = ImageOps.exif_transpose(image)
    if transparent is not None:
        image.info["transparency"] = transparent
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _check_image(image: Any) -> None:
    """Refuse what no conversion makes a picture, before any of its pixels is decoded."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"`image` must be a PIL.Image.Image, got {type(image).__name__}: open it with `load_image`.")
    if 0 in image.size:
        raise ValueError(f"`image` must have at least one pixel, got width {image.width} and height {image.height}.")
    if image.mode == "F":
        raise ValueError('`image` must hold integers, got mode "F" (floats): scale to 0 ... 255 and convert to "L".')


def _transparent_colour(image: Image.Image) -> Any:
    """The colour that a picture's file calls transparent, in the levels of its pixels; None where there is none.

    PNG counts it in the file's own bits per channel. Where Pillow scales the pixels of 2, 4 or 16 bits to 8, it leaves
    the colour as it was, and none of them would match.
    """
    colour, tile = image.info.get("transparency"), getattr(image, "tile", None)
    bits = tile[0][3] if tile else None  # Pillow's name of how the file stores its pixels, until they are read
    if isinstance(colour, int) and bits in ("L;2", "L;4"):
        levels = {"L;2": 3, "L;4": 15}[bits]
        return colour * 255 // levels if colour <= levels else colour
    if bits == "RGB;16B" and isinstance(colour, tuple):
        return tuple(level >> 8 for level in colour)  # as Pillow does with the pixels
    return colour


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes "I" and "I;16*" with values 0 ... 65535 -> mode "L", or "LA" where a level is transparent."""
    raw = bytearray(image.convert("I").tobytes())  # int32, native byte order
    levels = torch.frombuffer(raw, dtype=torch.int32)
    # 65535 = 255 * 257, so adding 128 rounds to the nearest of the 256 levels.
    grey = _grey(((levels.clamp(0, 65535) + 128) // 257).to(torch.uint8), image.size)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, _grey((levels != transparent).to(torch.uint8) * 255, image.size)))


def _grey(levels: Tensor, size: tuple[int, int]) -> Image.Image:
    """uint8 (width x height) -> mode "L"."""
    return Image.frombytes("L", size, bytes(levels.numpy()))


def load_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one picture from a file, from bytes, from Pillow or from an array, and refuse what cannot be one.

    The size is checked from the header, before any pixel is decoded. Of an animation the first frame is read.

    Args:
        source: path, encoded bytes, a file or stream open for reading bytes, a Pillow image, a NumPy array or tensor
            of one picture, or a dict with "bytes" or "path" as data sets hand out what they did not decode. URLs are
            not fetched. Arrays are (H, W), (H, W, C) or (C, H, W), uint8 of 1 to 4 channels as Pillow has them, or
            uint16 of one; where both ends of a shape could be channels, an array's are last and a tensor's first.
        max_pixels: largest width x height accepted.

    Returns:
        Upright RGB image, as `to_rgb` gives it.

    Raises:
        FileNotFoundError: no such file.
        OSError: empty, truncated or corrupt file, or none of the `READABLE_FORMATS`.
        ValueError: a URL, more than `max_pixels` pixels, or an array of other numbers or another shape.
        TypeError: any other `source`.
    """
    check_count(max_pixels, "max_pixels")
    name = "the image given as bytes"
    if isinstance(source, dict) and {"bytes", "path"} & source.keys():
        path, data = source.get("path"), source.get("bytes")
        name, source = (repr(path) if path else name), (path if data is None else data)
    if is_array(source):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        _check_image(source)
        _check_pixels(source.size, max_pixels, "the image")
        with _readable("the image"):  # Pillow decodes a file that it has opened when its pixels are asked for
            return to_rgb(source)
    if hasattr(source, "read"):
        source = _read_stream(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), max_pixels, name)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"`source` must be a path, bytes or a PIL.Image.Image, got {type(source).__name__}.")
    return _load_file(os.fsdecode(source), max_pixels)


def is_array(source: Any) -> bool:
    """Whether this is a tensor or a NumPy array, which Pillow images are not."""
    if isinstance(source, Image.Image):  # asked for the attribute below, Pillow would decode a file of any size
        return False
    return isinstance(source, Tensor) or hasattr(source, "__array_interface__")


def _from_array(array: Any) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W), uint8 or grey uint16 -> Pillow image."""
    wanted = "`source` must be (H, W), (H, W, C) or (C, H, W), uint8 of 1 to 4 channels or uint16 of one"
    try:
        levels = array.detach().cpu() if isinstance(array, Tensor) else torch.tensor(array)
    except (TypeError, ValueError) as error:  # an array of objects, say
        raise ValueError(f"{wanted}, got {describe(array)}.") from error
    levels = _channels_last(levels, tensor=isinstance(array, Tensor))
    channels = levels.shape[-1] if levels.ndim == 3 else 0
    mode = MODES.get((levels.dtype, channels))
    if mode is None or levels.numel() == 0:
        fix = "scale to 0 ... 255 and convert to uint8" if levels.is_floating_point() else "convert it"
        raise ValueError(f"{wanted}, got {describe(levels)}: {fix}.")
    height, width = levels.shape[:2]
    kind = "<u2" if mode == "I;16" else "u1"
    return Image.frombytes(mode, (width, height), levels.contiguous().numpy().astype(kind).tobytes())


def _channels_last(levels: Tensor, *, tensor: bool) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C); what is neither is left as it is."""
    if levels.ndim == 2:
        return levels.unsqueeze(2)
    if levels.ndim != 3:
        return levels
    first, last = levels.shape[0] <= 4, levels.shape[2] <= 4
    return levels.permute(1, 2, 0) if first and (tensor or not last) else levels


def _read_stream(stream: Any) -> bytes:
    """All bytes of an open file or stream, from its beginning where it has one, as Pillow does."""
    if hasattr(stream, "seekable") and stream.seekable():
        stream.seek(0)
    data = stream.read()
    if not isinstance(data, bytes):
        raise TypeError(f"`source` must give bytes, got {type(data).__name__}: open the file with mode 'rb'.")
    return data


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
    with _readable(name):
        image = Image.open(stream, formats=_formats())
    with image:
        _check_pixels(image.size, max_pixels, name)
        with _readable(name):
            return to_rgb(image)


def _formats() -> list[str]:
    """Those of `READABLE_FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in READABLE_FORMATS if name in Image.OPEN]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a bad picture into ValueError (too large) or OSError (not a picture)."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"Cannot read {name}: Pillow refuses its size ({error}). Downscale the picture.") from error
    except Exception as error:  # its parsers raise many types on corrupt files: SyntaxError, struct.error, ...
        # Pillow's own words for "no parser took it" name a memory address.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        formats = ", ".join(_formats())
        raise OSError(
            f"Cannot read {name} as a picture ({reason}): it must be a complete file in one of {formats}."
        ) from error


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"Cannot read {name}: at most {max_pixels} pixels are accepted, got {width} x {height}. "
            "Downscale the picture."
        )
