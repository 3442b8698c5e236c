"""The metrics as `evaluate.Metric` classes: predictions are attributions, one (N, K) table per image.

Used directly, without `evaluate.load` and without a network:

    InsertionDeletion().compute(predictions=attributions, game=game)

What a metric needs besides attributions (a batched game, labels, a generator) goes to `compute` and from there to the
function that does the work; `device` says where the game wants its coalitions. Attributions may arrive in
several `add_batch` calls; the game must then cover all their images in the same order. They pass through Arrow, so
the function itself is the faster way.
"""

import datasets
import evaluate
import torch
from torch import Tensor

from .agreement import attribution_correlation, error_ratio
from .correlations import faithfulness_correlation
from .curves import insertion_deletion
from .games import BatchedGame

_TABLE = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))


def _module_info(description: str, citation: str, *inputs: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=" and ".join(f"{name}: attributions (images, players, labels)" for name in inputs),
        features=datasets.Features(dict.fromkeys(inputs, _TABLE)),
    )


def _stack(tables: list, device: torch.device | str = "cpu") -> Tensor:
    return torch.as_tensor(tables, dtype=torch.float64, device=device)


def _mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """Mean over images and its standard error, NaN for a single image."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
    return {name: values.mean().item(), f"{name}_standard_error": error}


class InsertionDeletion(evaluate.Metric):
    """Insertion AUC, deletion AUC and AOPC; `compute(predictions=..., game=...)` takes the options of
    `insertion_deletion` and returns each mean over images with its standard error."""

    def _info(self) -> evaluate.MetricInfo:
        return _module_info(
            "Value of an image as its most relevant players are inserted or deleted.",
            "Petsiuk et al., arXiv:1806.07421; Covert et al., arXiv:2206.05282; Samek et al., arXiv:1509.06321",
            "predictions",
        )

    def _compute(
        self, predictions: list, *, game: BatchedGame, device: torch.device | str = "cpu", **options
    ) -> dict[str, float]:
        curves = insertion_deletion(game, _stack(predictions, device), **options)
        return {
            **_mean_and_error("insertion_auc", curves.insertion_auc),
            **_mean_and_error("deletion_auc", curves.deletion_auc),
            **_mean_and_error("aopc", curves.aopc),
        }


class FaithfulnessCorrelation(evaluate.Metric):
    """Correlation of coalitions' attributions and values; `compute(predictions=..., game=...)` takes the options of
    `faithfulness_correlation` and returns the mean over images with its standard error."""

    def _info(self) -> evaluate.MetricInfo:
        return _module_info(
            "Correlation between the attribution of a random coalition and its value.",
            "Bhatt et al., arXiv:2005.00631; Covert et al., arXiv:2206.05282",
            "predictions",
        )

    def _compute(
        self, predictions: list, *, game: BatchedGame, device: torch.device | str = "cpu", **options
    ) -> dict[str, float]:
        return _mean_and_error(
            "faithfulness_correlation", faithfulness_correlation(game, _stack(predictions, device), **options)
        )


class AttributionAgreement(evaluate.Metric):
    """Correlation and error ratio of attributions (predictions) against reference values (references)."""

    def _info(self) -> evaluate.MetricInfo:
        return _module_info(
            "Correlation with reference attributions, and mean squared error over their variance.",
            "Shapley, 1953",
            "predictions",
            "references",
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        attributions, truth = _stack(predictions), _stack(references)
        correlation, ratio = attribution_correlation(attributions, truth), error_ratio(attributions, truth)
        return {
            "correlation": correlation.mean,
            "pooled_correlation": correlation.pooled,
            "error_ratio": ratio.mean,
            "pooled_error_ratio": ratio.pooled,
        }
