"""A DeiT whose prediction is, exactly, a base value plus the Shapley values of its patches.

One file for both stock classifiers: of a distilled one the readout is that of CLS and that of the distillation token,
side by side, and the classifier is the mean of two linear layers.
"""

from typing import Any

from torch import Tensor, nn
from transformers import DeiTConfig
from transformers.models.deit.modeling_deit import DeiTLayer, DeiTMLP, DeiTModel, DeiTPreTrainedModel

from .configuration_shapley import TokenConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import InfluenceLayer, PreNormLayer, TokenBackbone, TokenMLP


class ShapleyDeiTConfig(TokenConfigMixin, DeiTConfig):
    """Configuration of `ShapleyDeiTForImageClassification`: `DeiTConfig` plus `ShapleyConfigMixin`.

    Attributes:
        distilled: whether the classifier reads the distillation token too, as `DeiTForImageClassificationWithTeacher`
            does. None = as the checkpoint's `architectures` say.
    """

    model_type = "shapley-deit"
    plain_model_type = "deit"

    distilled: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.distilled is None:
            named = kwargs.get("architectures") or self.architectures or []
            self.distilled = "DeiTForImageClassificationWithTeacher" in named
        super().__post_init__(**kwargs)


class ShapleyDeiTMLP(TokenMLP, DeiTMLP):
    """A DeiT MLP with less memory where nothing is learned."""


class ShapleyDeiTLayer(PreNormLayer, DeiTLayer):
    """A DeiT layer that a `TokenRule` may rule."""


class InfluenceDeiTLayer(InfluenceLayer, DeiTLayer):
    """A DeiT layer for the influence head."""


class ShapleyDeiTModel(DeiTModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock DeiT, for its features."""

    config_class = ShapleyDeiTConfig

    def __init__(self, config: ShapleyDeiTConfig):
        super().__init__(config, add_pooling_layer=False)


class ShapleyDeiTForImageClassification(ShapleyImageClassifierMixin, TokenBackbone, DeiTPreTrainedModel):
    """DeiT image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain DeiT ones, distilled or not, whose predictions it keeps.
    """

    config_class = ShapleyDeiTConfig
    features_class = ShapleyDeiTModel
    prefix = 2
    layer_class = ShapleyDeiTLayer
    influence_class = InfluenceDeiTLayer
    own_forms = {DeiTMLP: ShapleyDeiTMLP}
    _no_split_modules = ["DeiTEmbeddings", "ShapleyDeiTLayer"]

    def __init__(self, config: ShapleyDeiTConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deit = DeiTModel(config, add_pooling_layer=False)
        if config.distilled:
            self.classifier_names = ("cls_classifier", "distillation_classifier")
        for name in self.classifier_names:
            self.add_module(name, nn.Linear(config.hidden_size, config.num_labels))
        self.complete(readout_size=len(self.classifier_names) * config.hidden_size)
        self.post_init()

    def pool(self, prefix: Tensor, cells: Tensor | None, members: Tensor | None) -> Tensor:
        return prefix.flatten(2) if self.config.distilled else prefix[:, :, 0]  # (B, G, D')

    def votes(self, cells: Tensor) -> Tensor:
        return cells.repeat(1, 1, len(self.classifier_names))


ShapleyDeiTConfig.register_for_auto_class()
ShapleyDeiTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyDeiTModel.register_for_auto_class("AutoModel")
