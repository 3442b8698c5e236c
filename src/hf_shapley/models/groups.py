"""Players of the user's own: regions of an image, such as organs, defects or superpixels, as groups of its patches.

In the group game a group is present or absent as a whole. Its Shapley values are not the sums of its patches' own,
which only start from there: `explain(..., groups=..., evaluations=n)` brings them nearer.
"""

from typing import Any

import torch
from torch import Tensor

from .checks import check_device, describe


def check_groups(groups: Any, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Group ids as long (N), N = h w; refuse what does not say of every patch of the grid which group it is in."""
    wanted = f"`groups` must hold the group of each patch, integers of shape {grid} or ({grid[0] * grid[1]},)"
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        raise TypeError(f"{wanted}, got {describe(groups)}: use `torch.as_tensor(ids)`.")
    check_device(groups, "groups", device)
    if tuple(groups.shape) not in (grid, (grid[0] * grid[1],)):
        raise ValueError(f"{wanted}, got shape {tuple(groups.shape)}.")
    ids, found = groups.flatten().long(), groups.unique().tolist()
    if found != list(range(len(found))) or len(found) < 2:
        raise ValueError(f"`groups` must number at least two groups from 0 on without a gap, got {found[:10]}.")
    return ids


def summed_over_groups(attributions: Tensor, groups: Tensor) -> Tensor:
    """Attributions (B, N, K) summed over groups (N): (B, P, K)."""
    sums = attributions.new_zeros(attributions.shape[0], int(groups.max()) + 1, attributions.shape[2])
    return sums.index_add(1, groups, attributions)


def with_patches_of(coalitions: Tensor, groups: Tensor) -> Tensor:
    """Coalitions of groups, bool (..., P), as coalitions of their patches, bool (..., N)."""
    return coalitions[..., groups]


def spread_over_patches(values: Tensor, groups: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each group's value evenly over its patches: (..., P) -> (..., h, w), of the same sum."""
    shares = values / groups.bincount(minlength=values.shape[-1]).to(values)
    return shares[..., groups].unflatten(-1, grid)
