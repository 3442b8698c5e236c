"""shap, shapiq, captum and datasets get the same numbers that the model and exact enumeration give."""

import warnings

import numpy as np
import pytest
import torch
from conftest import make_model
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from test_images import encoded, png_header
from transformers import ViTImageProcessorPil

from hf_shapley.faithfulness.estimators import exact_shapley
from hf_shapley.publishing.interoperability import (
    add_attributions,
    as_shapiq_game,
    captum_forward,
    to_shap_explanation,
)

LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
NAMES = {"id2label": LABELS, "label2id": {name: label for label, name in LABELS.items()}}


def optional(name):
    """Import an optional package, whose own deprecation warnings are none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture
def small_model():
    """2 x 4 = 8 players: few enough for exact values."""
    return make_model("vit", image_size=(8, 16), **NAMES)


@pytest.fixture
def small_pixels():
    return torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(2))


def exact(model, pixel_values):
    """Shapley values (N, K) by our own enumeration, in float64."""
    return exact_shapley(lambda c: model.coalition_values(pixel_values, c[None])[0].double(), num_players=8)


# ---- shap


def test_an_explanation_adds_up_to_the_logits(model, pixel_values):
    optional("shap")
    outputs = model(pixel_values)
    explanation = to_shap_explanation(model.explain(pixel_values), outputs.base_values)
    assert explanation.values.shape == (3, 4, 6, 1, 5)
    totals = explanation.values.sum((1, 2, 3)) + explanation.base_values
    np.testing.assert_allclose(totals, outputs.logits.detach().numpy(), atol=1e-5)


def test_explanations_are_found_by_label_name(model, pixel_values):
    """An explanation of one label is found by its name."""
    optional("shap")
    maps = model.explain(pixel_values, labels=[1, 3])
    explanation = to_shap_explanation(maps, torch.tensor([1.0, 3.0]), label_names=["bee", "dog"])
    np.testing.assert_array_equal(explanation[:, :, :, :, "dog"].values[..., 0], maps[:, 1].numpy())


def test_shap_draws_an_explanation(small_model, small_pixels):
    shap = optional("shap")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps = small_model.explain(small_pixels, labels=["bee", "dog"], upsample=True)
    images = np.full((2, 8, 16, 3), 0.5)
    explanation = to_shap_explanation(maps, torch.zeros(2), images=images, label_names=["bee", "dog"])
    shap.image_plot(explanation, show=False)
    drawn = [axes for axes in plt.gcf().axes if axes.get_images()]
    plt.close("all")
    # Two rows of a picture and two labels, and the colour bar.
    assert len(drawn) >= 6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"maps": torch.zeros(2, 8, 3)}, "must be of shape"),
        ({"base_values": torch.zeros(4)}, "one value per label"),
        ({"label_names": ["a"]}, "must hold 3 names"),
        ({"images": np.zeros((1, 4, 4, 3))}, "must hold 2 images"),
    ],
)
def test_an_explanation_refuses_shapes_that_do_not_match(change, message):
    optional("shap")
    arguments = {"maps": torch.zeros(2, 3, 4, 4), "base_values": torch.zeros(3), **change}
    with pytest.raises(ValueError, match=message):
        to_shap_explanation(**arguments)


def test_a_missing_shap_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "shap", None)
    with pytest.raises(ImportError, match=r"hf_shapley\[interop\]"):
        to_shap_explanation(torch.zeros(1, 2, 2, 2), torch.zeros(2))


# ---- shapiq


def test_shapiq_computes_the_same_exact_values(small_model, small_pixels):
    shapiq = optional("shapiq")
    game = as_shapiq_game(small_model, small_pixels[0], "cat")
    values = shapiq.ExactComputer(game, n_players=game.n_players)("SV", order=1)
    found = np.array([values[(player,)] for player in range(8)])
    np.testing.assert_allclose(found, exact(small_model, small_pixels[:1])[:, 2].numpy(), atol=1e-6)


def test_shapiq_estimates_with_every_coalition_are_exact(small_model, small_pixels):
    shapiq = optional("shapiq")
    game = as_shapiq_game(small_model, small_pixels[:1], 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = shapiq.KernelSHAP(n=game.n_players, random_state=0).approximate(budget=256, game=game)
    found = np.array([values[(player,)] for player in range(8)])
    np.testing.assert_allclose(found, exact(small_model, small_pixels[:1])[:, 4].numpy(), atol=1e-5)


def test_a_game_takes_one_coalition_or_many(small_model, small_pixels):
    game = as_shapiq_game(small_model, small_pixels[0], 1)
    coalitions = np.array([[False] * 8, [True] * 8])
    outputs = small_model(small_pixels[:1])
    expected = [outputs.base_values[1].item(), outputs.logits[0, 1].item()]
    np.testing.assert_allclose(game(coalitions), expected, atol=1e-6)
    np.testing.assert_allclose(game(coalitions[1]), expected[1:], atol=1e-6)


@pytest.mark.parametrize("label", ["cow", 5, -1])
def test_a_game_refuses_unknown_labels(small_model, small_pixels, label):
    with pytest.raises(ValueError, match="A label must be one of"):
        as_shapiq_game(small_model, small_pixels[0], label)


def test_a_game_refuses_several_images(small_model, small_pixels):
    with pytest.raises(ValueError, match="must hold one image"):
        as_shapiq_game(small_model, small_pixels, 0)


# ---- captum


def test_captum_computes_the_same_exact_values(small_model, small_pixels):
    captum = optional("captum.attr")
    forward_func, presence, feature_mask = captum_forward(small_model, small_pixels)
    maps = captum.FeatureAblation(forward_func).attribute(
        presence, target=3, additional_forward_args=(small_pixels,), feature_mask=feature_mask
    )
    assert maps.shape == (2, 2, 4)
    without_player = ~torch.eye(8, dtype=torch.bool).expand(2, 8, 8)
    logits = small_model(small_pixels).logits[:, None, 3]
    expected = logits - small_model.coalition_values(small_pixels, without_player)[..., 3]  # (2, 8)
    torch.testing.assert_close(maps.flatten(1), expected.detach(), atol=1e-5, rtol=1e-5)


def test_captum_shapley_values_on_few_players_are_ours():
    captum = optional("captum.attr")
    model = make_model("vit", image_size=(8, 8))
    pixel_values = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    forward_func, presence, feature_mask = captum_forward(model, pixel_values)
    maps = captum.ShapleyValues(forward_func).attribute(
        presence,
        target=0,
        additional_forward_args=(pixel_values,),
        feature_mask=feature_mask,
        perturbations_per_eval=4,
    )
    ours = exact_shapley(lambda c: model.coalition_values(pixel_values, c[None])[0].double(), num_players=4)
    torch.testing.assert_close(maps.flatten().double(), ours[:, 0], atol=1e-6, rtol=1e-5)


def test_fractions_of_a_patch_are_refused(small_model, small_pixels):
    forward_func, presence, _ = captum_forward(small_model, small_pixels)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        forward_func(0.5 * presence, small_pixels)


# ---- datasets


@pytest.fixture
def dataset():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list(LABELS.values()))})
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(array) for array in pixels], "label": [0, 1, 2, 3, 4]}, features=features
    )


@pytest.fixture
def named_model():
    return make_model("vit", **NAMES)


PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 24})


def test_attributions_become_columns(named_model, dataset):
    explained = add_attributions(dataset, named_model, PROCESSOR, batch_size=2)
    pixel_values = PROCESSOR(images=[row["image"] for row in dataset], return_tensors="pt")["pixel_values"]
    outputs = named_model(pixel_values)
    predicted = outputs.logits.argmax(1)
    assert explained["attributions_label"][:] == predicted.tolist()
    assert explained.features["attributions_label"].int2str(2) == "cat"
    maps = torch.tensor(explained["attributions"][:])
    torch.testing.assert_close(
        maps, named_model.explain(pixel_values, predicted.unsqueeze(1)).squeeze(1), atol=1e-6, rtol=1e-5
    )
    totals = maps.sum((1, 2)) + torch.tensor(explained["attributions_base_value"][:])
    torch.testing.assert_close(totals, torch.tensor(explained["attributions_logit"][:]), atol=1e-5, rtol=1e-5)


def test_true_labels_can_be_explained_instead(named_model, dataset):
    explained = add_attributions(dataset, named_model, PROCESSOR, label_column="label")
    assert explained["attributions_label"][:] == [0, 1, 2, 3, 4]


def test_a_stream_stays_lazy(named_model, dataset):
    read = []

    def rows():
        for row in dataset:
            read.append(row["label"])
            yield row

    from datasets import IterableDataset

    explained = add_attributions(
        IterableDataset.from_generator(rows, features=dataset.features), named_model, PROCESSOR, batch_size=2
    )
    assert read == []
    assert np.shape(next(iter(explained))["attributions"]) == (4, 6)
    assert len(read) <= 3


def test_attributions_refuse_missing_and_taken_columns(named_model, dataset):
    with pytest.raises(ValueError, match="'photo'.*missing"):
        add_attributions(dataset, named_model, PROCESSOR, image_column="photo")
    with pytest.raises(ValueError, match="'attributions'.*there already"):
        add_attributions(dataset.add_column("attributions", [0] * 5), named_model, PROCESSOR)
    with pytest.raises(TypeError, match="take one split"):
        add_attributions({"train": dataset}, named_model, PROCESSOR)


def with_unreadable(dataset, folder, content):
    """The same rows as files, of which the fourth holds something else."""
    paths = [str(folder / f"picture-{row}.png") for row in range(len(dataset))]
    for path, image in zip(paths, dataset["image"], strict=True):
        image.save(path)
    (folder / "picture-3.png").write_bytes(content)
    files = Dataset.from_dict({"image": paths, "label": dataset["label"][:]})
    return files.cast(dataset.features)


PNG = encoded(PILImage.new("RGB", (4, 4)), format="PNG")
UNREADABLE = {
    "no picture": b"no picture",
    "SyntaxError": PNG[:40] + bytes(60),
    "decompression bomb": png_header(100_000, 100_000),
    "unsafe format": encoded(PILImage.new("RGB", (4, 4)), format="EPS"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_row_is_named_or_left_out(kind, stream, named_model, dataset, tmp_path, caplog):
    files = with_unreadable(dataset, tmp_path, UNREADABLE[kind])
    files = files.to_iterable_dataset() if stream else files
    with pytest.raises(ValueError, match="Row 3 holds no readable image.*picture-3.png"):
        list(add_attributions(files, named_model, PROCESSOR, batch_size=2))
    options = {"label_column": "label", "batch_size": 1, "skip_unreadable": True}
    rows = list(add_attributions(files, named_model, PROCESSOR, **options))
    assert [row["label"] for row in rows] == [row["attributions_label"] for row in rows] == [0, 1, 2, 4]
    maps = [row["attributions"] for row in add_attributions(dataset, named_model, PROCESSOR, label_column="label")]
    np.testing.assert_allclose([row["attributions"] for row in rows], [*maps[:3], maps[4]], atol=1e-6)
    assert rows[3]["image"].tobytes() == dataset[4]["image"].tobytes()
    assert "picture-3.png" in caplog.text


def test_a_transform_still_gets_pictures(named_model, dataset):
    def mirror(batch):
        return {**batch, "image": [image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) for image in batch["image"]]}

    explained = add_attributions(dataset.with_transform(mirror), named_model, PROCESSOR).with_format(None)
    mirrored = mirror({"image": [row["image"] for row in dataset]})["image"]
    logits = named_model(PROCESSOR(images=mirrored, return_tensors="pt")["pixel_values"]).logits.amax(1)
    torch.testing.assert_close(torch.tensor(explained["attributions_logit"][:]), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_formatted_data_sets_are_explained(kind, named_model, dataset):
    plain = add_attributions(dataset, named_model, PROCESSOR)["attributions_logit"][:]
    formatted = add_attributions(dataset.with_format(kind), named_model, PROCESSOR)
    np.testing.assert_allclose(formatted["attributions_logit"][:], plain, atol=1e-6)


def test_grey_image_models_explain_data_sets(dataset):
    """A model of grey images explains a data set by the grey levels of its pictures."""
    model = make_model("vit", num_channels=1, **NAMES)
    grey = ViTImageProcessorPil(size={"height": 16, "width": 24}, image_mean=[0.5], image_std=[0.5])
    pixel_values = grey(images=[row["image"].convert("L") for row in dataset], return_tensors="pt")["pixel_values"]
    explained = add_attributions(dataset, model, grey)
    logits = model(pixel_values).logits.amax(1)
    torch.testing.assert_close(torch.tensor(explained["attributions_logit"][:]), logits, atol=1e-5, rtol=1e-5)


def test_true_labels_of_unlabelled_rows_are_refused(named_model, dataset):
    """Unlabelled rows are refused when true labels are asked for."""
    unlabelled = dataset.map(lambda row: {"label": -1})
    with pytest.raises(ValueError, match="got -1"):
        add_attributions(unlabelled, named_model, PROCESSOR, label_column="label")
