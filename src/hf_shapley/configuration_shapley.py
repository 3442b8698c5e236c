"""Configurations of the Shapley classifiers: the stock ViT and ConvNeXt ones plus the attribution head's options."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import ConvNextConfig, ViTConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

ATTRIBUTION_HEADS = ("votes", "votes+influence")
INFLUENCE_BLOCKS = ("mlp", "backbone")


@dataclass(repr=False)
class ShapleyConfigMixin:
    """Options shared by both backbones.

    Args:
        attribution_head: "votes" (attributions are the patches' votes) or "votes+influence" (votes plus a learned term
            that sums to zero over the players, so that attributions can differ from votes while their sum cannot).
        vote_layers: depth of the residual MLP before the classifier; 0 applies the stock classifier to patch tokens.
        influence_layers: blocks of the influence head, at least 1; used with "votes+influence" only.
        influence_block: "mlp" (each token by itself) or "backbone" (ViT or ConvNeXt layers, which mix tokens).
        vote_gradient: share of the gradient of the attributions that reaches the votes while training, 0 to 1;
            None means 1 for "votes" and 0 for "votes+influence". Logits are never affected.
        influence_gradient: share of the gradient of the influence head that reaches the backbone's tokens, 0 to 1.
    """

    attribution_head: str = "votes"
    vote_layers: int = 0
    influence_layers: int = 2
    influence_block: str = "mlp"
    vote_gradient: float | int | None = None
    influence_gradient: float | int = 1.0

    # Trainer's evaluation would otherwise gather every attribution of the data set (images x players x labels).
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "attributions",
        "base_values",
        "coalition_votes",
        "coalition_gains",
        "coalition_attributions",
        "hidden_states",
        "attentions",
    ]
    plain_model_type: ClassVar[str]

    def __post_init__(self, **kwargs):
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # The library registers its own pipeline: a repository's copy of it, and trust in that, is not needed.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if not self.label2id and self.id2label:
            self.label2id = {label: index for index, label in self.id2label.items()}
        if self.attribution_head not in ATTRIBUTION_HEADS:
            raise ValueError(f"`attribution_head` must be one of {ATTRIBUTION_HEADS}, got {self.attribution_head!r}.")
        if self.influence_block not in INFLUENCE_BLOCKS:
            raise ValueError(f"`influence_block` must be one of {INFLUENCE_BLOCKS}, got {self.influence_block!r}.")
        if self.influence_layers < 1 or self.vote_layers < 0:
            raise ValueError(
                "`influence_layers` must be at least 1 and `vote_layers` at least 0, "
                f"got {self.influence_layers} and {self.vote_layers}."
            )
        if self.vote_gradient is None:
            self.vote_gradient = 1.0 if self.attribution_head == "votes" else 0.0
        for name in ("vote_gradient", "influence_gradient"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a config, taking plain checkpoints of the same backbone as our own and refusing other architectures."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config_dict.get("model_type")
        if found is not None and found not in (cls.model_type, cls.plain_model_type):
            raise ValueError(
                f"{cls.__name__} reads checkpoints of type {cls.plain_model_type!r} or {cls.model_type!r}, but "
                f"{str(pretrained_model_name_or_path)!r} is of type {found!r}: use a checkpoint of that backbone."
            )
        if found == cls.plain_model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs


class ShapleyViTConfig(ShapleyConfigMixin, ViTConfig):
    """Configuration of [`ShapleyViTForImageClassification`]: `ViTConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-vit"
    plain_model_type = "vit"


class ShapleyConvNextConfig(ShapleyConfigMixin, ConvNextConfig):
    """Configuration of [`ShapleyConvNextForImageClassification`]: `ConvNextConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-convnext"
    plain_model_type = "convnext"


ShapleyViTConfig.register_for_auto_class()
ShapleyConvNextConfig.register_for_auto_class()
