"""Attribution maps laid over the pictures they explain: where they lie, in which colours.

A map holds one attribution per patch, (h, w) row-major, in logits. Its zero means "no influence", so the colours
diverge from white at 0 and one scale, the same on both sides of 0, holds for all maps that are to be compared.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from .checks import check_number, check_pair, check_sequence, describe
from .images import MAX_PIXELS, to_rgb

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of a picture; may reach beyond it where the processor pads."""

Colour = tuple[int, int, int]

BLUE_WHITE_RED: tuple[Colour, ...] = (
    (33, 102, 172),
    (146, 197, 222),
    (255, 255, 255),
    (244, 165, 130),
    (178, 24, 43),
)
"""Evenly spaced colours from -scale (against the label) over 0 to +scale (for it); readable with colour blindness."""


def symmetric_scale(maps: Any) -> float:
    """The one colour scale of several maps: their largest absolute attribution.

    Args:
        maps: finite tensor or array of any shape, or a list of them (whose shapes may differ).

    Returns:
        Scale in logits, > 0: 1.0 if every attribution is 0.
    """
    maps = maps if isinstance(maps, list | tuple) else [maps]
    if not maps:
        raise ValueError("`maps` must hold at least one map, got an empty list.")
    return max(finite_values(values, "maps").abs().max().item() for values in maps) or 1.0


def processor_geometry(image_processor: BaseImageProcessor, image_size: tuple[int, int]) -> Box:
    """The part of a picture that an image processor shows to the model.

    The processor's resize and centre crop are run on coordinates: its output's corners, in pixels of the original.

    Args:
        image_processor: with `size` of height and width (ViT: direct resize), or of shortest edge (ConvNeXt's own rule
            where it has `crop_pct`); and optionally `do_center_crop` with `crop_size`.
        image_size: (width, height) of the upright original, `to_rgb(image).size`.

    Returns:
        (left, top, right, bottom) in original pixels; beyond the picture where the crop pads.
    """
    width, height = check_pair(image_size, "image_size", "(width, height) of at least one pixel each")
    resized: tuple[int, int] = (width, height)
    crops: list[tuple[int, int]] = []
    if image_processor.do_resize:
        resized, crops = _resize(image_processor, width, height)
    if getattr(image_processor, "do_center_crop", None):
        crop = image_processor.crop_size
        crops = [*crops, (_entry(crop, "width"), _entry(crop, "height"))]
    left, top, (visible_width, visible_height) = 0, 0, resized
    for crop_width, crop_height in crops:
        left += _crop_start(image_processor, visible_width, crop_width)
        top += _crop_start(image_processor, visible_height, crop_height)
        visible_width, visible_height = crop_width, crop_height
    x_scale, y_scale = width / resized[0], height / resized[1]
    return left * x_scale, top * y_scale, (left + visible_width) * x_scale, (top + visible_height) * y_scale


def check_enlargement(image_processor: Any, image_size: tuple[int, int]) -> None:
    """Refuse a picture that the processor would enlarge to more than `MAX_PIXELS`.

    Where the shorter edge is given, a small file of 20,000 x 1 pixels becomes a picture of gigabytes before the crop.

    Args:
        image_processor: any; only one with `size` of shortest edge can enlarge without bound.
        image_size: (width, height) of the picture.

    Raises:
        ValueError: it would.
    """
    size = getattr(image_processor, "size", None)
    bounded = not _entry(size, "shortest_edge", default=0) or _entry(size, "longest_edge", default=0)
    if bounded or not image_processor.do_resize:
        return
    (width, height), _ = _resize(image_processor, *image_size)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"A picture of {image_size[0]} x {image_size[1]} pixels is too long and narrow: the image processor would "
            f"enlarge it to {width} x {height}, and at most {MAX_PIXELS} pixels are accepted. Crop it."
        )


def _resize(processor: BaseImageProcessor, width: int, height: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Size (width, height) after the processor's resize, and the crops that this resize includes."""
    shortest = _entry(processor.size, "shortest_edge", default=0)
    if not shortest:
        return (_entry(processor.size, "width"), _entry(processor.size, "height")), []
    if _entry(processor.size, "longest_edge", default=0):
        raise ValueError("`size` with both a shortest and a longest edge is not supported: use height and width.")
    crop_fraction = getattr(processor, "crop_pct", None)
    if crop_fraction is None:
        return _shortest_edge(width, height, shortest), []
    if shortest >= 384:  # ConvNeXt's rule: large inputs are warped, small ones resized larger and cropped
        return (shortest, shortest), []
    return _shortest_edge(width, height, int(shortest / crop_fraction)), [(shortest, shortest)]


def _entry(size: Any, key: str, default: int | None = None) -> int:
    """One entry of a processor's `size`: a dict, or newer transformers' dataclass, None where absent."""
    value = size.get(key) if isinstance(size, dict) else getattr(size, key, None)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"The image processor's size must have height and width, or shortest_edge, got {size}.")
    return value


def _shortest_edge(width: int, height: int, shortest: int) -> tuple[int, int]:
    """(width, height) once the shorter edge is `shortest`; the longer is rounded down, as transformers does."""
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def _crop_start(processor: BaseImageProcessor, size: int, crop: int) -> int:
    """First pixel of a centre crop along one axis; negative where it pads."""
    # Of an odd padding, Pillow's processors put the larger half first, torchvision's the smaller.
    towards_zero = getattr(processor, "backend", "pil") == "torchvision"
    return int((size - crop) / 2) if towards_zero else (size - crop) // 2


def place_map(attribution_map: Any, image_size: tuple[int, int], *, box: Box | None = None) -> Tensor:
    """Lay a map on the picture it explains: every pixel gets its patch's attribution.

    For looking and measuring positions: a patch's attribution is repeated, so pixels do not sum to the prediction.

    Args:
        attribution_map: (h, w), in logits.
        image_size: (width, height) of the picture.
        box: where the map lies, from `processor_geometry`; None = the whole picture.

    Returns:
        Float64 tensor (height, width); NaN where the model does not see the picture.
    """
    values = _finite_map(attribution_map)
    image_size = check_pair(image_size, "image_size", "(width, height) of at least one pixel each")
    box, (columns, rows) = check_box(box, image_size), image_size
    placed = torch.full((rows, columns), torch.nan, dtype=values.dtype)
    (top, row_patches), (left, column_patches) = _patch_indices(box, image_size, values.shape)
    bottom, right = top + len(row_patches), left + len(column_patches)
    placed[top:bottom, left:right] = values[row_patches][:, column_patches]
    return placed


def _patch_indices(
    box: Box, image_size: tuple[int, int], grid: Sequence[int]
) -> tuple[tuple[int, Tensor], tuple[int, Tensor]]:
    """Per axis (rows, then columns): the first pixel inside the box and the patch index of each pixel inside."""
    axes = ((box[1], box[3], image_size[1], grid[0]), (box[0], box[2], image_size[0], grid[1]))
    indices = []
    for start, stop, size, patches in axes:
        centres = torch.arange(size, dtype=torch.float64) + 0.5
        patch = ((centres - start) / (stop - start) * patches).floor().long()
        inside = (patch >= 0) & (patch < patches)
        indices.append((int(inside.int().argmax()), patch[inside]))
    return indices[0], indices[1]


def map_colours(
    attribution_map: Any, *, scale: float | None = None, cmap: Sequence[Colour] = BLUE_WHITE_RED
) -> Tensor:
    """Colour a map: -scale takes the first colour, 0 the middle one, +scale the last, linear in between.

    Args:
        attribution_map: (h, w), in logits.
        scale: attribution of the full colour, > 0; beyond it colours stay full. None = the map's own largest.
        cmap: an odd number of evenly spaced (red, green, blue), each 0 ... 255.

    Returns:
        uint8 tensor (h, w, 3).
    """
    values = _finite_map(attribution_map)
    scale = symmetric_scale(values) if scale is None else check_scale(scale)
    _check_colours(cmap)
    colours = torch.tensor(cmap, dtype=torch.float64)  # (colours, 3)
    position = ((values / scale).clamp(-1, 1) + 1) / 2 * (len(cmap) - 1)  # (h, w), 0 ... colours - 1
    lower = position.floor().clamp(max=len(cmap) - 2).long()
    mixed = torch.lerp(colours[lower], colours[lower + 1], (position - lower).unsqueeze(-1))
    return mixed.round().to(torch.uint8)


def overlay(
    image: Image.Image,
    attribution_map: Any,
    *,
    scale: float | None = None,
    alpha: float = 0.6,
    cmap: Sequence[Colour] = BLUE_WHITE_RED,
    box: Box | None = None,
) -> Image.Image:
    """Blend a map's colours over the picture it explains: red speaks for the label, blue against it, white not at all.

    Needs no matplotlib. Under the colours the picture is grey, so that its own hues are not taken for attributions;
    what the model does not see (outside of `box`) keeps them.

    Args:
        image: the picture, of any mode that `to_rgb` takes.
        attribution_map: (h, w), any grid, in logits.
        scale: attribution of the full colour, > 0; give `symmetric_scale` of all maps to compare. None = this map's.
        alpha: share of the colours, 0 (only the grey picture) ... 1 (only the map).
        cmap: as for `map_colours`.
        box: where the map lies, from `processor_geometry`; None = the whole picture.

    Returns:
        New RGB image of the upright picture's size.
    """
    check_number(alpha, "alpha", "between 0 and 1", lambda value: 0 <= value <= 1)
    blended = to_rgb(image)
    box = check_box(box, blended.size)
    colours = map_colours(attribution_map, scale=scale, cmap=cmap)
    (top, row_patches), (left, column_patches) = _patch_indices(box, blended.size, colours.shape[:2])
    if len(row_patches) and len(column_patches):
        veil = Image.fromarray(colours[row_patches][:, column_patches].numpy())
        seen = blended.crop((left, top, left + veil.width, top + veil.height)).convert("L")
        blended.paste(Image.blend(seen.convert("RGB"), veil, alpha), (left, top))
    return blended


def finite_values(values: Any, name: str) -> Tensor:
    """Any array, or list of arrays of one shape, of finite numbers as a float64 tensor on the CPU."""
    try:
        if isinstance(values, list | tuple):
            values = torch.stack([torch.as_tensor(value) for value in values])
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be an array of numbers, got {describe(values)}: {error}.") from error
    if tensor.is_complex():
        raise TypeError(f"`{name}` must be real numbers, got {describe(tensor)}.")
    tensor = tensor.double()
    if tensor.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(tensor.shape)}.")
    if not tensor.isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(f"`{name}` must be finite, got {bad} NaN or infinite values of {tensor.numel()}.")
    return tensor


def _finite_map(attribution_map: Any) -> Tensor:
    values = finite_values(attribution_map, "attribution_map")
    if values.ndim != 2:
        raise ValueError(f"`attribution_map` must be of shape (h, w), got {tuple(values.shape)}: choose one label.")
    return values


def check_scale(scale: float) -> float:
    check_number(
        scale, "scale", "a finite number of logits above 0 (see `symmetric_scale`)", lambda x: isfinite(x) and x > 0
    )
    return scale


def _check_colours(cmap: Sequence[Colour]) -> None:
    wanted = "an odd number of colours (red, green, blue), at least 3 (the middle is 0)"
    colours = [check_sequence(colour, "cmap", wanted) for colour in check_sequence(cmap, "cmap", wanted)]
    fits = all(len(colour) == 3 and all(0 <= channel <= 255 for channel in colour) for colour in colours)
    if len(colours) < 3 or len(colours) % 2 == 0 or not fits:
        raise ValueError(f"`cmap` must have {wanted}, got {describe(cmap)}.")


def check_box(box: Box | None, image_size: tuple[int, int]) -> Box:
    if box is None:
        return 0.0, 0.0, float(image_size[0]), float(image_size[1])
    wanted = "(left, top, right, bottom) with left < right and top < bottom"
    corners = check_sequence(box, "box", wanted)
    if len(corners) != 4:
        raise ValueError(f"`box` must be {wanted}, got {describe(box)}.")
    for corner in corners:
        check_number(corner, "box", wanted, isfinite)
    left, top, right, bottom = corners
    if not (left < right and top < bottom):
        raise ValueError(f"`box` must be (left, top, right, bottom) with left < right and top < bottom, got {box}.")
    return box
