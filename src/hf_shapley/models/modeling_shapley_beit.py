"""A BEiT whose prediction is, exactly, a base value plus the Shapley values of its patches.

Attention has a bias for how far two patches lie apart: under a structure that of the full grid, restricted to the
tokens there are. Of a coalition the classifier reads the normed mean of its patches, and of no patch at all the norm's
bias; or CLS, where the configuration says so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitLayer, BeitMLP, BeitModel, BeitPreTrainedModel

from .configuration_shapley import Fewest, Sizes, TokenConfigMixin
from .modeling_shapley import ShapleyImageClassifierMixin
from .token_backbone import PreNormLayer, TokenBackbone, TokenMLP, TokenRule, mean_of_members


class BiasedConfigMixin(TokenConfigMixin):
    """`TokenConfigMixin` for backbones that may do without absolute positions."""

    @classmethod
    def _fewest_of_backbone(cls, sizes: Sizes) -> Fewest:
        needed, widths, layer = super()._fewest_of_backbone(sizes)
        needed["image_size"] *= sizes("use_absolute_position_embeddings")[0]
        return needed, widths, layer


class ShapleyBeitConfig(BiasedConfigMixin, BeitConfig):
    """Configuration of `ShapleyBeitForImageClassification`: `BeitConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-beit"
    plain_model_type = "beit"


class BiasedLayer(PreNormLayer):
    """A `TokenLayer` whose attention may have a bias for how far two patches lie apart."""

    def own_bias(self) -> Any:
        """The layer's own module for it, or None."""
        return self.relative_position_bias

    def whole(self, tokens: Tensor, rule: TokenRule) -> Tensor:
        return self.finished(tokens, self._attend(self.normed(tokens), self.mask_of(rule)))

    def mask_of(self, rule: TokenRule) -> Tensor | None:
        biases = [] if rule.bias is None else [rule.bias]
        if self.own_bias() is not None:
            biases.insert(0, restricted(self.own_bias()(rule.grid), rule.places))
        if rule.mask is not None:
            biases.append(rule.mask)
        return sum(biases[1:], biases[0]) if biases else None  # (1 or B, H, T, T)


class BiasedInfluenceLayer(BiasedLayer):
    """Such a layer for the influence head, over all tokens or the patches'; without what all layers share."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        places = torch.arange(1 + grid[0] * grid[1], device=tokens.device)
        return self.whole(tokens, TokenRule(grid=grid, places=places[-tokens.shape[1] :]))


class BiasedBackbone(TokenBackbone):
    """A backbone of such layers, of which the classifier reads the normed mean of patches, or CLS."""

    takes_any_size = True

    def shared_bias(self) -> Any:
        """The module for the bias that all layers share, or None."""
        return self.stock.shared_position_bias

    def enter(self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None) -> tuple[Tensor, TokenRule]:
        state, rule = super().enter(embeddings, grid, members)
        bias, places = None, None
        if members is not None:  # CLS once for each coalition, then the players
            cls = torch.zeros(members.shape[2], dtype=torch.long, device=members.device)
            places = torch.cat([cls, torch.arange(1, 1 + members.shape[3], device=members.device)])
        if self.shared_bias() is not None:
            bias = restricted(self.shared_bias()(grid), places)
        return state, (rule or TokenRule())._replace(grid=grid, places=places, bias=bias)

    def rule_of_none(self) -> TokenRule:
        # Alone, CLS reads itself, whatever the bias: any grid will do, and what layers share may be left out.
        return TokenRule(grid=(1, 1), places=torch.zeros(1, dtype=torch.long, device=self._input_device))

    def pool(self, prefix: Tensor, cells: Tensor | None, members: Tensor | None) -> Tensor:
        return self.votes(mean_of_members(cells, members)) if self.reads_cells else prefix[:, :, 0]

    def votes(self, cells: Tensor) -> Tensor:
        return self.stock.pooler.layernorm(cells) if self.reads_cells else cells

    def last_layers(self, count: int) -> tuple[Sequence[Any], nn.Module]:
        return self.blocks()[-count:], self.stock.pooler.layernorm if self.reads_cells else self.stock.layernorm


class ShapleyBeitMLP(TokenMLP, BeitMLP):
    """A BEiT MLP with less memory where nothing is learned."""


class ShapleyBeitLayer(BiasedLayer, BeitLayer):
    """A BEiT layer that a `TokenRule` may rule."""

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = self.drop_path(self.lambda_1 * self.dropout(self.attention.o_proj(attended))) + tokens
        return self.drop_path(self.lambda_2 * self.dropout(self.mlp(self.layernorm_after(tokens)))) + tokens


class InfluenceBeitLayer(BiasedInfluenceLayer, ShapleyBeitLayer):
    """A BEiT layer for the influence head."""


class ShapleyBeitModel(BeitModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock BEiT, for its features."""

    config_class = ShapleyBeitConfig


class ShapleyBeitForImageClassification(ShapleyImageClassifierMixin, BiasedBackbone, BeitPreTrainedModel):
    """BEiT image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain BEiT ones, whose predictions it keeps, and takes images of any size.
    """

    config_class = ShapleyBeitConfig
    features_class = ShapleyBeitModel
    layer_class = ShapleyBeitLayer
    influence_class = InfluenceBeitLayer
    own_forms = {BeitMLP: ShapleyBeitMLP}
    _no_split_modules = ["ShapleyBeitLayer"]

    def __init__(self, config: ShapleyBeitConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reads_cells = config.use_mean_pooling
        self.reads_prefix = not self.reads_cells
        self.beit = BeitModel(config, add_pooling_layer=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.complete()
        self.post_init()


def restricted(bias: Tensor, places: Tensor | None) -> Tensor:
    """The bias between an image's tokens, (1, H, 1 + N, 1 + N), as that between those at places (T): (1, H, T, T)."""
    return bias if places is None else bias.index_select(2, places).index_select(3, places)


ShapleyBeitConfig.register_for_auto_class()
ShapleyBeitForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyBeitModel.register_for_auto_class("AutoModel")
