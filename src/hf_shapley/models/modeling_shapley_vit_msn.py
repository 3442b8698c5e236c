"""A ViT-MSN whose prediction is, exactly, a base value plus the Shapley values of its patches."""

from torch import nn
from transformers import ViTMSNConfig
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNLayer, ViTMSNMLP, ViTMSNModel, ViTMSNPreTrainedModel

from .configuration_shapley import TokenConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import InfluenceLayer, PreNormLayer, TokenBackbone, TokenMLP


class ShapleyViTMSNConfig(TokenConfigMixin, ViTMSNConfig):
    """Configuration of `ShapleyViTMSNForImageClassification`: `ViTMSNConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-vit_msn"
    plain_model_type = "vit_msn"


class ShapleyViTMSNMLP(TokenMLP, ViTMSNMLP):
    """A ViT-MSN MLP with less memory where nothing is learned."""


class ShapleyViTMSNLayer(PreNormLayer, ViTMSNLayer):
    """A ViT-MSN layer that a `TokenRule` may rule."""


class InfluenceViTMSNLayer(InfluenceLayer, ViTMSNLayer):
    """A ViT-MSN layer for the influence head."""


class ShapleyViTMSNModel(ViTMSNModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock ViT-MSN, for its features."""

    config_class = ShapleyViTMSNConfig


class ShapleyViTMSNForImageClassification(ShapleyImageClassifierMixin, TokenBackbone, ViTMSNPreTrainedModel):
    """ViT-MSN image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain ViT-MSN ones, whose predictions it keeps.
    """

    config_class = ShapleyViTMSNConfig
    features_class = ShapleyViTMSNModel
    layer_class = ShapleyViTMSNLayer
    influence_class = InfluenceViTMSNLayer
    own_forms = {ViTMSNMLP: ShapleyViTMSNMLP}
    _no_split_modules = ["ViTMSNEmbeddings", "ShapleyViTMSNLayer"]

    def __init__(self, config: ShapleyViTMSNConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTMSNModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.complete()
        self.post_init()


ShapleyViTMSNConfig.register_for_auto_class()
ShapleyViTMSNForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyViTMSNModel.register_for_auto_class("AutoModel")
