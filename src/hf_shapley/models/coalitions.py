"""Coalitions of players: sampling from the Shapley kernel, enumeration, ranking, and coalition structures.

A *coalition* is a bool vector over the players, True = present. A *coalition structure* is a partition of the players
into disjoint coalitions, written as one integer per player (`coalition_ids`).
"""

import torch
from torch import Tensor

from .checks import check_count, check_data, check_device, check_finite, check_generator, describe

COALITION_SIZES = ("kernel", "spread")


def check_coalitions(coalitions: Tensor, num_players: int | None = None, name: str = "coalitions") -> None:
    """Raise unless `coalitions` is a bool tensor (..., num_players); None = any number of players."""
    wanted = f"`{name}` must be a bool tensor ending in {'all' if num_players is None else num_players} players"
    if not isinstance(coalitions, Tensor):
        raise TypeError(f"{wanted}, got {describe(coalitions)}.")
    fits = coalitions.ndim > 0 and coalitions.shape[-1] == (
        coalitions.shape[-1] if num_players is None else num_players
    )
    if coalitions.dtype != torch.bool or not fits:
        raise ValueError(f"{wanted} (True = present), got {describe(coalitions)}.")
    check_data(coalitions, name)


def _check_num_players(num_players: int) -> None:
    check_count(
        num_players, "num_players", 2, "a game needs at least 2 players, so use smaller patches or larger images"
    )


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


def _size_probabilities(num_players: int, sizes: str, device: torch.device | str | None) -> Tensor:
    """P(|S| = k), k = 1 ... N - 1, float64."""
    if sizes not in COALITION_SIZES:
        raise ValueError(f"`sizes` must be one of {COALITION_SIZES}, got {sizes!r}.")
    kernel = shapley_kernel_size_probabilities(num_players, device)
    return kernel if sizes == "kernel" else kernel.sqrt() / kernel.sqrt().sum()


def importance_weights(coalitions: Tensor, sizes: str = "kernel") -> Tensor:
    """What makes a mean over coalitions drawn with `sizes` one over the Shapley kernel: the ratio of both laws.

    Args:
        coalitions: bool (..., N), neither empty nor full.
        sizes: as `sample_coalitions` was given.

    Returns:
        Float32 (...); a coalition and its complement weigh the same. All 1 with "kernel".

    Raises:
        ValueError: for an empty or a full coalition, which is never drawn.
    """
    check_coalitions(coalitions)
    num_players, device = coalitions.shape[-1], coalitions.device
    ratios = _size_probabilities(num_players, "kernel", device) / _size_probabilities(num_players, sizes, device)
    of_each = coalitions.sum(-1)
    # Elsewhere than on the CPU the check would make the host wait in every training step.
    if device.type == "cpu" and not ((of_each > 0) & (of_each < num_players)).all():
        raise ValueError(
            f"`coalitions` must have 1 to {num_players - 1} players present, as all that are drawn have; got an empty "
            "or a full one, which has no weight."
        )
    return ratios.float()[of_each - 1]


def sample_coalitions(
    *shape: int,
    num_players: int,
    sizes: str = "kernel",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw coalitions from the Shapley kernel: the size by its law, then members uniformly among that size.

    Neither the empty nor the full coalition is ever drawn. The complement of a draw follows the same law, so
    `S` and `~S` make a pair.

    Args:
        *shape: leading dimensions of the result, such as (batch, structures).
        num_players: N, at least 2.
        sizes: "kernel", or "spread": P(|S| = k) proportional to 1 / sqrt(k (N - k)), the geometric mean of the
            kernel's law and the uniform one (Chen et al., arXiv:2506.05216, section 2.2). `importance_weights` make
            up for it, and an estimate has less variance: the kernel draws extreme sizes more often than they tell.
        generator: source of randomness, on `device`; None uses torch's global one.
        device: where to draw; defaults to the generator's device.

    Returns:
        Bool tensor (*shape, num_players), True = present.
    """
    for size in shape:
        check_count(size, "shape", 0)
    check_generator(generator)
    if device is None:
        device = generator.device if generator is not None else "cpu"
    cumulative = _size_probabilities(num_players, sizes, device).cumsum(0)
    uniform = torch.rand(*shape, dtype=torch.float64, generator=generator, device=device)
    # Rounding may leave the last cumulative probability a hair under 1: the clamp keeps the size below N.
    drawn = torch.bucketize(uniform, cumulative, right=True).clamp(max=num_players - 2) + 1  # (*shape)
    keys = torch.rand(*shape, num_players, generator=generator, device=device)
    return keys.argsort(dim=-1).argsort(dim=-1) < drawn.unsqueeze(-1)


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
            f"`num_players`: enumerating 2^{num_players} coalitions is out of reach (at most 24 players): "
            "use a sampled estimator."
        )
    codes = torch.arange(2 ** (num_players - 1), device=device)
    bits = torch.arange(num_players, device=device)
    half = (codes.unsqueeze(-1) >> bits) & 1 == 1  # (2^(N-1), N): the last player is always absent
    return with_complements(half)


def with_complements(coalitions: Tensor) -> Tensor:
    """Each coalition and its complement: (..., M, N) -> (..., 2 M, N), rows 2 j and 2 j + 1 are a pair."""
    return torch.stack([coalitions, ~coalitions], dim=-2).flatten(-3, -2)


def ranked_coalitions(scores: Tensor) -> Tensor:
    """The top-k players by score, for k = 0 ... N.

    Args:
        scores: (..., N), higher = ranked earlier; ties go to the lower index.

    Returns:
        Bool tensor (..., N + 1, N): row k holds the k players of highest score. Its complement holds the rest.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"`scores` must be a tensor (..., players), got {describe(scores)}.")
    if scores.ndim == 0 or scores.shape[-1] == 0 or scores.is_complex():
        raise ValueError(f"`scores` must be real and of shape (..., players), got {describe(scores)}.")
    check_finite(scores, "scores")  # NaN has no rank
    num_players = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(num_players, device=scores.device).expand_as(order)
    )
    sizes = torch.arange(num_players + 1, device=scores.device).unsqueeze(-1)
    return ranks.unsqueeze(-2) < sizes


def coalitions_to_ids(coalitions: Tensor) -> Tensor:
    """Coalition structure {S, complement}: bool (..., N) -> long (..., N), id 0 for S and id 1 for its complement."""
    check_coalitions(coalitions)
    return (~coalitions).long()


def ids_to_coalitions(coalition_ids: Tensor, num_coalitions: int) -> Tensor:
    """Members of each coalition: long (..., N) -> bool (..., num_coalitions, N), row c = the players of id c."""
    if not isinstance(coalition_ids, Tensor):
        raise TypeError(f"`coalition_ids` must be a long tensor, got {describe(coalition_ids)}.")
    if coalition_ids.dtype != torch.long or coalition_ids.ndim == 0:
        raise ValueError(f"`coalition_ids` must be a long tensor (..., players), got {describe(coalition_ids)}.")
    if not torch.compiler.is_compiling():
        check_count(num_coalitions, "num_coalitions")
    return coalition_ids.unsqueeze(-2) == torch.arange(num_coalitions, device=coalition_ids.device).unsqueeze(-1)


def sum_over_coalitions(coalitions: Tensor, votes: Tensor) -> Tensor:
    """Sum votes over the members of each coalition, in float32 or better whatever autocast says.

    Args:
        coalitions: bool (..., M, N).
        votes: float (..., N, K).

    Returns:
        (..., M, K), in the dtype of `votes` (float32 for half precision).
    """
    if not torch.compiler.is_compiling():
        check_coalitions(coalitions)
        _check_votes(votes, coalitions)
    dtype = torch.promote_types(votes.dtype, torch.float32)
    with torch.autocast(votes.device.type, enabled=False):
        return coalitions.to(dtype) @ votes.to(dtype)


def _check_votes(votes: Tensor, coalitions: Tensor) -> None:
    """Raise unless `votes` is float (..., N, K) for coalitions (..., M, N) with the same leading dimensions."""
    wanted = f"`votes` must be a float tensor (..., players, labels) for `coalitions` {tuple(coalitions.shape)}"
    if not isinstance(votes, Tensor):
        raise TypeError(f"{wanted}, got {describe(votes)}.")
    check_device(votes, "votes", coalitions.device)
    fits = coalitions.ndim >= 2 and votes.ndim == coalitions.ndim and votes.numel() > 0
    if not votes.is_floating_point() or not fits or votes.shape[:-1] != (*coalitions.shape[:-2], coalitions.shape[-1]):
        raise ValueError(f"{wanted}, got {describe(votes)}.")
