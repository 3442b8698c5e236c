"""Figures of pictures beside their attribution maps, all on one scale of colours."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from ..models.checks import check_count, check_sequence
from ..models.images import to_rgb
from ..models.overlay import (
    BLUE_WHITE_RED,
    Box,
    Colour,
    check_box,
    check_scale,
    finite_values,
    overlay,
    symmetric_scale,
)
from .optional_matplotlib import matplotlib_parts
from .panel_titles import set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    maps = finite_values(maps, "maps")
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
    maps = finite_values(maps, "maps")
    if maps.ndim != 4:
        raise ValueError(f"`maps` must be of shape (images, labels, h, w), got {tuple(maps.shape)}.")
    check_count(blocks_per_row, "blocks_per_row")
    count, panels = len(maps), 1 + maps.shape[1]
    titles = [""] * count if titles is None else titles
    boxes = [None] * count if boxes is None else boxes
    for name, given in (("images", images), ("labels", labels), ("titles", titles), ("boxes", boxes)):
        if len(check_sequence(given, name, "a list with one entry per image of `maps`")) != count:
            raise ValueError(f"`{name}` must have one entry per image of `maps` ({count}), got {len(given)}.")
    scale = symmetric_scale(maps) if scale is None else check_scale(scale)

    figure, axes = _axes(rows=ceil(count / blocks_per_row), columns=min(count, blocks_per_row) * panels)
    blocks = axes.reshape(-1, panels)  # (blocks, panels): row-major, so blocks of one row stay side by side
    for block, image, image_maps, names, title, box in zip(blocks, images, maps, labels, titles, boxes, strict=False):
        _draw_block(block, image, image_maps, names, title, box, scale=scale, alpha=alpha, cmap=cmap)
    _colour_bar(figure, axes, scale, cmap)
    return figure


def _axes(rows: int, columns: int) -> tuple["Figure", Any]:
    """An empty figure and its (rows, columns) array of bare axes."""
    figure = matplotlib_parts().figure.Figure(figsize=(2.1 * columns + 1, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    return figure, axes


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
    set_title(block[0], title)
    for panel, attribution_map, label in zip(block[1:], maps, labels, strict=True):
        panel.imshow(overlay(image, attribution_map, box=box, **colouring))
        set_title(panel, label, f"\nsum {attribution_map.sum():+.2f}")


def _thumbnail(image: Image.Image, box: Box | None, longest_edge: int = 512) -> tuple[Image.Image, Box | None]:
    """Shrink a picture and its box: a dozen photographs at full size would take gigabytes in a figure."""
    image = to_rgb(image)
    box = check_box(box, image.size)
    width, height = image.size
    image.thumbnail((longest_edge, longest_edge))
    x_scale, y_scale = image.width / width, image.height / height
    return image, (box[0] * x_scale, box[1] * y_scale, box[2] * x_scale, box[3] * y_scale)


def _colour_bar(figure: "Figure", axes: Any, scale: float, cmap: Sequence[Colour]) -> None:
    """Say once for the whole figure what the colours mean."""
    matplotlib = matplotlib_parts()
    colours = [tuple(channel / 255 for channel in colour) for colour in cmap]
    colour_map = matplotlib.colors.LinearSegmentedColormap.from_list("attributions", colours)
    mappable = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-scale, scale), colour_map)
    # Moved towards the bar, as they otherwise are, narrow pictures would bring their titles over it.
    placing: dict[str, Any] = {"fraction": 0.05, "aspect": 30, "panchor": False}
    figure.colorbar(mappable, ax=axes, label="attribution (logits per patch)", **placing)
