"""An I-JEPA whose prediction is, exactly, a base value plus the Shapley values of its patches.

It has no prefix tokens: of a coalition the classifier reads the mean of its patches, and of no patch at all 0.
"""

from torch import Tensor, nn
from transformers import IJepaConfig
from transformers.models.ijepa.modeling_ijepa import IJepaLayer, IJepaMLP, IJepaModel, IJepaPreTrainedModel

from .configuration_shapley import TokenConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import InfluenceLayer, PreNormLayer, TokenBackbone, TokenMLP, mean_of_members


class ShapleyIJepaConfig(TokenConfigMixin, IJepaConfig):
    """Configuration of `ShapleyIJepaForImageClassification`: `IJepaConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-ijepa"
    plain_model_type = "ijepa"


class ShapleyIJepaMLP(TokenMLP, IJepaMLP):
    """An I-JEPA MLP with less memory where nothing is learned."""


class ShapleyIJepaLayer(PreNormLayer, IJepaLayer):
    """An I-JEPA layer that a `TokenRule` may rule."""


class InfluenceIJepaLayer(InfluenceLayer, IJepaLayer):
    """An I-JEPA layer for the influence head."""


class ShapleyIJepaModel(IJepaModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock I-JEPA, for its features."""

    config_class = ShapleyIJepaConfig


class ShapleyIJepaForImageClassification(ShapleyImageClassifierMixin, TokenBackbone, IJepaPreTrainedModel):
    """I-JEPA image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain I-JEPA ones, whose predictions it keeps.
    """

    config_class = ShapleyIJepaConfig
    features_class = ShapleyIJepaModel
    prefix = 0
    reads_prefix = False
    reads_cells = True
    layer_class = ShapleyIJepaLayer
    influence_class = InfluenceIJepaLayer
    own_forms = {IJepaMLP: ShapleyIJepaMLP}
    _no_split_modules = ["IJepaEmbeddings", "ShapleyIJepaLayer"]

    def __init__(self, config: ShapleyIJepaConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ijepa = IJepaModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.complete()
        self.post_init()

    def pool(self, prefix: Tensor, cells: Tensor | None, members: Tensor | None) -> Tensor:
        return mean_of_members(cells, members)


ShapleyIJepaConfig.register_for_auto_class()
ShapleyIJepaForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyIJepaModel.register_for_auto_class("AutoModel")
