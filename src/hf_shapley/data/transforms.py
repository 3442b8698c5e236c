"""From rows of a split to what a model takes: pixel values, and labels by its own ids."""

import random
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

from datasets import DatasetDict
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..models.pipeline_shapley import pixel_values_of
from .dataset_images import read_picture, undecoded
from .labels import ids_by_name
from .splits import DataArguments


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
        numbers = rows.get("row", [None] * len(rows["image"]))
        pictures = zip(rows["image"], numbers, strict=True)
        images = [augment(read_picture(image, number, split=split)) for image, number in pictures]
        batch: dict[str, Any] = {"pixel_values": list(pixel_values_of(images, processor, config))}
        if "label" in rows:
            batch["labels"] = rows["label"] if label_ids is None else [label_ids[label] for label in rows["label"]]
        return batch

    return transform


def with_transforms(
    splits: DatasetDict, model: PreTrainedModel, processor: BaseImageProcessor, args: DataArguments
) -> DatasetDict:
    """The splits as the model takes them: pixel_values, and labels by the model's own ids of the same names."""
    known = [str(model.config.id2label[label]) for label in range(model.config.num_labels)]
    label_ids = ids_by_name(splits["train"].features["label"].names, known)
    augmentation: dict[str, Any] = {"horizontal_flip": args.horizontal_flip, "random_crop": args.random_crop}
    return DatasetDict(
        {
            name: undecoded(rows, "image").with_transform(
                make_transform(
                    processor,
                    model.config,
                    label_ids=label_ids,
                    split=str(rows.split) if rows.split else None,
                    **(augmentation if name == "train" else {}),
                )
            )
            for name, rows in splits.items()
        }
    )
