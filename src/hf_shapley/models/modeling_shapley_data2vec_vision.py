"""A Data2Vec-Vision whose prediction is, exactly, a base value plus the Shapley values of its patches: as the BEiT."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Data2VecVisionConfig
from transformers.models.data2vec import modeling_data2vec_vision as plain

from .modeling_shapley import ShapleyImageClassifierMixin
from .modeling_shapley_beit import BiasedBackbone, BiasedConfigMixin, BiasedInfluenceLayer, BiasedLayer
from .token_backbone import TokenRule


class ShapleyData2VecVisionConfig(BiasedConfigMixin, Data2VecVisionConfig):
    """Configuration of `ShapleyData2VecVisionForImageClassification`, plus `ShapleyConfigMixin`."""

    model_type = "shapley-data2vec-vision"
    plain_model_type = "data2vec-vision"


class NamedAsElsewhere:
    """The stock self-attention, whose parts also have the names that they have in other models."""

    q_proj = property(lambda self: self.query)
    k_proj = property(lambda self: self.key)
    v_proj = property(lambda self: self.value)
    head_dim = property(lambda self: self.attention_head_size)
    scaling = property(lambda self: self.attention_head_size**-0.5)
    attention_dropout = property(lambda self: self.config.attention_probs_dropout_prob)


class ShapleyData2VecVisionSelfAttention(NamedAsElsewhere, plain.Data2VecVisionSelfAttention):
    """The eager one."""


class ShapleyData2VecVisionSdpaSelfAttention(NamedAsElsewhere, plain.Data2VecVisionSdpaSelfAttention):
    """The one of torch."""


class ShapleyData2VecVisionLayer(BiasedLayer, plain.Data2VecVisionLayer):
    """A Data2Vec-Vision layer that a `TokenRule` may rule."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if isinstance(attention_mask, TokenRule):
            return super().forward(hidden_states, attention_mask)
        return plain.Data2VecVisionLayer.forward(self, hidden_states, **kwargs)  # which takes no mask

    def projections(self) -> Any:
        return self.attention.attention

    def own_bias(self) -> Any:
        attention = self.attention.attention
        return attention.relative_position_bias if attention.has_relative_position_bias else None

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        first, second = (1.0 if scale is None else scale for scale in (self.lambda_1, self.lambda_2))
        tokens = self.drop_path(first * self.attention.output(attended, tokens)) + tokens
        return self.drop_path(second * self.output(self.intermediate(self.layernorm_after(tokens)))) + tokens


class InfluenceData2VecVisionLayer(BiasedInfluenceLayer, ShapleyData2VecVisionLayer):  # type: ignore[misc]  # no mask
    """A Data2Vec-Vision layer for the influence head."""

    def __init__(self, config: ShapleyData2VecVisionConfig):
        sizes = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
        grid = sizes[0] // config.patch_size, sizes[1] // config.patch_size
        super().__init__(config, window_size=grid if config.use_relative_position_bias else None)


class ShapleyData2VecVisionModel(plain.Data2VecVisionModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock one, for its features."""

    config_class = ShapleyData2VecVisionConfig


class ShapleyData2VecVisionForImageClassification(
    ShapleyImageClassifierMixin, BiasedBackbone, plain.Data2VecVisionPreTrainedModel
):
    """Data2Vec-Vision image classifier that gives logits and every patch's Shapley value in one forward pass.

    Loads its own checkpoints and plain Data2Vec-Vision ones, whose predictions it keeps, and takes images of any size.
    """

    config_class = ShapleyData2VecVisionConfig
    features_class = ShapleyData2VecVisionModel
    layer_class = ShapleyData2VecVisionLayer
    influence_class = InfluenceData2VecVisionLayer
    own_forms = {
        plain.Data2VecVisionSelfAttention: ShapleyData2VecVisionSelfAttention,
        plain.Data2VecVisionSdpaSelfAttention: ShapleyData2VecVisionSdpaSelfAttention,
    }
    _no_split_modules = ["ShapleyData2VecVisionLayer"]

    def __init__(self, config: ShapleyData2VecVisionConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reads_cells = config.use_mean_pooling
        self.reads_prefix = not self.reads_cells
        self.data2vec_vision = plain.Data2VecVisionModel(config, add_pooling_layer=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.complete()
        self.post_init()

    def stock_layers(self) -> Sequence[Any]:
        return self.stock.encoder.layer

    def shared_bias(self) -> Any:
        encoder = self.stock.encoder
        return encoder.relative_position_bias if encoder.has_relative_position_bias else None

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        return super().embed(pixel_values, interpolate_pos_encoding)[0]  # the stock embeddings give their grid too


ShapleyData2VecVisionConfig.register_for_auto_class()
ShapleyData2VecVisionForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyData2VecVisionModel.register_for_auto_class("AutoModel")
