"""A certificate for attributions: their distance to the true Shapley values, without ever knowing those.

An unbiased estimate u of the Shapley values phi* is off by noise, so (u - phi)^2 overstates (phi* - phi)^2 by the
variance of u. That variance is known from the spread of the independent draws behind u, and is subtracted: what is
left is unbiased, however few the draws. It equals the mean of (a - phi)(b - phi) over all ways of taking a and b from
different draws.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.checks import check_callable, check_choice, check_count, check_finite, check_floats, check_number
from .estimators import ShapleyEstimate, kernel_shapley, permutation_shapley
from .games import Game


@dataclass(frozen=True)
class AttributionCertificate:
    """Estimated distance of attributions to the Shapley values of their games.

    Attributes:
        mean_squared_error: mean over images, players and labels of (phi - phi*)^2; unbiased, so it may fall below 0.
        shapley_variance: mean over images of the variance of phi* over players and labels; unbiased.
        error_ratio: the first over the second; 0 is exact, 1 is no better than the image's mean value everywhere.
        error_ratio_interval: lower and upper end of the confidence interval of `error_ratio` over images.
        correlation: implied pooled correlation of phi with phi*, images centred one by one; may pass 1 by noise.
        confidence: nominal coverage of the interval.
        images: number of images.
        evaluations: coalitions sent to all games together.
        mean_squared_error_per_image: (B,).
        shapley_variance_per_image: (B,).
    """

    mean_squared_error: float
    shapley_variance: float
    error_ratio: float
    error_ratio_interval: tuple[float, float]
    correlation: float
    confidence: float
    images: int
    evaluations: int
    mean_squared_error_per_image: Tensor
    shapley_variance_per_image: Tensor


def attribution_error_certificate(
    games: Iterable[Game],
    attributions: Tensor,
    *,
    budget: int,
    estimator: Literal["kernel", "permutation"] = "kernel",
    confidence: float = 0.95,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> AttributionCertificate:
    """Estimate, with a confidence interval, how far attributions are from the Shapley values of each image's game.

    Per image, from an unbiased estimate u of phi* with standard errors s: error e = mean (u - phi)^2 - s^2, variance
    w = mean(u^2 - s^2) - mean(u)^2 (the mean is exact: Shapley values add up). Over images, R = sum e / sum w. The
    interval is for images drawn from a population: Student t with B - 1 degrees of freedom on the linearised ratio
    (e - R w) / mean(w), which also holds the noise of the sampling. It says nothing of images unlike them,
    and is to be trusted for 20 images or more.

    Args:
        games: one game per image, bool (M, N) -> float (M, K); may be lazy, each is used once and in order.
        attributions: (B, N, K), at least 2 images.
        budget: evaluations per image. The number that any estimate needs is in `kernel_shapley` and
            `permutation_shapley`; where it covers all 2^N coalitions the error per image is exact.
        estimator: "kernel" is unbiased KernelSHAP with spread sizes and the attributions as control variate: the
            better they are, the less noise. "permutation" is antithetic permutation sampling, less noisy for games
            whose value changes little with each player.
        confidence: coverage of the interval, in (0, 1).
        batch_size: coalitions per call of a game.
        generator: source of randomness; None uses torch's global one.
        device: where coalitions are made; defaults to the device of `attributions`.
        progress: show a progress bar over images.

    Returns:
        AttributionCertificate.

    Raises:
        ValueError: attributions that are not finite (B, N, K), another number of games than images, too small a
            budget, or Shapley values whose variance cannot be told from 0.
    """
    _check_request(games, attributions, budget, estimator, confidence)
    device = attributions.device if device is None else device
    moments, evaluations = [], 0
    for phi, game in _matched(attributions, games, progress):
        options: dict[str, Any] = {"num_players": len(phi), "budget": budget, "batch_size": batch_size}
        options |= {"generator": generator, "device": device}
        if estimator == "kernel":
            estimate = _kernel_estimate(game, phi, options)
        else:
            estimate = permutation_shapley(game, **options)
        moments.append(_moments(estimate, phi))
        evaluations += estimate.evaluations
    return _summary(torch.stack(moments), confidence, evaluations)


def _kernel_estimate(game: Game, phi: Tensor, options: dict[str, Any]) -> ShapleyEstimate:
    try:
        return kernel_shapley(game, unbiased=True, control_variate=phi, sizes="spread", **options)
    except ValueError as error:  # it knows the attributions by another name
        raise ValueError(str(error).replace("`control_variate`", "each image's `attributions`")) from error


def _check_request(
    games: Iterable[Game], attributions: Tensor, budget: int, estimator: str, confidence: float
) -> None:
    if not isinstance(games, Iterable):
        raise TypeError(f"`games` must hold one game per image, got {type(games).__name__}: give a list.")
    check_floats(attributions, "attributions", ("images", "players", "labels"), "give at least 2 images")
    if len(attributions) < 2:
        raise ValueError(f"`attributions` must hold at least 2 images, got {len(attributions)}.")
    check_finite(attributions, "attributions")
    check_count(budget, "budget")
    check_choice(estimator, "estimator", ("kernel", "permutation"))
    check_number(confidence, "confidence", "between 0 and 1", lambda value: 0 < value < 1)


def _matched(attributions: Tensor, games: Iterable[Game], progress: bool) -> Iterable[tuple[Tensor, Game]]:
    """Pair each image's attributions with its game; complain about a missing or a spare game."""
    remaining = iter(games)
    for image, phi in enumerate(tqdm(attributions, unit="image", disable=not progress)):
        game = next(remaining, None)
        if game is None:
            raise ValueError(f"`games` must hold one game per image, {len(attributions)}, got {image}.")
        check_callable(game, f"games[{image}]", "a function from bool (coalitions, players) to (coalitions, labels)")
        yield phi, game
    if next(remaining, None) is not None:
        raise ValueError(f"`games` must hold one game per image, {len(attributions)}, got more.")


def _moments(estimate: ShapleyEstimate, phi: Tensor) -> Tensor:
    """Per-image moments, the first two unbiased; float64 (5,) on the CPU.

    Squared error, variance of phi*, variance of phi, covariance of both, mean square of the estimate.
    """
    values, noise = estimate.values.double(), estimate.standard_errors.double().square()  # (players, labels)
    if values.shape != phi.shape:
        raise ValueError(
            f"`attributions` of an image must match its game, {tuple(values.shape)}, got {tuple(phi.shape)}."
        )
    phi = phi.to(values.device, torch.float64)
    centred_values, centred_phi = values - values.mean(), phi - phi.mean()
    moments = [
        (values - phi).square() - noise,
        centred_values.square() - noise,
        centred_phi.square(),
        centred_phi * centred_values,
        values.square(),
    ]
    return torch.stack([moment.mean() for moment in moments]).cpu()


def _summary(moments: Tensor, confidence: float, evaluations: int) -> AttributionCertificate:
    """Ratios and the interval from per-image moments (B, 5)."""
    images = len(moments)
    errors, variances = moments[:, 0], moments[:, 1]
    error, variance, phi_variance, covariance, size = moments.mean(0).tolist()
    if variance <= 1e-12 * size:  # 0 up to rounding, or less by noise
        raise ValueError(
            f"The variance of the Shapley values came out as {variance:.3g}, which cannot be told from 0: "
            "raise `budget` or give more images."
        )
    ratio = error / variance
    spread = ((errors - ratio * variances).std() / (variance * math.sqrt(images))).item()
    half_width = _student_quantile((1 + confidence) / 2, images - 1) * spread
    return AttributionCertificate(
        mean_squared_error=error,
        shapley_variance=variance,
        error_ratio=ratio,
        error_ratio_interval=(ratio - half_width, ratio + half_width),
        correlation=covariance / math.sqrt(variance * phi_variance) if phi_variance > 0 else math.nan,
        confidence=confidence,
        images=images,
        evaluations=evaluations,
        mean_squared_error_per_image=errors,
        shapley_variance_per_image=variances,
    )


def _student_quantile(probability: float, degrees: int) -> float:
    from scipy.stats import t  # here and not above: importing it takes longer than the rest of this file

    return float(t.ppf(probability, degrees))
