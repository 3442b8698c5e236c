"""Configurations of models of image and text: the stock ones plus the options of their attribution heads."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import CLIPConfig, PreTrainedConfig, SiglipConfig

from .checks import check_choice, check_count, describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    Config = object  # the options join those of the stock configuration that a class inherits from besides

BLOCKS = ("mlp", "backbone")


@dataclass(frozen=True)
class SideOptions:
    """What the attribution head of one side, image or text, is made of: an `AttributionHead`'s options.

    Args:
        influence_own_layers: copies of that side's last layers.
        influence_layers: blocks after those.
        influence_block: "mlp" or "backbone".
        attribution_gradient: whether the gradient of the attributions reaches the embedding's weights.
        hidden_act: that side's activation.
        layer_norm_eps: that side's.
    """

    influence_own_layers: int
    influence_layers: int
    influence_block: str
    attribution_gradient: bool
    hidden_act: str
    layer_norm_eps: float
    vote_readout: ClassVar[str] = "pooled"
    has_influence_head: ClassVar[bool] = True

    def check_head(self) -> None:
        """Nothing is left to refuse: `side_options` has asked."""


@dataclass(repr=False)
class ImageTextConfigMixin(Config):
    """Options of both attribution heads of a model of image and text.

    Args:
        influence_own_layers: how many of the last layers of each side its head has its own copies of.
        influence_layers: blocks of the head after those; one of both must be above 0.
        influence_block: "mlp" (each token by itself) or "backbone" (layers as that side has).
        attribution_gradient: whether learning to be explained teaches the embeddings through the attributions.
    """

    influence_own_layers: int = 1
    influence_layers: int = 0
    influence_block: str = "mlp"
    attribution_gradient: bool = False

    # Trainer's evaluation would otherwise gather every attribution of the data set.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "image_attributions",
        "text_attributions",
        "image_base_embeds",
        "text_base_embeds",
        "image_coalition_embeds",
        "text_coalition_embeds",
        "text_model_output",
        "vision_model_output",
    ]
    plain_model_type: ClassVar[str]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_head()

    def check_head(self) -> None:
        """Refuse options from which no head can be built."""
        for name in ("influence_own_layers", "influence_layers"):
            check_count(getattr(self, name), name, 0)
        check_choice(self.influence_block, "influence_block", BLOCKS)
        got: Any = self.attribution_gradient
        if not isinstance(got, bool):
            raise TypeError(f"`attribution_gradient` must be True or False, got {describe(got)}.")
        if not self.influence_own_layers + self.influence_layers:
            raise ValueError(
                "Without a head all patches, and all words, would have the same share, got `influence_own_layers` 0 "
                "and `influence_layers` 0: set one of them above 0."
            )
        fewest = min(self.text_config.num_hidden_layers, self.vision_config.num_hidden_layers)
        if self.influence_own_layers > fewest:
            raise ValueError(
                f"`influence_own_layers` must be at most {fewest}, the layers there are to copy, got "
                f"{self.influence_own_layers}."
            )

    def side_options(self, side: PreTrainedConfig) -> SideOptions:
        """The options of the head of the side that has this configuration; refuses those of no head."""
        self.check_head()  # options can be set after creation
        return SideOptions(
            self.influence_own_layers,
            self.influence_layers,
            self.influence_block,
            self.attribution_gradient,
            side.hidden_act,
            side.layer_norm_eps,
        )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a config, taking plain checkpoints as our own and refusing other architectures."""
        entries, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "model_type" in entries:
            cls._check_type(entries["model_type"], repr(str(pretrained_model_name_or_path)))
            entries = {**entries, "model_type": cls.model_type}
        return entries, kwargs

    @classmethod
    def of(cls, config: PreTrainedConfig, **options: Any) -> PreTrainedConfig:
        """A configuration of ours as it is, or a plain one as ours; with options, a copy.

        Raises:
            ValueError: a configuration of another architecture.
        """
        found = getattr(type(config), "model_type", cls.model_type)
        if found != cls.model_type:
            cls._check_type(found, "the configuration given")
            entries = {**config.to_dict(), "model_type": cls.model_type, **options}
            return cls(**entries, attn_implementation=config._attn_implementation)
        if options:
            config = copy.deepcopy(config)
            for name, value in options.items():
                setattr(config, name, value)
            config.check_head()
        return config

    @classmethod
    def _check_type(cls, found: str, what: str) -> None:
        if found not in (cls.model_type, cls.plain_model_type):
            raise ValueError(
                f"{cls.__name__} reads checkpoints of type {cls.plain_model_type!r} or {cls.model_type!r}, but "
                f"{what} is of type {found!r}: use a checkpoint of that architecture."
            )


class ShapleyCLIPConfig(ImageTextConfigMixin, CLIPConfig):
    """Configuration of `ShapleyCLIPModel`: `CLIPConfig` plus `ImageTextConfigMixin`."""

    model_type = "shapley-clip-model"
    plain_model_type = "clip"


class ShapleySiglipConfig(ImageTextConfigMixin, SiglipConfig):
    """Configuration of `ShapleySiglipModel`: `SiglipConfig` plus `ImageTextConfigMixin`."""

    model_type = "shapley-siglip-model"
    plain_model_type = "siglip"


ShapleyCLIPConfig.register_for_auto_class()
ShapleySiglipConfig.register_for_auto_class()
