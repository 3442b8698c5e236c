"""A DINOv2, with registers or without, whose prediction is a base value plus the Shapley values of its patches.

Of a coalition the classifier reads CLS and the mean of the coalition's own patches, side by side; of no patch at all
that mean is 0. Registers are prefix tokens that nothing reads.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, cat, nn, zeros_like
from transformers import Dinov2Config, Dinov2WithRegistersConfig
from transformers.models.dinov2 import modeling_dinov2 as plain
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as with_registers

from .configuration_shapley import TokenConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import InfluenceLayer, TokenBackbone, TokenLayer, TokenMLP, mean_of_members


class ShapleyDinov2Config(TokenConfigMixin, Dinov2Config):
    """Configuration of `ShapleyDinov2ForImageClassification`: `Dinov2Config` plus `ShapleyConfigMixin`."""

    model_type = "shapley-dinov2"
    plain_model_type = "dinov2"


class ShapleyDinov2WithRegistersConfig(TokenConfigMixin, Dinov2WithRegistersConfig):
    """Configuration of `ShapleyDinov2WithRegistersForImageClassification`, plus `ShapleyConfigMixin`."""

    model_type = "shapley-dinov2_with_registers"
    plain_model_type = "dinov2_with_registers"


class ScaledLayer(TokenLayer):
    """A `TokenLayer` for layers that scale what they add, and may drop it."""

    def normed(self, tokens: Tensor) -> Tensor:
        return self.norm1(tokens)

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = self.drop_path(self.layer_scale1(self.attention.o_proj(attended))) + tokens
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(tokens)))) + tokens


class ShapleyDinov2MLP(TokenMLP, plain.Dinov2MLP):
    """A DINOv2 MLP with less memory where nothing is learned."""


class ShapleyDinov2Layer(ScaledLayer, plain.Dinov2Layer):
    """A DINOv2 layer that a `TokenRule` may rule."""


class InfluenceDinov2Layer(InfluenceLayer, plain.Dinov2Layer):
    """A DINOv2 layer for the influence head."""


class ShapleyDinov2WithRegistersMLP(TokenMLP, with_registers.Dinov2WithRegistersMLP):
    """The same with registers."""


class ShapleyDinov2WithRegistersLayer(ScaledLayer, with_registers.Dinov2WithRegistersLayer):
    """The same with registers."""


class InfluenceDinov2WithRegistersLayer(InfluenceLayer, with_registers.Dinov2WithRegistersLayer):
    """The same with registers."""


class ShapleyDinov2Model(plain.Dinov2Model):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock DINOv2, for its features."""

    config_class = ShapleyDinov2Config


class ShapleyDinov2WithRegistersModel(with_registers.Dinov2WithRegistersModel):
    """The same with registers."""

    config_class = ShapleyDinov2WithRegistersConfig


class Dinov2Classifier(ShapleyImageClassifierMixin, TokenBackbone):
    """What both have in common."""

    reads_cells = True
    takes_any_size = True
    plain_model: type

    def __init__(self, config: Any):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.add_module(self.base_model_prefix, self.plain_model(config))
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.complete(readout_size=2 * config.hidden_size)
        self.post_init()

    def stock_layers(self) -> Sequence[Any]:
        return self.stock.encoder.layer

    def pool(self, prefix: Tensor, cells: Tensor | None, members: Tensor | None) -> Tensor:
        cls = prefix[:, :, 0]
        return cat([cls, zeros_like(cls) if cells is None else mean_of_members(cells, members)], dim=-1)

    def votes(self, cells: Tensor) -> Tensor:
        return cells.repeat(1, 1, 2)


class ShapleyDinov2ForImageClassification(Dinov2Classifier, plain.Dinov2PreTrainedModel):
    """DINOv2 image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain DINOv2 ones, whose predictions it keeps, and takes images of any size.
    """

    config_class = ShapleyDinov2Config
    features_class = ShapleyDinov2Model
    plain_model = plain.Dinov2Model
    layer_class = ShapleyDinov2Layer
    influence_class = InfluenceDinov2Layer
    own_forms = {plain.Dinov2MLP: ShapleyDinov2MLP}
    _no_split_modules = ["Dinov2Embeddings", "ShapleyDinov2Layer"]


class ShapleyDinov2WithRegistersForImageClassification(
    Dinov2Classifier, with_registers.Dinov2WithRegistersPreTrainedModel
):
    """`ShapleyDinov2ForImageClassification` for DINOv2 with registers."""

    config_class = ShapleyDinov2WithRegistersConfig
    features_class = ShapleyDinov2WithRegistersModel
    plain_model = with_registers.Dinov2WithRegistersModel
    layer_class = ShapleyDinov2WithRegistersLayer
    influence_class = InfluenceDinov2WithRegistersLayer
    own_forms = {with_registers.Dinov2WithRegistersMLP: ShapleyDinov2WithRegistersMLP}
    _no_split_modules = ["Dinov2WithRegistersEmbeddings", "ShapleyDinov2WithRegistersLayer"]


ShapleyDinov2Config.register_for_auto_class()
ShapleyDinov2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyDinov2Model.register_for_auto_class("AutoModel")
ShapleyDinov2WithRegistersConfig.register_for_auto_class()
ShapleyDinov2WithRegistersForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyDinov2WithRegistersModel.register_for_auto_class("AutoModel")
