"""Estimators against games with known answers, slow second implementations, and their own stated errors."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_shapley.faithfulness.estimators import exact_shapley, kernel_shapley, permutation_shapley
from hf_shapley.models.coalitions import enumerate_coalitions, shapley_kernel_size_probabilities

SAMPLERS = {
    "permutation": partial(permutation_shapley, antithetic=False),
    "antithetic": permutation_shapley,
    "regression": partial(kernel_shapley, paired=False),
    "paired regression": kernel_shapley,
    "unbiased": partial(kernel_shapley, paired=False, unbiased=True),
    "paired unbiased": partial(kernel_shapley, unbiased=True),
    "spread regression": partial(kernel_shapley, sizes="spread"),
    "spread unbiased": partial(kernel_shapley, sizes="spread", unbiased=True),
}
PAIRED = ["antithetic", "paired regression", "paired unbiased"]
property_settings = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_game(num_players, seed, num_labels=2, additive=1.0):
    """A game without structure: an additive part plus an independent draw per coalition."""
    generator = seeded(seed)
    table = torch.randn(2**num_players, num_labels, generator=generator, dtype=torch.double)
    weights = additive * torch.randn(num_players, num_labels, generator=generator, dtype=torch.double)
    bits = 2 ** torch.arange(num_players)
    return lambda coalitions: table[(coalitions * bits).sum(-1)] + coalitions.double() @ weights


class Recorder:
    """A game that remembers every coalition it was asked about."""

    def __init__(self, game):
        self.game, self.calls = game, []

    def __call__(self, coalitions):
        self.calls.append(coalitions.clone())
        return self.game(coalitions)

    @property
    def evaluations(self):
        return sum(len(call) for call in self.calls)


def shapley_by_definition(game, num_players):
    """Average marginal contribution over all N! orders, one coalition at a time."""
    total = 0.0
    for order in itertools.permutations(range(num_players)):
        coalition = torch.zeros(1, num_players, dtype=torch.bool)
        marginals = {}
        for player in order:
            before = game(coalition)
            coalition[0, player] = True
            marginals[player] = game(coalition) - before
        total = total + torch.cat([marginals[player] for player in range(num_players)])
    return total / math.factorial(num_players)


@pytest.mark.parametrize("members", [[0], [1, 3], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_unanimity_game_is_split_evenly_among_its_members(members):
    def game(coalitions):
        return coalitions[:, members].all(-1, keepdim=True).double()

    expected = torch.zeros(5, 1, dtype=torch.double)
    expected[members] = 1 / len(members)
    torch.testing.assert_close(exact_shapley(game, num_players=5), expected, rtol=0, atol=1e-12)


def test_additive_game_gives_back_its_weights():
    weights = torch.randn(10, 3, generator=seeded(0), dtype=torch.double)
    result = exact_shapley(lambda coalitions: 5 + coalitions.double() @ weights, num_players=10)
    torch.testing.assert_close(result, weights, rtol=0, atol=1e-12)


def test_airport_game_shares_each_stretch_among_users():
    """The airport game shares each stretch of runway among those who need it."""
    costs = torch.tensor([1.0, 2.0, 2.0, 5.0, 7.0, 11.0], dtype=torch.double)

    def game(coalitions):
        return (coalitions * costs).amax(-1, keepdim=True)

    stretches = costs.diff(prepend=torch.zeros(1, dtype=torch.double)) / torch.arange(6, 0, -1)
    expected = stretches.cumsum(0).unsqueeze(-1)  # Littlechild and Owen, 1973
    torch.testing.assert_close(exact_shapley(game, num_players=6), expected, rtol=0, atol=1e-12)


def test_weighted_majority_game_matches_its_known_power_index():
    weights = torch.tensor([3, 2, 1, 1])

    def game(coalitions):
        return ((coalitions * weights).sum(-1, keepdim=True) >= 4).double()

    expected = torch.tensor([[6], [2], [2], [2]], dtype=torch.double) / 12
    torch.testing.assert_close(exact_shapley(game, num_players=4), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_players", [2, 3, 5])
def test_exact_values_equal_the_average_over_all_orders(num_players):
    game = random_game(num_players, seed=num_players)
    result = exact_shapley(game, num_players=num_players, batch_size=6)
    torch.testing.assert_close(result, shapley_by_definition(game, num_players), rtol=0, atol=1e-12)


def test_exact_values_make_the_weighted_loss_stationary():
    """Exact values are a stationary point of the kernel-weighted loss among values of the same sum."""
    num_players = 6
    game = random_game(num_players, seed=3)
    phi = exact_shapley(game, num_players=num_players).requires_grad_()
    coalitions = enumerate_coalitions(num_players)[2:]
    sizes = coalitions.sum(-1)
    by_size = shapley_kernel_size_probabilities(num_players)
    counts = torch.tensor([math.comb(num_players, size) for size in range(1, num_players)])
    weights = (by_size / counts)[sizes - 1].unsqueeze(-1)
    empty = game(torch.zeros(1, num_players, dtype=torch.bool))
    loss = (weights * (game(coalitions) - empty - coalitions.double() @ phi).square()).sum()
    (gradient,) = torch.autograd.grad(loss, phi)
    # Only moves that keep the sum are allowed: along them the gradient vanishes.
    torch.testing.assert_close(gradient - gradient.mean(0), torch.zeros_like(phi), rtol=0, atol=1e-12)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(
    "dtype, expected", [(torch.half, torch.float), (torch.float, torch.float), (torch.double, torch.double)]
)
def test_results_have_the_games_dtype_or_float32(dtype, expected):
    """Results have the dtype of the game, and at least float32."""
    table = random_game(8, seed=0)

    def game(coalitions):
        return table(coalitions).to(dtype)

    estimate = kernel_shapley(game, num_players=8, budget=100, generator=seeded(0))
    assert exact_shapley(game, num_players=8).dtype == expected
    assert estimate.values.dtype == estimate.standard_errors.dtype == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_errors_are_as_large_as_standard_errors_claim(name):
    """Errors lie within two standard errors as often as those claim."""
    game = random_game(9, seed=1)
    exact = exact_shapley(game, num_players=9)
    scores = []
    for seed in range(300):
        estimate = SAMPLERS[name](game, num_players=9, budget=500, generator=seeded(seed))
        scores.append((estimate.values - exact) / estimate.standard_errors)
    inside = (torch.stack(scores).abs() < 2).double().mean()
    assert 0.93 < inside < 0.97


@pytest.mark.parametrize("name", ["permutation", "antithetic", "unbiased", "paired unbiased", "spread unbiased"])
def test_unbiased_estimates_average_to_the_exact_values(name):
    """Unbiased estimators average to the exact values even at a small budget."""
    game = random_game(8, seed=2)
    exact = exact_shapley(game, num_players=8)
    errors = torch.stack(
        [SAMPLERS[name](game, num_players=8, budget=30, generator=seeded(seed)).values - exact for seed in range(1500)]
    )
    scores = errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)
    assert scores.abs().max() < 4
    assert scores.square().mean() < 2


def test_good_control_variates_remove_most_variance():
    """A good control variate removes most of the variance and no truth: at most 5 % of it is left."""
    game = random_game(10, seed=4, additive=10.0)
    exact = exact_shapley(game, num_players=10)
    guess = exact + 0.1 * torch.randn(exact.shape, generator=seeded(5), dtype=torch.double)
    options = {"num_players": 10, "budget": 300, "unbiased": True}
    errors = {"with": [], "without": []}
    for seed in range(60):
        controlled = kernel_shapley(game, control_variate=guess, generator=seeded(seed), **options)
        plain = kernel_shapley(game, generator=seeded(seed), **options)
        errors["with"].append(controlled.values - exact)
        errors["without"].append(plain.values - exact)
    variance = {name: torch.stack(values).square().mean() for name, values in errors.items()}
    assert variance["with"] < 0.05 * variance["without"]


def test_a_control_variates_sum_does_not_matter():
    """A control variate of the wrong sum, by a constant for each player, changes nothing."""
    game = random_game(8, seed=4)
    guess = torch.randn(8, 2, generator=seeded(5), dtype=torch.double)
    options = {"num_players": 8, "budget": 100, "unbiased": True}
    first = kernel_shapley(game, control_variate=guess, generator=seeded(0), **options)
    second = kernel_shapley(game, control_variate=guess + 3, generator=seeded(0), **options)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_additive_games_are_solved_without_error(name):
    weights = torch.randn(9, 2, generator=seeded(0), dtype=torch.double)
    sampler = SAMPLERS[name]
    if "unbiased" in name:
        sampler = partial(sampler, control_variate=weights)
    estimate = sampler(lambda s: 1 + s.double() @ weights, num_players=9, budget=120, generator=seeded(1))
    torch.testing.assert_close(estimate.values, weights, rtol=0, atol=1e-10)
    assert estimate.standard_errors.max() < 1e-10


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("budget", [80, 101, 127])
@pytest.mark.parametrize("batch_size", [10, 4096])
def test_reported_evaluations_are_made_and_within_budget(name, budget, batch_size):
    """The reported evaluations are the ones made, and never more than the budget."""
    game = Recorder(random_game(8, seed=0))
    estimate = SAMPLERS[name](game, num_players=8, budget=budget, batch_size=batch_size, generator=seeded(0))
    assert estimate.evaluations == game.evaluations <= budget
    assert budget - game.evaluations < 14  # no further antithetic pair would fit
    assert max(len(call) for call in game.calls) <= batch_size
    ends = torch.cat(game.calls).sum(-1)
    assert (ends == 0).sum() == (ends == 8).sum() == 1


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("batch_size", [7, 4096])
def test_complements_are_adjacent_in_every_call(name, batch_size):
    game = Recorder(random_game(8, seed=0))
    SAMPLERS[name](game, num_players=8, budget=100, batch_size=batch_size, generator=seeded(0))
    exact_shapley(game, num_players=8, batch_size=batch_size)
    for call in game.calls:
        assert torch.equal(call[0::2], ~call[1::2])


def test_enumeration_asks_for_every_coalition_once():
    game = Recorder(random_game(7, seed=0))
    exact_shapley(game, num_players=7, batch_size=50)
    assert len(torch.cat(game.calls).unique(dim=0)) == game.evaluations == 2**7


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_size_does_not_change_the_result(name):
    game = random_game(8, seed=0)
    small, large = (
        SAMPLERS[name](game, num_players=8, budget=100, batch_size=size, generator=seeded(3)) for size in (2, 4096)
    )
    torch.testing.assert_close(small.values, large.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(small.standard_errors, large.standard_errors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_budgets_for_all_coalitions_buy_exact_values(name):
    """A budget for all coalitions buys the exact values, at the cost of each coalition once."""
    game = Recorder(random_game(5, seed=0))
    estimate = SAMPLERS[name](game, num_players=5, budget=40)
    assert torch.equal(estimate.values, exact_shapley(game.game, num_players=5))
    assert not estimate.standard_errors.any()
    assert estimate.evaluations == game.evaluations == 32


@pytest.mark.parametrize("name", SAMPLERS)
def test_generators_replay_draws_without_the_global_one(name):
    """A generator replays every draw, and the global one is left alone."""
    game = random_game(8, seed=0)
    before = torch.get_rng_state()
    first, second = (SAMPLERS[name](game, num_players=8, budget=100, generator=seeded(7)).values for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


@property_settings
@given(seed=seeds, num_players=st.integers(2, 6), scale=st.floats(-3, 3))
def test_exact_values_are_linear_in_the_game(seed, num_players, scale):
    first, second = random_game(num_players, seed), random_game(num_players, seed + 1)
    both = exact_shapley(lambda s: first(s) + scale * second(s), num_players=num_players)
    apart = exact_shapley(first, num_players=num_players) + scale * exact_shapley(second, num_players=num_players)
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-12)


@property_settings
@given(seed=seeds, num_players=st.integers(2, 7))
def test_exact_values_are_efficient(seed, num_players):
    game = random_game(num_players, seed)
    empty, full = game(torch.stack([torch.zeros(num_players), torch.ones(num_players)]).bool())
    total = exact_shapley(game, num_players=num_players).sum(0)
    torch.testing.assert_close(total, full - empty, rtol=0, atol=1e-12)


@property_settings
@given(seed=seeds, num_players=st.integers(3, 6))
def test_a_null_player_gets_nothing(seed, num_players):
    rest = random_game(num_players - 1, seed)
    result = exact_shapley(lambda s: rest(s[:, 1:]), num_players=num_players)
    torch.testing.assert_close(result[0], torch.zeros(2, dtype=torch.double), rtol=0, atol=1e-12)
    torch.testing.assert_close(result[1:], exact_shapley(rest, num_players=num_players - 1), rtol=0, atol=1e-12)


@property_settings
@given(seed=seeds, num_players=st.integers(3, 6))
def test_interchangeable_players_get_the_same(seed, num_players):
    rest = random_game(num_players, seed)
    swap = [1, 0, *range(2, num_players)]
    result = exact_shapley(lambda s: rest(s) + rest(s[:, swap]), num_players=num_players)
    torch.testing.assert_close(result[0], result[1], rtol=0, atol=1e-12)


@property_settings
@given(seed=seeds, name=st.sampled_from(sorted(SAMPLERS)))
def test_samplers_keep_efficiency_and_linearity(seed, name):
    """Sampled values are efficient, and for the same draws linear in the game."""
    first, second = random_game(7, seed), random_game(7, seed + 1)

    def estimate(game):
        return SAMPLERS[name](game, num_players=7, budget=120, generator=seeded(seed)).values

    empty, full = first(torch.stack([torch.zeros(7), torch.ones(7)]).bool())
    torch.testing.assert_close(estimate(first).sum(0), full - empty, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        estimate(lambda s: first(s) - 2 * second(s)), estimate(first) - 2 * estimate(second), rtol=0, atol=1e-9
    )


ESTIMATORS = {"exact": exact_shapley} | {name: partial(s, budget=200) for name, s in SAMPLERS.items()}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "game, message",
    [
        (lambda s: s.double().sum(-1), "unsqueeze"),
        (lambda s: s.double()[1:], "one row per coalition"),
        (lambda s: s.double() * math.nan, "NaN"),
        (lambda s: s.long(), "float tensor, got torch.int64"),
        (lambda s: s.double().tolist(), "float tensor, got list"),
    ],
)
def test_a_game_that_answers_wrongly_is_refused(name, game, message):
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name](game, num_players=8)


@pytest.mark.parametrize(
    "name, least",
    [
        ("permutation", 2 + 2 * 9),
        ("antithetic", 2 + 4 * 9),
        ("regression", 2 + 30),
        ("paired regression", 2 + 60),
        ("unbiased", 2 + 10),
        ("paired unbiased", 2 + 20),
    ],
)
def test_only_budgets_below_the_least_are_refused(name, least):
    """A budget below the least one is refused, and the least one works."""
    game = random_game(10, seed=0)
    with pytest.raises(ValueError, match=f"at least {least} evaluations for 10 players.*got {least - 1}"):
        SAMPLERS[name](game, num_players=10, budget=least - 1)
    estimate = SAMPLERS[name](game, num_players=10, budget=least, generator=seeded(0))
    assert estimate.evaluations == least
    assert estimate.values.isfinite().all() and estimate.standard_errors.isfinite().all()


def test_draws_of_an_undetermined_regression_are_refused(monkeypatch):
    """Draws that do not determine the regression are refused."""

    def same_coalition(*shape, num_players, **_):
        return (torch.arange(num_players) < 3).expand(*shape, num_players)

    monkeypatch.setattr("hf_shapley.faithfulness.estimators.sample_coalitions", same_coalition)
    with pytest.raises(ValueError, match="do not determine"):
        kernel_shapley(random_game(10, seed=0), num_players=10, budget=100)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda game: exact_shapley(game, num_players=1), "at least 2, got 1"),
        (lambda game: exact_shapley(game, num_players=25), "at most 24 players"),
        (lambda game: exact_shapley(game, num_players=8, batch_size=1), "`batch_size` must be at least 2"),
        (lambda game: kernel_shapley(game, num_players=1, budget=9), "at least 2, got 1"),
        (lambda game: permutation_shapley(game, num_players=0, budget=9), "at least 2, got 0"),
        (
            lambda game: kernel_shapley(game, num_players=8, budget=99, control_variate=torch.zeros(8, 2)),
            "unbiased=True",
        ),
        (
            lambda game: kernel_shapley(
                game, num_players=8, budget=99, unbiased=True, control_variate=torch.zeros(8, 3)
            ),
            r"\(8, 2\), got shape \(8, 3\)",
        ),
        (
            lambda game: kernel_shapley(
                game, num_players=8, budget=99, unbiased=True, control_variate=torch.full((8, 2), math.nan)
            ),
            "finite",
        ),
    ],
)
def test_bad_options_are_refused_with_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_game(8, seed=0))


def test_gradients_are_not_recorded():
    weights = torch.ones(8, 1, requires_grad=True)
    assert not exact_shapley(lambda s: s.float() @ weights, num_players=8).requires_grad
    assert not kernel_shapley(lambda s: s.float() @ weights, num_players=8, budget=90).values.requires_grad


def test_progress_is_shown_only_on_request(capsys):
    game = random_game(8, seed=0)
    exact_shapley(game, num_players=8)
    assert capsys.readouterr().err == ""
    kernel_shapley(game, num_players=8, budget=90, generator=seeded(0), progress=True)
    assert "90/90" in capsys.readouterr().err
