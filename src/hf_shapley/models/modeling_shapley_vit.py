"""A ViT whose prediction is, exactly, a base value plus the Shapley values of its patches."""

from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTLayer, ViTMLP, ViTModel, ViTPreTrainedModel

from .configuration_shapley import ShapleyViTConfig
from .heads import AttributionHead, coalition_adapters
from .modeling_shapley import ShapleyImageClassifierMixin
from .speed import activated
from .token_backbone import TokenBackbone, TokenLayer


class ShapleyViTMLP(ViTMLP):
    """The stock MLP, with less memory where nothing is learned."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(activated(self.activation_fn, self.fc1(hidden_states), self.fc1))


class ShapleyViTLayer(TokenLayer, ViTLayer):
    """A ViT layer that a `TokenRule` may rule."""

    def normed(self, tokens: Tensor) -> Tensor:
        return self.layernorm_before(tokens)

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention.o_proj(attended))
        return tokens + self.dropout(self.mlp(self.layernorm_after(tokens)))


class InfluenceViTLayer(ViTLayer):
    """A ViT layer over all tokens, or the patches', for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # no mask
        return super().forward(tokens)


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
    _no_split_modules = ["ViTEmbeddings", "ShapleyViTLayer"]

    def __init__(self, config: ShapleyViTConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.take_layers()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.attribution_head = AttributionHead(config, config.hidden_size, lambda: InfluenceViTLayer(config))
        self.coalition_adapters = coalition_adapters(config, self.adapter_widths())
        for module in self.modules():
            if type(module) is ViTMLP:
                module.__class__ = ShapleyViTMLP
        self.post_init()


ShapleyViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyViTModel.register_for_auto_class("AutoModel")
