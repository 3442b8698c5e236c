"""What training is asked for beyond `TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..models.checks import check_count, check_number

MEASURED = "attribution_error"  # of an evaluation, with its interval


@dataclass
class ShapleyTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the joint loss's; the defaults suit a checkpoint that goes on learning."""

    shapley_weight: float = field(default=1.0, metadata={"help": "Weight of the Shapley regression."})
    shapley_warmup: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the training steps over which `shapley_weight` ramps up from 0. Default 0.3; 0 where "
            "the classifier is frozen."
        },
    )
    coalition_weight: float = field(
        default=0.3,
        metadata={"help": "Weight of the masked predictions' loss: they learn what the full image's prediction says."},
    )
    value_gradient: float | None = field(
        default=None,
        metadata={
            "help": "Share of the Shapley regression's gradient that flows through v(S), and weight of its even part, "
            "which measures interactions: the more, the easier the model is to explain, and the more accuracy it may "
            "cost. Default 0.1, with coalition adapters 0.03; from scratch 1."
        },
    )
    value_gradient_fraction: float = field(
        default=0.25,
        metadata={
            "help": "Fraction of each batch whose images learn through v(S), with a weight that makes up for the "
            "others, whose v(S) is evaluated without gradient; above 0."
        },
    )
    num_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Pairs (coalition and complement) per image and step. Default 1; 4 where the classifier is frozen."
        },
    )
    attribution_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the attribution head and coalition adapters, whose weights start new; default 8 "
            "times `learning_rate`."
        },
    )
    attribution_error_images: int = field(
        default=0,
        metadata={
            "help": "Images of each evaluation data set, its first ones, to measure the attribution error on: "
            "`eval_attribution_error`, and its interval `eval_attribution_error_low` and `_high`, to be trusted for "
            "20 images or more. Each image costs two forwards for each of its patches. 0 leaves it out."
        },
    )

    def __post_init__(self) -> None:
        self._prepare_to_measure()
        super().__post_init__()
        for name in ("shapley_warmup", "value_gradient"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name, "in [0, 1]", lambda share: 0 <= share <= 1)
        check_number(
            self.value_gradient_fraction, "value_gradient_fraction", "above 0, at most 1", lambda x: 0 < x <= 1
        )
        for name in ("shapley_weight", "coalition_weight"):
            check_number(getattr(self, name), name, "0 or more, finite", lambda weight: 0 <= weight < float("inf"))
        if self.attribution_learning_rate is not None:
            check_number(
                self.attribution_learning_rate,
                "attribution_learning_rate",
                "above 0, finite",
                lambda x: 0 < x < float("inf"),
            )
        if self.num_pairs is not None:
            check_count(self.num_pairs, "num_pairs")
        stock: Any = self
        if stock.ddp_find_unused_parameters is None:
            # One forward per step uses every parameter: looking for unused ones would only cost time.
            stock.ddp_find_unused_parameters = False

    def _prepare_to_measure(self) -> None:
        """Refuse too few images for the attribution error; the best model is that of the least."""
        images, chooses = self.attribution_error_images, MEASURED in (self.metric_for_best_model or "")
        check_count(images, "attribution_error_images", 0)
        if images == 1 or (chooses and images == 0):
            raise ValueError(
                f"`attribution_error_images` must be at least 2 to measure an error, got {images}: 32 is a good start."
            )
        stock: Any = self
        if chooses and stock.greater_is_better is None:
            stock.greater_is_better = False  # the stock rule is that greater is better, of a loss alone not
