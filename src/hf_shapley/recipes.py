"""Settings that suit a situation, chosen by measurement; the page "Choosing a recipe" has the figures."""

from typing import Any

from .checks import check_number


def fine_tuning_recipe(learning_rate: float = 5e-5, *, frozen: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to set to fine-tune a plain checkpoint: its predictions are kept, and little is asked of its backbone.

        model_options, training_options = fine_tuning_recipe(learning_rate=5e-5)
        model = ShapleyViTForImageClassification.from_pretrained("google/vit-base-patch16-224", **model_options)
        args = ShapleyTrainingArguments("explained", num_train_epochs=8, **training_options)

    Args:
        learning_rate: what the backbone is fine-tuned with, above 0. The attribution head and adapters, whose
            weights are new, learn at eight times that.
        frozen: for a classifier that `freeze_classifier` keeps as it is: adapters let predictions for masked images
            learn without it.

    Returns:
        Options of the configuration, for `from_pretrained`, and arguments of `ShapleyTrainingArguments`.

    Raises:
        TypeError, ValueError: for a learning rate that is no number or not above 0.
    """
    check_number(learning_rate, "learning_rate", "above 0, finite", lambda rate: 0 < rate < float("inf"))
    model_options = {
        "attribution_head": "votes+influence",
        "vote_readout": "pooled",
        "influence_own_layers": 1,
        "influence_layers": 0,
        "influence_gradient": 0.1,
    }
    training_options = {
        "learning_rate": learning_rate,
        "attribution_learning_rate": 8 * learning_rate,
        "coalition_weight": 0.3,
        "shapley_warmup": 0.3,
        "even_weight": 0.1,
        "value_gradient": 0.1,
        "shapley_fraction": 0.75,
        "value_gradient_fraction": 1 / 3,
    }
    if frozen:
        model_options["coalition_adapter_size"] = 64
        del training_options["shapley_fraction"]  # nothing here costs accuracy: every image learns
        # The even part would pull masked predictions to the middle of v(all) and v(empty), which do not move.
        training_options |= {"even_weight": 0.0, "value_gradient": 0.03, "value_gradient_fraction": 0.25}
    return model_options, training_options
