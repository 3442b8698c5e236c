"""A ConvNeXt V2 whose prediction is, exactly, a base value plus the Shapley values of its patches.

As the ConvNeXt, but for global response normalisation: it sets each channel's L2 norm over space against the other
channels' (arXiv:2301.00808, eq. 1 to 3), which mixes all cells. Under a structure each coalition has its own norms.
"""

import torch
from torch import Tensor, nn
from transformers import ConvNextV2Config
from transformers.models.convnextv2.modeling_convnextv2 import (
    ConvNextV2GRN,
    ConvNextV2Layer,
    ConvNextV2Model,
    ConvNextV2PreTrainedModel,
)

from .configuration_shapley import CellConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .modeling_shapley_convnext import CellBackbone, CellLayer, InfluenceCellLayer
from .speed import apart, together


class ShapleyConvNextV2Config(CellConfigMixin, ConvNextV2Config):
    """Configuration of `ShapleyConvNextV2ForImageClassification`: `ConvNextV2Config` plus `ShapleyConfigMixin`."""

    model_type = "shapley-convnextv2"
    plain_model_type = "convnextv2"


class ShapleyConvNextV2GRN(ConvNextV2GRN):
    """Global response normalisation that can keep coalitions apart."""

    def forward(self, hidden_states: Tensor, masks: Tensor | None = None) -> Tensor:
        """The stock one; under masks the norms of a cell are those over its own coalition's members.

        Args:
            hidden_states: (B, H, W, C).
            masks: (B, G, H, W, 1), 1 = member.
        """
        if masks is None:
            return super().forward(hidden_states)
        own = apart(hidden_states, masks)  # (B, G, H, W, C)
        norms = torch.linalg.vector_norm(own, dim=(2, 3), keepdim=True)  # (B, G, 1, 1, C), 0 of the empty coalition
        norms = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        responses = together(norms.expand_as(own).to(masks.dtype), masks)  # (B, H, W, C)
        return self.weight * (hidden_states * responses) + self.bias + hidden_states


class ShapleyConvNextV2Layer(CellLayer, ConvNextV2Layer):
    """A ConvNeXt V2 layer that can keep coalitions apart."""

    def narrowed(self, hidden: Tensor, masks: Tensor | None) -> Tensor:
        return self.pwconv2(self.grn(hidden, masks))


class InfluenceConvNextV2Layer(InfluenceCellLayer, ShapleyConvNextV2Layer):
    """A ConvNeXt V2 layer for the influence head."""


class ShapleyConvNextV2Model(ConvNextV2Model):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock ConvNeXt V2, for its features."""

    config_class = ShapleyConvNextV2Config


class ShapleyConvNextV2ForImageClassification(ShapleyImageClassifierMixin, CellBackbone, ConvNextV2PreTrainedModel):
    """ConvNeXt V2 image classifier that gives logits and every patch's Shapley value for every label in one pass.

    Loads its own checkpoints and plain ConvNeXt V2 ones, whose predictions it keeps.
    """

    config_class = ShapleyConvNextV2Config
    features_class = ShapleyConvNextV2Model
    layer_class = ShapleyConvNextV2Layer
    influence_class = InfluenceConvNextV2Layer
    own_forms = {ConvNextV2GRN: ShapleyConvNextV2GRN}
    supports_gradient_checkpointing = True
    _no_split_modules = ["ShapleyConvNextV2Layer"]

    def __init__(self, config: ShapleyConvNextV2Config):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.convnextv2 = ConvNextV2Model(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.complete()
        self.post_init()


ShapleyConvNextV2Config.register_for_auto_class()
ShapleyConvNextV2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyConvNextV2Model.register_for_auto_class("AutoModel")
