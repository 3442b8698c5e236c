"""Attribution maps over pictures: overlays without matplotlib, figures with it.

A map holds one attribution per patch, (h, w) row-major, in logits. Its zero means "no influence", so the colours
diverge from white at 0 and one scale, the same on both sides of 0, holds for a whole figure.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from .checks import check_count, check_number, check_pair, check_sequence, describe, printable
from .images import MAX_PIXELS, to_rgb

if TYPE_CHECKING:
    # In `try`, because the Hub demands at load whatever a file imports outside of one.
    try:  # noqa: SIM105
        from matplotlib.figure import Figure
    except ImportError:
        pass

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

TITLE_WIDTH = 136.0
"""In points: what a panel of a figure leaves between its neighbours."""

LONGEST_LINE = 200
"""In letters: more are not measured."""


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
    return max(_finite(values, "maps").abs().max().item() for values in maps) or 1.0


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
    box, (columns, rows) = _check_box(box, image_size), image_size
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
    scale = symmetric_scale(values) if scale is None else _check_scale(scale)
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
    box = _check_box(box, blended.size)
    colours = map_colours(attribution_map, scale=scale, cmap=cmap)
    (top, row_patches), (left, column_patches) = _patch_indices(box, blended.size, colours.shape[:2])
    if len(row_patches) and len(column_patches):
        veil = Image.fromarray(colours[row_patches][:, column_patches].numpy())
        seen = blended.crop((left, top, left + veil.width, top + veil.height)).convert("L")
        blended.paste(Image.blend(seen.convert("RGB"), veil, alpha), (left, top))
    return blended


def attribution_figure(
    image: Image.Image,
    maps: Any,
    labels: Sequence[str],
    *,
    scale: float | None = None,
    alpha: float = 0.6,
    cmap: Sequence[Colour] = BLUE_WHITE_RED,
    box: Box | None = None,
    title: str = "",
) -> "Figure":
    """One picture and its maps for several labels side by side, on one scale.

    Args:
        image: the picture.
        maps: (labels, h, w), in logits.
        labels: one title per map.
        scale: attribution of the full colour; None = the largest of `maps`.
        alpha: share of the colours.
        cmap: as for `map_colours`.
        box: where the maps lie, from `processor_geometry`.
        title: above the picture.

    Returns:
        A matplotlib figure outside of pyplot: save it with `figure.savefig(path)`.
    """
    maps = _finite(maps, "maps")
    if maps.ndim != 3:
        raise ValueError(f"`maps` must be of shape (labels, h, w), got {tuple(maps.shape)}: add a leading dimension.")
    return attribution_grid(
        [image],
        maps[None],
        [labels],
        titles=[title],
        boxes=[box],
        scale=scale,
        alpha=alpha,
        cmap=cmap,
        blocks_per_row=1,
    )


def attribution_grid(
    images: Sequence[Image.Image],
    maps: Any,
    labels: Sequence[Sequence[str]],
    *,
    titles: Sequence[str] | None = None,
    boxes: Sequence[Box | None] | None = None,
    scale: float | None = None,
    alpha: float = 0.6,
    cmap: Sequence[Colour] = BLUE_WHITE_RED,
    blocks_per_row: int = 2,
) -> "Figure":
    """Several pictures, each followed by its maps (the predicted label and the runner-up, say), all on one scale.

    Each map's title ends with its sum: what the patches add to the base value, in logits.

    Args:
        images: the pictures.
        maps: (images, labels, h, w), in logits.
        labels: per picture, one title per map.
        titles: one per picture, above it.
        boxes: one per picture, from `processor_geometry`; None = maps cover the whole pictures.
        scale: attribution of the full colour; None = the largest of all `maps`.
        alpha: share of the colours.
        cmap: as for `map_colours`.
        blocks_per_row: pictures (with their maps) side by side.

    Returns:
        A matplotlib figure outside of pyplot: save it with `figure.savefig(path)`.
    """
    maps = _finite(maps, "maps")
    if maps.ndim != 4:
        raise ValueError(f"`maps` must be of shape (images, labels, h, w), got {tuple(maps.shape)}.")
    check_count(blocks_per_row, "blocks_per_row")
    count, panels = len(maps), 1 + maps.shape[1]
    titles = [""] * count if titles is None else titles
    boxes = [None] * count if boxes is None else boxes
    for name, given in (("images", images), ("labels", labels), ("titles", titles), ("boxes", boxes)):
        if len(check_sequence(given, name, "a list with one entry per image of `maps`")) != count:
            raise ValueError(f"`{name}` must have one entry per image of `maps` ({count}), got {len(given)}.")
    scale = symmetric_scale(maps) if scale is None else _check_scale(scale)

    figure, axes = _axes(rows=ceil(count / blocks_per_row), columns=min(count, blocks_per_row) * panels)
    blocks = axes.reshape(-1, panels)  # (blocks, panels): row-major, so blocks of one row stay side by side
    for block, image, image_maps, names, title, box in zip(blocks, images, maps, labels, titles, boxes, strict=False):
        _draw_block(block, image, image_maps, names, title, box, scale=scale, alpha=alpha, cmap=cmap)
    _colour_bar(figure, axes, scale, cmap)
    return figure


def _axes(rows: int, columns: int) -> tuple["Figure", Any]:
    """An empty figure and its (rows, columns) array of bare axes."""
    figure = _matplotlib().figure.Figure(figsize=(2.1 * columns + 1, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    return figure, axes


def _matplotlib() -> Any:
    """The optional matplotlib, without pyplot: that would keep every figure alive."""
    try:
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.font_manager
        import matplotlib.textpath
    except ImportError as error:
        raise ImportError("Figures need matplotlib: install it with `pip install hf_shapley[plot]`.") from error
    return matplotlib


def _draw_block(
    block: Sequence[Any],
    image: Image.Image,
    maps: Tensor,
    labels: Sequence[str],
    title: str,
    box: Box | None,
    **colouring: Any,
) -> None:
    """Draw one picture and its overlays (labels, h, w) into as many axes plus one."""
    if len(check_sequence(labels, "labels", "one title per map")) != len(maps):
        raise ValueError(f"`labels` must name the {len(maps)} maps of every image, got {len(labels)}: {list(labels)}.")
    image, box = _thumbnail(image, box)
    block[0].imshow(image)
    _set_title(block[0], title)
    for panel, attribution_map, label in zip(block[1:], maps, labels, strict=True):
        panel.imshow(overlay(image, attribution_map, box=box, **colouring))
        _set_title(panel, label, f"\nsum {attribution_map.sum():+.2f}")


def _set_title(panel: Any, text: str, last: str = "") -> None:
    """Put a text above a panel, on lines no wider than it and in fonts that have its letters; then `last`."""
    matplotlib = _matplotlib()
    lines = (" ".join(line.split()) for line in printable(text).split("\n"))
    text, families = _in_fonts("\n".join(lines))
    font = matplotlib.font_manager.FontProperties(family=families, size="small")
    measure = matplotlib.textpath.text_to_path.get_text_width_height_descent

    def fits(line: str) -> bool:
        return measure(line, font, False)[0] <= TITLE_WIDTH

    title = "\n".join(_wrapped(text, fits)) + last
    panel.set_title(title, fontfamily=families, fontsize="small", parse_math=False)


def _wrapped(text: str, fits: Callable[[str], bool], most: int = 3) -> list[str]:
    """Break a text into lines that fit; of one that needs more than `most`, the middle is left out."""
    lines: list[str] = []
    while text:
        if len(lines) == most - 1 and ("\n" in text or not fits(text)):
            return [*lines, _end(text.replace("\n", " "), fits)]
        line = _start(text, fits)
        lines.append(line.rstrip())
        text = text[len(line) :].lstrip()
    return lines


def _start(text: str, fits: Callable[[str], bool]) -> str:
    """As much of a text's first line as fits, at least a letter; whole words where there are any."""
    line = text.split("\n", 1)[0][:LONGEST_LINE]
    size = bisect_right(range(1, len(line) + 1), False, key=lambda size: not fits(line[:size]))
    if size == len(line):
        return line
    return line[: (size if line[size] == " " else line.rfind(" ", 0, size) + 1) or max(1, size)]


def _end(text: str, fits: Callable[[str], bool]) -> str:
    """As much of a text's end as fits after an ellipsis, at least a letter."""
    sizes = range(1, min(len(text), LONGEST_LINE) + 1)
    size = bisect_right(sizes, False, key=lambda size: not fits("\u2026" + text[-size:]))
    return "\u2026" + text[-max(1, size) :]


def _in_fonts(text: str) -> tuple[str, list[str]]:
    """The text, with letters that no installed font has as escapes, and the font families that have the others."""
    matplotlib = _matplotlib()
    families = list(matplotlib.rcParams["font.family"])
    missing = {ord(letter) for letter in text if letter != "\n"}.difference(*map(_letters, families))
    while missing:
        best = max(_installed_families(), key=lambda family: len(missing & _letters(family)))
        if not missing & _letters(best):
            break
        families.append(best)
        missing -= _letters(best)
    return text.translate({code: chr(code).encode("unicode_escape").decode() for code in missing}), families


def _installed_families() -> list[str]:
    """Font families with an upright font of ordinary weight; fonts of last resort, all boxes, are none."""
    fonts = _matplotlib().font_manager.fontManager.ttflist
    ordinary = (font.name for font in fonts if font.style == "normal" and font.weight in (400, "normal"))
    return sorted({name for name in ordinary if "Last" not in name})


@cache
def _letters(family: str) -> frozenset[int]:
    """Code points for which the font of a family that matplotlib takes has a glyph."""
    manager = _matplotlib().font_manager
    return frozenset(manager.get_font(manager.findfont(manager.FontProperties(family=[family]))).get_charmap())


def _thumbnail(image: Image.Image, box: Box | None, longest_edge: int = 512) -> tuple[Image.Image, Box | None]:
    """Shrink a picture and its box: a dozen photographs at full size would take gigabytes in a figure."""
    image = to_rgb(image)
    box = _check_box(box, image.size)
    width, height = image.size
    image.thumbnail((longest_edge, longest_edge))
    x_scale, y_scale = image.width / width, image.height / height
    return image, (box[0] * x_scale, box[1] * y_scale, box[2] * x_scale, box[3] * y_scale)


def _colour_bar(figure: "Figure", axes: Any, scale: float, cmap: Sequence[Colour]) -> None:
    """Say once for the whole figure what the colours mean."""
    matplotlib = _matplotlib()
    colours = [tuple(channel / 255 for channel in colour) for colour in cmap]
    colour_map = matplotlib.colors.LinearSegmentedColormap.from_list("attributions", colours)
    mappable = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-scale, scale), colour_map)
    # Moved towards the bar, as they otherwise are, narrow pictures would bring their titles over it.
    placing: dict[str, Any] = {"fraction": 0.05, "aspect": 30, "panchor": False}
    figure.colorbar(mappable, ax=axes, label="attribution (logits per patch)", **placing)


def _finite(values: Any, name: str) -> Tensor:
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
    values = _finite(attribution_map, "attribution_map")
    if values.ndim != 2:
        raise ValueError(f"`attribution_map` must be of shape (h, w), got {tuple(values.shape)}: choose one label.")
    return values


def _check_scale(scale: float) -> float:
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


def _check_box(box: Box | None, image_size: tuple[int, int]) -> Box:
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
