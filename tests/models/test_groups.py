"""Players of the user's own: groups of patches in the game, in explanations and in the picture."""

import pytest
import torch
from conftest import make_model

from hf_shapley import exact_shapley

GROUPS = torch.tensor(
    [[0, 0, 1, 1, 1, 2], [0, 0, 1, 3, 1, 2], [0, 3, 3, 3, 2, 2], [3, 3, 3, 3, 2, 2]]
)  # 4 x 6 patches


def test_a_group_comes_and_goes_as_a_whole(model, pixel_values):
    """A coalition of groups has the value of the coalition of their patches."""
    coalitions = torch.tensor([[True, False, True, False], [False, False, False, True]])
    patches = torch.stack([(GROUPS.flatten() == 0) | (GROUPS.flatten() == 2), GROUPS.flatten() == 3])
    found = model.game(pixel_values, groups=GROUPS)(coalitions.expand(3, -1, -1))
    assert torch.equal(found, model.coalition_values(pixel_values, patches.expand(3, -1, -1)))
    one = model.game(pixel_values[1], [2], groups=GROUPS.flatten())(coalitions)
    torch.testing.assert_close(one, found[1, :, [2]], atol=1e-5, rtol=1e-5)


def test_one_pass_gives_groups_their_patches_sums(model, pixel_values):
    maps = model.explain(pixel_values).flatten(2)
    found = model.explain(pixel_values, groups=GROUPS)
    for group in range(4):
        expected = maps[..., GROUPS.flatten() == group].sum(-1)
        torch.testing.assert_close(found[..., group], expected, atol=1e-5, rtol=1e-5)


def test_evaluations_bring_groups_near_their_exact_values(backbone, pixel_values):
    """All coalitions of four groups, asked again and again, give nearly exact values; sums are exact at once."""
    model = make_model(backbone, head="recommended")
    exact = exact_shapley(model.game(pixel_values[0], [1], groups=GROUPS), num_players=4)[:, 0]
    before, after = (
        model.explain(pixel_values[:1], [1], groups=GROUPS, evaluations=n, generator=torch.Generator().manual_seed(0))[
            0, 0
        ]
        for n in (0, 256)
    )
    assert (after - exact).norm() < 0.2 * (before - exact).norm()
    torch.testing.assert_close(after.sum(), before.sum(), atol=1e-5, rtol=1e-5)


def test_groups_are_drawn_evenly_over_their_pixels(backbone, pixel_values):
    model = make_model(backbone)
    values = model.explain(pixel_values, groups=GROUPS)
    picture = model.explain(pixel_values, groups=GROUPS, upsample=True)
    assert picture.shape == (3, 5, 16, 24)
    pixels = GROUPS.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for group in range(4):
        inside = picture[..., pixels == group]
        torch.testing.assert_close(inside.sum(-1), values[..., group], atol=1e-5, rtol=1e-4)
        assert torch.equal(inside.amax(-1), inside.amin(-1))


@pytest.mark.parametrize(
    "groups, error, message",
    [
        (torch.zeros(4, 6), TypeError, "integers"),
        ([[0, 1]], TypeError, "integers"),
        (torch.zeros(6, 4, dtype=torch.long), ValueError, r"got shape \(6, 4\)"),
        (torch.zeros(4, 6, dtype=torch.long), ValueError, "at least two groups"),
        (2 * GROUPS, ValueError, r"without a gap, got \[0, 2, 4, 6\]"),
        (GROUPS - 1, ValueError, r"got \[-1, 0, 1, 2\]"),
    ],
)
def test_groups_that_say_nothing_are_refused(backbone, groups, error, message, pixel_values):
    model = make_model(backbone)
    with pytest.raises(error, match=message):
        model.explain(pixel_values, groups=groups)
    with pytest.raises(error, match=message):
        model.game(pixel_values, groups=groups)


def test_coalitions_of_patches_are_none_of_groups(backbone, pixel_values):
    game = make_model(backbone).game(pixel_values, groups=GROUPS)
    with pytest.raises(ValueError, match="4 players"):
        game(torch.ones(3, 2, 24, dtype=torch.bool))
