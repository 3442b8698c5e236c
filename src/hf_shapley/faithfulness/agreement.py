"""How close attributions are to reference values, such as exact Shapley values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .correlations import pearson
from .games import check_attributions


@dataclass(frozen=True)
class Agreement:
    """A comparison with reference attributions, image by image and for all of them.

    Attributes:
        per_image: (B,).
        mean: mean of `per_image`.
        pooled: the same quantity from the moments of all images together, each image centred on its own mean, so
            that differences between images count for nothing.
    """

    per_image: Tensor
    mean: float
    pooled: float


def _entries(attributions: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Check two sets of attributions and flatten each image's entries: two (B, ...) -> two float64 (B, E)."""
    for tensor, name in ((attributions, "attributions"), (references, "references")):
        check_attributions(tensor, name)
    if attributions.shape != references.shape:
        raise ValueError(
            f"`attributions` and `references` must share a shape (images, players, labels), "
            f"got {tuple(attributions.shape)} and {tuple(references.shape)}."
        )
    references = references.flatten(1).double()
    constant = (references == references[:, :1]).all(1)
    if constant.any():
        raise ValueError(
            f"`references` must vary within each image, but are constant for image {constant.nonzero()[0].item()}: "
            "leave such images out."
        )
    return attributions.flatten(1).to(references.device, torch.float64), references


def attribution_correlation(attributions: Tensor, references: Tensor) -> Agreement:
    """Pearson correlation of attributions with reference values, such as exact Shapley values.

    Per image over its N K entries; pooled: sum_b cov_b / sqrt(sum_b var_b(attributions) sum_b var_b(references)).

    Args:
        attributions: (B, N, K) or (B, N).
        references: the same shape.

    Returns:
        Agreement; NaN for an image with constant attributions (and then for the mean).

    Raises:
        ValueError: shapes that differ, entries that are not finite, references constant within an image.
    """
    attributions, references = _entries(attributions, references)
    per_image = pearson(attributions, references)
    attributions = attributions - attributions.mean(1, keepdim=True)
    references = references - references.mean(1, keepdim=True)
    pooled = (attributions * references).sum() / (attributions.square().sum() * references.square().sum()).sqrt()
    return Agreement(per_image, per_image.mean().item(), pooled.item())


def error_ratio(attributions: Tensor, references: Tensor) -> Agreement:
    """Mean squared error of attributions over the variance of the reference values (1 - R^2); 0 is exact.

    Per image `mean (phi - phi*)^2 / var phi*` over players and labels, the variance with denominator N K; pooled: the
    sum over images of the numerators over the sum of the denominators. Unlike a correlation it sees a wrong scale.

    Args:
        attributions: (B, N, K) or (B, N).
        references: the same shape.

    Returns:
        Agreement.

    Raises:
        ValueError: as `attribution_correlation`.
    """
    attributions, references = _entries(attributions, references)
    errors = (attributions - references).square().mean(1)
    variances = references.var(1, correction=0)
    per_image = errors / variances
    return Agreement(per_image, per_image.mean().item(), (errors.sum() / variances.sum()).item())
