"""How well sums of attributions follow the game: over random coalitions, sum_{i in S} phi_i against v(S).

Correlations are returned in float64; one with a constant is NaN.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..models.checks import check_choice, check_count, check_generator, check_sequence
from ..models.coalitions import check_coalitions, sample_coalitions, with_complements
from .games import BatchedGame, LabelGame, Link, check_finite_floats, check_same_labels, evaluated


def sample_uniform_sizes(
    images: int,
    num_samples: int,
    *,
    num_players: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw coalitions whose size is uniform on 0 ... N, each followed by its complement (which has the same law).

    Args:
        images: B.
        num_samples: M, coalitions per image; even.
        num_players: N.
        generator: source of randomness; None uses torch's global one.
        device: where to draw; defaults to the generator's device, else CPU.

    Returns:
        Bool (B, M, N).
    """
    check_count(images, "images")
    check_count(num_players, "num_players")
    _check_even(num_samples)
    check_generator(generator)
    sizes = torch.randint(
        num_players + 1, (images, num_samples // 2, 1), generator=generator, device=_draw_device(device, generator)
    )
    first = _sample_members(sizes, num_players, generator)
    return with_complements(first).to(device)


def _check_even(num_samples: int) -> None:
    check_count(num_samples, "num_samples", 2)
    if num_samples % 2:
        raise ValueError(f"`num_samples` must be even and at least 2 (coalitions come in pairs), got {num_samples}.")


def _draw_device(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device | str | None:
    return generator.device if generator is not None else device


def _sample_members(sizes: Tensor, num_players: int, generator: torch.Generator | None) -> Tensor:
    """Uniform coalitions of given sizes: long (B, M, 1) -> bool (B, M, N)."""
    keys = torch.rand(*sizes.shape[:2], num_players, generator=generator, device=sizes.device)
    return keys.argsort(-1).argsort(-1) < sizes


def _check_drawn(coalitions: Tensor, attributions: Tensor) -> Tensor:
    """Given coalitions as (B, M, N): one list for all images (M, N), or one per image (B, M, N)."""
    images, players = attributions.shape[:2]
    check_coalitions(coalitions, players)
    if coalitions.ndim == 2:
        coalitions = coalitions.expand(images, -1, -1)
    if coalitions.ndim != 3 or len(coalitions) != images or coalitions.shape[1] < 2:
        raise ValueError(
            f"`coalitions` must be (coalitions, {players}) or ({images}, coalitions, {players}) "
            f"with at least 2 coalitions, got shape {tuple(coalitions.shape)}."
        )
    return coalitions.to(attributions.device)


def _drawn_or_given(
    coalitions: Tensor | None, attributions: Tensor, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    images, players = attributions.shape[:2]
    if coalitions is not None:
        return _check_drawn(coalitions, attributions)
    return sample_uniform_sizes(
        images, num_samples, num_players=players, generator=generator, device=attributions.device
    )


def _sum_scores(coalitions: Tensor, scores: Tensor) -> Tensor:
    """Attribution of each coalition: (B, M, N), (B, N) -> float64 (B, M)."""
    return torch.einsum("bmn,bn->bm", coalitions.to(scores.device, torch.float64), scores)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation along the last dimension: two (..., M) -> (...); NaN where one is constant."""
    first = first - first.mean(-1, keepdim=True)
    second = second - second.mean(-1, keepdim=True)
    norms = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return ((first * second).sum(-1) / norms).clamp(-1, 1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, ties averaged: (..., M) -> float64 (..., M)."""
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / 2


def faithfulness_correlation(
    game: BatchedGame,
    attributions: Tensor,
    *,
    coalitions: Tensor | None = None,
    num_samples: int = 1000,
    method: Literal["pearson", "spearman"] = "pearson",
    labels: Tensor | None = None,
    link: Link = "logit",
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Correlation between the attribution of a coalition, sum_{i in S} phi_i, and its value v(S).

    Bhatt et al., arXiv:2005.00631, correlate the attribution of the *removed* players with the drop
    v(full) - v(rest); both are constants minus ours, so the correlation is the same. By default sizes are uniform on
    0 ... N as in ViT-Shapley (arXiv:2206.05282), which uses method="spearman"; Bhatt's coalitions of one size are
    `sensitivity_n`. Across sizes the size alone explains most of v(S), so numbers near 1 say little:
    see `interaction_share` and `sensitivity_n`.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        coalitions: bool (M, N) or (B, M, N), to use instead of drawing; at least 2.
        num_samples: M, coalitions per image, even: drawn in complementary pairs.
        method: "pearson", or "spearman" (ties averaged).
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B,); NaN where attributions or values do not vary.

    Raises:
        ValueError: attributions that are not finite or do not fit the game, labels or coalitions that do not fit.
    """
    check_choice(method, "method", ("pearson", "spearman"))
    target = LabelGame(game, attributions, labels, link, batch_size, progress)
    coalitions = _drawn_or_given(coalitions, attributions, num_samples, generator)
    values = target(coalitions)
    sums = _sum_scores(coalitions, target.scores)
    return pearson(sums, values) if method == "pearson" else pearson(_ranks(sums), _ranks(values))


def sensitivity_n(
    game: BatchedGame,
    attributions: Tensor,
    *,
    sizes: Sequence[int],
    num_samples: int = 100,
    labels: Tensor | None = None,
    link: Link = "logit",
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Sensitivity-n: correlation over random sets of n players of their attribution and the drop without them.

    Pearson correlation of sum_{i in S} phi_i and v(full) - v(full without S) over S with |S| = n
    (Ancona et al., arXiv:1711.06104). The size being fixed, it cannot help.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        sizes: the numbers n of players to remove, each from 1 to N - 1.
        num_samples: sets per image and size, at least 2.
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B, len(sizes)); NaN where attributions or values do not vary.

    Raises:
        ValueError: sizes out of range, fewer than 2 samples, and as `faithfulness_correlation`.
    """
    target = LabelGame(game, attributions, labels, link, batch_size, progress)
    images, players = attributions.shape[:2]
    wanted = f"one or more integers from 1 to {players - 1}"
    sizes = check_sequence(sizes, "sizes", wanted)
    if not sizes or not all(isinstance(size, int) and 1 <= size < players for size in sizes):
        raise ValueError(f"`sizes` must be {wanted}, got {sizes}.")
    check_count(num_samples, "num_samples", 2, "a correlation needs two points")
    check_generator(generator)
    device = _draw_device(attributions.device, generator)
    drawn = torch.tensor(sizes, device=device).repeat_interleave(num_samples).view(1, -1, 1).expand(images, -1, 1)
    removed = _sample_members(drawn, players, generator).to(attributions.device)  # (images, sizes * samples, players)
    drops = (target.full.unsqueeze(1) - target(~removed)).unflatten(1, (len(sizes), num_samples))
    sums = _sum_scores(removed, target.scores).unflatten(1, (len(sizes), num_samples))
    return pearson(sums, drops)


def infidelity(
    game: BatchedGame,
    attributions: Tensor,
    *,
    coalitions: Tensor | None = None,
    num_samples: int = 1000,
    normalize: bool = False,
    labels: Tensor | None = None,
    link: Link = "logit",
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Mean squared difference between the attribution of the removed players and the drop in value without them.

    E_S[(sum_{i not in S} phi_i - (v(full) - v(S)))^2]: the infidelity of Yeh et al., arXiv:1901.09392, with
    the perturbation I = indicator of the players not in S.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        coalitions: bool (M, N) or (B, M, N), the present players, to use instead of drawing; at least 2.
        num_samples: M, coalitions per image, even: complementary pairs, sizes uniform on 0 ... N.
        normalize: scale the attributions by the best factor E[I phi drop] / E[(I phi)^2] first, as captum does.
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B,), in squared units of the value; lower is better.

    Raises:
        ValueError: as `faithfulness_correlation`.
    """
    target = LabelGame(game, attributions, labels, link, batch_size, progress)
    coalitions = _drawn_or_given(coalitions, attributions, num_samples, generator)
    drops = target.full.unsqueeze(1) - target(coalitions)
    sums = _sum_scores(~coalitions, target.scores)
    if normalize:
        power = sums.square().mean(1)
        # Attributions of zero predict no drop at any scale.
        scale = torch.where(power == 0, 0.0, (sums * drops).mean(1) / power)
        sums = sums * scale.unsqueeze(1)
    return (sums - drops).square().mean(1)


def interaction_share(
    game: BatchedGame,
    attributions: Tensor,
    *,
    coalitions: Tensor | None = None,
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Share of the variance of v(S) among coalitions of one size that the attributions do not explain.

    sum_S (r(S) - mean of r at size |S|)^2 / sum_S (v(S) - mean of v at size |S|)^2, r(S) = v(S) - sum_{i in S} phi_i,
    over all labels at once. Means within a size are taken out because the size alone explains nearly all of v(S). For
    exact Shapley values it measures how far the game is from additive: near 0, a faithful explanation is no feat.
    Attributions of zero give 1; wrong ones may give more.

    Args:
        game: bool (B, M, N) -> float (B, M, K).
        attributions: (B, N, K).
        coalitions: bool (M, N) or (B, M, N), to use instead of drawing, such as all 2^N of them.
        num_samples: M, coalitions per image, even: complementary pairs from the Shapley kernel.
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B,); NaN where the value depends on nothing but the size.

    Raises:
        ValueError: attributions that are not finite or do not fit the game, an odd number of samples.
    """
    check_finite_floats(attributions, "attributions", ("images", "players", "labels"))
    images, players = attributions.shape[:2]
    if coalitions is not None:
        coalitions = _check_drawn(coalitions, attributions)
    else:
        _check_even(num_samples)
        check_generator(generator)
        device = _draw_device(attributions.device, generator)
        half = sample_coalitions(images, num_samples // 2, num_players=players, generator=generator, device=device).to(
            attributions.device
        )
        coalitions = with_complements(half)
    values = evaluated(game, coalitions, batch_size, progress)
    check_same_labels(attributions, values)
    coalitions = coalitions.to(values.device)
    residuals = values - coalitions.double() @ attributions.to(values.device, torch.float64)
    sizes = coalitions.sum(-1)  # (images, coalitions)
    return _within_sizes(residuals, sizes, players) / _within_sizes(values, sizes, players)


def _within_sizes(values: Tensor, sizes: Tensor, num_players: int) -> Tensor:
    """Sum of squared distances to the mean of one's size: (B, M, K), (B, M) -> (B,)."""
    same = torch.nn.functional.one_hot(sizes, num_players + 1).to(values.dtype)  # (images, coalitions, N + 1)
    means = same.transpose(1, 2) @ values / same.sum(1).clamp(min=1).unsqueeze(-1)  # (images, N + 1, labels)
    return (values - same @ means).square().sum((1, 2))
