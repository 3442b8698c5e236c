"""The terms of the joint loss: tensors in, tensors out.

Together, as `ShapleyTrainer` adds them up:

    L = CE(f(x), y) + coalition_weight * mean_c CE(v(S_c), p)
        + shapley_weight * N * mean_c mean_k (v(S_c) - base - sum_{S_c} phi)^2
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.checks import check_count, check_device, check_floats
from ..models.coalitions import check_coalitions, sum_over_coalitions


def shapley_loss(attributions: Tensor, coalitions: Tensor, gains: Tensor) -> Tensor:
    """N times the mean of (v(S) - v(empty) - sum_{i in S} phi_i)^2 over images, coalitions and labels.

    With coalitions drawn from the Shapley kernel its minimum over phi, sum(phi) being fixed, is the Shapley values
    (FastSHAP, arXiv:2107.07436, eq. 5). The factor N keeps its weight comparable across grids: votes are O(1/N).

    Args:
        attributions: phi, (B, N, K).
        coalitions: bool (B, M, N), True = present.
        gains: v(S) - v(empty), (B, M, K).

    Returns:
        Scalar.
    """
    _check_pairs(attributions, coalitions)
    check_floats(gains, "gains", (*coalitions.shape[:2], attributions.shape[-1]))
    check_device(gains, "gains", attributions.device)
    return attributions.shape[-2] * F.mse_loss(sum_over_coalitions(coalitions, attributions), gains)


def paired_shapley_loss(
    attributions: Tensor,
    coalitions: Tensor,
    gains: Tensor,
    *,
    odd_weight: float = 1.0,
    even_weight: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """`shapley_loss` over coalitions and their complements, its odd and even part weighted apart.

    With residuals r(S) = v(S) - v(empty) - sum_S phi, the odd part (r(S) - r(~S)) / 2 is what Shapley values depend
    on. The even part (r(S) + r(~S)) / 2 does not depend on how phi is split among players, only on its sum: it
    measures interactions. Both weights at 1 give `shapley_loss` over all coalitions.

    Args:
        attributions: phi, (B, N, K).
        coalitions: bool (B, R, N): S of each pair.
        gains: v - v(empty) of S and of its complement, (B, R, 2, K).
        odd_weight: weight of the odd part.
        even_weight: weight of the even part.
        weights: of each pair, (B, R): `importance_weights` where they were not drawn from the Shapley kernel.

    Returns:
        Scalar.
    """
    _check_pairs(attributions, coalitions)
    check_floats(gains, "gains", (*coalitions.shape[:2], 2, attributions.shape[-1]))
    check_device(gains, "gains", attributions.device)
    additive = torch.stack(
        [sum_over_coalitions(coalitions, attributions), sum_over_coalitions(~coalitions, attributions)], dim=2
    )
    return paired_residual_loss(
        gains - additive, attributions.shape[-2], odd_weight=odd_weight, even_weight=even_weight, weights=weights
    )


def paired_residual_loss(
    residuals: Tensor,
    num_players: int,
    *,
    odd_weight: float = 1.0,
    even_weight: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """`paired_shapley_loss` from the residuals r of each coalition and its complement, (B, R, 2, K)."""
    check_floats(residuals, "residuals", ("images", "pairs", 2, "labels"))
    check_count(num_players, "num_players", 2)
    if weights is not None:
        check_floats(weights, "weights", residuals.shape[:2])
        check_device(weights, "weights", residuals.device)
    of_coalition, of_complement = residuals.unbind(dim=2)  # (B, R, K) each
    odd = _weighted((of_coalition - of_complement).square().mean(-1), weights).mean() / 4
    even = _weighted((of_coalition + of_complement).square().mean(-1), weights).mean() / 4
    return num_players * (odd_weight * odd + even_weight * even)


def coalition_loss(
    values: Tensor, logits: Tensor, *, multi_label: bool = False, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the coalitions' values with the full image's prediction, which is not pulled towards them.

    Args:
        values: v(S), (B, ..., K), in logits.
        logits: v(all), (B, K); no gradient flows to it.
        multi_label: independent labels (sigmoid) instead of exclusive ones (softmax).
        weights: of each coalition, (B, ...): `importance_weights` where they were not drawn from the Shapley kernel.

    Returns:
        Scalar, mean over images and coalitions.
    """
    _check_values(values, weights)
    check_floats(logits, "logits", (len(values), values.shape[-1]))
    check_device(logits, "logits", values.device)
    logits = logits.detach().reshape(len(logits), *[1] * (values.ndim - 2), -1).expand_as(values)
    if multi_label:
        losses = F.binary_cross_entropy_with_logits(values, logits.sigmoid(), reduction="none").mean(-1)
    else:
        losses = -(logits.softmax(-1) * values.log_softmax(-1)).sum(-1)
    return _weighted(losses, weights).mean()


def coalition_regression_loss(values: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of the coalitions' values with the full image's prediction or the true targets.

    Args:
        values: v(S), (B, ..., K).
        targets: (B, K), or (B) where K = 1; no gradient flows to it.
        weights: of each coalition, as in `coalition_loss`.

    Returns:
        Scalar, mean over images, coalitions and targets.
    """
    _check_values(values, weights)
    targets = targets.detach().reshape(len(targets), *[1] * (values.ndim - 2), -1)
    return _weighted((values - targets.to(values.dtype)).square().mean(-1), weights).mean()


def _weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses if weights is None else losses * weights


def _check_pairs(attributions: Tensor, coalitions: Tensor) -> None:
    check_floats(attributions, "attributions", ("images", "players", "labels"))
    check_coalitions(coalitions, attributions.shape[1])
    check_device(coalitions, "coalitions", attributions.device)
    if coalitions.ndim != 3 or len(coalitions) != len(attributions) or coalitions.shape[1] == 0:
        raise ValueError(
            f"`coalitions` must be of shape ({len(attributions)}, coalitions, {attributions.shape[1]}), one list per "
            f"image of `attributions`, got {tuple(coalitions.shape)}."
        )


def _check_values(values: Tensor, weights: Tensor | None) -> None:
    extra = max(1, getattr(values, "ndim", 0) - 2)
    check_floats(values, "values", ("images", *["coalitions"] * extra, "labels"))
    if weights is not None:
        check_floats(weights, "weights", values.shape[:-1])
        check_device(weights, "weights", values.device)
