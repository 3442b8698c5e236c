"""Does a label's attribution lie where its image is? Mosaics of images, and the share that lies in the right cell."""

import torch
from torch import Tensor

from ..models.checks import (
    check_count,
    check_finite,
    check_floats,
    check_generator,
    check_label_ids,
    check_pair,
    describe,
)


def make_mosaics(
    images: Tensor,
    labels: Tensor,
    *,
    num_mosaics: int,
    grid: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Build mosaics of images with different labels, for `grid_pointing_game`.

    Args:
        images: (B, C, H, W).
        labels: long (B,).
        num_mosaics: M, how many to build.
        grid: rows and columns of cells; no more cells than distinct labels.
        generator: source of randomness, on the CPU; None uses torch's global one.

    Returns:
        mosaics (M, C, rows * H, columns * W), and long (M, rows * columns): the label of each cell, row by row.

    Raises:
        ValueError: shapes that do not fit, or fewer labels than cells.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"`images` must be a tensor (images, channels, height, width) and not empty, got {describe(images)}."
        )
    labels = check_label_ids(labels, "labels", len(images))
    check_count(num_mosaics, "num_mosaics")
    check_generator(generator)
    rows, columns = check_pair(grid, "grid", "two integers of at least 1, rows and columns")
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    if len(members) < rows * columns:
        raise ValueError(
            f"`grid`: a mosaic of {rows} x {columns} cells needs as many distinct labels, got {len(members)} in "
            "`labels`: give more labels or a smaller grid."
        )
    drawn = []
    for _ in range(num_mosaics):
        for which in torch.randperm(len(members), generator=generator)[: rows * columns].tolist():
            pick = torch.randint(len(members[which]), (1,), generator=generator).item()
            drawn.append(members[which][pick])
    picks = torch.stack(drawn).view(num_mosaics, rows, columns)
    mosaics = images[picks].permute(0, 3, 1, 4, 2, 5)  # (mosaics, channels, rows, height, columns, width)
    return mosaics.flatten(4, 5).flatten(2, 3), labels[picks].flatten(1)


def grid_pointing_game(maps: Tensor, cells: Tensor, *, grid: tuple[int, int] = (2, 2)) -> Tensor:
    """Share of the positive attribution that lies in the right cell of a mosaic.

    sum over the cell of max(phi, 0) / sum over the map of max(phi, 0): the grid pointing game of Boehle et al.,
    arXiv:2104.00032. Chance level: 1 / number of cells.

    Args:
        maps: (B, h, w), attributions of the label that belongs in `cells`; h and w divisible by the grid.
        cells: long (B,), the index of the right cell, counted row by row.
        grid: rows and columns of cells.

    Returns:
        (B,); 0 where no attribution is positive.

    Raises:
        ValueError: maps that are not finite or not divisible by the grid, cells out of range.
    """
    check_floats(maps, "maps", ("images", "height", "width"))
    check_finite(maps, "maps")
    rows, columns = check_pair(grid, "grid", "two integers of at least 1, rows and columns")
    height, width = maps.shape[1:]
    if height % rows or width % columns:
        raise ValueError(
            f"`maps` must divide into {rows} x {columns} equal cells (`grid`), got {height} x {width}: resize them."
        )
    cells = check_label_ids(cells, "cells", len(maps), rows * columns)
    positive = maps.double().clamp(min=0)
    per_cell = (
        positive.view(-1, rows, height // rows, columns, width // columns).sum((2, 4)).flatten(1)
    )  # (images, cells)
    total = per_cell.sum(1)
    right = per_cell.gather(1, cells.to(maps.device).long().unsqueeze(1)).squeeze(1)
    return torch.where(total > 0, right / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
