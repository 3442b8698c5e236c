"""A Swin V2 whose prediction is, exactly, a base value plus the Shapley values of its patches.

As the Swin, but that layers norm what they add (arXiv:2111.09883), and that the windows of each stage are those of the
configuration's image size.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Swinv2Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer, Swinv2Model, Swinv2PreTrainedModel

from .modeling_shapley import ShapleyImageClassifierMixin
from .window_backbone import InfluenceWindowLayer, WindowBackbone, WindowConfigMixin, WindowLayer, WindowRule


class ShapleySwinv2Config(WindowConfigMixin, Swinv2Config):
    """Configuration of `ShapleySwinv2ForImageClassification`: `Swinv2Config` plus `ShapleyConfigMixin`."""

    model_type = "shapley-swinv2"
    plain_model_type = "swinv2"


class ShapleySwinv2Layer(WindowLayer, GradientCheckpointingLayer, Swinv2Layer):
    """A Swin V2 layer that can keep coalitions apart, and be run again in the backward pass to save memory."""

    def ruled(self, cells: Tensor, rule: WindowRule | None) -> Tensor:
        cells = cells + self.drop_path(self.layernorm_before(self.attended(cells, rule)))
        return cells + self.drop_path(self.layernorm_after(self.output(self.intermediate(cells))))


class InfluenceSwinv2Layer(InfluenceWindowLayer, ShapleySwinv2Layer):
    """A Swin V2 layer for the influence head."""


class ShapleySwinv2Model(Swinv2Model):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock Swin V2, for its features."""

    config_class = ShapleySwinv2Config


class ShapleySwinv2ForImageClassification(ShapleyImageClassifierMixin, WindowBackbone, Swinv2PreTrainedModel):
    """Swin V2 image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain Swin V2 ones, whose predictions it keeps.
    """

    config_class = ShapleySwinv2Config
    features_class = ShapleySwinv2Model
    layer_class = ShapleySwinv2Layer
    influence_class = InfluenceSwinv2Layer
    _no_split_modules = ["Swinv2Embeddings", "ShapleySwinv2Layer"]

    def __init__(self, config: ShapleySwinv2Config):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.swinv2 = Swinv2Model(config, add_pooling_layer=False)
        self.classifier = nn.Linear(self.swinv2.num_features, config.num_labels)
        self.complete()
        self.post_init()

    def influence_options(self) -> dict[str, Any]:
        return {**super().influence_options(), "pretrained_window_size": self.config.pretrained_window_sizes[-1]}


ShapleySwinv2Config.register_for_auto_class()
ShapleySwinv2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleySwinv2Model.register_for_auto_class("AutoModel")
