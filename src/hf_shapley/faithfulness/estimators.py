"""Shapley values of any game: exact, by permutations, and by KernelSHAP.

A game is that of one image, as `games` says. Sums are taken in float64 whatever the dtype of its values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.checks import check_count, check_finite, check_floats, check_generator
from ..models.coalitions import importance_weights, ranked_coalitions, sample_coalitions, with_complements
from .games import CheckedGame, Game

MAX_ENUMERATED_PLAYERS = 24


@dataclass(frozen=True)
class ShapleyEstimate:
    """Estimated Shapley values and how far to trust them.

    Attributes:
        values: (N, K).
        standard_errors: (N, K), one standard deviation of the error of `values`; 0 where the values are exact.
        evaluations: number of coalitions that were sent to the game.
    """

    values: Tensor
    standard_errors: Tensor
    evaluations: int


def _check_num_players(num_players: int) -> None:
    check_count(num_players, "num_players", 2, "cut the image finer")


def check_request(num_players: int, budget: int, generator: torch.Generator | None) -> None:
    _check_num_players(num_players)
    check_count(budget, "budget")
    check_generator(generator)


def check_budget(budget: int, needed: int, num_players: int) -> None:
    if budget < needed:
        raise ValueError(
            f"`budget` must be at least {needed} evaluations for {num_players} players with these options, "
            f"got {budget}: raise it, or group the players."
        )


def _device(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device:
    if device is None:
        device = "cpu" if generator is None else generator.device
    return torch.device(device)


def covers_every_coalition(budget: int, num_players: int) -> bool:
    return num_players <= MAX_ENUMERATED_PLAYERS and budget >= 2**num_players


def exact_estimate(game: Game, *, num_players: int, **options: Any) -> ShapleyEstimate:
    values = exact_shapley(game, num_players=num_players, **options)
    return ShapleyEstimate(values, torch.zeros_like(values), 2**num_players)


@torch.no_grad()
def exact_shapley(
    game: Game,
    *,
    num_players: int,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Shapley values by enumerating all 2^N coalitions, a batch at a time.

    phi_i = sum over S without i of |S|! (N - |S| - 1)! / N! (v(S + i) - v(S))  (Shapley, 1953). The weights of a
    coalition and of its complement are opposite, so this is a sum over pairs of
    c_i(S) (v(S) - v(~S)), c_i(S) = (|S| - 1)! (N - |S|)! / N! for i in S and -|S|! (N - |S| - 1)! / N! otherwise.

    Args:
        game: bool (M, N) -> float (M, K).
        num_players: N, from 2 to 24.
        batch_size: coalitions per call of the game, at least 2.
        device: where coalitions are made; default CPU. The game's values may lie elsewhere.
        progress: show a progress bar.

    Returns:
        (N, K), summed in float64 and returned in the dtype of the game's values (float32 for half precision).

    Raises:
        ValueError: more than 24 players, or values that are not finite floats of shape (M, K).
    """
    _check_num_players(num_players)
    if num_players > MAX_ENUMERATED_PLAYERS:
        raise ValueError(
            f"`num_players`: enumerating 2^{num_players} coalitions is out of reach (at most {MAX_ENUMERATED_PLAYERS} "
            "players): use `kernel_shapley` or `permutation_shapley`."
        )
    bits = torch.arange(num_players, device=device)
    codes = torch.arange(2 ** (num_players - 1), device=device)  # the last player is absent, present in the complement
    with CheckedGame(game, batch_size, 2**num_players, progress) as checked:
        attributions = torch.zeros((), dtype=torch.float64)
        for chunk in codes.split(checked.batch_size // 2):
            coalitions = (chunk.unsqueeze(-1) >> bits) & 1 == 1  # (pairs, players)
            values = checked(with_complements(coalitions))
            odd = values[0::2].double() - values[1::2].double()  # (pairs, labels)
            weights = _exact_weights(coalitions.to(values.device))
            attributions = attributions + weights.T @ odd  # (players, labels)
    return attributions.to(_result_dtype(values))


def _exact_weights(coalitions: Tensor) -> Tensor:
    """c_i(S) of `exact_shapley`: (M, N) -> float64 (M, N)."""
    num_players = coalitions.shape[-1]
    inverse = [1 / (num_players * math.comb(num_players - 1, size)) for size in range(num_players)]
    others = torch.tensor([*inverse, 0.0], dtype=torch.float64, device=coalitions.device)  # indexed by |S| without i
    sizes = coalitions.sum(-1, keepdim=True)
    return torch.where(coalitions, others[(sizes - 1).clamp(min=0)], -others[sizes])


def _result_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


class _RunningMean:
    """Mean of independent draws and its standard error, draws arriving in batches (Chan, Golub and LeVeque, 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)  # until draws come, with their shape

    def add(self, draws: Tensor) -> None:
        """Take in float64 draws (D, ...)."""
        mean = draws.mean(0)
        shift = mean - self.mean
        total = self.count + len(draws)
        self.squares = (
            self.squares + (draws - mean).square().sum(0) + shift.square() * (self.count * len(draws) / total)
        )
        self.mean = self.mean + shift * (len(draws) / total)
        self.count = total

    @property
    def standard_error(self) -> Tensor:
        return (self.squares / ((self.count - 1) * self.count)).sqrt()


def _endpoints(checked: CheckedGame, num_players: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """v(empty) and v(full), each (1, K) in the dtype of the game."""
    empty = torch.zeros(1, num_players, dtype=torch.bool, device=device)
    return checked(with_complements(empty)).split(1)


@torch.no_grad()
def permutation_shapley(
    game: Game,
    *,
    num_players: int,
    budget: int,
    antithetic: bool = True,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ShapleyEstimate:
    """Unbiased Shapley values by sampling permutations of the players.

    phi_i is the mean over permutations of v(players up to i) - v(players before i) (Castro, Gomez and Tejada, 2009).
    An antithetic pair is a permutation and its reverse (Mitchell et al., arXiv:2104.12199): the prefixes
    of one are the complements of the prefixes of the other. The errors come from the spread of independent
    permutations (or pairs). The additive part of a game is found exactly: a control variate would change nothing.

    Args:
        game: bool (M, N) -> float (M, K).
        num_players: N, at least 2.
        budget: most evaluations to spend. Two for v(empty) and v(full), then N - 1 per permutation, and at least two
            permutations (antithetic: two pairs). Where the budget covers all 2^N coalitions (N up to 24) they are
            enumerated instead and the result is exact.
        antithetic: draw a permutation with its reverse.
        batch_size: coalitions per call of the game, at least 2.
        generator: source of randomness; None uses torch's global one.
        device: where coalitions are made; defaults to the generator's device, else CPU.
        progress: show a progress bar.

    Returns:
        ShapleyEstimate; values in the dtype of the game (float32 for half precision).

    Raises:
        ValueError: too small a budget, or values that are not finite floats of shape (M, K).
    """
    check_request(num_players, budget, generator)
    device = _device(device, generator)
    if covers_every_coalition(budget, num_players):
        return exact_estimate(game, num_players=num_players, batch_size=batch_size, device=device, progress=progress)
    cost = (num_players - 1) * (2 if antithetic else 1)
    check_budget(budget, 2 + 2 * cost, num_players)
    draws = (budget - 2) // cost
    running = _RunningMean()
    with CheckedGame(game, batch_size, 2 + draws * cost, progress) as checked:
        empty, full = _endpoints(checked, num_players, device)
        for count in _chunks(draws, max(1, batch_size // cost)):
            keys = torch.rand(count, num_players, dtype=torch.float64, generator=generator, device=device)
            prefixes = ranked_coalitions(keys)  # (draws, N + 1, players)
            running.add(_marginal_contributions(checked, prefixes, empty, full, antithetic))
    dtype = _result_dtype(empty)
    return ShapleyEstimate(running.mean.to(dtype), running.standard_error.to(dtype), checked.evaluations)


def _chunks(total: int, size: int) -> Iterator[int]:
    """Sizes of the chunks that add up to `total`."""
    for start in range(0, total, size):
        yield min(size, total - start)


def _marginal_contributions(
    checked: CheckedGame, prefixes: Tensor, empty: Tensor, full: Tensor, antithetic: bool
) -> Tensor:
    """What each player adds to the players before it: prefixes (D, N + 1, N) -> float64 (D, N, K)."""
    draws, _, num_players = prefixes.shape
    inner = prefixes[:, 1:-1].flatten(0, 1)  # (D (N - 1), N)
    if antithetic:
        # With a permutation and its reverse averaged, only the odd part (v(S) - v(~S)) / 2 is left.
        values = checked(with_complements(inner)).double()
        inner_values = (values[0::2] - values[1::2]) / 2
        first, last = (empty - full).double() / 2, (full - empty).double() / 2
    else:
        inner_values = checked(inner).double()
        first, last = empty.double(), full.double()
    along = torch.cat(
        [
            first.expand(draws, 1, -1),
            inner_values.unflatten(0, (draws, num_players - 1)),
            last.expand(draws, 1, -1),
        ],
        dim=1,
    )  # (D, N + 1, K)
    ranks = num_players - prefixes.sum(1).to(along.device)  # a player of rank r is in the prefixes r + 1 ... N
    return along.diff(dim=1).gather(1, ranks.unsqueeze(-1).expand(-1, -1, along.shape[-1]))


@torch.no_grad()
def kernel_shapley(
    game: Game,
    *,
    num_players: int,
    budget: int,
    unbiased: bool = False,
    control_variate: Tensor | None = None,
    paired: bool = True,
    sizes: str = "kernel",
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ShapleyEstimate:
    """Shapley values by KernelSHAP: coalitions from the Shapley kernel, efficiency as an exact constraint.

    phi minimises E[(v(S) - v(empty) - sum_{i in S} phi_i)^2] over S from the kernel, subject to
    sum_i phi_i = v(full) - v(empty) (Lundberg and Lee, arXiv:1705.07874; Covert and Lee, arXiv:2012.01536). With the
    constraint solved, x = 1_S - |S| / N, t = v(S) - v(empty) - |S| / N (v(full) - v(empty)), and H the harmonic number
    of N - 1, two estimators follow, as E[x x^T] = 1 / (2 H) on the vectors that sum to zero:

    - regression (default): least squares of t on x. Its bias is of order 1 / budget, small against its error of order
      1 / sqrt(budget). Errors by the jackknife over independent draws, in closed form.
    - `unbiased=True`: phi = (v(full) - v(empty)) / N + 2 H mean(x t). No bias at any budget; more variance, unless a
      control variate c is given: then the Shapley values of the game v(S) - sum_{i in S} c_i are estimated this way
      and c is added back. Errors from the spread of independent draws.

    With `paired=True` each draw is a pair and t is the mean of t(S) and -t(~S): the even part of the game, on
    which Shapley values do not depend, drops out.

    Args:
        game: bool (M, N) -> float (M, K).
        num_players: N, at least 2.
        budget: most evaluations to spend. Two for v(empty) and v(full), then one per draw (paired: two); the
            regression needs at least 3 N draws, the unbiased estimator N. Where the budget covers all 2^N coalitions
            (N up to 24) they are enumerated instead and the result is exact.
        unbiased: use the unbiased estimator.
        control_variate: (N, K), any guess of the Shapley values that does not depend on the draws, such as a model's
            attributions. Only with `unbiased=True`: a regression does not change under an additive shift.
        paired: draw a coalition with its complement.
        sizes: "kernel", or "spread" as in `sample_coalitions`: each draw then counts by its `importance_weights`, and
            the error is smaller where coalitions of all sizes are about as far from additive.
        batch_size: coalitions per call of the game, at least 2.
        generator: source of randomness; None uses torch's global one.
        device: where coalitions are made; defaults to the generator's device, else CPU.
        progress: show a progress bar.

    Returns:
        ShapleyEstimate; values in the dtype of the game (float32 for half precision).

    Raises:
        ValueError: too small a budget, a control variate of the wrong shape or without `unbiased=True`, draws that do
            not determine the regression, or values that are not finite floats of shape (M, K).
    """
    check_request(num_players, budget, generator)
    if control_variate is not None and not unbiased:
        raise ValueError("`control_variate` changes nothing in a regression: give `unbiased=True`, or leave it out.")
    device = _device(device, generator)
    if covers_every_coalition(budget, num_players):
        return exact_estimate(game, num_players=num_players, batch_size=batch_size, device=device, progress=progress)
    cost = 2 if paired else 1
    check_budget(budget, 2 + cost * num_players * (1 if unbiased else 3), num_players)
    draws = (budget - 2) // cost
    coalitions = sample_coalitions(draws, num_players=num_players, sizes=sizes, generator=generator, device=device)
    with CheckedGame(game, batch_size, 2 + cost * draws, progress) as checked:
        empty, full = _endpoints(checked, num_players, device)
        control = _control(control_variate, empty, num_players)
        values = checked(with_complements(coalitions) if paired else coalitions)
    features = _centred_memberships(coalitions.to(values.device))  # (draws, players)
    targets = _kernel_targets(values.double(), coalitions, empty.double(), full.double(), paired)
    # Of each draw x and t appear as products only: both take the root of its weight.
    scale = importance_weights(coalitions, sizes).to(values.device, torch.float64).sqrt().unsqueeze(-1)  # (draws, 1)
    if unbiased:
        rest, standard_errors = _unbiased_solution(scale * features, scale * targets, control)
    else:
        rest, standard_errors = _regression_solution(scale * features, scale * targets)
    even_split = (full - empty).double() / num_players  # (1, labels)
    dtype = _result_dtype(values)
    return ShapleyEstimate((even_split + rest).to(dtype), standard_errors.to(dtype), checked.evaluations)


def _centred_memberships(coalitions: Tensor) -> Tensor:
    """x = 1_S - |S| / N: bool (D, N) -> float64 (D, N), rows that sum to zero."""
    members = coalitions.double()
    return members - members.mean(-1, keepdim=True)


def _kernel_targets(values: Tensor, coalitions: Tensor, empty: Tensor, full: Tensor, paired: bool) -> Tensor:
    """t of `kernel_shapley`: what a coalition has beyond its even share of v(full) - v(empty); float64 (D, K)."""
    share = coalitions.double().mean(-1, keepdim=True).to(values.device)  # (draws, 1): |S| / N
    if paired:
        return (values[0::2] - values[1::2]) / 2 - (share - 0.5) * (full - empty)
    return values - empty - share * (full - empty)


def _control(control_variate: Tensor | None, values: Tensor, num_players: int) -> Tensor:
    """The control variate as float64 (N, K), shifted to sum to zero over the players: the sum is known exactly."""
    wanted = (num_players, values.shape[-1])
    if control_variate is None:
        return torch.zeros(wanted, dtype=torch.float64, device=values.device)
    check_floats(control_variate, "control_variate", wanted)
    check_finite(control_variate, "control_variate")
    control = control_variate.to(values.device, torch.float64)
    return control - control.mean(0)


def _unbiased_solution(features: Tensor, targets: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """c + 2 H mean(x (t - x c)) and its standard error: (D, N), (D, K), (N, K) -> two float64 (N, K)."""
    draws, num_players = features.shape
    scale = 2 * sum(1 / size for size in range(1, num_players))
    residuals = targets - features @ control  # (draws, labels)
    mean = scale * (features.T @ residuals) / draws
    mean_square = scale**2 * (features.square().T @ residuals.square()) / draws
    variance = (mean_square - mean.square()).clamp(min=0) / (draws - 1)
    return control + mean, variance.sqrt()


def _regression_solution(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of t on x and its jackknife standard error: (D, N), (D, K) -> two float64 (N, K)."""
    draws, num_players = features.shape
    # Features sum to zero over players, so the matrix of ones only fills the direction that they leave empty.
    gram = features.T @ features + torch.ones(num_players, num_players, dtype=torch.float64, device=features.device)
    inverse, failed = torch.linalg.inv_ex(gram)
    influence = features @ inverse  # (draws, players)
    spare = 1 - (influence * features).sum(-1, keepdim=True)  # (draws, 1): one minus the leverage
    if failed or spare.min() < 1e-8 or not inverse.isfinite().all():
        raise ValueError(
            f"{draws} draws of coalitions do not determine the values of {num_players} players: raise `budget`, "
            "or give `unbiased=True`."
        )
    solution = inverse @ (features.T @ targets)
    residuals = (targets - features @ solution) / spare  # of each draw under the solution without it
    shift = influence.T @ residuals / draws
    spread = influence.square().T @ residuals.square() - draws * shift.square()
    return solution, (spread.clamp(min=0) * ((draws - 1) / draws)).sqrt()
