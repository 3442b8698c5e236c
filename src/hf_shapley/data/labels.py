"""Labels of a data set and of a model: names, in one place, because ids alone do not say what they mean."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Value


def label_maps(names: Sequence[str]) -> dict[str, dict]:
    """What a configuration keeps of label names, `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def given_names(id2label: Mapping[int, Any]) -> list[str]:
    """A model's label names in order; empty where they were never given and are transformers' LABEL_0, LABEL_1 ..."""
    names = [str(id2label[label]) for label in sorted(id2label)]
    return [] if names == [f"LABEL_{label}" for label in range(len(names))] else names


def ids_by_name(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Where each of a data set's label names stands among a model's.

    Args:
        names: of the data set, in the order of its ids.
        known: of the model, in the order of its ids.

    Returns:
        The model's id of each of the data set's ids.

    Raises:
        ValueError: a name is none of the model's, or one that several of its labels share.
    """
    if list(names) == list(known):
        return list(range(len(known)))
    counts = Counter(known)
    unclear = [name for name in names if counts[name] != 1]
    if unclear:
        raise ValueError(
            f"The data set's labels {unclear[:10]} must each be the name of one of the model's labels, which are "
            f"{list(known)[:20]}: rename the data set's classes."
        )
    places = {name: place for place, name in enumerate(known)}
    return [places[name] for name in names]


def check_labels_of_checkpoint(checkpoint: str | os.PathLike, id2label: Mapping[int, str]) -> None:
    """Refuse to go on from a checkpoint whose label ids mean something else.

    Args:
        checkpoint: its folder.
        id2label: what they mean to the model that goes on.

    Raises:
        ValueError: the checkpoint's configuration names its labels, and not like that.
    """
    config = Path(checkpoint) / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8")).get("id2label") if config.exists() else None
    theirs = given_names({int(label): name for label, name in (saved or {}).items()})
    ours = given_names(id2label)
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"`resume_from_checkpoint`: the labels of {str(checkpoint)!r} are {theirs[:10]}, those of the model "
            f"{ours[:10]}: go on with the data set and the model that it was started with."
        )


def row_names(rows: Dataset, column: str) -> list[str | None]:
    """The name of each row's label: its class's, else `str(value)`; None where there is no label.

    Raises:
        ValueError: the column holds more than one value per row.
    """
    feature = rows.features[column]
    if not isinstance(feature, ClassLabel | Value):
        raise ValueError(
            f"The labels in {column!r} must be one text, number or class per row, got {feature}: give a column with "
            "one label per picture."
        )
    values = rows.with_format(None)[column][:]
    if isinstance(feature, ClassLabel):  # in which -1 stands for no label
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    return [None if value is None or value != value else str(value) for value in values]  # NaN is not itself


def class_names(rows: Dataset, column: str) -> list[str]:
    """The classes of a column of labels: a `ClassLabel`'s own, else `str(value)` of its values, in their own order.

    Numbers are in numeric order, text is sorted.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    names = row_names(rows, column)
    values = rows.with_format(None)[column][:]
    by_value = {value: name for value, name in zip(values, names, strict=True) if name is not None}
    return [by_value[value] for value in sorted(by_value)]
