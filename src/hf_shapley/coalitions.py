"""Coalitions of players: sampling from the Shapley kernel, enumeration, ranking, and coalition structures.

A *coalition* is a bool vector over the players, True = present. A *coalition structure* is a partition of the players
into disjoint coalitions, written as one integer per player (`coalition_ids`).
"""

import torch
from torch import Tensor


def check_coalitions(coalitions: Tensor, num_players: int, name: str = "coalitions") -> None:
    """Raise unless `coalitions` is a bool tensor (..., num_players)."""
    if not isinstance(coalitions, Tensor):
        raise TypeError(
            f"`{name}` must be a bool tensor ending in {num_players} players, got {type(coalitions).__name__}."
        )
    if coalitions.dtype != torch.bool or coalitions.ndim == 0 or coalitions.shape[-1] != num_players:
        raise ValueError(
            f"`{name}` must be a bool tensor ending in {num_players} players (True = present), "
            f"got {coalitions.dtype} of shape {tuple(coalitions.shape)}."
        )


def _check_num_players(num_players: int) -> None:
    if num_players < 2:
        raise ValueError(f"A game needs at least 2 players, got {num_players}: use smaller patches or a larger image.")


def shapley_kernel_size_probabilities(num_players: int, device: torch.device | str | None = None) -> Tensor:
    """Law of the coalition size under the Shapley kernel: P(|S| = k) proportional to 1 / (k (N - k)), k = 1 ... N - 1.

    The kernel itself is (N - 1) / (C(N, k) k (N - k)) per coalition (Lundberg and Lee, arXiv:1705.07874, theorem 2);
    the C(N, k) coalitions of one size share their probability evenly.

    Args:
        num_players: N, at least 2.
        device: where the result lies.

    Returns:
        Float64 tensor (N - 1,), entry k - 1 for size k; sums to 1.
    """
    _check_num_players(num_players)
    sizes = torch.arange(1, num_players, dtype=torch.float64, device=device)
    weights = 1 / (sizes * (num_players - sizes))
    return weights / weights.sum()


def sample_coalitions(
    *shape: int,
    num_players: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw coalitions from the Shapley kernel: the size by its law, then members uniformly among that size.

    Neither the empty nor the full coalition is ever drawn. The complement of a draw follows the same law, so
    `S` and `~S` make a pair.

    Args:
        *shape: leading dimensions of the result, such as (batch, structures).
        num_players: N, at least 2.
        generator: source of randomness, on `device`; None uses torch's global one.
        device: where to draw; defaults to the generator's device.

    Returns:
        Bool tensor (*shape, num_players), True = present.
    """
    if device is None:
        device = generator.device if generator is not None else "cpu"
    cumulative = shapley_kernel_size_probabilities(num_players, device=device).cumsum(0)
    uniform = torch.rand(*shape, dtype=torch.float64, generator=generator, device=device)
    # Rounding may leave the last cumulative probability a hair under 1: the clamp keeps the size below N.
    sizes = torch.bucketize(uniform, cumulative, right=True).clamp(max=num_players - 2) + 1  # (*shape)
    keys = torch.rand(*shape, num_players, generator=generator, device=device)
    return keys.argsort(dim=-1).argsort(dim=-1) < sizes.unsqueeze(-1)


def enumerate_coalitions(num_players: int, *, device: torch.device | str | None = None) -> Tensor:
    """List all 2^N coalitions, each followed by its complement: rows 2 j and 2 j + 1 are a pair.

    Args:
        num_players: N, from 2 to 24 (16 million rows).
        device: where the result lies.

    Returns:
        Bool tensor (2^N, N); row 0 is the empty coalition, row 1 the full one.
    """
    _check_num_players(num_players)
    if num_players > 24:
        raise ValueError(
            f"Enumerating 2^{num_players} coalitions is out of reach (at most 24 players): use a sampled estimator."
        )
    codes = torch.arange(2 ** (num_players - 1), device=device)
    bits = torch.arange(num_players, device=device)
    half = (codes.unsqueeze(-1) >> bits) & 1 == 1  # (2^(N-1), N): the last player is always absent
    return torch.stack([half, ~half], dim=1).flatten(0, 1)


def ranked_coalitions(scores: Tensor) -> Tensor:
    """The top-k players by score, for k = 0 ... N.

    Args:
        scores: (..., N), higher = ranked earlier; ties go to the lower index.

    Returns:
        Bool tensor (..., N + 1, N): row k holds the k players of highest score. Its complement holds the rest.
    """
    num_players = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(num_players, device=scores.device).expand_as(order)
    )
    sizes = torch.arange(num_players + 1, device=scores.device).unsqueeze(-1)
    return ranks.unsqueeze(-2) < sizes


def coalitions_to_ids(coalitions: Tensor) -> Tensor:
    """Coalition structure {S, complement}: bool (..., N) -> long (..., N), id 0 for S and id 1 for its complement."""
    check_coalitions(coalitions, coalitions.shape[-1])
    return (~coalitions).long()


def ids_to_coalitions(coalition_ids: Tensor, num_coalitions: int) -> Tensor:
    """Members of each coalition: long (..., N) -> bool (..., num_coalitions, N), row c = the players of id c."""
    if coalition_ids.dtype != torch.long:
        raise ValueError(f"`coalition_ids` must be a long tensor, got {coalition_ids.dtype}.")
    return coalition_ids.unsqueeze(-2) == torch.arange(num_coalitions, device=coalition_ids.device).unsqueeze(-1)


def sum_over_coalitions(coalitions: Tensor, votes: Tensor) -> Tensor:
    """Sum votes over the members of each coalition, in float32 or better whatever autocast says.

    Args:
        coalitions: bool (..., M, N).
        votes: float (..., N, K).

    Returns:
        (..., M, K), in the dtype of `votes` (float32 for half precision).
    """
    dtype = torch.promote_types(votes.dtype, torch.float32)
    with torch.autocast(votes.device.type, enabled=False):
        return coalitions.to(dtype) @ votes.to(dtype)
