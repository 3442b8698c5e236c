"""A Swin whose prediction is, exactly, a base value plus the Shapley values of its patches.

The players are the cells of the last stage's grid, 32 x 32 pixels each in the usual shapes. Of a coalition the
classifier reads the mean of its cells after the last norm; of no cell at all that is 0.
"""

from typing import Any

from torch import Tensor, nn
from transformers import SwinConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.swin.modeling_swin import SwinLayer, SwinMLP, SwinModel, SwinPreTrainedModel

from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import TokenMLP
from .window_backbone import InfluenceWindowLayer, WindowBackbone, WindowConfigMixin, WindowLayer, WindowRule, Windows


class ShapleySwinConfig(WindowConfigMixin, SwinConfig):
    """Configuration of `ShapleySwinForImageClassification`: `SwinConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-swin"
    plain_model_type = "swin"


class ShapleySwinMLP(TokenMLP, SwinMLP):
    """A Swin MLP with less memory where nothing is learned."""


class ShapleySwinLayer(WindowLayer, SwinLayer):
    """A Swin layer that can keep coalitions apart."""

    def windows(self, height: int, width: int) -> Windows:
        """As the stock layer's, which do not shift where one covers the map's shorter side."""
        size, shift = self.stock_windows
        return Windows(min(size, height, width), 0 if min(height, width) <= size else shift)

    def set_shift_and_window_size(self, input_resolution: tuple[int, int]) -> None:
        """As the stock layer, but of each image by itself: the stock one never forgets a small one."""
        self.window_size, self.shift_size = self.windows(*input_resolution)

    def ruled(self, cells: Tensor, rule: WindowRule | None) -> Tensor:
        attended = self.dropout(self.attended(self.layernorm_before(cells), rule))
        cells = cells + self.drop_path(attended)
        return self.dropout(self.mlp(self.layernorm_after(cells))) + cells


class InfluenceSwinLayer(InfluenceWindowLayer, ShapleySwinLayer):
    """A Swin layer for the influence head."""


class ShapleySwinModel(SwinModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock Swin, for its features."""

    config_class = ShapleySwinConfig


class ShapleySwinForImageClassification(ShapleyImageClassifierMixin, WindowBackbone, SwinPreTrainedModel):
    """Swin image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain Swin ones, whose predictions it keeps.
    """

    config_class = ShapleySwinConfig
    features_class = ShapleySwinModel
    layer_class = ShapleySwinLayer
    influence_class = InfluenceSwinLayer
    own_forms = {SwinMLP: ShapleySwinMLP}
    _no_split_modules = ["SwinEmbeddings", "ShapleySwinLayer"]

    def __init__(self, config: ShapleySwinConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.swin = SwinModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(self.swin.num_features, config.num_labels)
        self.complete()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the shared one; transformers knows by the plain model type what checkpoints call the weights."""
        renamings = get_checkpoint_conversion_mapping(cls.config_class.plain_model_type) or []
        names = {each.source_patterns[0]: each.target_patterns[0] for each in renamings}
        kwargs.setdefault("key_mapping", names)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        grid = super().grid_size(height, width, interpolate_pos_encoding)
        if min(grid) < self.config.window_size:
            raise ValueError(
                f"Images must give at least {self.config.window_size} players on each side, as large as the windows, "
                f"got a grid of {grid[0]} x {grid[1]}: resize them."
            )
        return grid


ShapleySwinConfig.register_for_auto_class()
ShapleySwinForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleySwinModel.register_for_auto_class("AutoModel")
