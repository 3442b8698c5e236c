"""Refinement: the posterior against enumeration, exact where it can be, and what a model makes of it."""

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_shapley import enumerate_coalitions, exact_shapley, kernel_shapley, refine, verdict
from hf_shapley.models.posterior import _Process, shapley_posterior


def smooth_game(num_players: int, labels: int = 3, seed: int = 0):
    """A small random network of the present players: interactions of every order."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(num_players, 40, generator=generator, dtype=torch.float64)
    second = torch.randn(40, labels, generator=generator, dtype=torch.float64)
    return lambda coalitions: torch.tanh(coalitions.double() @ first) @ second


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.floats(0.05, 0.99), st.floats(0, 2), st.booleans())
def test_shapley_values_of_the_covariance_are_enumerated_ones(num_players, rho, error, free):
    """Those of S -> cov(y(S), y(T)), for each T, and their own: unless they are free, interactions have none."""
    process = _Process(num_players, rho, error, free)
    everyone = enumerate_coalitions(num_players).double()
    covariance = process.covariance(everyone)
    found = exact_shapley(lambda coalitions: covariance[index_of(coalitions)], num_players=num_players)  # (N, 2^N)
    expected = process.shapley(everyone)
    torch.testing.assert_close(found.T, expected, atol=1e-10, rtol=1e-8)
    variances = exact_shapley(lambda coalitions: expected[index_of(coalitions)], num_players=num_players).diagonal()
    torch.testing.assert_close(variances, process.variance.expand(num_players), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(covariance[0::2], -covariance[1::2], atol=1e-10, rtol=0)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-10


def index_of(coalitions: torch.Tensor) -> torch.Tensor:
    """Rows of `enumerate_coalitions`: pairs by the code of the one without the last player."""
    flipped = coalitions[:, -1]
    codes = ((coalitions ^ flipped[:, None]) * 2 ** torch.arange(coalitions.shape[1])).sum(-1)
    return 2 * codes + flipped


def test_all_coalitions_give_the_exact_values():
    game = smooth_game(8)
    exact = exact_shapley(game, num_players=8)
    assert torch.equal(refine(game, torch.zeros(8, 3), budget=256).values, exact)
    halves = enumerate_coalitions(8)[0::2]
    coalitions = torch.cat([~halves[:1], halves[1:]])
    odd = (game(coalitions) - game(~coalitions)) / 2
    values, errors, ratios = shapley_posterior(torch.zeros(8, 3, dtype=torch.float64), coalitions, odd)
    torch.testing.assert_close(values, exact, atol=1e-4, rtol=1e-4)
    assert errors.max() < 1e-2
    # What was given says nothing: all of the variance is error.
    torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-3, rtol=0)


@pytest.mark.parametrize("budget", [4, 16, 65, 512])
def test_refined_attributions_add_up(budget):
    """To v(full) - v(empty), whatever the attributions that were given add up to, within the budget."""
    game = smooth_game(14)
    start = torch.randn(14, 3, generator=torch.Generator().manual_seed(1))
    asked = []
    estimate = refine(
        lambda coalitions: (asked.append(len(coalitions)), game(coalitions))[1],
        start,
        budget=budget,
        generator=torch.Generator().manual_seed(0),
    )
    full = torch.ones(1, 14, dtype=torch.bool)
    torch.testing.assert_close(estimate.values.sum(0), (game(full) - game(~full))[0], atol=1e-12, rtol=0)
    assert sum(asked) == estimate.evaluations <= budget


def errors_of(budget: int, start_error: float, games: int = 12) -> tuple[float, float, float]:
    """Mean squared errors over random games of 12 players: of the start, refined, and as the posterior states it."""
    found = []
    for seed in range(games):
        game, generator = smooth_game(12, seed=seed), torch.Generator().manual_seed(seed)
        exact = exact_shapley(game, num_players=12)
        start = exact + start_error * torch.randn(12, 3, generator=generator)
        start = start + (exact - start).mean(0)
        refined = refine(game, start, budget=budget, generator=generator)
        gap, stated = refined.values - exact, refined.standard_errors
        found.append([(start - exact).square().mean(), gap.square().mean(), stated.square().mean()])
    return tuple(torch.tensor(found).mean(0).tolist())


@pytest.mark.parametrize("budget", [16, 64, 256])
@pytest.mark.parametrize("start_error", [0.2, 0.5, 2.0])
def test_evaluations_never_make_attributions_worse(budget, start_error):
    """On average, be their error small or large; by a twentieth at most where hardly anything is asked."""
    before, after, _ = errors_of(budget, start_error)
    assert after < 1.05 * before


def test_the_stated_error_is_the_error():
    _, after, stated = errors_of(256, 1.0)
    assert 0.5 < stated / after < 2


def test_refined_is_nearer_than_kernelshap_from_nothing():
    """At the same evaluations, from attributions that say nothing."""
    game = smooth_game(12)
    exact = exact_shapley(game, num_players=12)
    refined, sampled = [], []
    for seed in range(4):
        options = dict(budget=256, generator=torch.Generator().manual_seed(seed))
        refined.append(refine(game, torch.zeros(12, 3), **options).values)
        sampled.append(kernel_shapley(game, num_players=12, sizes="spread", **options).values)
    gaps = [(torch.stack(values) - exact).square().mean() for values in (refined, sampled)]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize(
    ("attributions", "budget", "message"),
    [
        (torch.zeros(12), 64, "shape"),
        (torch.full((12, 3), float("nan")), 64, "finite"),
        (torch.zeros(12, 2), 64, "3 labels"),
        (torch.zeros(12, 3), 3, "at least 4"),
        (torch.zeros(25, 3), 20_000, "at most 16384"),
    ],
)
def test_refinement_refuses(attributions, budget, message):
    with pytest.raises(ValueError, match=message):
        refine(smooth_game(len(attributions)), attributions, budget=budget)


def test_a_model_refines_its_own_maps(backbone, pixel_values):
    """Where evaluations cover all coalitions the maps are the exact values; with none they are those of one pass."""
    model = make_model(backbone, head="votes+influence", **({"image_size": 8} if backbone == "vit" else {}))
    pixels = pixel_values[:, :, :8, :8]
    exact = torch.stack(
        [exact_shapley(lambda c, x=x: model.coalition_values(x[None], c[None])[0], num_players=4) for x in pixels]
    )
    maps = model.explain(pixels, evaluations=16)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), exact, atol=1e-4, rtol=1e-3)
    assert torch.equal(model.explain(pixels, evaluations=0), model.explain(pixels))
    chosen = model.explain(pixels, [2, 0], evaluations=16)
    torch.testing.assert_close(chosen, maps[:, [2, 0]], atol=1e-5, rtol=1e-4)


def test_refined_maps_add_up_to_the_logits(model, pixel_values):
    maps = model.explain(pixel_values, evaluations=32, generator=torch.Generator().manual_seed(0))
    gains = model(pixel_values).logits - model.base_values
    torch.testing.assert_close(maps.sum((-2, -1)), gains, atol=1e-5, rtol=1e-5)


def additive_model():
    """Without mixing a patch's vote depends on nothing else: votes are the exact Shapley values."""
    model = make_model("convnext")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dwconv" in name:
                parameter.zero_()
    return model


def test_the_check_tells_right_maps_from_wrong_ones(pixel_values):
    """Where maps are exact it is near 0, where they are the next image's it is not."""
    model, options = additive_model(), {"generator": torch.Generator().manual_seed(0)}
    assert model.check_explanation(pixel_values, [0, 1, 2], **options).max() < 0.1
    assert model.check_explanation(pixel_values, **options).shape == (3, 1)
    right = model._attributions
    model._attributions = lambda *args: right(*args).roll(1, dims=1)  # those of the patch beside
    assert model.check_explanation(pixel_values, [0, 1, 2], **options).min() > 0.3


def test_the_check_states_the_error_there_is():
    """Over random games whose attributions are off by a known amount, with 64 evaluations."""
    stated, true = [], []
    for seed in range(24):
        game, generator = smooth_game(12, seed=seed), torch.Generator().manual_seed(seed)
        exact = exact_shapley(game, num_players=12)
        start = exact + 0.6 * torch.randn(12, 3, generator=generator)
        coalitions = torch.rand(32, 12, generator=generator) > 0.5
        coalitions[0] = True
        odd = (game(coalitions) - game(~coalitions)) / 2
        stated.append(shapley_posterior(start, coalitions, odd).error_ratios.mean())
        start = start + (exact - start).mean(0)
        true.append(((start - exact).square().mean(0) / exact.var(0, correction=0)).mean())
    assert 0.6 < torch.stack(stated).mean() / torch.stack(true).mean() < 1.6


def test_refined_maps_are_judged_as_they_are(pixel_values):
    """The check takes the maps that it is given: exact ones pass, those of the patch beside do not."""
    model, labels = additive_model(), torch.tensor([[0, 1], [2, 3], [4, 0]])
    exact = model.explain(pixel_values, labels)
    for maps, holds in [(exact, lambda error: error < 0.1), (exact.roll(1, dims=-1), lambda error: error > 0.3)]:
        generator = torch.Generator().manual_seed(0)
        errors = model.check_explanation(pixel_values, labels, maps=maps, generator=generator)
        assert errors.shape == (3, 2) and holds(errors).all()
    with pytest.raises(ValueError, match=r"`maps` must be of shape \(3, 1, 4, 6\)"):
        model.check_explanation(pixel_values, maps=exact)


@pytest.mark.parametrize(
    ("error", "words"),
    [(-0.1, "good"), (0.35, "good"), (0.351, "rough"), (0.65, "rough"), (1.0, "do not trust"), (10.0, "do not trust")],
)
def test_verdicts_follow_the_error(error, words):
    assert verdict(error) == words
    assert verdict(torch.tensor(float("nan"))) == "do not trust"
