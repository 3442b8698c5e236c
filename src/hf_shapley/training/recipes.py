"""Settings that suit a situation, chosen by measurement; the page "Choosing a recipe" has the figures."""

from typing import Any

from ..models.checks import check_number

# The influence head, at a cost of about a hundredth of the forward: a ViT's own layer takes the place of the last one,
# which is then run for CLS alone; ConvNeXt has no such saving, and narrow convolutions serve it nearly as well.
INFLUENCE_HEADS: dict[str, dict[str, Any]] = {
    "vit": {"influence_own_layers": 1, "influence_layers": 0},
    "convnext": {"influence_block": "convolution", "influence_layers": 5},
}


GAMES = ("own", "adapted")


def fine_tuning_recipe(
    learning_rate: float = 5e-5, backbone: str = "vit", game: str = "own"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to set to explain a plain checkpoint while it goes on learning.

        model_options, training_options = fine_tuning_recipe(learning_rate=5e-5)
        model = ShapleyViTForImageClassification.from_pretrained("google/vit-base-patch16-224", **model_options)
        args = ShapleyTrainingArguments("explained", num_train_epochs=8, **training_options)

    What is explained is the classifier's own response to missing patches, and a little of it learns to be easier to
    explain. Let the head learn on alone at the end, with `refinement_recipe`. A classifier that must not change at all
    takes that recipe from the beginning, after `model.freeze_classifier()`.

    Args:
        learning_rate: what the backbone is fine-tuned with, above 0. The attribution head and adapters, whose
            weights are new, learn at eight times that.
        backbone: "vit" or "convnext".
        game: "own", or "adapted": the labels alone teach the classifier, and adapters that act on masked images only
            change its response to missing patches, which is then another game than the classifier's own. It is for a
            classifier whose own response is useless, or may not change while it is learned.

    Returns:
        Options of the configuration, for `from_pretrained`, and arguments of `ShapleyTrainingArguments`.

    Raises:
        TypeError, ValueError: for a learning rate that is no number or not above 0, another backbone or game.
    """
    rates = _learning_rates(learning_rate)
    for name, value, choices in (("backbone", backbone, list(INFLUENCE_HEADS)), ("game", game, list(GAMES))):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
    model_options = {
        "attribution_head": "votes+influence",
        "vote_readout": "pooled",
        **INFLUENCE_HEADS[backbone],
        "influence_gradient": 0.0,
    }
    training_options = {
        **rates,
        "coalition_weight": 0.3,
        "shapley_warmup": 0.3,
        "value_gradient_fraction": 0.25,
        "coalition_sizes": "spread",
    }
    if game == "own":
        return model_options, training_options | {"even_weight": 0.1, "value_gradient": 0.1}
    # The even part would pull masked predictions to the middle of v(all) and v(empty), which adapters cannot move.
    training_options |= {"even_weight": 0.0, "value_gradient": 0.03}
    return model_options | {"coalition_gradient": 0.0, "coalition_adapter_size": 64}, training_options


def refinement_recipe(learning_rate: float = 5e-5) -> dict[str, Any]:
    """What to set to let the influence head learn on alone: the game stays what it is, its Shapley values come nearer.

        model = ShapleyViTForImageClassification.from_pretrained("explained")
        model.freeze_classifier(adapters=True)
        args = ShapleyTrainingArguments("refined", num_train_epochs=4, **refinement_recipe(learning_rate=5e-5))

    Nothing else has a gradient, so a step shows the head many more coalitions of each image. Images without
    augmentation, as they will be asked about, bring it closer. From a plain checkpoint, loaded with the options of
    `fine_tuning_recipe`, this explains a classifier that stays what it is, to the bit, in its own game.

    Args:
        learning_rate: as for `fine_tuning_recipe`; the head learns at eight times that here too.

    Returns:
        Arguments of `ShapleyTrainingArguments`.

    Raises:
        TypeError, ValueError: for a learning rate that is no number or not above 0.
    """
    return {
        **_learning_rates(learning_rate),
        "num_pairs": 4,
        "coalition_sizes": "spread",
        # Nothing that these would teach learns.
        "coalition_weight": 0.0,
        "even_weight": 0.0,
        "value_gradient": 0.0,
    }


def _learning_rates(learning_rate: float) -> dict[str, float]:
    check_number(learning_rate, "learning_rate", "above 0, finite", lambda rate: 0 < rate < float("inf"))
    return {"learning_rate": learning_rate, "attribution_learning_rate": 8 * learning_rate}
