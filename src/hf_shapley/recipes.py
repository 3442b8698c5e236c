"""Settings that suit a situation, chosen by measurement; the page "Choosing a recipe" has the figures."""

from typing import Any

from .checks import check_number

# The influence head, at a cost of about a hundredth of the forward: a ViT's own layer takes the place of the last one,
# which is then run for CLS alone; ConvNeXt has no such saving, and narrow convolutions serve it nearly as well.
INFLUENCE_HEADS: dict[str, dict[str, Any]] = {
    "vit": {"influence_own_layers": 1, "influence_layers": 0},
    "convnext": {"influence_block": "convolution", "influence_layers": 5},
}


def fine_tuning_recipe(learning_rate: float = 5e-5, backbone: str = "vit") -> tuple[dict[str, Any], dict[str, Any]]:
    """What to set to explain a plain checkpoint, which goes on learning as it would without, or stays as it is.

        model_options, training_options = fine_tuning_recipe(learning_rate=5e-5)
        model = ShapleyViTForImageClassification.from_pretrained("google/vit-base-patch16-224", **model_options)
        args = ShapleyTrainingArguments("explained", num_train_epochs=8, **training_options)

    The labels alone teach the classifier: masked predictions and the Shapley regression teach coalition adapters and
    the influence head. With `model.freeze_classifier()` nothing else learns.

    Args:
        learning_rate: what the backbone is fine-tuned with, above 0. The attribution head and adapters, whose
            weights are new, learn at eight times that.
        backbone: "vit" or "convnext".

    Returns:
        Options of the configuration, for `from_pretrained`, and arguments of `ShapleyTrainingArguments`.

    Raises:
        TypeError, ValueError: for a learning rate that is no number or not above 0, or another backbone.
    """
    rates = _learning_rates(learning_rate)
    if backbone not in INFLUENCE_HEADS:
        raise ValueError(f"`backbone` must be one of {list(INFLUENCE_HEADS)}, got {backbone!r}.")
    model_options = {
        "attribution_head": "votes+influence",
        "vote_readout": "pooled",
        **INFLUENCE_HEADS[backbone],
        "influence_gradient": 0.0,
        "coalition_gradient": 0.0,
        "coalition_adapter_size": 64,
    }
    training_options = {
        **rates,
        "coalition_weight": 0.3,
        "shapley_warmup": 0.3,
        # The even part would pull masked predictions to the middle of v(all) and v(empty), which adapters cannot move.
        "even_weight": 0.0,
        "value_gradient": 0.03,
        "value_gradient_fraction": 0.25,
        "coalition_sizes": "spread",
    }
    return model_options, training_options


def refinement_recipe(learning_rate: float = 5e-5) -> dict[str, Any]:
    """What to set to let the influence head learn on alone: the game stays what it is, its Shapley values come nearer.

        model = ShapleyViTForImageClassification.from_pretrained("explained")
        model.freeze_classifier(adapters=True)
        args = ShapleyTrainingArguments("refined", num_train_epochs=4, **refinement_recipe(learning_rate=5e-5))

    Nothing else has a gradient, so a step shows the head many more coalitions of each image. Images without
    augmentation, as they will be asked about, bring it closer.

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
