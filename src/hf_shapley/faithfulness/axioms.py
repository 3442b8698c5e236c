"""What must hold exactly: attributions add up, and absent players change nothing."""

import torch
from torch import Tensor

from ..models.coalitions import check_coalitions, with_complements
from .games import BatchedGame, check_finite_floats, check_same_labels, evaluated


def efficiency_gap(game: BatchedGame, attributions: Tensor) -> Tensor:
    """How far the attributions are from adding up: max over labels of |sum_i phi_i - (v(full) - v(empty))|.

    Args:
        game: bool (B, M, N) -> float (B, M, K).
        attributions: (B, N, K).

    Returns:
        (B,); 0 up to rounding for attributions that satisfy the efficiency axiom (Shapley, 1953).

    Raises:
        ValueError: attributions that are not finite or do not fit the game.
    """
    check_finite_floats(attributions, "attributions", ("images", "players", "labels"))
    empty = torch.zeros_like(attributions[:, :1, :1], dtype=torch.bool).expand(-1, -1, attributions.shape[1])
    ends = evaluated(game, with_complements(empty), batch_size=2)
    check_same_labels(attributions, ends)
    sums = attributions.to(ends.device, torch.float64).sum(1)
    return (sums - (ends[:, 1] - ends[:, 0])).abs().amax(-1)


def leak(game: BatchedGame, changed_game: BatchedGame, coalitions: Tensor, *, batch_size: int = 1024) -> Tensor:
    """What hidden pixels change: max over coalitions and labels of |v(S; x) - v(S; x')|, x and x' equal on S.

    Args:
        game: the game of images x, bool (B, M, N) -> float (B, M, K).
        changed_game: the game of images x' that equal x on every player of every given coalition.
        coalitions: bool (B, M, N).
        batch_size: coalitions per call of a game, all images together.

    Returns:
        (B,); exactly 0 for a game that never sees an absent player, in any precision.

    Raises:
        ValueError: no coalitions, or games that do not fit them.
    """
    if not isinstance(coalitions, Tensor) or coalitions.ndim != 3 or coalitions.numel() == 0:
        got = tuple(coalitions.shape) if isinstance(coalitions, Tensor) else type(coalitions).__name__
        raise ValueError(f"`coalitions` must be bool (images, coalitions, players) and not empty, got {got}.")
    check_coalitions(coalitions, coalitions.shape[-1])
    values = evaluated(game, coalitions, batch_size)
    changed = evaluated(changed_game, coalitions, batch_size)
    return (values - changed).abs().amax((1, 2))
