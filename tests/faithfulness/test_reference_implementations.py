"""Our numbers against captum, shapiq and Quantus, wherever these compute the same quantity.

Left out because they compute another one: Quantus' Sensitivity-N (0.6.0) removes players in the order of their
attribution instead of at random, and scores the first batch only; its Completeness compares floats with `==`.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_shapley.faithfulness.correlations import faithfulness_correlation, infidelity, sample_uniform_sizes
from hf_shapley.faithfulness.curves import insertion_deletion
from hf_shapley.faithfulness.estimators import exact_shapley, kernel_shapley
from hf_shapley.models.coalitions import enumerate_coalitions

IMAGES, HEIGHT, WIDTH, LABELS = 3, 2, 3, 4
PLAYERS = HEIGHT * WIDTH


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net():
    """A small network on pixels (B, 1, 2, 3), each pixel a player, absent = 0."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(PLAYERS, 16), nn.Tanh(), nn.Linear(16, LABELS)).double()
    with torch.no_grad():
        for index, parameter in enumerate(layers.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(index), dtype=torch.double))
    return layers.requires_grad_(False).eval()


@pytest.fixture
def images():
    return torch.randn(IMAGES, 1, HEIGHT, WIDTH, generator=seeded(10), dtype=torch.double)


@pytest.fixture
def attributions():
    return torch.randn(IMAGES, PLAYERS, LABELS, generator=seeded(11), dtype=torch.double)


@pytest.fixture
def batched_game(net, images):
    def game(coalitions):
        masked = images.flatten(1).unsqueeze(1) * coalitions  # (images, coalitions, players)
        return net(masked.flatten(0, 1)).unflatten(0, masked.shape[:2])

    return game


def game_of(batched_game, image):
    return lambda coalitions: batched_game(coalitions.expand(IMAGES, -1, -1))[image]


def test_exact_values_equal_captums_shapley_values(net, images, batched_game):
    captum_attr = pytest.importorskip("captum.attr")
    explainer = captum_attr.ShapleyValues(net)
    for label in range(LABELS):
        reference = explainer.attribute(images, baselines=0, target=label, perturbations_per_eval=16).flatten(1)
        for image in range(IMAGES):
            ours = exact_shapley(game_of(batched_game, image), num_players=PLAYERS)[:, label]
            # captum sums the marginal contributions of all 720 orders in float32.
            torch.testing.assert_close(ours, reference[image].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_players", [3, 7])
def test_exact_values_equal_shapiqs_exact_computer(num_players):
    shapiq = pytest.importorskip("shapiq")
    table = torch.randn(2**num_players, 1, generator=seeded(0), dtype=torch.double)
    bits = 2 ** torch.arange(num_players)

    def game(coalitions):
        return table[(coalitions * bits).sum(-1)]

    computer = shapiq.ExactComputer(
        lambda coalitions: game(torch.as_tensor(np.atleast_2d(coalitions)).bool()).squeeze(-1).numpy(),
        n_players=num_players,
    )
    values = computer("SV", order=1)
    # By player and not by position: the first entry of `values` may be the empty coalition.
    reference = torch.tensor([values[(player,)] for player in range(num_players)], dtype=torch.double)
    torch.testing.assert_close(exact_shapley(game, num_players=num_players)[:, 0], reference, rtol=0, atol=1e-12)


def test_our_sampling_agrees_with_shapiqs_kernel_shap():
    """Sampled values agree with shapiq's KernelSHAP at full budget, within three standard errors."""
    shapiq = pytest.importorskip("shapiq")
    table = torch.randn(2**8, 1, generator=seeded(1), dtype=torch.double)
    bits = 2 ** torch.arange(8)

    def game(coalitions):
        return table[(coalitions * bits).sum(-1)]

    approximator = shapiq.KernelSHAP(n=8, random_state=0)
    values = approximator.approximate(2**8, lambda coalitions: game(torch.as_tensor(coalitions)).squeeze(-1).numpy())
    reference = torch.tensor([values[(player,)] for player in range(8)], dtype=torch.double)
    estimate = kernel_shapley(game, num_players=8, budget=255, generator=seeded(0))
    scores = (estimate.values[:, 0] - reference) / estimate.standard_errors[:, 0]
    assert scores.abs().max() < 3


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_equals_captums_on_the_same_perturbations(net, images, attributions, batched_game, normalize):
    captum_metrics = pytest.importorskip("captum.metrics")
    labels = torch.tensor([2, 0, 1])
    coalitions = sample_uniform_sizes(IMAGES, 20, num_players=PLAYERS, generator=seeded(3))

    def perturb(inputs):  # captum repeats each image once per perturbation
        present = coalitions.flatten(0, 1).view_as(inputs)
        return (~present).double(), inputs * present

    chosen = attributions[torch.arange(IMAGES), :, labels].view_as(images)
    reference = captum_metrics.infidelity(
        net, perturb, images, chosen, target=labels, n_perturb_samples=20, normalize=normalize
    )
    ours = infidelity(batched_game, attributions, coalitions=coalitions, labels=labels, normalize=normalize)
    torch.testing.assert_close(ours, reference.flatten(), rtol=0, atol=1e-10)


class Removal:
    """A Quantus perturbation that sets the chosen pixels to 0 and remembers what is left.

    Its own "black" is the smallest value of the batch, not 0.
    """

    def __init__(self):
        self.present = []

    def __call__(self, arr, indices, **_):
        arr = arr.copy()
        np.put_along_axis(arr, indices, 0.0, axis=1)
        present = np.ones(arr.shape, dtype=bool)
        np.put_along_axis(present, indices, False, axis=1)
        self.present.append(torch.as_tensor(present))
        return arr


def quantus_scores(metric, net, images, attributions, labels, softmax):
    chosen = attributions[torch.arange(IMAGES), :, labels].view_as(images)
    return metric(
        model=copy.deepcopy(net).float(),
        x_batch=images.float().numpy(),
        y_batch=labels.numpy(),
        a_batch=chosen.float().numpy(),
        device="cpu",
        channel_first=True,
        softmax=softmax,
    )


@pytest.mark.parametrize("subset_size", [1, 3])
def test_faithfulness_correlation_equals_quantus_on_the_same_subsets(
    net, images, attributions, batched_game, subset_size
):
    quantus = pytest.importorskip("quantus")
    pytest.importorskip("scipy", minversion="1.14")  # with which Quantus correlates a batch
    removal, labels = Removal(), torch.tensor([2, 0, 1])
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=30,
        subset_size=subset_size,
        perturb_func=removal,
        normalise=False,
        return_aggregate=False,
        disable_warnings=True,
    )
    np.random.seed(0)
    reference = quantus_scores(metric, net, images, attributions, labels, softmax=False)
    coalitions = torch.stack(removal.present, dim=1)  # (images, runs, players)
    assert (coalitions.sum(-1) == PLAYERS - subset_size).all()
    ours = faithfulness_correlation(batched_game, attributions, coalitions=coalitions, labels=labels)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)  # Quantus runs in float32


def test_the_deletion_curve_equals_quantus_pixel_flipping(net, images, attributions, batched_game):
    quantus = pytest.importorskip("quantus")
    labels = torch.tensor([2, 0, 1])
    metric = quantus.PixelFlipping(
        features_in_step=1,
        perturb_func=Removal(),
        normalise=False,
        return_aggregate=False,
        disable_warnings=True,
    )
    reference = quantus_scores(metric, net, images, attributions, labels, softmax=True)
    ours = insertion_deletion(batched_game, attributions, labels=labels).deletion
    # Quantus leaves out the unperturbed image, the first point of ours.
    np.testing.assert_allclose(ours[:, 1:], reference, rtol=0, atol=1e-4)


def test_kernel_weighted_least_squares_gives_exact_values(batched_game):
    """The regression of Lundberg and Lee (arXiv:1705.07874, theorem 2) over all coalitions, solved by NumPy."""
    game = game_of(batched_game, 0)
    coalitions = enumerate_coalitions(PLAYERS)[2:]
    empty, full = game(torch.stack([torch.zeros(PLAYERS), torch.ones(PLAYERS)]).bool())
    sizes = coalitions.sum(-1).double()
    binomials = torch.tensor([math.comb(PLAYERS, size) for size in coalitions.sum(-1).tolist()])
    root = ((PLAYERS - 1) / (binomials * sizes * (PLAYERS - sizes))).sqrt().unsqueeze(1)
    members = coalitions.double()
    # The last player takes what the others leave, which builds efficiency into the regression.
    rest, _, _, _ = np.linalg.lstsq(
        (root * (members[:, :-1] - members[:, -1:])).numpy(),
        (root * (game(coalitions) - empty - members[:, -1:] * (full - empty))).numpy(),
        rcond=None,
    )
    ours = exact_shapley(game, num_players=PLAYERS)
    np.testing.assert_allclose(ours[:-1], rest, rtol=0, atol=1e-10)
