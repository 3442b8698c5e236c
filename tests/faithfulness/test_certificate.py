"""The certificate against exact enumeration: unbiased, covering at its stated rate, exact at full budget."""

import math

import pytest
import torch

from hf_shapley.faithfulness.agreement import attribution_correlation, error_ratio
from hf_shapley.faithfulness.certificate import attribution_error_certificate
from hf_shapley.faithfulness.estimators import exact_shapley

PLAYERS, LABELS = 8, 3


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_game(generator):
    """An additive part plus an independent draw per coalition, at a scale that differs between images."""
    scale = 0.5 + torch.rand(1, generator=generator, dtype=torch.double)
    table = 0.3 * scale * torch.randn(2**PLAYERS, LABELS, generator=generator, dtype=torch.double)
    weights = scale * torch.randn(PLAYERS, LABELS, generator=generator, dtype=torch.double)
    bits = 2 ** torch.arange(PLAYERS)
    return lambda coalitions: table[(coalitions * bits).sum(-1)] + coalitions.double() @ weights


def population(images, seed, noise):
    """Games, their Shapley values, and attributions that miss them by noise of a scale that differs between images."""
    generator = seeded(1_000_003 * seed + 17)
    games = [random_game(generator) for _ in range(images)]
    truth = torch.stack([exact_shapley(game, num_players=PLAYERS) for game in games])
    scales = 2 * noise * torch.rand(images, 1, 1, generator=generator, dtype=torch.double)
    return games, truth, truth + scales * torch.randn(truth.shape, generator=generator, dtype=torch.double)


@pytest.fixture(scope="module")
def true_ratio():
    """The error ratio of the population that `population(..., noise=0.3)` draws from."""
    _, truth, attributions = population(4000, seed=-1, noise=0.3)
    return error_ratio(attributions, truth).pooled


@pytest.mark.parametrize("estimator", ["kernel", "permutation"])
def test_the_certificate_of_all_coalitions_is_exact(estimator):
    """At a budget for all coalitions the certificate is the comparison with the exact values."""
    games, truth, attributions = population(5, seed=0, noise=0.3)
    certificate = attribution_error_certificate(games, attributions, budget=2**PLAYERS, estimator=estimator)
    errors = (attributions - truth).square().mean((1, 2))
    torch.testing.assert_close(certificate.mean_squared_error_per_image, errors, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        certificate.shapley_variance_per_image, truth.flatten(1).var(1, correction=0), rtol=0, atol=1e-12
    )
    assert certificate.mean_squared_error == pytest.approx(errors.mean().item(), abs=1e-12)
    variances = certificate.shapley_variance_per_image
    assert certificate.shapley_variance == pytest.approx(variances.mean().item(), abs=1e-12)
    assert certificate.error_ratio == pytest.approx(error_ratio(attributions, truth).pooled, abs=1e-12)
    assert certificate.correlation == pytest.approx(attribution_correlation(attributions, truth).pooled, abs=1e-12)
    assert certificate.evaluations == 5 * 2**PLAYERS and certificate.images == 5


@pytest.mark.parametrize("estimator", ["kernel", "permutation"])
def test_small_budgets_give_unbiased_error_and_variance(estimator):
    """At a small budget the error and the variance of each image are estimated without bias."""
    games, truth, attributions = population(6, seed=1, noise=0.3)
    errors = (attributions - truth).square().mean((1, 2))
    variances = truth.flatten(1).var(1, correction=0)
    runs = [
        attribution_error_certificate(games, attributions, budget=44, estimator=estimator, generator=seeded(seed))
        for seed in range(200)
    ]
    for name, exact in (("mean_squared_error_per_image", errors), ("shapley_variance_per_image", variances)):
        estimates = torch.stack([getattr(run, name) for run in runs])
        scores = (estimates.mean(0) - exact) / (estimates.std(0) / len(runs) ** 0.5)
        assert scores.abs().max() < 3.5
    # Without the correction for its own noise the estimate would be far off.
    assert torch.stack([run.mean_squared_error_per_image for run in runs]).std(0).max() > 0.01


@pytest.mark.parametrize("estimator", ["kernel", "permutation"])
def test_intervals_cover_the_true_ratio_as_stated(estimator, true_ratio):
    """The interval covers the error ratio of the population at its stated rate."""
    trials, confidence, covered = 150, 0.9, 0
    for seed in range(trials):
        games, _, attributions = population(30, seed=seed, noise=0.3)
        low, high = attribution_error_certificate(
            games, attributions, budget=60, estimator=estimator, confidence=confidence, generator=seeded(seed)
        ).error_ratio_interval
        covered += low <= true_ratio <= high
    assert abs(covered / trials - confidence) < 2.5 * math.sqrt(confidence * (1 - confidence) / trials)


def test_exact_attributions_have_intervals_around_zero():
    """Exact attributions have an interval around zero, at its stated rate, and a correlation near one."""
    games, truth, _ = population(30, seed=2, noise=0.3)
    trials, covered = 100, 0
    for seed in range(trials):
        certificate = attribution_error_certificate(games, truth, budget=100, generator=seeded(seed))
        low, high = certificate.error_ratio_interval
        covered += low < 0 < high
        assert high < 0.05
        assert certificate.correlation == pytest.approx(1, abs=0.03)
    assert abs(covered / trials - 0.95) < 2.5 * math.sqrt(0.95 * 0.05 / trials)


def test_worthless_attributions_are_told_from_good_ones():
    games, truth, attributions = population(30, seed=3, noise=0.3)
    good = attribution_error_certificate(games, attributions, budget=60, generator=seeded(0))
    shuffled = attribution_error_certificate(games, truth.roll(1, 0), budget=60, generator=seeded(0))
    assert good.error_ratio_interval[1] < 0.5 < 1.5 < shuffled.error_ratio_interval[0]
    assert shuffled.correlation < 0.3 < 0.8 < good.correlation


def test_good_attributions_as_control_variate_narrow_the_interval():
    def steeper(game):
        weights = 10 * torch.randn(PLAYERS, LABELS, generator=seeded(9), dtype=torch.double)
        return lambda coalitions: game(coalitions) + coalitions.double() @ weights

    games = [steeper(game) for game in population(12, seed=4, noise=0.3)[0]]
    truth = torch.stack([exact_shapley(game, num_players=PLAYERS) for game in games])
    zeros = attribution_error_certificate(games, torch.zeros_like(truth), budget=60, generator=seeded(0))
    exact = attribution_error_certificate(games, truth, budget=60, generator=seeded(0))
    widths = [high - low for low, high in (zeros.error_ratio_interval, exact.error_ratio_interval)]
    assert widths[1] < 0.1 * widths[0]


def test_lazy_games_are_made_just_before_use():
    """Lazy games are made one at a time and used in their order."""
    games, truth, _ = population(3, seed=5, noise=0.3)
    made = []

    def factory():
        for index, game in enumerate(games):
            made.append(index)
            yield lambda coalitions, index=index, game=game: (made.append(f"use {index}"), game(coalitions))[1]

    attribution_error_certificate(factory(), truth, budget=2**PLAYERS)
    assert made == [0, "use 0", 1, "use 1", 2, "use 2"]


def test_a_generator_replays_the_certificate():
    games, _, attributions = population(3, seed=6, noise=0.3)
    first, second = (
        attribution_error_certificate(games, attributions, budget=60, generator=seeded(1)) for _ in range(2)
    )
    assert first.error_ratio_interval == second.error_ratio_interval


GAMES, TRUTH, _ = population(3, seed=7, noise=0.3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attributions": TRUTH[:1]}, "at least 2 images"),
        ({"attributions": TRUTH[0]}, r"\(images, players, labels\)"),
        ({"attributions": TRUTH * math.nan}, "NaN"),
        ({"attributions": TRUTH[..., :2]}, r"\(8, 3\)"),
        ({"attributions": TRUTH[..., :2], "estimator": "permutation"}, r"must match its game, \(8, 3\), got \(8, 2\)"),
        ({"games": GAMES[:2]}, "one game per image, 3, got 2"),
        ({"games": GAMES + GAMES[:1]}, "one game per image, 3, got more"),
        ({"budget": 17}, "at least 18 evaluations"),
        ({"estimator": "regression"}, r"\['kernel', 'permutation'\], got 'regression'"),
        ({"confidence": 95}, "between 0 and 1, got 95"),
        ({"games": [lambda s: s.double().sum(-1, keepdim=True).expand(-1, 3)] * 3}, "cannot be told from 0"),
    ],
)
def test_bad_requests_are_refused_with_what_was_wanted(arguments, message):
    options = {"games": GAMES, "attributions": TRUTH, "budget": 60, "generator": seeded(0)} | arguments
    with pytest.raises(ValueError, match=message):
        attribution_error_certificate(options.pop("games"), options.pop("attributions"), **options)
