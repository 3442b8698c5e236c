"""What an evaluation measured, as a result file that cards are made of."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .hub import card_of
from .model_card import results_of_card

GROUPS = {
    "model": "Faithfulness of the attributions",
    "leave one out": "The same of leaving out one patch at a time",
    "chance": "The same of chance",
}


def evaluation_entries(
    measured: Mapping[str, Any], meanings: Mapping[str, str], options: Mapping[str, Any], *, images: int
) -> dict[str, Any]:
    """Entries of a result file (see `hf_shapley.publishing.card_results`) for what `hf-shapley evaluate` measured.

    Args:
        measured: "methods" (by method, numbers by name), "interaction_share" and "certificate".
        meanings: what each of a method's numbers is, and whether higher or lower is better.
        options: model, dataset, split, budget and seed of the evaluation.
        images: how many pictures there were.

    Returns:
        "model_name", "dataset", "metrics", "environment" and "command"; of paths on this machine their last part.
    """
    settings = {"images": images, "seed": options["seed"]}
    metrics = [
        {
            "group": GROUPS[method],
            "type": name,
            "name": _readable(name) + ("" if method == "model" else f", {method}"),
            "value": value,
            "better": "higher" if "higher is better" in meanings[name] else "lower",
            "settings": settings,
        }
        for method, numbers in measured["methods"].items()
        for name, value in numbers.items()
    ]
    name = _last_part(options["model"] or "digits")
    return {
        "model_name": _title(options["model"]) or name,
        "dataset": _dataset(options["dataset"], options["split"]),
        "metrics": [*metrics, *_certified(measured, settings, options["budget"])],
        "environment": {package: version(package) for package in ("hf_shapley", "torch", "transformers")},
        "command": _command({**options, "images": images}),
    }


def _certified(measured: Mapping[str, Any], settings: Mapping[str, Any], budget: int) -> list[dict[str, Any]]:
    """What is known of the exact Shapley values, and of what no attribution can show."""
    certificate = measured["certificate"]
    settings = {**settings, "coalitions per image": budget}
    group = "Distance to the exact Shapley values"
    return [
        {
            "group": group,
            "type": "error_ratio",
            "name": "Squared error / variance of exact values",
            "value": certificate["error_ratio"],
            "interval": list(certificate["error_ratio_interval"]),
            "confidence": certificate["confidence"],
            "better": "lower",
            "settings": settings,
        },
        {
            "group": group,
            "type": "shapley_correlation",
            "name": "Correlation with exact Shapley values",
            "value": certificate["correlation"],
            "better": "higher",
            "settings": settings,
        },
        {
            "group": group,
            "type": "interaction_share",
            "name": "Interaction share",
            "value": measured["interaction_share"],
            "settings": {name: settings[name] for name in ("images", "seed")},
        },
    ]


def _readable(name: str) -> str:
    return name.replace("_", " ").capitalize().replace(" auc", " AUC")


def _title(model: str | None) -> str | None:
    """What the model's card calls it, if there is one that was generated."""
    return results_of_card(card_of(model) or "").get("model_name") if model and Path(model).is_dir() else None


def _dataset(dataset: str | None, split: str) -> dict[str, str]:
    if dataset is None:
        return {"name": "scikit-learn digits", "id": "sklearn-digits", "split": split}
    on_hub = {} if Path(dataset).exists() else {"id": dataset}
    return {"name": _last_part(dataset), **on_hub, "split": split}


def _command(options: Mapping[str, Any]) -> str:
    given = {name: options[name] for name in ("model", "dataset", "split", "images", "budget", "seed")}
    words = [
        word for name, value in given.items() if value is not None for word in (f"--{name}", _last_part(str(value)))
    ]
    return shlex.join(["hf-shapley", "evaluate", *words])


def _last_part(name: str) -> str:
    """A Hub id as it is, a path without the folders that it lies in."""
    return Path(name).absolute().name if Path(name).exists() else name
