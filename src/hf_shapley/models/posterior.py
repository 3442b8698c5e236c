"""What a few evaluations of a game say of its Shapley values, given attributions to start from.

Half the difference of a coalition and its complement, less what the attributions say of it, is a function y(S), and
Shapley values depend on nothing else of a game. It is modelled as a Gaussian process over coalitions,

    y(S) = x_S' delta + g(S),    x_S = 1_S - |S| / N,    delta ~ N(0, tau^2),    g ~ GP(0, k),    y(full) = 0,
    k(S, T) = (rho^|S xor T| - rho^(N - |S xor T|)) / 2:

delta is an error of the attributions that is the same in all coalitions, g what changes with them: interactions, of
which two coalitions share the more, the fewer players they differ in. They may have Shapley values of their own or,
where the attributions are taken at their word, none. Those of k have a closed form: by the multilinear extension
(Owen, 1972) those of S -> rho^|S xor T| are integrals over q in [0, 1] of

    +-(1 - rho) prod_{j in T, j != i} (q + (1 - q) rho) prod_{j not in T, j != i} (1 - q + q rho),   + where i in T,

polynomials in q, which Gauss-Legendre quadrature integrates exactly. Each label has a scale of its own. The models
weigh by their marginal likelihood, over all labels together, and the more, the less error they grant.
"""

from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .coalitions import enumerate_coalitions, sample_coalitions, sum_over_coalitions

RHOS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Models by tau^2, over the variance of k's own Shapley values, and whether interactions have such; with the logarithm
# of their odds before anything is asked: granted three times the error, they are e times less likely to be right.
ERRORS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MODELS = {(error, False): -float(step) for step, error in enumerate(ERRORS)} | {(3.0, True): -5.0, (10.0, True): -5.0}
SEARCHED = 384  # of so many pairs at most the likelihood is asked
MOST_PAIRS = 8192  # which take half a gigabyte

GOOD_ERROR = 0.35  # the largest error ratio of a map that is called good
ROUGH_ERROR = 0.65  # and of one that is called rough


def verdict(error_ratio: float) -> Literal["good", "rough", "do not trust"]:
    """How wrong a map is, in words.

    A map scaled as well as can be has a correlation of sqrt(1 - error ratio) with the exact values.

    - "good", up to `GOOD_ERROR` (a correlation of 0.81): the patches that stand out are those that matter;
    - "rough", up to `ROUGH_ERROR` (0.59): where the weight lies holds, the order of single patches does not;
    - "do not trust": little better than a map that gives every patch the same, or of unknown error (NaN).

    Args:
        error_ratio: as `check_explanation` gives it, 0 where a map is exact. The verdict is as sure as this number,
            which a few evaluations can only estimate.
    """
    if error_ratio <= GOOD_ERROR:
        return "good"
    return "rough" if error_ratio <= ROUGH_ERROR else "do not trust"


def coalitions_to_ask(
    evaluations: int, *, num_players: int, generator: torch.Generator | None = None, device: torch.device | str
) -> Tensor:
    """Coalitions to evaluate with their complements: bool (evaluations / 2, N), or all where these are no more."""
    if evaluations > 2 * MOST_PAIRS:
        raise ValueError(
            f"Attributions are refined with at most {2 * MOST_PAIRS} evaluations, got {evaluations}: give fewer, or "
            "use `permutation_shapley`."
        )
    if num_players < 12 and 2**num_players <= evaluations:
        return enumerate_coalitions(num_players, device=device)[2::2]  # row 0 is empty, its complement known
    return sample_coalitions(
        evaluations // 2, num_players=num_players, sizes="spread", generator=generator, device=device
    )


class ShapleyPosterior(NamedTuple):
    """Of a game's Shapley values, after a few evaluations; float64.

    Attributes:
        values: (N, K), their mean; it adds up to v(full) - v(empty).
        standard_errors: (N, K), the expected distance to the mean.
        error_ratios: (K), how wrong the attributions were that this started from: the expected mean squared error over
            the expected variance of the Shapley values over players. 0 is exact, 1 no better than their mean.
    """

    values: Tensor
    standard_errors: Tensor
    error_ratios: Tensor


def shapley_posterior(prior: Tensor, coalitions: Tensor, odd: Tensor) -> ShapleyPosterior:
    """What evaluations say of Shapley values.

    Args:
        prior: attributions (N, K), float64.
        coalitions: bool (M, N), the first one full.
        odd: half of what each coalition has more than its complement, (M, K), float64.
    """
    prior = prior + (2 * odd[0] - prior.sum(0)) / len(prior)  # now they add up
    residuals = odd - sum_over_coalitions(coalitions, prior) + prior.sum(0) / 2  # that of the full image is 0
    ones, first = _distinct(coalitions[1:].double())
    residuals = residuals[1:][first]
    mean = change = square = torch.zeros((), dtype=torch.float64)
    for process, belief, chance in _weighted_processes(ones[:SEARCHED], residuals[:SEARCHED]):
        found, variance = process.posterior(ones, residuals)
        mean, change = mean + belief * found, change + chance * found
        square = square + chance * (variance + found.square())
    values = prior + mean
    values = values + (2 * odd[0] - values.sum(0)) / len(values)  # to the last digit
    errors = (square - 2 * mean * change + mean.square()).clamp(min=0).sqrt()
    centred = prior - prior.mean(0)
    spread = (centred.square() + 2 * centred * change + square).mean(0)  # of the Shapley values
    ratios = square.mean(0) / spread.clamp(min=torch.finfo(spread.dtype).tiny)
    # Few evaluations tell an error from interactions badly. Attributions that say less of the values, all labels
    # together, than an even share does are worse than that, whatever the model of them makes of it.
    evenly = (ones.mean(-1, keepdim=True) - 0.5) * prior.sum(0)
    left = residuals.square().sum() / (odd[1:][first] - evenly).square().sum().clamp(min=torch.finfo(odd.dtype).tiny)
    return ShapleyPosterior(values, errors, ratios.clamp(min=left) if left > 1 else ratios)


def _distinct(ones: Tensor) -> tuple[Tensor, Tensor]:
    """Those of coalitions (M, N) that are no other one or its complement, in order, and where each was found."""
    kept: dict[bytes, int] = {}
    for index, row in enumerate(ones.bool()):
        row = row if row[0] else ~row
        kept.setdefault(row.numpy().tobytes(), index)
    first = torch.tensor(list(kept.values()))
    return ones[first], first


class _Process:
    """One model of y, over coalitions given as 0 and 1 in float64: a rho, and a key of `MODELS`."""

    def __init__(self, num_players: int, rho: float, error: float, free: bool):
        self.num_players, self.rho, self.error, self.free = num_players, rho, error, free
        nodes, weights = _quadrature(num_players // 2 + 1)
        inside = torch.arange(num_players).unsqueeze(-1)  # how many of the other players are in T
        near, far = nodes + (1 - nodes) * rho, 1 - nodes + nodes * rho
        self.integrals = (1 - rho) * (near**inside * far ** (num_players - 1 - inside)) @ weights  # (N)
        # The covariance of k's Shapley values has two eigenvalues: of their sum, and of all that sums to 0.
        self.of_sum = 2 * self.integrals[-1]
        self.of_rest = (2 * self.integrals.sum() - self.of_sum) / (num_players - 1)
        self.variance = (error + free) * self.of_rest * (1 - 1 / num_players)  # of one player's, before it is asked

    def covariance(self, ones: Tensor) -> Tensor:
        """Of y: (M, N) -> (M, M)."""
        differ = ones @ (1 - ones).T
        differ = differ + differ.T
        odd = (self.rho**differ - self.rho ** (self.num_players - differ)) / 2
        shapley, centred = self._shapley_values_of_k(ones), _centred(ones)
        sums, rest = shapley.sum(-1, keepdim=True), _centred(shapley)
        covariance = odd - sums @ sums.T / (self.num_players * self.of_sum)  # y(full) = 0
        covariance = covariance + self.error * self.of_rest * centred @ centred.T
        return covariance if self.free else covariance - rest @ rest.T / self.of_rest

    def shapley(self, ones: Tensor) -> Tensor:
        """Covariance of y(T) and its Shapley values, which are those of S -> cov(y(S), y(T)): (M, N) -> (M, N)."""
        additive = self.error * self.of_rest * _centred(ones)
        return additive + _centred(self._shapley_values_of_k(ones)) if self.free else additive

    def _shapley_values_of_k(self, ones: Tensor) -> Tensor:
        sizes = ones.sum(-1, keepdim=True).long()
        of_members = self.integrals[(sizes - 1).clamp(min=0)]
        of_others = -self.integrals[sizes.clamp(max=self.num_players - 1)]
        return torch.where(ones > 0, of_members, of_others)

    def fitted(self, ones: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of the covariance (M, M), and each label's scale (K), a variance."""
        covariance = self.covariance(ones)
        covariance.diagonal().add_(1e-8)
        root = torch.linalg.cholesky(covariance)
        return root, torch.linalg.solve_triangular(root, residuals, upper=False).square().mean(0)

    def log_likelihood(self, ones: Tensor, residuals: Tensor) -> float:
        """Marginal, a label's on average, each with the scale that suits it."""
        root, scales = self.fitted(ones, residuals)
        scales = scales.clamp(min=torch.finfo(scales.dtype).tiny)
        return -(scales.log().mean() * len(ones) / 2 + root.diagonal().log().sum()).item()

    def posterior(self, ones: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (N, K) of the Shapley values of what has these values (M, K) for these coalitions."""
        root, scales = self.fitted(ones, residuals)
        influence = self.shapley(ones)  # (M, N)
        explained = torch.linalg.solve_triangular(root, influence, upper=False).square().sum(0)  # (N)
        variance = (self.variance - explained).clamp(min=0)
        return influence.T @ torch.cholesky_solve(residuals, root), variance.unsqueeze(-1) * scales


def _weighted_processes(ones: Tensor, residuals: Tensor) -> list[tuple[_Process, float, float]]:
    """Models that tell something, each with its probability, and with what it is if all were alike before.

    At first attributions are believed; how wrong they may be is stated without that belief.
    """
    processes = [_Process(ones.shape[1], rho, *model) for rho, model in product(RHOS, MODELS)]
    likelihoods = torch.tensor([process.log_likelihood(ones, residuals) for process in processes])
    belief = torch.tensor([MODELS[process.error, process.free] for process in processes])
    weights = torch.stack([likelihoods + belief, likelihoods]).softmax(-1)
    weights = torch.where(weights.amax(0) > 0.01, weights, 0.0)
    believing, neutral = (weights / weights.sum(-1, keepdim=True)).tolist()
    return [kept for kept in zip(processes, believing, neutral, strict=True) if kept[1] or kept[2]]


def _quadrature(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature over [0, 1] (Golub and Welsch, 1969), float64."""
    orders = torch.arange(1, count, dtype=torch.float64)
    beside = orders / (4 * orders**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return (nodes + 1) / 2, vectors[0] ** 2


def _centred(ones: Tensor) -> Tensor:
    return ones - ones.mean(-1, keepdim=True)
