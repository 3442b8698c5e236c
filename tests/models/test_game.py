"""`model.game`, a function of coalitions for estimators and metrics, and `outputs.maps`, attributions on the grid."""

import pytest
import torch
from accelerate.utils import convert_to_fp32
from conftest import make_model

from hf_shapley import efficiency_gap, exact_shapley, sample_coalitions

PLAYERS = 24


def draw(batch: int = 3, structures: int = 2) -> torch.Tensor:
    return sample_coalitions(batch, structures, num_players=PLAYERS, generator=torch.Generator().manual_seed(2))


def test_a_game_gives_the_values_of_coalitions(model, pixel_values):
    coalitions = draw(structures=5)
    expected = model.coalition_values(pixel_values, coalitions)
    assert torch.equal(model.game(pixel_values)(coalitions), expected)
    one = model.game(pixel_values[1], batch_size=2)(coalitions[1])
    torch.testing.assert_close(one, expected[1], atol=1e-5, rtol=1e-5)


def test_a_game_of_labels_gives_their_values_alone(backbone, pixel_values):
    model, coalitions = make_model(backbone), draw(structures=5)
    expected = model.coalition_values(pixel_values, coalitions)
    assert torch.equal(model.game(pixel_values, ["LABEL_3", 1])(coalitions), expected[..., [3, 1]])
    of_each = torch.tensor([[0], [4], [2]])
    found = model.game(pixel_values, of_each)(coalitions)
    assert torch.equal(found, torch.stack([expected[range(3), row, of_each[:, 0]] for row in range(5)], 1)[..., None])
    one = model.game(pixel_values[1], of_each[1])(coalitions[1])
    torch.testing.assert_close(one, expected[1, :, [4]], atol=1e-5, rtol=1e-5)


def test_a_game_is_ready_for_estimators_and_metrics(backbone):
    model = make_model(backbone, image_size=(8, 8))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([exact_shapley(model.game(image), num_players=4) for image in pixels])
    assert efficiency_gap(model.game(pixels), exact).max() < 1e-5


@pytest.mark.parametrize(
    "pixels, labels, coalitions, message",
    [
        (torch.zeros(16, 24), None, None, r"\(batch, channels, height, width\)"),
        (torch.zeros(3, 16, 24), [5], None, "Unknown labels"),
        (torch.zeros(3, 16, 24), None, torch.ones(1, 2, PLAYERS).bool(), "give `game` many images"),
        (torch.zeros(3, 16, 24), None, torch.ones(2, PLAYERS + 1).bool(), "24 players"),
        (torch.zeros(1, 3, 16, 24), None, torch.ones(2, PLAYERS).bool(), r"\(batch = 1, coalitions, players\)"),
    ],
)
def test_a_game_refuses_what_does_not_fit(backbone, pixels, labels, coalitions, message):
    with pytest.raises(ValueError, match=message):
        make_model(backbone).game(pixels, labels)(coalitions)


def test_maps_are_the_attributions_on_the_grid(model, pixel_values):
    output = model(pixel_values)
    assert output.maps.shape == (3, 5, 4, 6)
    assert torch.equal(output.maps[1, 2, 3, 4], output.attributions[1, 3 * 6 + 4, 2])
    assert output.maps.data_ptr() == output.attributions.data_ptr()  # a view, which costs no memory
    few = model(pixel_values, attributed=2)
    assert few.maps.shape == (3, 2, 4, 6)
    assert torch.equal(few.maps[1, 1, 3, 4], few.attributions[1, 3 * 6 + 4, 1])
    assert model(pixel_values, draw().long(), sums_only=True).maps is None


def test_maps_survive_what_builds_outputs_anew(backbone, pixel_values):
    output = make_model(backbone)(pixel_values)
    assert torch.equal(convert_to_fp32(output).maps, output.maps)
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, spec).maps, output.maps)
