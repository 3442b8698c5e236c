"""Train, evaluate and use a Shapley image classifier on any `datasets` data set: the job behind `hf-shapley train`."""

import json
import logging
import random
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.hf_argparser import string_to_bool

from ..data.dataset_images import undecoded
from ..data.labels import class_names, given_names, ids_by_name, row_names
from ..files import whole_file
from ..models.configuration_shapley import ShapleyConvNextConfig, ShapleyViTConfig
from ..models.images import load_image
from ..models.modeling_shapley_convnext import ShapleyConvNextForImageClassification
from ..models.modeling_shapley_vit import ShapleyViTForImageClassification
from ..models.pipeline_shapley import label_scores, pixel_values_of
from ..training.digits import digits_dataset, label_maps

from ..training.trainer import ShapleyTrainer, ShapleyTrainingArguments

logger = logging.getLogger(__name__)

FAMILIES = {
    "vit": (ShapleyViTConfig, ShapleyViTForImageClassification),
    "convnext": (ShapleyConvNextConfig, ShapleyConvNextForImageClassification),
}

# Options of the attribution head: None leaves what the checkpoint or the recipe says, else the default.
HEAD_OPTIONS = (
    "attribution_head",
    "vote_readout",
    "influence_layers",
    "influence_block",
    "influence_own_layers",
    "influence_gradient",
    "coalition_gradient",
    "coalition_adapter_size",
)

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


@dataclass
class ModelArguments:
    """Which model to start from."""

    model: str | None = field(
        default=None,
        metadata={"help": "Plain or Shapley checkpoint, ViT or ConvNeXt: folder or Hub id. None = scratch."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint on the Hub."})
    game: str = field(
        default="own",
        metadata={
            "help": "Of a plain checkpoint, what is explained: the classifier's 'own' response to missing patches, or "
            "one that adapters on masked images learn, 'adapted'."
        },
    )
    attribution_head: str | None = field(
        default=None, metadata={"help": "'votes' or 'votes+influence'. None = the checkpoint's, else 'votes'."}
    )
    vote_readout: str | None = field(
        default=None, metadata={"help": "'patches' or 'pooled', which keeps a plain checkpoint's predictions."}
    )
    influence_layers: int | None = field(
        default=None, metadata={"help": "Blocks of the influence head, after its own layers."}
    )
    influence_block: str | None = field(default=None, metadata={"help": "'mlp', 'convolution' or 'backbone'."})
    influence_own_layers: int | None = field(
        default=None, metadata={"help": "Last layers of which the influence head has its own copies."}
    )
    influence_gradient: float | None = field(
        default=None, metadata={"help": "Share of the influence head's gradient that reaches the backbone."}
    )
    coalition_gradient: float | None = field(
        default=None, metadata={"help": "Share of the gradient of v(S) that reaches the classifier's own weights."}
    )
    coalition_adapter_size: int | None = field(
        default=None, metadata={"help": "Width of the adapters that act where patches are absent only; 0 = none."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new classifier where the checkpoint's has other labels."}
    )
    freeze_classifier: bool = field(
        default=False, metadata={"help": "Train influence head and adapters alone: predictions stay what they are."}
    )
    freeze_adapters: bool = field(
        default=False, metadata={"help": "Train the influence head alone: predictions for masked images stay too."}
    )
    backbone: str = field(default="convnext", metadata={"help": "From scratch: 'vit' or 'convnext'."})
    image_size: int = field(
        default=8, metadata={"help": "From scratch: height and width that the model sees, pixels."}
    )
    patch_size: int = field(default=2, metadata={"help": "From scratch: height and width of one player, pixels."})
    hidden_size: int = field(default=64, metadata={"help": "From scratch: width of the tokens."})
    num_layers: int = field(default=2, metadata={"help": "From scratch: number of layers."})

    def __post_init__(self):
        if self.backbone not in FAMILIES:
            raise ValueError(f"`--backbone` must be one of {list(FAMILIES)}, got {self.backbone!r}.")
        for name in ("freeze_classifier", "freeze_adapters"):
            if getattr(self, name) and self.model is None:
                raise ValueError(f"`--{name}` keeps a trained classifier: give its checkpoint with `--model`.")
            if getattr(self, name) and self.ignore_mismatched_sizes:
                raise ValueError(
                    f"`--{name}` keeps a trained classifier, not the new one of `--ignore_mismatched_sizes`."
                )


@dataclass
class DataArguments:
    """Which pictures to learn from."""

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, folder of pictures, or `save_to_disk` folder. None = digits."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column with the labels."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. None = 'validation', 'test', or a part of training's."}
    )
    predict_split: str | None = field(default=None, metadata={"help": "Split to predict. None = the evaluation's."})
    held_out: float = field(
        default=0.15, metadata={"help": "Part of training's split held out where there is no other."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many pictures at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate and predict so many at most."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training pictures."})
    random_crop: float = field(
        default=1.0, metadata={"help": "Crop training pictures to a part of their area drawn from [this, 1]."}
    )

    def __post_init__(self):
        for name in ("held_out", "random_crop"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`--{name}` must lie in (0, 1], got {getattr(self, name)}.")


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
    model_type = _model_type(given["model"], given.get("revision", "main"))
    learning_rate = float(given.get("learning_rate", 5e-5))
    plain = model_type in FAMILIES
    game = given.get("game", "own")
    model_options, training_options = fine_tuning_recipe(learning_rate, model_type, game) if plain else ({}, {})
    # Adapters that are new would stay at nothing.
    frozen = given.get("freeze_adapters") or (plain and game == "own" and given.get("freeze_classifier"))
    if frozen and plain:
        model_options = fine_tuning_recipe(learning_rate, model_type)[0]
    return model_options | (refinement_recipe(learning_rate) if frozen else training_options)


def _model_type(model: str, revision: str) -> str:
    return AutoConfig.from_pretrained(model, revision=revision).model_type


def load_splits(args: DataArguments, seed: int, *, evaluates: bool = True) -> DatasetDict:
    """The data set with splits train, eval and predict.

    Columns: image; row, its number in the split it comes from; and label, a `ClassLabel` with the names of training's
    in every split. Rows to predict need no labels: where one has none, the split has none.

    Args:
        args: which data set.
        seed: of what is held out and of which rows are taken.
        evaluates: whether the rows to evaluate need labels.

    Raises:
        ValueError: a split or column is missing, or rows that need a label have none or one that training's lack.
    """
    splits = _read(args)
    _check_columns(splits, args)
    names = class_names(splits[args.train_split], args.label_column)
    train = _with_label_ids(splits[args.train_split], args.train_split, names, args)
    chosen = args.eval_split or _labelled(splits, names, args.label_column, "validation", "test")
    if chosen is None:
        parts = train.train_test_split(args.held_out, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    else:
        evaluation = _with_label_ids(_named(splits, chosen), chosen, names, args, must=evaluates)
    prediction = evaluation
    if args.predict_split is not None:
        rows = _named(splits, args.predict_split)
        prediction = _with_label_ids(rows, args.predict_split, names, args, must=False)
    limits = {"train": args.max_train_samples, "eval": args.max_eval_samples, "predict": args.max_eval_samples}
    parts = {"train": train, "eval": evaluation, "predict": prediction}
    return DatasetDict({name: _first(rows, limits[name], seed) for name, rows in parts.items()})


def _check_columns(splits: DatasetDict, args: DataArguments) -> None:
    """Refuse a training split or columns that the data set does not have."""
    if args.train_split not in splits:
        raise ValueError(f"`--train_split` must be one of {list(splits)}, got {args.train_split!r}.")
    columns = splits[args.train_split].column_names
    for option in ("image_column", "label_column"):
        if getattr(args, option) not in columns:
            raise ValueError(
                f"`--{option}` must be one of {columns}, got {getattr(args, option)!r}.{_about_tables(args.dataset)}"
            )


def _about_tables(dataset: str | None) -> str:
    """Why columns of a table in a folder of pictures may be missing."""
    files = sorted(Path(dataset).rglob("*")) if dataset and Path(dataset).is_dir() else []
    unread = next((path for path in files if path.suffix in (".csv", ".jsonl") and path.stem != "metadata"), None)
    if unread is None:
        return ""
    return (
        f" {str(unread)!r} was not read with the pictures: name it metadata{unread.suffix}, with their paths in a "
        "column file_name."
    )


def _with_label_ids(rows: Dataset, split: str, names: list[str], args: DataArguments, must: bool = True) -> Dataset:
    """Columns image, row and, where every row has one of the names, label."""
    numbered = rows.with_format(None).select_columns([args.image_column]).rename_columns({args.image_column: "image"})
    numbered = numbered.add_column("row", np.arange(len(rows)))
    if args.label_column not in rows.column_names:
        if must:
            raise ValueError(
                f"The split {split!r} must have the column {args.label_column!r}, got {rows.column_names}."
            )
        return numbered
    places = {name: place for place, name in enumerate(names)}
    found = row_names(rows, args.label_column)
    unknown = next((row for row, name in enumerate(found) if name not in places), None)
    if unknown is None:
        return numbered.add_column("label", [places[name] for name in found], feature=ClassLabel(names=names))
    label = "no label" if found[unknown] is None else f"the label {found[unknown]!r}"
    problem = f"Row {unknown} of the split {split!r} has {label}, and training's labels are {names[:20]}"
    if must:
        raise ValueError(f"{problem}: leave such rows out, or give the labels their names.")
    logger.warning("%s: what is predicted for that split cannot be compared with labels.", problem)
    return numbered


def _labelled(splits: DatasetDict, names: list[str], column: str, *usual: str) -> str | None:
    """The first of the usual splits that is there, and not one whose labels are kept secret."""
    secret = {None, "-1"}.difference(names)
    for split in usual:
        has_labels = split in splits and column in splits[split].column_names
        if has_labels and not secret.issuperset(row_names(splits[split], column)):
            return split
    return None


def _read(args: DataArguments) -> DatasetDict:
    if args.dataset is None:
        return digits_dataset()
    folder = Path(args.dataset)
    if (folder / "dataset_dict.json").is_file():
        return load_from_disk(folder)
    return load_dataset(args.dataset, args.dataset_config)


def _named(splits: DatasetDict, wanted: str) -> Dataset:
    if wanted not in splits:
        raise ValueError(f"The data set has the splits {list(splits)}, got {wanted!r}.")
    return splits[wanted]


def _first(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))


def load_model(args: ModelArguments, labels: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The checkpoint and its image processor, or a small model with random weights.

    A checkpoint with the data set's label names, in whatever order, keeps its own order.
    """
    options: dict[str, Any] = {name: value for name in HEAD_OPTIONS if (value := getattr(args, name)) is not None}
    if args.model is None:
        config_class, model_class = FAMILIES[args.backbone]
        size = {"height": args.image_size, "width": args.image_size}
        config = config_class(**_small(args), **options, **label_maps(labels))
        return model_class(config), ViTImageProcessorPil(size=size)
    model_type = _model_type(args.model, args.revision)
    family = model_type.removeprefix("shapley-")
    if family not in FAMILIES:
        raise ValueError(f"`--model` must be a ViT or ConvNeXt checkpoint, got {args.model!r} of type {model_type!r}.")
    config_class, model_class = FAMILIES[family]
    config = config_class.from_pretrained(args.model, revision=args.revision, **options)
    known = {label: str(name) for label, name in config.id2label.items()}
    if sorted(known.values()) != sorted(labels):
        config = config_class.from_pretrained(args.model, revision=args.revision, **options, **label_maps(labels))
    model, info = model_class.from_pretrained(
        args.model, config=config, revision=args.revision, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _fit_classifier(args, model, info, known)
    if args.freeze_classifier or args.freeze_adapters:
        model.freeze_classifier(adapters=args.freeze_adapters)
    processor = AutoImageProcessor.from_pretrained(args.model, revision=args.revision, trust_remote_code=False)
    return model, processor


def _fit_classifier(args: ModelArguments, model: PreTrainedModel, info: dict[str, Any], known: dict[int, str]) -> None:
    """Refuse a checkpoint's classifier that is for other labels, `known`, or begin it anew if that was asked for."""
    labels, names = model.config.id2label, given_names(known)
    has_none = "classifier.weight" in info["missing_keys"]
    if has_none and (args.freeze_classifier or args.freeze_adapters):
        raise ValueError(f"{args.model!r} has no classifier to keep: train without `--freeze_...` first.")
    is_of_others = bool(names) and not has_none and sorted(names) != sorted(labels.values())
    wrong = sorted(key for key, *_ in info["mismatched_keys"])
    if args.ignore_mismatched_sizes:
        if is_of_others:  # weights of the same size would be those of other labels
            _restart_classifier(model)
    elif is_of_others or "classifier.weight" in wrong:
        raise ValueError(
            f"The classifier of {args.model!r} has {len(known)} labels, {list(known.values())[:10]}, the data set "
            f"{len(labels)}, {list(labels.values())[:10]}: give the data set's classes the checkpoint's names, in any "
            "order, or start with a new classifier by `--ignore_mismatched_sizes`."
        )
    elif wrong:
        raise ValueError(f"{args.model!r} has weights of other sizes than these options make: {wrong[:5]}.")


@torch.no_grad()
def _restart_classifier(model: PreTrainedModel) -> None:
    model.classifier.weight.normal_(std=model.config.initializer_range)
    model.classifier.bias.zero_()


def _small(args: ModelArguments) -> dict:
    """Configuration of a small backbone whose players are single patches."""
    if args.backbone == "convnext":
        shape = {"hidden_sizes": [args.hidden_size], "depths": [args.num_layers], "num_stages": 1}
        return {**shape, "patch_size": args.patch_size, "layer_scale_init_value": 1.0}
    shape = {"hidden_size": args.hidden_size, "intermediate_size": 2 * args.hidden_size}
    layers = {"num_hidden_layers": args.num_layers, "num_attention_heads": 4}
    return {**shape, **layers, "image_size": args.image_size, "patch_size": args.patch_size}


def make_transform(
    processor: BaseImageProcessor,
    config: PreTrainedConfig,
    *,
    horizontal_flip: bool = False,
    random_crop: float = 1.0,
    label_ids: Sequence[int] | None = None,
    split: str | None = None,
) -> Callable[[dict], dict]:
    """A batch of rows as `load_splits` gives them -> pixel_values and labels, the pictures augmented if asked.

    Args:
        processor: of the model.
        config: of the model.
        horizontal_flip: mirror half of the pictures.
        random_crop: crop to a part of the area drawn from [this, 1].
        label_ids: the model's id of each of the data set's; None = the same.
        split: which one the rows are from, for messages.
    """

    def augment(image: Image.Image) -> Image.Image:
        if random_crop < 1:
            edge = sqrt(random.uniform(random_crop, 1))
            width, height = max(1, round(edge * image.width)), max(1, round(edge * image.height))
            left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
            image = image.crop((left, top, left + width, top + height))
        if horizontal_flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def transform(rows: dict) -> dict:
        images = [augment(image) for image in _pictures(rows, split)]
        batch: dict[str, Any] = {"pixel_values": list(pixel_values_of(images, processor, config))}
        if "label" in rows:
            batch["labels"] = rows["label"] if label_ids is None else [label_ids[label] for label in rows["label"]]
        return batch

    return transform


def _pictures(rows: dict, split: str | None) -> Iterator[Image.Image]:
    """The pictures of a batch of rows; a message about one that cannot be read names its row."""
    for place, source in enumerate(rows["image"]):
        try:
            yield load_image(source)
        except (OSError, TypeError, ValueError) as error:
            row = f"Row {rows['row'][place]}" if "row" in rows else "A row"
            raise ValueError(
                f"{row}{f' of the split {str(split)!r}' if split else ''} holds no readable image: {error}"
            ) from error


def with_transforms(
    splits: DatasetDict, model: PreTrainedModel, processor: BaseImageProcessor, args: DataArguments
) -> DatasetDict:
    """The splits as the model takes them: pixel_values, and labels by the model's own ids of the same names."""
    known = [str(model.config.id2label[label]) for label in range(model.config.num_labels)]
    label_ids = ids_by_name(splits["train"].features["label"].names, known)
    augmentation = {"horizontal_flip": args.horizontal_flip, "random_crop": args.random_crop}
    return DatasetDict(
        {
            name: undecoded(rows, "image").with_transform(
                make_transform(
                    processor,
                    model.config,
                    label_ids=label_ids,
                    split=rows.split,
                    **(augmentation if name == "train" else {}),
                )
            )
            for name, rows in splits.items()
        }
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of pictures whose most likely label is the right one."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def write_predictions(trainer: ShapleyTrainer, rows: Dataset, path: Path) -> dict[str, float]:
    """Predict every picture, write one line of JSON per picture, and return the metrics."""
    result = trainer.predict(rows, metric_key_prefix="predict")
    probabilities = label_scores(torch.from_numpy(result.predictions), trainer.model.config)
    names = trainer.model.config.id2label
    if trainer.is_world_process_zero():
        scores, ids = probabilities.max(-1)
        lines = [
            json.dumps({"row": i, "label": names[label], "score": round(score, 6)})
            for i, (label, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True))
        ]
        with whole_file(path) as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return result.metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the options ask for; return the evaluation's metrics."""
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=args.get_process_log_level())
    set_seed(args.seed)  # before the weights are drawn

    splits = load_splits(data_args, args.seed, evaluates=args.do_eval or args.eval_strategy != "no")
    model, processor = load_model(model_args, splits["train"].features["label"].names)
    splits = with_transforms(splits, model, processor, data_args)
    trainer = ShapleyTrainer(
        model,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    if args.do_train:
        # True tells the Trainer to look for the last checkpoint in the output folder itself.
        resume = True if args.resume_from_checkpoint == "last" else args.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        _report(trainer, "train", result.metrics)
    metrics = {}
    if args.do_eval:
        metrics = trainer.evaluate()
        _report(trainer, "eval", metrics)
    if args.do_predict:
        path = Path(args.output_dir) / "predictions.jsonl"
        _report(trainer, "predict", write_predictions(trainer, splits["predict"], path))
    card = {
        "finetuned_from": _hub_id(model_args.model),
        "dataset": data_args.dataset or "scikit-learn digits",
        "dataset_tags": _hub_id(data_args.dataset),
        "dataset_args": data_args.dataset_config,
    }
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    elif args.do_train:
        trainer.create_model_card(**card)  # once more: now it has the evaluation
    return metrics


def _hub_id(name: str | None) -> str | None:
    return None if name is None or Path(name).exists() else name


def _report(trainer: ShapleyTrainer, name: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)
