"""Which pictures a training learns from: the splits of a data set, each with labels of the same names."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from .digits import digits_dataset
from .labels import class_names, row_names

logger = logging.getLogger(__name__)


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

    def __post_init__(self) -> None:
        for name in ("held_out", "random_crop"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`--{name}` must lie in (0, 1], got {getattr(self, name)}.")


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
    places: dict[str | None, int] = {name: place for place, name in enumerate(names)}
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
