"""Metrics against slow second implementations written from their definitions, and against games with known answers."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_shapley.faithfulness.agreement import attribution_correlation, error_ratio
from hf_shapley.faithfulness.axioms import efficiency_gap, leak
from hf_shapley.faithfulness.correlations import (
    faithfulness_correlation,
    infidelity,
    interaction_share,
    sample_uniform_sizes,
    sensitivity_n,
)
from hf_shapley.faithfulness.curves import (
    aopc_bounds,
    comprehensiveness_sufficiency,
    insertion_deletion,
    normalised_aopc,
)
from hf_shapley.faithfulness.evaluate_metrics import AttributionAgreement, FaithfulnessCorrelation, InsertionDeletion
from hf_shapley.faithfulness.grid_pointing import grid_pointing_game, make_mosaics
from hf_shapley.models.coalitions import enumerate_coalitions

IMAGES, PLAYERS, LABELS = 3, 6, 4
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.double)


def random_game(seed=0, num_players=PLAYERS, images=IMAGES):
    """A batched game without structure: an independent draw per image, coalition and label."""
    table = normal(images, 2**num_players, LABELS, seed=seed)
    bits = 2 ** torch.arange(num_players)

    def game(coalitions):
        codes = (coalitions * bits).sum(-1)
        return table.gather(1, codes.unsqueeze(-1).expand(-1, -1, LABELS))

    return game


def additive_game(weights, base=0.5):
    return lambda coalitions: base + coalitions.double() @ weights


def value(game, image, members, label, link):
    """v of one coalition for one label, by the definition."""
    coalition = torch.zeros(IMAGES, 1, PLAYERS, dtype=torch.bool)
    coalition[:, :, sorted(members)] = True
    values = game(coalition)[image, 0]
    return {"probability": values.softmax(0), "sigmoid": 1 / (1 + (-values).exp()), "logit": values}[link][
        label
    ].item()


def ranking(attributions, image, label):
    return attributions[image, :, label].argsort(descending=True).tolist()


@pytest.mark.parametrize("link", ["probability", "sigmoid", "logit"])
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3, 1])])
def test_insertion_and_deletion_follow_their_definition(link, labels):
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    curves = insertion_deletion(game, attributions, labels=labels, link=link, batch_size=12)
    full = game(torch.ones(IMAGES, 1, PLAYERS, dtype=torch.bool))[:, 0]
    assert torch.equal(curves.labels, full.argmax(-1) if labels is None else labels)
    for image, label in enumerate(curves.labels.tolist()):
        order = ranking(attributions, image, label)
        insertion = [value(game, image, order[:k], label, link) for k in range(PLAYERS + 1)]
        deletion = [value(game, image, order[k:], label, link) for k in range(PLAYERS + 1)]
        close(curves.insertion[image].tolist(), insertion)
        close(curves.deletion[image].tolist(), deletion)
        close(curves.insertion_auc[image].item(), sum(insertion) / (PLAYERS + 1))
        close(curves.deletion_auc[image].item(), sum(deletion) / (PLAYERS + 1))
        close(curves.aopc[image].item(), sum(deletion[0] - v for v in deletion) / (PLAYERS + 1))


@pytest.mark.parametrize("link", ["probability", "sigmoid", "logit"])
def test_comprehensiveness_and_sufficiency_follow_their_definition(link):
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    labels = torch.tensor([2, 0, 1])
    result = comprehensiveness_sufficiency(game, attributions, shares=(0.1, 0.5, 1.0), labels=labels, link=link)
    for image, label in enumerate(labels.tolist()):
        order = ranking(attributions, image, label)
        full = value(game, image, order, label, link)
        lost_without = [full - value(game, image, order[k:], label, link) for k in (1, 3, 6)]
        lost_with_only = [full - value(game, image, order[:k], label, link) for k in (1, 3, 6)]
        close(result.comprehensiveness_curve[image].tolist(), lost_without)
        close(result.sufficiency_curve[image].tolist(), lost_with_only)
        close(result.comprehensiveness[image].item(), sum(lost_without) / 3)
        close(result.sufficiency[image].item(), sum(lost_with_only) / 3)


def test_float_error_rounds_no_share_up():
    """A share of the players is not rounded up by float error: 7 % of 100 players are 7."""
    weights = normal(1, 100, 2)
    result = comprehensiveness_sufficiency(
        additive_game(weights), weights, shares=(0.07,), labels=torch.tensor([0]), link="logit"
    )
    close(result.comprehensiveness[0], weights[0, :, 0].sort(descending=True).values[:7].sum())


def test_one_labels_attributions_need_no_label_dimension():
    """Attributions of one label may come without the label dimension."""
    game, attributions, labels = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1), torch.tensor([1, 0, 3])
    chosen = attributions[torch.arange(IMAGES), :, labels]
    close(
        insertion_deletion(game, chosen, labels=labels).deletion,
        insertion_deletion(game, attributions, labels=labels).deletion,
    )
    close(
        faithfulness_correlation(game, chosen, labels=labels, generator=seeded(0)),
        faithfulness_correlation(game, attributions, labels=labels, generator=seeded(0)),
    )


def test_complements_arrive_in_pairs_and_only_once():
    """Complements arrive side by side, nothing is evaluated twice, and batches keep their limit."""
    game, calls = random_game(), []

    def recorder(coalitions):
        calls.append(coalitions)
        return game(coalitions)

    insertion_deletion(recorder, normal(IMAGES, PLAYERS, LABELS, seed=1), batch_size=4 * IMAGES)
    assert sum(call.shape[1] for call in calls) == 2 * PLAYERS
    faithfulness_correlation(recorder, normal(IMAGES, PLAYERS, LABELS), num_samples=50, generator=seeded(0))
    interaction_share(recorder, normal(IMAGES, PLAYERS, LABELS), num_samples=50, generator=seeded(0))
    aopc_bounds(recorder, torch.zeros(IMAGES, dtype=torch.long), num_players=PLAYERS)
    for call in calls:
        assert torch.equal(call[:, 0::2], ~call[:, 1::2])
    assert max(call.shape[1] for call in calls[:4]) <= 4


@pytest.mark.parametrize("link", ["probability", "sigmoid", "logit"])
def test_exact_aopc_bounds_are_extremes_over_orders(link):
    """Exact AOPC bounds are the extremes over all orders of the players."""
    game, labels = random_game(), torch.tensor([2, 0, 1])
    lower, upper = aopc_bounds(game, labels, num_players=PLAYERS, link=link)
    for image, label in enumerate(labels.tolist()):
        values = {
            members: value(game, image, members, label, link)
            for size in range(PLAYERS + 1)
            for members in itertools.combinations(range(PLAYERS), size)
        }
        areas = [
            values[tuple(range(PLAYERS))] - sum(values[tuple(sorted(order[k:]))] for k in range(PLAYERS + 1)) / 7
            for order in itertools.permutations(range(PLAYERS))
        ]
        close(lower[image].item(), min(areas))
        close(upper[image].item(), max(areas))


def test_a_wide_beam_finds_the_exact_bounds():
    """A beam as wide as there are coalitions of the middle size finds the exact bounds."""
    game, labels = random_game(seed=5), torch.tensor([2, 0, 1])
    exact = aopc_bounds(game, labels, num_players=PLAYERS)
    close(aopc_bounds(game, labels, num_players=PLAYERS, beam_size=math.comb(PLAYERS, 3)), exact)


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_a_narrow_beams_bounds_lie_inside_exact_ones(beam_size):
    """A narrow beam gives bounds inside the exact ones and stays within its cost."""
    game, labels, calls = random_game(seed=5), torch.tensor([2, 0, 1]), []

    def recorder(coalitions):
        calls.append(coalitions.shape[1])
        return game(coalitions)

    lower, upper = aopc_bounds(game, labels, num_players=PLAYERS)
    low, high = aopc_bounds(recorder, labels, num_players=PLAYERS, beam_size=beam_size)
    assert (low >= lower - 1e-12).all() and (high <= upper + 1e-12).all() and (low < high).all()
    assert sum(calls[1:]) <= beam_size * PLAYERS * (PLAYERS + 1)


def test_normalised_aopc_of_additive_weights_is_one():
    """The normalised AOPC of an additive game is one for its weights and zero for their negative."""
    weights = normal(IMAGES, PLAYERS, LABELS)
    game, labels = additive_game(weights), torch.tensor([0, 1, 2])
    bounds = aopc_bounds(game, labels, num_players=PLAYERS, link="logit")
    for attributions, expected in ((weights, 1.0), (-weights, 0.0)):
        aopc = insertion_deletion(game, attributions, labels=labels, link="logit").aopc
        close(normalised_aopc(aopc, *bounds), torch.full((IMAGES,), expected, dtype=torch.double))


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_faithfulness_correlation_equals_scipy_on_the_same_coalitions(method):
    game = random_game()
    attributions = normal(IMAGES, PLAYERS, LABELS, seed=1).round()  # rounding makes ties for the ranks
    coalitions = sample_uniform_sizes(IMAGES, 40, num_players=PLAYERS, generator=seeded(2))
    labels = torch.tensor([1, 3, 0])
    result = faithfulness_correlation(game, attributions, coalitions=coalitions, method=method, labels=labels)
    reference = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method]
    for image, label in enumerate(labels.tolist()):
        sums = [attributions[image, coalition, label].sum().item() for coalition in coalitions[image]]
        values = game(coalitions)[image, :, label].tolist()
        close(result[image].item(), reference(sums, values).statistic)


def test_sizes_and_members_are_uniform_in_pairs():
    """Sizes are uniform, members are uniform inside a size, and complements are paired."""
    coalitions = sample_uniform_sizes(20, 2000, num_players=4, generator=seeded(0))
    sizes = coalitions.sum(-1)
    frequencies = torch.bincount(sizes.flatten(), minlength=5) / sizes.numel()
    assert (frequencies - 1 / 5).abs().max() < 0.01
    assert (coalitions[sizes == 1].double().mean(0) - 1 / 4).abs().max() < 0.02
    assert torch.equal(coalitions[:, 0::2], ~coalitions[:, 1::2])


def test_sensitivity_n_follows_its_definition_at_every_size():
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    calls = []

    def recorder(coalitions):
        calls.append(coalitions)
        return game(coalitions)

    labels, sizes = torch.tensor([1, 3, 0]), [1, 4]
    result = sensitivity_n(recorder, attributions, sizes=sizes, num_samples=12, labels=labels, generator=seeded(0))
    removed = ~calls[-1]
    for column, size in enumerate(sizes):
        subsets = removed[:, 12 * column : 12 * (column + 1)]
        assert (subsets.sum(-1) == size).all()
        for image, label in enumerate(labels.tolist()):
            full = value(game, image, range(PLAYERS), label, "logit")
            sums = [attributions[image, subset, label].sum().item() for subset in subsets[image]]
            drops = [full - v for v in game(~subsets)[image, :, label].tolist()]
            close(result[image, column].item(), stats.pearsonr(sums, drops).statistic)


def test_weights_explain_additive_games_perfectly():
    """An additive game is perfectly explained by its weights, as each of these metrics says."""
    weights = normal(IMAGES, PLAYERS, LABELS)
    game = additive_game(weights)
    ones, zeros = torch.ones(IMAGES, dtype=torch.double), torch.zeros(IMAGES, dtype=torch.double)
    close(faithfulness_correlation(game, weights, generator=seeded(0)), ones)
    close(faithfulness_correlation(game, -weights, generator=seeded(0)), -ones)
    close(faithfulness_correlation(game, 2 * weights, method="spearman", generator=seeded(0)), ones)
    close(sensitivity_n(game, weights, sizes=[2], generator=seeded(0)), ones.unsqueeze(1))
    close(infidelity(game, weights, generator=seeded(0)), zeros)
    close(infidelity(game, 7 * weights, normalize=True, generator=seeded(0)), zeros)
    close(interaction_share(game, weights, generator=seeded(0)), zeros)
    close(efficiency_gap(game, weights), zeros)


def test_constant_attributions_have_no_correlation():
    game, attributions = random_game(), torch.zeros(IMAGES, PLAYERS, LABELS)
    assert faithfulness_correlation(game, attributions, generator=seeded(0)).isnan().all()
    assert sensitivity_n(game, attributions, sizes=[2], generator=seeded(0)).isnan().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_follows_its_definition(normalize):
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    coalitions, labels = enumerate_coalitions(PLAYERS), torch.tensor([1, 3, 0])
    result = infidelity(game, attributions, coalitions=coalitions, labels=labels, normalize=normalize)
    for image, label in enumerate(labels.tolist()):
        full = value(game, image, range(PLAYERS), label, "logit")
        drops = full - game(coalitions.expand(IMAGES, -1, -1))[image, :, label]
        sums = (~coalitions).double() @ attributions[image, :, label]
        scale = (sums * drops).mean() / (sums * sums).mean() if normalize else 1.0
        close(result[image], ((scale * sums - drops) ** 2).mean())


def test_zero_attributions_have_zero_infidelity_scale():
    """The scale of infidelity is zero for attributions of zero: normalising changes nothing."""
    game, zeros = random_game(), torch.zeros(IMAGES, PLAYERS, LABELS)
    options = {"coalitions": enumerate_coalitions(PLAYERS)}
    close(infidelity(game, zeros, normalize=True, **options), infidelity(game, zeros, **options))


def test_the_efficiency_gap_is_the_largest_over_labels():
    weights = normal(IMAGES, PLAYERS, LABELS)
    wrong = weights.clone()
    wrong[1, 0, 2] -= 0.25
    wrong[1, 3, 0] += 0.125
    close(efficiency_gap(additive_game(weights), wrong), torch.tensor([0, 0.25, 0], dtype=torch.double))


def test_a_leak_is_found_only_where_it_is():
    """A leak is found where it is, and is exactly zero elsewhere."""
    pixels = normal(IMAGES, PLAYERS, LABELS)
    coalitions = enumerate_coalitions(PLAYERS)[6:7].expand(IMAGES, -1, -1)
    changed = torch.where(coalitions[:, 0].unsqueeze(-1), pixels, 9.0)

    def leaky(image_pixels):
        clean = additive_game(image_pixels)
        weight = torch.tensor([0.0, 0.0, 0.01], dtype=torch.double).view(-1, 1, 1)
        return lambda s: clean(s) + weight * (~s).double() @ image_pixels

    assert not leak(additive_game(pixels), additive_game(changed), coalitions).any()
    found = leak(leaky(pixels), leaky(changed), coalitions)
    assert not found[:2].any()
    hidden = ~coalitions[2, 0]
    close(found[2], (0.01 * (9.0 - pixels[2, hidden]).sum(0)).abs().max())


def test_interaction_share_divides_variances_within_sizes():
    """The interaction share is a ratio of variances within sizes: of the residuals, and of the values."""
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    coalitions = enumerate_coalitions(PLAYERS)
    result = interaction_share(game, attributions, coalitions=coalitions)
    for image in range(IMAGES):
        values = game(coalitions.expand(IMAGES, -1, -1))[image]
        residuals = values - coalitions.double() @ attributions[image]
        unexplained = total = 0.0
        for size in range(PLAYERS + 1):
            rows = coalitions.sum(-1) == size
            unexplained += (residuals[rows].var(0, correction=0) * rows.sum()).sum()
            total += (values[rows].var(0, correction=0) * rows.sum()).sum()
        close(result[image], unexplained / total)


def test_interaction_share_ignores_what_sizes_explain():
    """The interaction share ignores what the size explains, and is one for attributions of zero."""
    game, zeros = random_game(), torch.zeros(IMAGES, PLAYERS, LABELS)
    attributions = normal(IMAGES, PLAYERS, LABELS, seed=1)

    def with_size(coalitions):
        return game(coalitions) + 100 * coalitions.sum(-1, keepdim=True).double().square()

    close(
        interaction_share(with_size, attributions, generator=seeded(0)),
        interaction_share(game, attributions, generator=seeded(0)),
        atol=1e-9,
    )
    close(interaction_share(game, zeros, generator=seeded(0)), torch.ones(IMAGES, dtype=torch.double))


def test_mosaics_hold_the_different_labels_they_say():
    """Mosaics hold different labels, and the images that they say, upright and whole."""
    labels = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3])
    images = torch.arange(8).view(8, 1, 1, 1) + torch.zeros(8, 3, 2, 5)
    images[:, :, 0, 0] = -1.0  # the top left pixel shows a flip or a transposition
    mosaics, cells = make_mosaics(images, labels, num_mosaics=50, grid=(1, 3), generator=seeded(0))
    assert mosaics.shape == (50, 3, 2, 15) and cells.shape == (50, 3)
    for mosaic, row in zip(mosaics, cells, strict=True):
        assert len(set(row.tolist())) == 3
        for cell, label in enumerate(row):
            tile = mosaic[:, :, 5 * cell : 5 * (cell + 1)]
            assert (tile[:, 0, 0] == -1).all()
            assert labels[int(tile[0, 1, 1])] == label and torch.equal(tile, images[int(tile[0, 1, 1])])
    assert set(cells.flatten().tolist()) == {0, 1, 2, 3}


def test_mosaic_cells_are_counted_row_by_row():
    """The cells of a mosaic are counted row by row, in making as in scoring."""
    images = torch.arange(6).view(6, 1, 1, 1) + torch.zeros(6, 1, 4, 4)
    mosaics, cells = make_mosaics(images, torch.arange(6), num_mosaics=7, grid=(3, 2), generator=seeded(0))
    assert torch.equal(mosaics[:, 0, ::4, ::4].flatten(1).long(), cells)
    for cell in range(6):
        maps = (mosaics[:, 0] == cells[:, cell].view(-1, 1, 1)).float()
        close(grid_pointing_game(maps, torch.full((7,), cell), grid=(3, 2)), torch.ones(7, dtype=torch.double))


def test_pointing_scores_are_shares_of_positive_attribution():
    """The grid pointing score is the cell's share of positive attribution, and zero where there is none."""
    maps = torch.tensor([[[3.0, 0, 1, 0], [0, -9, 0, 0]], [[-1.0, -1, -1, -1], [-2, -2, -2, -2]]])
    close(grid_pointing_game(maps, torch.tensor([0, 1]), grid=(1, 2)), torch.tensor([0.75, 0], dtype=torch.double))


def test_correlation_and_error_ratio_follow_their_definition():
    references = normal(IMAGES, PLAYERS, LABELS)
    attributions = references + 0.5 * normal(IMAGES, PLAYERS, LABELS, seed=1)
    correlation, ratio = attribution_correlation(attributions, references), error_ratio(attributions, references)
    pearson = [
        stats.pearsonr(a.flatten(), r.flatten()).statistic for a, r in zip(attributions, references, strict=True)
    ]
    errors = [((a - r) ** 2).mean().item() for a, r in zip(attributions, references, strict=True)]
    variances = [r.var(correction=0).item() for r in references]
    close(correlation.per_image.tolist(), pearson)
    close(correlation.mean, sum(pearson) / IMAGES)
    close(ratio.per_image.tolist(), [e / v for e, v in zip(errors, variances, strict=True)])
    close(ratio.pooled, sum(errors) / sum(variances))
    centred = [(t - t.mean((1, 2), keepdim=True)).flatten() for t in (attributions, references)]
    close(correlation.pooled, stats.pearsonr(*centred).statistic)


def test_pooling_ignores_differences_between_images():
    references = normal(IMAGES, PLAYERS, LABELS) + 100 * torch.arange(IMAGES).view(-1, 1, 1)
    attributions = normal(IMAGES, PLAYERS, LABELS, seed=1) + 100 * torch.arange(IMAGES).view(-1, 1, 1)
    assert abs(attribution_correlation(attributions, references).pooled) < 0.5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_only_error_ratios_see_scale_and_shift(seed, scale, shift):
    """The correlation ignores scale and shift, and the error ratio does not."""
    references = normal(IMAGES, PLAYERS, LABELS, seed=seed)
    close(attribution_correlation(scale * references + shift, references).per_image, torch.ones(3).double())
    errors = ((scale - 1) * references + shift).square().mean((1, 2)) / references.flatten(1).var(1, correction=0)
    close(error_ratio(scale * references + shift, references).per_image, errors, atol=1e-9)


def test_evaluate_metrics_return_what_the_functions_return(tmp_path):
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    references = normal(IMAGES, PLAYERS, LABELS, seed=2)
    curves = insertion_deletion(game, attributions, link="logit")
    result = InsertionDeletion(cache_dir=str(tmp_path)).compute(predictions=attributions, game=game, link="logit")
    for name in ("insertion_auc", "deletion_auc", "aopc"):
        close(result[name], getattr(curves, name).mean().item())
        close(result[f"{name}_standard_error"], stats.sem(getattr(curves, name)))
    agreement = AttributionAgreement(cache_dir=str(tmp_path)).compute(predictions=attributions, references=references)
    assert agreement == {
        "correlation": attribution_correlation(attributions, references).mean,
        "pooled_correlation": attribution_correlation(attributions, references).pooled,
        "error_ratio": error_ratio(attributions, references).mean,
        "pooled_error_ratio": error_ratio(attributions, references).pooled,
    }


def test_evaluate_metrics_gather_batches_before_asking_games(tmp_path):
    """A metric for `evaluate` gathers batches before it asks the game."""
    game, attributions = random_game(), normal(IMAGES, PLAYERS, LABELS, seed=1)
    metric = FaithfulnessCorrelation(cache_dir=str(tmp_path))
    metric.add_batch(predictions=attributions[:2])
    metric.add_batch(predictions=attributions[2:])
    result = metric.compute(game=game, num_samples=100, generator=seeded(0))["faithfulness_correlation"]
    close(result, faithfulness_correlation(game, attributions, num_samples=100, generator=seeded(0)).mean().item())


GAME_METRICS = {
    "insertion_deletion": insertion_deletion,
    "comprehensiveness_sufficiency": comprehensiveness_sufficiency,
    "faithfulness_correlation": faithfulness_correlation,
    "sensitivity_n": partial(sensitivity_n, sizes=[2]),
    "infidelity": infidelity,
    "interaction_share": interaction_share,
    "efficiency_gap": efficiency_gap,
}


@pytest.mark.parametrize("name", GAME_METRICS)
@pytest.mark.parametrize(
    "attributions, message",
    [
        (torch.full((IMAGES, PLAYERS, LABELS), math.nan), "finite"),
        (torch.zeros(0, PLAYERS, LABELS), "not empty"),
        (torch.zeros(PLAYERS), r"\(images, players, labels\)"),
        (torch.zeros(IMAGES, PLAYERS, LABELS + 1), f"{LABELS} labels"),
        (torch.zeros(IMAGES, PLAYERS, LABELS, dtype=torch.long), "float tensor"),
        ([[0.0]], "float tensor .*got list"),
    ],
)
def test_attributions_unfit_for_the_game_are_refused(name, attributions, message):
    """Attributions that do not fit the game are refused."""
    with pytest.raises(ValueError, match=message):
        GAME_METRICS[name](random_game(), attributions)


@pytest.mark.parametrize("name", GAME_METRICS)
@pytest.mark.parametrize(
    "game, message",
    [
        (lambda s: s.double().sum(-1), "to values"),
        (lambda s: s.double()[:2], "the same images"),
        (lambda s: s.double() * math.nan, "NaN"),
        (lambda s: s.long(), "float tensor, got torch.int64"),
    ],
)
def test_a_game_that_answers_wrongly_is_refused(name, game, message):
    with pytest.raises(ValueError, match=message):
        GAME_METRICS[name](game, torch.zeros(IMAGES, PLAYERS, PLAYERS))


ATTRIBUTIONS = torch.zeros(IMAGES, PLAYERS, LABELS)
MAPS = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda g: insertion_deletion(g, ATTRIBUTIONS, labels=torch.tensor([0, 1, LABELS])), "3 integers from 0 to 3"),
        (lambda g: insertion_deletion(g, ATTRIBUTIONS, labels=torch.tensor([0, 1])), "one per image"),
        (
            lambda g: insertion_deletion(g, ATTRIBUTIONS, link="softmax"),
            "'probability', 'sigmoid', 'logit'.*got 'softmax'",
        ),
        (lambda g: insertion_deletion(g, ATTRIBUTIONS, batch_size=1), "at least 2"),
        (lambda g: insertion_deletion(g, ATTRIBUTIONS[:, :1]), "at least 2 players"),
        (lambda g: insertion_deletion(lambda s: g(s)[..., :1], ATTRIBUTIONS[..., :1]), "link='logit'"),
        (lambda g: comprehensiveness_sufficiency(g, ATTRIBUTIONS, shares=()), "one or more"),
        (lambda g: comprehensiveness_sufficiency(g, ATTRIBUTIONS, shares=(0.5, 1.5)), r"\(0, 1\]"),
        (lambda g: aopc_bounds(g, torch.zeros(3, dtype=torch.long), num_players=17), "give `beam_size`"),
        (lambda g: aopc_bounds(g, torch.zeros(3, dtype=torch.long), num_players=6, beam_size=0), "at least 1, got 0"),
        (lambda g: aopc_bounds(g, torch.tensor(0), num_players=6), "one integer per image"),
        (lambda g: normalised_aopc(torch.zeros(3), torch.zeros(2), torch.zeros(3)), "share a shape"),
        (lambda g: faithfulness_correlation(g, ATTRIBUTIONS, method="kendall"), "got 'kendall'"),
        (lambda g: faithfulness_correlation(g, ATTRIBUTIONS, num_samples=3), "even"),
        (lambda g: faithfulness_correlation(g, ATTRIBUTIONS, coalitions=torch.zeros(4, 5).bool()), "6 players"),
        (lambda g: faithfulness_correlation(g, ATTRIBUTIONS, coalitions=torch.zeros(2, 4, 6).bool()), r"\(3, coal"),
        (lambda g: infidelity(g, ATTRIBUTIONS, coalitions=torch.zeros(1, 6).bool()), "at least 2 coalitions"),
        (lambda g: interaction_share(g, ATTRIBUTIONS, num_samples=5), "even"),
        (lambda g: sensitivity_n(g, ATTRIBUTIONS, sizes=[6]), "from 1 to 5"),
        (lambda g: sensitivity_n(g, ATTRIBUTIONS, sizes=[2], num_samples=1), "at least 2"),
        (lambda g: leak(g, g, torch.zeros(4, 6).bool()), r"\(images, coalitions, players\)"),
        (lambda g: leak(g, g, torch.zeros(3, 0, 6).bool()), "not empty"),
        (lambda g: make_mosaics(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 2]), num_mosaics=1), "got 3"),
        (lambda g: make_mosaics(torch.zeros(4, 3, 2, 2), torch.zeros(3), num_mosaics=1), r"\(images,\)"),
        (lambda g: grid_pointing_game(MAPS, torch.tensor([0, 1]), grid=(3, 2)), "3 x 2 equal cells"),
        (lambda g: grid_pointing_game(MAPS, torch.tensor([0, 4])), "from 0 to 3"),
        (lambda g: grid_pointing_game(MAPS * math.nan, torch.tensor([0, 1])), "finite"),
        (lambda g: attribution_correlation(normal(2, 3), normal(2, 4)), "share a shape"),
        (lambda g: attribution_correlation(normal(2, 3), torch.ones(2, 3)), "constant for image 0"),
        (lambda g: error_ratio(normal(2, 3) * math.nan, normal(2, 3)), "`attributions` must be finite"),
        (lambda g: error_ratio(torch.zeros(0, 3), torch.zeros(0, 3)), "not empty"),
    ],
)
def test_bad_options_are_refused_with_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_game())
