from functools import partial
from itertools import product

import pytest
import torch

from hf_shapley import coalition_loss, paired_shapley_loss, shapley_loss
from hf_shapley.models.coalitions import enumerate_coalitions, sample_coalitions, shapley_kernel_size_probabilities
from hf_shapley.training.losses import coalition_regression_loss

PLAYERS, LABELS = 6, 3


def random_game(seed: int = 0):
    """Values of all coalitions of 6 players (64, 3), v(empty) = 0, and their Shapley values from the definition."""
    coalitions = enumerate_coalitions(PLAYERS)
    values = torch.randn(len(coalitions), LABELS, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    values[~coalitions.any(-1)] = 0
    codes = (coalitions * 2 ** torch.arange(PLAYERS)).sum(-1)
    by_code = torch.empty_like(values).index_copy_(0, codes, values)
    factorial = torch.tensor([1, 1, 2, 6, 24, 120, 720], dtype=torch.double)
    phi = torch.zeros(PLAYERS, LABELS, dtype=torch.double)
    for player in range(PLAYERS):
        for code in range(2**PLAYERS):
            if not code >> player & 1:
                size = bin(code).count("1")
                weight = factorial[size] * factorial[PLAYERS - size - 1] / factorial[PLAYERS]
                phi[player] += weight * (by_code[code | 1 << player] - by_code[code])
    return coalitions, values, phi


def kernel_weights(coalitions):
    """Probability of each coalition under the kernel, 0 for the empty and the full one."""
    sizes = coalitions.sum(-1)
    counts = torch.bincount(sizes, minlength=PLAYERS + 1)
    by_size = torch.cat([torch.zeros(1), shapley_kernel_size_probabilities(PLAYERS), torch.zeros(1)])
    return (by_size / counts)[sizes]


def test_weighted_loss_gradients_vanish_at_shapley_values():
    """The gradient of the kernel-weighted loss vanishes at the Shapley values, but for the efficiency direction."""
    coalitions, values, phi = random_game()
    phi.requires_grad_()
    residuals = values - coalitions.double() @ phi
    loss = (kernel_weights(coalitions).unsqueeze(-1) * residuals.square()).sum()
    (gradient,) = torch.autograd.grad(loss, phi)
    along_efficiency = gradient.mean(dim=0, keepdim=True)
    torch.testing.assert_close(gradient - along_efficiency, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    assert along_efficiency.abs().max() > 1e-3


def test_equal_weights_make_the_paired_loss_plain():
    """The paired loss with equal weights is the plain loss of all coalitions and complements."""
    generator = torch.Generator().manual_seed(0)
    coalitions = sample_coalitions(4, 2, num_players=PLAYERS, generator=generator)
    phi = torch.randn(4, PLAYERS, LABELS, generator=generator)
    gains = torch.randn(4, 2, 2, LABELS, generator=generator)
    both = torch.stack([coalitions, ~coalitions], dim=2).flatten(1, 2)
    expected = 0.0
    for image in range(4):
        for coalition, gain in zip(both[image], gains[image].flatten(0, 1), strict=True):
            expected += (gain - phi[image][coalition].sum(0)).square().sum()
    expected = PLAYERS * expected / (4 * 4 * LABELS)
    torch.testing.assert_close(paired_shapley_loss(phi, coalitions, gains), expected)
    torch.testing.assert_close(shapley_loss(phi, both, gains.flatten(1, 2)), expected)


def test_the_even_part_sees_only_summed_attributions():
    """The even part of the loss does not depend on how attributions are split among the players."""
    generator = torch.Generator().manual_seed(0)
    coalitions = sample_coalitions(4, 1, num_players=PLAYERS, generator=generator)
    phi = torch.randn(4, PLAYERS, LABELS, generator=generator, requires_grad=True)
    gains = torch.randn(4, 1, 2, LABELS, generator=generator)
    even = paired_shapley_loss(phi, coalitions, gains, odd_weight=0)
    (gradient,) = torch.autograd.grad(even, phi)
    assert even > 0
    torch.testing.assert_close(gradient, gradient[:, :1].expand_as(gradient))
    odd = paired_shapley_loss(phi, coalitions, gains, even_weight=0)
    shifted = paired_shapley_loss(phi, coalitions, gains + 1.5, even_weight=0)
    torch.testing.assert_close(odd, shifted)
    assert odd > 0


def test_an_additive_games_votes_have_no_loss():
    """The paired loss is zero for an additive game and its votes."""
    coalitions = sample_coalitions(2, 3, num_players=PLAYERS, generator=torch.Generator().manual_seed(0))
    phi = torch.randn(2, PLAYERS, LABELS)
    members = torch.stack([coalitions, ~coalitions], dim=2).float()
    gains = torch.einsum("brgn,bnk->brgk", members, phi)
    assert paired_shapley_loss(phi, coalitions, gains) < 1e-10


def test_coalition_loss_is_least_at_the_prediction():
    """The coalition loss is least where values equal the prediction, and leaves the prediction alone."""
    logits = torch.randn(4, LABELS, requires_grad=True)
    values = logits.detach()[:, None, None].expand(4, 2, 2, LABELS).clone().requires_grad_()
    loss = coalition_loss(values, logits)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy().mean()
    torch.testing.assert_close(loss, entropy)
    loss.backward()
    assert logits.grad is None
    torch.testing.assert_close(values.grad, torch.zeros_like(values), atol=1e-7, rtol=0)
    assert coalition_loss(values.detach() + torch.tensor([2.0, 0, 0]), logits) > loss


def test_multi_label_coalition_loss_is_binary_cross_entropy():
    logits, values = torch.tensor([[0.0, 4.0]]), torch.tensor([[[1.0, -2.0]]])
    p, q = logits[0].sigmoid(), values[0, 0].sigmoid()
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(coalition_loss(values, logits, multi_label=True), expected)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (coalition_loss, torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, 0.5]])),
        (partial(coalition_loss, multi_label=True), torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, 0.5]])),
        (coalition_regression_loss, torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, 0.5]])),
    ],
)
def test_masked_predictions_count_by_their_coalitions_weight(loss, targets):
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(2, 3, 2, 3, generator=generator), torch.rand(2, 3, 2, generator=generator)
    expected = sum(
        weights[i, r, g] * loss(values[i : i + 1, r : r + 1, g : g + 1], targets[i : i + 1]) / weights.numel()
        for i, r, g in product(range(2), range(3), range(2))
    )
    torch.testing.assert_close(loss(values, targets, weights=weights), expected)
    torch.testing.assert_close(loss(values, targets, weights=torch.ones(2, 3, 2)), loss(values, targets))
