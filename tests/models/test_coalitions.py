from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_shapley import (
    coalitions_to_ids,
    enumerate_coalitions,
    ids_to_coalitions,
    importance_weights,
    ranked_coalitions,
    sample_coalitions,
    shapley_kernel_size_probabilities,
)
from hf_shapley.models.coalitions import sum_over_coalitions


@pytest.mark.parametrize("num_players", [2, 3, 16, 196])
def test_sampled_sizes_follow_the_shapley_kernel(num_players):
    draws = sample_coalitions(200_000, num_players=num_players, generator=torch.Generator().manual_seed(0))
    observed = torch.bincount(draws.sum(-1), minlength=num_players + 1) / len(draws)
    sizes = torch.arange(1, num_players)
    law = 1 / (sizes * (num_players - sizes)).double()
    law /= law.sum()
    assert observed[0] == 0 and observed[num_players] == 0
    assert (observed[1:num_players] - law).abs().max() < 5e-3
    torch.testing.assert_close(shapley_kernel_size_probabilities(num_players), law)


@pytest.mark.parametrize("num_players", [2, 3, 16, 196])
def test_spread_sizes_with_weights_follow_the_kernel(num_players):
    """Spread sizes follow the geometric mean of the kernel and a uniform law, and weights make up for it."""
    draws = sample_coalitions(
        200_000, num_players=num_players, sizes="spread", generator=torch.Generator().manual_seed(0)
    )
    observed = torch.bincount(draws.sum(-1), minlength=num_players + 1)[1:num_players] / len(draws)
    sizes = torch.arange(1, num_players).double()
    law = (sizes * (num_players - sizes)) ** -0.5
    law /= law.sum()
    assert (observed - law).abs().max() < 5e-3
    kernel = shapley_kernel_size_probabilities(num_players)
    one_each = torch.arange(num_players) < sizes.unsqueeze(-1)  # a coalition of each size
    torch.testing.assert_close(law * importance_weights(one_each, "spread"), kernel)
    assert torch.equal(importance_weights(~one_each, "spread"), importance_weights(one_each, "spread"))
    assert importance_weights(one_each).unique().tolist() == [1.0]


@pytest.mark.parametrize("present", [0, 5])
def test_coalitions_that_are_never_drawn_have_no_weight(present):
    with pytest.raises(ValueError, match="1 to 4 players present"):
        importance_weights(torch.arange(5).expand(2, 5) < present, "spread")


def test_members_are_uniform_inside_a_size():
    draws = sample_coalitions(300_000, num_players=5, generator=torch.Generator().manual_seed(0))
    codes = (draws * 2 ** torch.arange(5)).sum(-1)
    for size in range(1, 5):
        counts = torch.bincount(codes[draws.sum(-1) == size], minlength=32)
        shares = counts[counts > 0] / counts.sum()
        assert len(shares) == comb(5, size)
        assert (shares - 1 / comb(5, size)).abs().max() < 5e-3


def test_the_generator_alone_decides_the_draw():
    def draw(seed):
        return sample_coalitions(4, 3, num_players=9, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert torch.equal(first, draw(7))
    assert not torch.equal(first, draw(8))
    assert first.shape == (4, 3, 9) and first.dtype == torch.bool


@given(num_players=st.integers(2, 10))
@settings(deadline=None, max_examples=9)
def test_every_coalition_is_enumerated_beside_its_complement(num_players):
    """Enumeration lists each coalition once, its complement next to it, and begins with the empty one."""
    coalitions = enumerate_coalitions(num_players)
    codes = (coalitions * 2 ** torch.arange(num_players)).sum(-1)
    assert torch.equal(codes.sort().values, torch.arange(2**num_players))
    assert torch.equal(coalitions[0::2], ~coalitions[1::2])
    assert not coalitions[0].any()


def test_ranking_takes_players_in_order_of_score():
    ranked = ranked_coalitions(torch.tensor([0.1, 3.0, -2.0, 3.0]))
    expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    assert ranked.long().tolist() == expected


@given(st.integers(2, 12), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=25)
def test_ids_and_coalitions_translate_into_each_other(num_players, seed):
    coalitions = sample_coalitions(2, 3, num_players=num_players, generator=torch.Generator().manual_seed(seed))
    back = ids_to_coalitions(coalitions_to_ids(coalitions), 2)
    assert torch.equal(back[..., 0, :], coalitions)
    assert torch.equal(back[..., 1, :], ~coalitions)


def test_sums_keep_float32_under_autocast():
    coalitions = torch.tensor([[True, False, True]])
    votes = torch.tensor([[1.0001], [5.0], [2.0003]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = sum_over_coalitions(coalitions, votes)
    torch.testing.assert_close(total, torch.tensor([[3.0004]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_players", [-1, 0, 1])
def test_a_game_needs_at_least_two_players(num_players):
    """A game of fewer than two players is refused where coalitions are drawn or enumerated."""
    with pytest.raises(ValueError, match="at least 2 players"):
        sample_coalitions(1, num_players=num_players)
    with pytest.raises(ValueError, match="at least 2 players"):
        enumerate_coalitions(num_players)


def test_enumeration_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="use a sampled estimator"):
        enumerate_coalitions(25)


def test_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match="bool tensor"):
        coalitions_to_ids(torch.zeros(4))
    with pytest.raises(ValueError, match="long tensor"):
        ids_to_coalitions(torch.zeros(4), 2)
