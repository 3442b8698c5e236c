"""What `hf-shapley train` can be asked for, and the defaults that suit what it starts from."""

import json
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..data.splits import DataArguments
from ..training.recipes import fine_tuning_recipe, refinement_recipe
from ..training.trainer import ShapleyTrainingArguments
from .starting_model import FAMILIES, HEAD_OPTIONS, ModelArguments, model_type_of

# What suits the digits from scratch; a checkpoint or another data set starts from TrainingArguments' own defaults.
DIGITS_DEFAULTS = {
    "output_dir": "outputs/digits",
    "learning_rate": 1e-2,
    "num_train_epochs": 16,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 64,
    "shapley_weight": 3.0,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
}


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, ShapleyTrainingArguments]:
    """Options from the command line or from one `.json` file; with no action named, train and evaluate.

    A plain checkpoint with no option of the attribution head starts from `fine_tuning_recipe`, an influence head that
    learns alone from `refinement_recipe`.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ShapleyTrainingArguments),
        allow_abbrev=False,
        description="The defaults below are those of a run with the options given here beside the one for this help; "
        "with no `--model` and no `--dataset` they suit a small model of digits.",
    )
    if len(argv) == 1 and argv[0].endswith(".json"):
        given = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        model_args, data_args, args = parser.parse_dict({**_suited_defaults(given), **given})
    else:
        few = ArgumentParser(add_help=False, allow_abbrev=False)
        few.add_argument("--learning_rate", default=SUPPRESS, type=float)
        for name in ("freeze_classifier", "freeze_adapters"):
            few.add_argument(f"--{name}", default=SUPPRESS, type=string_to_bool, nargs="?", const=True)
        for name in ("model", "dataset", "revision", "game", *HEAD_OPTIONS):
            few.add_argument(f"--{name}", default=SUPPRESS)
        parser.set_defaults(**_suited_defaults(vars(few.parse_known_args(argv)[0])))
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    if not (args.do_train or args.do_eval or args.do_predict):
        args.do_train = args.do_eval = True
    args.remove_unused_columns = False  # the image column is read on the fly, by the transform
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
    return model_args, data_args, args


def _suited_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults for what is given: the digits from scratch, a plain checkpoint, or neither."""
    if not {"model", "dataset"} & given.keys():
        return DIGITS_DEFAULTS
    if given.get("model") is None or set(HEAD_OPTIONS) & given.keys():
        return {}
    model_type = model_type_of(given["model"], given.get("revision", "main"))
    learning_rate = float(given.get("learning_rate", 5e-5))
    plain = model_type in FAMILIES
    game = given.get("game", "own")
    model_options, training_options = fine_tuning_recipe(learning_rate, model_type, game) if plain else ({}, {})
    # Adapters that are new would stay at nothing.
    frozen = given.get("freeze_adapters") or (plain and game == "own" and given.get("freeze_classifier"))
    if frozen and plain:
        model_options = fine_tuning_recipe(learning_rate, model_type)[0]
    return model_options | (refinement_recipe(learning_rate) if frozen else training_options)
