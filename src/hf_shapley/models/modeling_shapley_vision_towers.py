"""The image classifiers on the vision towers of CLIP, MetaCLIP 2 and SigLIP, with their patches' Shapley values.

Of a coalition the classifier reads the mean of its patches after the last layer (SigLIP: after the norm that follows),
and of no patch at all 0. SigLIP has no prefix tokens; nothing reads CLIP's CLS, which takes part in the attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import CLIPConfig, MetaClip2Config, PreTrainedConfig, SiglipConfig
from transformers.models.clip import modeling_clip as clip
from transformers.models.metaclip_2 import modeling_metaclip_2 as metaclip_2
from transformers.models.siglip import modeling_siglip as siglip

from .configuration_shapley import SIZES, TokenConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import InfluenceLayer, TokenBackbone, TokenLayer, TokenMLP, mean_of_members

OF_THE_TOWER = {*SIZES, "hidden_act", "layer_norm_eps", "initializer_range"}


class TowerConfigMixin(TokenConfigMixin):
    """`TokenConfigMixin` for configurations that hold one of a text and one of a vision tower: the latter counts."""

    def __getattr__(self, name: str) -> Any:
        if name in OF_THE_TOWER:
            return getattr(self.vision_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_backbone(self) -> None:
        given: Any = self
        if not isinstance(given.vision_config, PreTrainedConfig):
            given.vision_config = self.sub_configs["vision_config"](**(given.vision_config or {}))
        super()._check_backbone()

    @classmethod
    def _fewest_weights(cls, stored: Mapping[str, Any]) -> dict[str, int]:
        tower = stored.get("vision_config")
        return super()._fewest_weights({**(tower if isinstance(tower, dict) else {}), **stored})


class ShapleyCLIPVisionConfig(TowerConfigMixin, CLIPConfig):
    """Configuration of `ShapleyCLIPForImageClassification`: `CLIPConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-clip"
    plain_model_type = "clip"


class ShapleyMetaClip2VisionConfig(TowerConfigMixin, MetaClip2Config):
    """Configuration of `ShapleyMetaClip2ForImageClassification`: `MetaClip2Config` plus `ShapleyConfigMixin`."""

    model_type = "shapley-metaclip_2"
    plain_model_type = "metaclip_2"


class ShapleySiglipVisionConfig(TowerConfigMixin, SiglipConfig):
    """Configuration of `ShapleySiglipForImageClassification`: `SiglipConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-siglip"
    plain_model_type = "siglip"


class TowerAttention:
    """A stock attention, whose numbers also have the names that they have in other models."""

    scaling = property(lambda self: self.scale)
    attention_dropout = property(lambda self: self.dropout)


class TowerLayer(TokenLayer):
    """A `TokenLayer` for layers that normalise first, under CLIP's names."""

    def projections(self) -> Any:
        return self.self_attn

    def normed(self, tokens: Tensor) -> Tensor:
        return self.layer_norm1(tokens)

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.self_attn.out_proj(attended)
        return tokens + self.mlp(self.layer_norm2(tokens))


class TowerInfluenceLayer(InfluenceLayer):
    """Such a layer for the influence head."""

    def __init__(self, config: Any):
        super().__init__(config.vision_config)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return super(InfluenceLayer, self).forward(tokens, None)


class TowerClassifier(ShapleyImageClassifierMixin, TokenBackbone):
    """What all of them have in common."""

    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    reads_prefix = False
    reads_cells = True
    plain_tower: Any

    def __init__(self, config: Any):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = self.plain_tower._from_config(config.vision_config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.complete()
        self.post_init()

    def stock_layers(self) -> Sequence[Any]:
        return self.stock.encoder.layers

    def final_norm(self) -> nn.Module:
        return self.stock.post_layernorm

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        embeddings = self.stock.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.stock.pre_layrnorm(embeddings) if hasattr(self.stock, "pre_layrnorm") else embeddings

    def pool(self, prefix: Tensor, cells: Tensor | None, members: Tensor | None) -> Tensor:
        return mean_of_members(cells, members)


class ShapleyCLIPMLP(TokenMLP, clip.CLIPMLP):
    """A CLIP MLP with less memory where nothing is learned."""


class ShapleyCLIPAttention(TowerAttention, clip.CLIPAttention):
    """The attention of CLIP."""


class ShapleyCLIPLayer(TowerLayer, clip.CLIPEncoderLayer):
    """A CLIP layer that a `TokenRule` may rule."""


class InfluenceCLIPLayer(TowerInfluenceLayer, clip.CLIPEncoderLayer):
    """A CLIP layer for the influence head."""


class ShapleyCLIPVisionTower(clip.CLIPVisionModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock vision tower, for its features."""

    config_class = ShapleyCLIPVisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: ShapleyCLIPVisionConfig):
        super().__init__(config.vision_config)


class ShapleyCLIPForImageClassification(TowerClassifier, clip.CLIPPreTrainedModel):
    """CLIP image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain CLIP ones, whose predictions it keeps.
    """

    config_class = ShapleyCLIPVisionConfig
    features_class = ShapleyCLIPVisionTower
    plain_tower = clip.CLIPVisionModel
    layer_class = ShapleyCLIPLayer
    influence_class = InfluenceCLIPLayer
    own_forms = {clip.CLIPMLP: ShapleyCLIPMLP, clip.CLIPAttention: ShapleyCLIPAttention}
    _no_split_modules = ["CLIPVisionEmbeddings", "ShapleyCLIPLayer"]

    def finish(self, tokens: Tensor) -> Tensor:
        return tokens  # the norm that follows is for CLS alone


class ShapleyMetaClip2MLP(TokenMLP, metaclip_2.MetaClip2MLP):
    """A MetaCLIP 2 MLP with less memory where nothing is learned."""


class ShapleyMetaClip2Attention(TowerAttention, metaclip_2.MetaClip2Attention):
    """The attention of MetaCLIP 2."""


class ShapleyMetaClip2Layer(TowerLayer, metaclip_2.MetaClip2EncoderLayer):
    """A MetaCLIP 2 layer that a `TokenRule` may rule."""


class InfluenceMetaClip2Layer(TowerInfluenceLayer, metaclip_2.MetaClip2EncoderLayer):
    """A MetaCLIP 2 layer for the influence head."""


class ShapleyMetaClip2VisionTower(metaclip_2.MetaClip2VisionModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock vision tower, for its features."""

    config_class = ShapleyMetaClip2VisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: ShapleyMetaClip2VisionConfig):
        super().__init__(config.vision_config)


class ShapleyMetaClip2ForImageClassification(TowerClassifier, metaclip_2.MetaClip2PreTrainedModel):
    """MetaCLIP 2 image classifier that gives logits and every patch's Shapley value in one forward pass.

    Loads its own checkpoints and plain MetaCLIP 2 ones, whose predictions it keeps.
    """

    config_class = ShapleyMetaClip2VisionConfig
    features_class = ShapleyMetaClip2VisionTower
    plain_tower = metaclip_2.MetaClip2VisionModel
    layer_class = ShapleyMetaClip2Layer
    influence_class = InfluenceMetaClip2Layer
    own_forms = {
        metaclip_2.MetaClip2MLP: ShapleyMetaClip2MLP,
        metaclip_2.MetaClip2Attention: ShapleyMetaClip2Attention,
    }
    _no_split_modules = ["MetaClip2VisionEmbeddings", "ShapleyMetaClip2Layer"]

    def finish(self, tokens: Tensor) -> Tensor:
        return tokens  # the norm that follows is for CLS alone


class ShapleySiglipMLP(TokenMLP, siglip.SiglipMLP):
    """A SigLIP MLP with less memory where nothing is learned."""


class ShapleySiglipAttention(TowerAttention, siglip.SiglipAttention):
    """The attention of SigLIP."""


class ShapleySiglipLayer(TowerLayer, siglip.SiglipEncoderLayer):
    """A SigLIP layer that a `TokenRule` may rule."""


class InfluenceSiglipLayer(TowerInfluenceLayer, siglip.SiglipEncoderLayer):
    """A SigLIP layer for the influence head."""


class ShapleySiglipVisionTower(siglip.SiglipVisionModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock vision tower, for its features."""

    config_class = ShapleySiglipVisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: ShapleySiglipVisionConfig):
        super().__init__(config.vision_config)


class ShapleySiglipForImageClassification(TowerClassifier, siglip.SiglipPreTrainedModel):
    """SigLIP image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain SigLIP ones, whose predictions it keeps.
    """

    config_class = ShapleySiglipVisionConfig
    features_class = ShapleySiglipVisionTower
    plain_tower = siglip.SiglipVisionModel
    layer_class = ShapleySiglipLayer
    influence_class = InfluenceSiglipLayer
    own_forms = {siglip.SiglipMLP: ShapleySiglipMLP, siglip.SiglipAttention: ShapleySiglipAttention}
    _no_split_modules = ["SiglipVisionEmbeddings", "ShapleySiglipLayer"]
    prefix = 0


ShapleyCLIPVisionConfig.register_for_auto_class()
ShapleyCLIPForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyCLIPVisionTower.register_for_auto_class("AutoModel")
ShapleyMetaClip2VisionConfig.register_for_auto_class()
ShapleyMetaClip2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyMetaClip2VisionTower.register_for_auto_class("AutoModel")
ShapleySiglipVisionConfig.register_for_auto_class()
ShapleySiglipForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleySiglipVisionTower.register_for_auto_class("AutoModel")
