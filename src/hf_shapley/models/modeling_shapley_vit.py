"""A ViT whose prediction is, exactly, a base value plus the Shapley values of its patches."""

from torch import nn
from transformers.models.vit.modeling_vit import ViTLayer, ViTMLP, ViTModel, ViTPreTrainedModel

from .configuration_shapley import ShapleyViTConfig
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import InfluenceLayer, PreNormLayer, TokenBackbone, TokenMLP


class ShapleyViTMLP(TokenMLP, ViTMLP):
    """A ViT MLP with less memory where nothing is learned."""


class ShapleyViTLayer(PreNormLayer, ViTLayer):
    """A ViT layer that a `TokenRule` may rule."""


class InfluenceViTLayer(InfluenceLayer, ViTLayer):
    """A ViT layer for the influence head."""


class ShapleyViTModel(ViTModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock ViT, for its features."""

    config_class = ShapleyViTConfig

    def __init__(self, config: ShapleyViTConfig):
        super().__init__(config, add_pooling_layer=False)


class ShapleyViTForImageClassification(ShapleyImageClassifierMixin, TokenBackbone, ViTPreTrainedModel):
    """ViT image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain ViT ones, whose predictions it keeps.
    """

    config_class = ShapleyViTConfig
    features_class = ShapleyViTModel
    layer_class = ShapleyViTLayer
    influence_class = InfluenceViTLayer
    own_forms = {ViTMLP: ShapleyViTMLP}
    _no_split_modules = ["ViTEmbeddings", "ShapleyViTLayer"]

    def __init__(self, config: ShapleyViTConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.complete()
        self.post_init()


ShapleyViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyViTModel.register_for_auto_class("AutoModel")
