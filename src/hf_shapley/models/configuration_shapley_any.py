"""Configuration of the Shapley classifier that holds any stock image classifier."""

import copy
import os
from collections.abc import Mapping
from math import isfinite
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    ImageProcessingMixin,
    PreTrainedConfig,
)

from .checks import check_number, check_pair, describe
from .configuration_shapley import ShapleyConfigMixin
from .stored_checkpoint import place_of

# Where neither the caller nor the stock configuration says what size images have.
USUAL_IMAGE_SIZE = 224
LABEL_ENTRIES = ("id2label", "label2id", "problem_type")


class ShapleyAnyConfig(ShapleyConfigMixin, PreTrainedConfig):
    """Configuration of `ShapleyForImageClassification`: a stock classifier's, and what a painted game needs.

    Attributes:
        stock_config: of the stock classifier, or its entries. Its labels are this configuration's.
        image_size: height and width of the images, pixels, or both in one. None = what the stock configuration says,
            or the checkpoint's image processor, or 224.
        player_size: height and width of one player, pixels, or both in one. None = the cells of the last features, or
            the finest grid that is no finer and tiles the image.
        paint: what the pixels of absent players are, after normalisation; 0 is the mean of an image processor that
            normalises.
        hidden_act: activation of the influence head.
        initializer_range: standard deviation of the influence head's first weights.

    There are neither own layers nor adapters, and the classifier reads what the stock one reads,
    `vote_readout="pooled"`.
    """

    model_type = "shapley-any"
    sub_configs = {"stock_config": AutoConfig}
    recommended_head = {"influence_own_layers": 0, "influence_layers": 5, "influence_block": "convolution"}

    stock_config: dict[str, Any] | PreTrainedConfig | None = None
    image_size: int | list[int] | tuple[int, ...] | None = None
    player_size: int | list[int] | tuple[int, ...] | None = None
    paint: float = 0.0
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.stock_config = stock = _stock_config(self.stock_config)
        given: Any = self
        if self.image_size is None:
            self.image_size = list(self.stock_size)
        check_number(self.paint, "paint", "finite", isfinite)
        if not given.id2label and kwargs.get("num_labels") is None:
            given.id2label, given.label2id = stock.id2label, stock.label2id
            kwargs["num_labels"] = None if stock.id2label else stock.num_labels  # some have the number alone
            given.problem_type = given.problem_type or stock.problem_type
        super().__post_init__(**kwargs)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return _both(self.image_size, "image_size")

    @property
    def stock_size(self) -> tuple[int, int]:
        """Those that the stock configuration says."""
        return _both(_said_size(self.stock_config) or USUAL_IMAGE_SIZE, "image_size")

    @property
    def player(self) -> tuple[int, int] | None:
        """Height and width of one player, pixels, where they are asked for."""
        return None if self.player_size is None else _both(self.player_size, "player_size")

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return _entry(self.stock_config, "num_channels", 3)

    def check_head(self) -> None:
        """As for all backbones; and refuse what needs a look inside the stock model."""
        super().check_head()
        for name, value, why in (
            ("vote_readout", "pooled", "the stock classifier reads no single patch"),
            ("coalition_adapter_size", 0, "layers of a stock model take none"),
        ):
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` must be {value!r} here, got {getattr(self, name)!r}: {why}.")
        if self.influence_block == "backbone":
            raise ValueError("`influence_block` must be 'mlp' or 'convolution' here, got 'backbone'.")

    def _last_layers(self) -> int:
        return 0

    def _check_labels(self) -> None:
        """As for all backbones; the stock configuration has the same labels."""
        super()._check_labels()
        stock: Any = self.stock_config
        stock.num_labels = self.num_labels
        stock.id2label, stock.label2id = dict(self.id2label), dict(self.label2id)

    @classmethod
    def check_stored_sizes(cls, name: Any, **options: Any) -> None:
        """Nothing: what a stock configuration calls for is transformers' to judge, whoever loads it."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As for all backbones; of a stock classifier that takes any size, the size its image processor gives."""
        entries, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        stock, size = entries.get("stock_config"), entries.get("image_size")
        if stock and size is None and _said_size(_stock_config(stock)) is None:
            entries = {**entries, "image_size": _processed_size(pretrained_model_name_or_path, kwargs)}
        return entries, kwargs

    @classmethod
    def _of_plain(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A stock classifier's entries as ours."""
        stock = _stock_config(dict(entries))  # some name their labels in ways of their own
        ours = {name: getattr(stock, name) for name in (*LABEL_ENTRIES, "dtype")}
        return {"model_type": cls.model_type, "stock_config": stock.to_dict(), **ours}

    @classmethod
    def _check_type(cls, found: str, what: str) -> None:
        """Refuse what is no image classifier of transformers'."""
        if found != cls.model_type and not is_plain_classifier(found):
            raise ValueError(
                f"{cls.__name__} reads checkpoints of image classifiers that transformers has, but {what} is of type "
                f"{found!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As the stock one; labels are written once."""
        entries = super().to_dict()
        if isinstance(entries.get("stock_config"), dict):
            for name in (*LABEL_ENTRIES, "label_names"):
                entries["stock_config"].pop(name, None)
        return entries


def is_plain_classifier(model_type: str) -> bool:
    """Whether transformers has image classifiers of this type, ours not counted."""
    if model_type not in CONFIG_MAPPING or model_type.startswith("shapley-"):
        return False
    return CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _stock_config(found: Any) -> PreTrainedConfig:
    """A stock classifier's configuration, from its entries; as it is if it is one."""
    if isinstance(found, dict) and is_plain_classifier(str(found.get("model_type"))):
        return CONFIG_MAPPING[found["model_type"]].from_dict(found)
    if isinstance(found, PreTrainedConfig) and is_plain_classifier(type(found).model_type):
        return copy.deepcopy(found)  # which will get the labels of ours
    raise ValueError(
        "`stock_config` must be the configuration of an image classifier that transformers has, or its entries with "
        f"`model_type`, got {describe(found)}."
    )


def _entry(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """An entry of a stock configuration, or of its vision part."""
    places = (config, getattr(config, "vision_config", None))
    return next((value for place in places if (value := getattr(place, name, None)) is not None), default)


def _said_size(config: PreTrainedConfig) -> Any:
    """Height and width of images, as a stock configuration says them; None where it does not."""
    of_timm = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")  # channels come first
    return of_timm[-2:] if of_timm else _entry(config, "image_size", None)


def _processed_size(name: str | os.PathLike, options: Mapping[str, Any]) -> list[int] | None:
    """Height and width of what a checkpoint's image processor gives; None where it has none, or gives any."""
    try:
        entries, _ = ImageProcessingMixin.get_image_processor_dict(name, **place_of(options))
    except (OSError, ValueError):
        return None
    size = entries.get("crop_size") or entries.get("size")
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    return list(_both(size, "size")) if isinstance(size, int) or (size and None not in size) else None


def _both(size: Any, name: str) -> tuple[int, int]:
    """Height and width, where one number stands for both."""
    return check_pair((size, size) if isinstance(size, int) else size, name, "a height and a width in pixels")


ShapleyAnyConfig.register_for_auto_class()
