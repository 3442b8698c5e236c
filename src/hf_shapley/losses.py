"""The terms of the joint loss: tensors in, tensors out.

Together, as `ShapleyTrainer` adds them up:

    L = CE(f(x), y) + coalition_weight * mean_c CE(v(S_c), p)
        + shapley_weight * N * mean_c mean_k (v(S_c) - base - sum_{S_c} phi)^2
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .coalitions import sum_over_coalitions


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
    return attributions.shape[-2] * F.mse_loss(sum_over_coalitions(coalitions, attributions), gains)


def paired_shapley_loss(
    attributions: Tensor, coalitions: Tensor, gains: Tensor, *, odd_weight: float = 1.0, even_weight: float = 1.0
) -> Tensor:
    """[`shapley_loss`] over coalitions and their complements, its odd and even part weighted apart.

    With residuals r(S) = v(S) - v(empty) - sum_S phi, the odd part (r(S) - r(~S)) / 2 is what Shapley values depend
    on. The even part (r(S) + r(~S)) / 2 does not depend on how phi is split among players, only on its sum: it
    measures interactions. Both weights at 1 give `shapley_loss` over all coalitions.

    Args:
        attributions: phi, (B, N, K).
        coalitions: bool (B, R, N): S of each pair.
        gains: v - v(empty) of S and of its complement, (B, R, 2, K).
        odd_weight: weight of the odd part.
        even_weight: weight of the even part.

    Returns:
        Scalar.
    """
    additive = torch.stack(
        [sum_over_coalitions(coalitions, attributions), sum_over_coalitions(~coalitions, attributions)], dim=2
    )
    return paired_residual_loss(
        gains - additive, attributions.shape[-2], odd_weight=odd_weight, even_weight=even_weight
    )


def paired_residual_loss(
    residuals: Tensor, num_players: int, *, odd_weight: float = 1.0, even_weight: float = 1.0
) -> Tensor:
    """[`paired_shapley_loss`] from the residuals r of each coalition and its complement, (B, R, 2, K)."""
    of_coalition, of_complement = residuals.unbind(dim=2)  # (B, R, K) each
    odd = (of_coalition - of_complement).square().mean() / 4
    even = (of_coalition + of_complement).square().mean() / 4
    return num_players * (odd_weight * odd + even_weight * even)


def coalition_loss(values: Tensor, logits: Tensor, *, multi_label: bool = False) -> Tensor:
    """Cross-entropy of the coalitions' values with the full image's prediction, which is not pulled towards them.

    Args:
        values: v(S), (B, ..., K), in logits.
        logits: v(all), (B, K); no gradient flows to it.
        multi_label: independent labels (sigmoid) instead of exclusive ones (softmax).

    Returns:
        Scalar, mean over images and coalitions.
    """
    logits = logits.detach().reshape(len(logits), *[1] * (values.ndim - 2), -1).expand_as(values)
    if multi_label:
        return F.binary_cross_entropy_with_logits(values, logits.sigmoid())
    return -(logits.softmax(-1) * values.log_softmax(-1)).sum(-1).mean()


def coalition_label_loss(values: Tensor, labels: Tensor, *, multi_label: bool = False) -> Tensor:
    """Cross-entropy of the coalitions' values with the true labels.

    Args:
        values: v(S), (B, ..., K), in logits.
        labels: (B) long, or (B, K) float with `multi_label`.
        multi_label: independent labels (sigmoid) instead of exclusive ones (softmax).

    Returns:
        Scalar, mean over images and coalitions.
    """
    flat = values.flatten(1, -2)  # (B, coalitions, K)
    if multi_label:
        return F.binary_cross_entropy_with_logits(flat, labels.to(flat.dtype).unsqueeze(1).expand_as(flat))
    return F.cross_entropy(flat.transpose(1, 2), labels.unsqueeze(1).expand(flat.shape[:2]))
