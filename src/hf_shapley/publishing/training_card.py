"""What a training run knows about its model, as a model card."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from ..models.configuration_shapley import ShapleyConfigMixin
from .card_data import ShapleyModelCardData
from .hub import label_names, with_what_holds
from .model_card import render_model_card

# What a card tells of the recipe, next to the joint loss's own knobs.
RECIPE = (
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
# What evaluation logs besides metrics.
SPEEDS = re.compile(r"runtime|.*_per_second|.*_time")

OneOrMore = str | list[str] | None


def render_training_card(
    trainer: Trainer,
    *,
    model_id: str,
    model_name: str,
    base_model: str | None = None,
    dataset: Mapping[str, OneOrMore] | None = None,
    tags: Sequence[OneOrMore] = (),
    license: str | None = None,
    language: str | None = None,
) -> str:
    """Write the card of the model that a trainer holds: data set, last evaluation and recipe.

    Args:
        trainer: after training, or on the way.
        model_id: what `from_pretrained` takes.
        model_name: title.
        base_model: Hub id of the model that training started from; None = what the model remembers.
        dataset: "name", "id" on the Hub and "config" of the data set; what is not given comes from the data set.
        tags: further tags.
        license: as the Hub writes it.
        language: of the labels, as the Hub writes it.

    Returns:
        The card, as `render_model_card` gives it.
    """
    results: dict[str, Any] = {
        "model_name": model_name,
        "license": license,
        "base_model": base_model or _base_model(trainer),
        "dataset": _dataset(trainer, dataset or {}),
        "labels": label_names(trainer.model),
        "metrics": _metrics(_last_evaluation(trainer)),
        "training": _recipe(trainer),
    }
    results = with_what_holds(results, trainer.model)
    data = ShapleyModelCardData.from_results(results, language=language)
    adapters = getattr(trainer.model, "peft_config", None) or {}
    if adapters:
        data.library_name = "peft"  # what is saved are adapters, which take that library
    kinds = [str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower() for adapter in adapters.values()]
    data.tags = list(
        dict.fromkeys([*(data.tags or []), *(tag for given in [*tags, kinds] for tag in _as_list(given))])
    )
    return render_model_card(results, model_id=model_id, data=data)


def _base_model(trainer: Trainer) -> str | None:
    name = trainer.model.config._name_or_path
    return name if name and not Path(name).exists() else None


def _dataset(trainer: Trainer, given: Mapping[str, OneOrMore]) -> dict[str, str]:
    """The data set of the evaluation, or else of the training; empty if nobody knows its name."""
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    entry = {
        "name": getattr(getattr(dataset, "info", None), "dataset_name", None),
        "split": getattr(dataset, "split", None),
        **{key: ", ".join(_as_list(value)) for key, value in given.items() if value},
    }
    entry["name"] = entry["name"] or entry.get("id")
    return {key: str(value) for key, value in entry.items() if value} if entry["name"] else {}


def _last_evaluation(trainer: Trainer) -> dict[str, Any]:
    """Log entries of the last evaluation of the current weights, merged; empty if there was none."""
    history, state = trainer.state.log_history, trainer.state
    places = [place for place, entry in enumerate(history) if any(key.startswith("eval_") for key in entry)]
    if not places:
        return {}
    step = history[places[-1]]["step"]
    trained = max((place for place, entry in enumerate(history) if "train_runtime" in entry), default=-1)
    if trainer.args.load_best_model_at_end and state.best_global_step and places[-1] < trained:
        step = state.best_global_step  # the weights have gone back to it
    entries = (history[place] for place in places if history[place]["step"] == step)
    return {key: value for entry in entries for key, value in entry.items()}


def _metrics(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Logged numbers as a card's metrics, speeds left out."""
    metrics = []
    for key, value in evaluation.items():
        name = key.removeprefix("eval_")
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if name == key or not is_number or SPEEDS.fullmatch(name):
            continue
        metrics.append(
            {
                "group": "Evaluation while training",
                "type": re.sub(r"[^\w.-]", "_", name),
                "name": name.replace("_", " ").capitalize(),
                "value": value,
                "better": "lower"
                if name.endswith(("loss", "attribution_error"))
                else "higher"
                if name.endswith("accuracy")
                else None,
                "settings": {"after step": evaluation["step"]},
            }
        )
    return metrics


def _recipe(trainer: Trainer) -> dict[str, Any]:
    """The settings that a reader needs to train such a model again."""
    stock = {argument.name for argument in fields(TrainingArguments)}
    own = [argument.name for argument in fields(trainer.args) if argument.name not in stock]
    settings = {name: getattr(trainer.args, name) for name in (*RECIPE, *own)}
    # The trainer knows what None stands for.
    settings |= {name: getattr(trainer, name, None) for name, value in settings.items() if value is None}
    config = trainer.model.config
    changed = [option.name for option in fields(ShapleyConfigMixin) if getattr(config, option.name) != option.default]
    return {
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        **{name: getattr(config, name) for name in dict.fromkeys(["vote_readout", *changed])},
        **({"classifier": "frozen"} if trainer.is_frozen else {}),
        **{name: getattr(value, "value", value) for name, value in settings.items()},
    }


def _as_list(value: OneOrMore) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
