"""Result files, of which cards are made: their form, and what two of them say of one model.

A result file is a JSON object with these entries, all optional but `model_name`; others are left alone:

    model_name: name of the model.
    summary: what it is for, in a sentence or two.
    game: whose game is explained, as `model.game_name` says.
    license, base_model: as the Hub writes them.
    dataset: {"name", "id", "config", "split", "revision"}; `id` as on the Hub.
    labels: label names in order.
    metrics: a list of {"group", "type", "name", "value", "interval", "confidence", "better", "settings"}: `group` is
        the heading of a table, `type` a metric id, `interval` [low, high] at level `confidence` (0.95, say), `better`
        "higher" or "lower", `settings` an object that says how it was measured, and `dataset` its own, if it differs.
    training, environment: objects of settings.
    limits: sentences that add to the standing ones.
    command: the shell command that reproduces the results.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from .card_texts import format_number, plain_text

ENTRY_KINDS = {"dataset": dict, "training": dict, "environment": dict, "labels": list, "metrics": list, "limits": list}


def merge_results(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """What two result files say of one model: all metrics and limits of both, and other entries as `later` has them.

    Metrics that were measured on different data say on which. Of one that both have, the later value counts.

    Args:
        earlier: content of a result file, such as a training's.
        later: content of another, such as an evaluation's.

    Returns:
        Content of a result file.
    """
    given = {name: value for name, value in later.items() if value not in (None, "", [], {})}
    merged = {**earlier, **given}
    metrics = [dict(metric) for results in (earlier, later) for metric in results.get("metrics", [])]
    datasets = [results.get("dataset", {}) for results in (earlier, later) for _ in results.get("metrics", [])]
    if any(dataset != datasets[0] for dataset in datasets):
        metrics = [{"dataset": dataset, **metric} for metric, dataset in zip(metrics, datasets, strict=True)]
    # What says how a metric was measured says what it is; the value is not part of that.
    names = ("group", "type", "name", "dataset")
    by_name = {json.dumps([metric.get(name) for name in names], sort_keys=True): metric for metric in metrics}
    limits = dict.fromkeys([*earlier.get("limits", []), *later.get("limits", [])])
    return merged | {"metrics": list(by_name.values()), "limits": list(limits)}


def check_results(results: Mapping[str, Any]) -> None:
    """Refuse malformed results before anything is written."""
    if not isinstance(results, Mapping):
        raise TypeError(f"`results` must be a mapping, got {type(results).__name__}: load the JSON file first.")
    if not plain_text(results.get("model_name", "")):
        raise ValueError("`results` must have a `model_name`.")
    for key, kind in ENTRY_KINDS.items():
        if key in results and not isinstance(results[key], kind):
            raise ValueError(f"`results[{key!r}]` must be a {kind.__name__}, got {type(results[key]).__name__}.")
    for index, metric in enumerate(results.get("metrics", [])):
        _check_metric(metric, f"`results['metrics'][{index}]`")


def _check_metric(metric: Mapping[str, Any], where: str) -> None:
    missing = [key for key in ("type", "value") if key not in metric]
    if missing:
        raise ValueError(f"{where} must have `type` and `value`, it lacks {', '.join(missing)}.")
    if not re.fullmatch(r"[\w.-]+", metric["type"]):
        raise ValueError(f"{where} must have a `type` of letters, digits, '_', '.' and '-', got {metric['type']!r}.")
    if metric.get("better") not in (None, "higher", "lower"):
        raise ValueError(f"{where} must have `better` 'higher' or 'lower' if at all, got {metric['better']!r}.")
    format_number(metric["value"])
    if not isinstance(metric.get("dataset", {}), Mapping):
        raise ValueError(f"{where} must have a `dataset` that is a dict if at all, got {metric['dataset']!r}.")
    if "interval" in metric:
        low, high = metric["interval"]
        if "confidence" not in metric or not 0 < metric["confidence"] < 1:
            raise ValueError(f"{where} has an interval: it must state its `confidence` between 0 and 1, such as 0.95.")
        if not low <= high:
            raise ValueError(f"{where} must have an `interval` [low, high] with low <= high, got [{low}, {high}].")
