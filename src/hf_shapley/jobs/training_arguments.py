"""What `hf-shapley train` can be asked for, and the defaults that suit what it starts from."""

import json
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ..data.splits import DataArguments
from ..training.arguments import ShapleyTrainingArguments
from ..training.digits import EVERYTHING_FLOWS, VOTES
from .starting_model import ModelArguments

# What suits the digits from scratch; the options' own defaults suit a checkpoint that goes on learning.
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
    **VOTES,
    **EVERYTHING_FLOWS,
}


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, ShapleyTrainingArguments]:
    """Options from the command line or from one `.json` file; with no action named, train and evaluate."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ShapleyTrainingArguments),
        allow_abbrev=False,
        description="With no `--model` and no `--dataset` other defaults hold, which suit a small model of digits: "
        + ", ".join(f"{name} {value}" for name, value in DIGITS_DEFAULTS.items()),
    )
    if len(argv) == 1 and argv[0].endswith(".json"):
        given = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        model_args, data_args, args = parser.parse_dict({**_suited_defaults(given), **given})
    else:
        few = ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("model", "dataset"):
            few.add_argument(f"--{name}", default=SUPPRESS)
        parser.set_defaults(**_suited_defaults(vars(few.parse_known_args(argv)[0])))
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    if not (args.do_train or args.do_eval or args.do_predict):
        args.do_train = args.do_eval = True
    args.remove_unused_columns = False  # the image column is read on the fly, by the transform
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
    return model_args, data_args, args


def _suited_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Other defaults than the options' own, for the digits from scratch."""
    return {} if {"model", "dataset"} & given.keys() else DIGITS_DEFAULTS
