"""A ConvNeXt whose prediction is, exactly, a base value plus the Shapley values of its patches.

The players are the cells of the last stage's grid. Stem and downsampling do not overlap and norms and pointwise layers
work per position, so the depthwise convolution is the only operation that mixes players.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextModel, ConvNextPreTrainedModel

from .backbone import Backbone, Read, absent_shares, check_grid, enlarged
from .coalitions import sum_over_coalitions
from .configuration_shapley import ShapleyConvNextConfig
from .heads import AttributionHead, coalition_adapters
from .modeling_shapley import ShapleyImageClassifierMixin
from .speed import DepthwiseConv2d, activated, apart, dtype_of_products, together


class CellRule(NamedTuple):
    """Which cells belong together, at each resolution of the features."""

    members: Tensor  # bool (B, G, N)
    masks: dict[int, Tensor]  # by the features' width W: (B, G, H, W, 1), 1 = member, in the convolution's dtype
    absent: dict[
        int, Tensor
    ]  # for adapters, likewise: the share of players that a cell's coalition lacks (B, H, W, 1)


class CellLayer(GradientCheckpointingLayer):
    """A stock layer that can keep coalitions apart, and be run again in the backward pass to save memory.

    A subclass says how the stock layer ends, `narrowed`.
    """

    def narrowed(self, hidden: Tensor, masks: Tensor | None) -> Tensor:
        """What the layer adds, from its widened cells: (B, H, W, 4 C) -> (B, H, W, C).

        Args:
            hidden: after the activation.
            masks: (B, G, H, W, 1), 1 = member; None = the stock layer.
        """
        raise NotImplementedError

    def forward(self, features: Tensor, rule: CellRule | None = None) -> Tensor:
        """The stock layer; under a rule its depthwise convolution becomes sum_c mask_c * dwconv(mask_c * features).

        Args:
            features: (B, C, H, W).
            rule: disjoint coalitions that cover all players.
        """
        masks = None if rule is None else rule.masks[features.shape[-1]]
        if masks is None:
            mixed = self.dwconv(features).permute(0, 2, 3, 1)  # (B, H, W, C)
        else:
            # Channels last, as in the stock layer: there the convolution's weight gradient is up to 3 times cheaper.
            features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            mixed = self._mix_apart(features, masks)
        hidden = activated(self.act, self.pwconv1(self.layernorm(mixed)), self.pwconv1)
        return features + self.drop_path(self.narrowed(hidden, masks).permute(0, 3, 1, 2))

    def _mix_apart(self, features: Tensor, masks: Tensor) -> Tensor:
        """The depthwise convolution with coalitions kept apart: (B, C, H, W), (B, G, H, W, 1) -> (B, H, W, C)."""
        hidden = apart(features.permute(0, 2, 3, 1).to(masks.dtype), masks)  # (B, G, H, W, C)
        hidden = self.dwconv(hidden.flatten(0, 1).permute(0, 3, 1, 2))
        return together(hidden.permute(0, 2, 3, 1).unflatten(0, masks.shape[:2]), masks)


class InfluenceCellLayer(CellLayer):
    """The same over the patch tokens, for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]  # tokens, not features
        features = tokens.transpose(1, 2).unflatten(-1, grid)  # (B, D, h, w)
        return super().forward(features).flatten(2).transpose(1, 2)


class CellBackbone(Backbone):
    """The methods of a backbone for stock models of ConvNeXt's shape: a stem, and stages of layers of cells.

    A subclass names this package's forms of the stock layer, `layer_class`, and of the same for the influence head,
    `influence_class`. Its constructor makes the stock model and the classifier, then calls `complete`.
    """

    layer_class: ClassVar[type]
    influence_class: ClassVar[type]
    own_forms: ClassVar[Mapping[type, type]] = {}  # of parts of a layer: the stock class -> ours

    @property
    def stock(self) -> Any:
        """The stock backbone."""
        return getattr(self, self.base_model_prefix)

    def complete(self) -> None:
        """Make the stock layers ours, the same weights under the same names, and add what a stock model lacks."""
        config, width = self.config, self.config.hidden_sizes[-1]
        for stage in self.stock.encoder.stages:
            for layer in stage.layers:
                layer.__class__ = self.layer_class
                layer.dwconv.__class__ = DepthwiseConv2d
        self.attribution_head = AttributionHead(config, width, lambda: self.influence_class(config, dim=width))
        self.coalition_adapters = coalition_adapters(config, self.adapter_widths())
        for module in self.modules():
            if type(module) in self.own_forms:
                module.__class__ = self.own_forms[type(module)]

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        step = self.stock.embeddings.patch_embeddings.stride
        for stage in self.stock.encoder.stages:
            if stage.downsampling_layer:
                stride = stage.downsampling_layer[1].stride
                step = step[0] * stride[0], step[1] * stride[1]
        grid = height // step[0], width // step[1]
        check_grid(grid, step, (height, width))
        return grid

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Stem features: (B, 3, H, W) -> (B, C, H', W')."""
        return self.stock.embeddings(pixel_values.to(self.stock.embeddings.patch_embeddings.weight.dtype))

    def blocks(self) -> Sequence[Callable[[Tensor, CellRule | None], Tensor]]:
        return [block for block, _ in self._blocks_and_adapters()]

    def _blocks_and_adapters(self) -> list[tuple[Callable[[Tensor, CellRule | None], Tensor], int | None]]:
        """Each block, and which adapter follows it: downsampling, which mixes no players, has none."""
        found: list[tuple[Callable, int | None]] = []
        adapters = 0
        for stage in self.stock.encoder.stages:
            found += [(_ruleless(layer), None) for layer in stage.downsampling_layer]
            found += [(layer, adapters + place) for place, layer in enumerate(stage.layers)]
            adapters += len(stage.layers)
        return found

    def adapter_widths(self) -> Sequence[int]:
        sizes = zip(self.config.hidden_sizes, self.config.depths, strict=True)
        return [width for width, depth in sizes for _ in range(depth)]

    def enter(
        self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None
    ) -> tuple[Tensor, CellRule | None]:
        if members is None:
            return embeddings, None
        batch, structures = members.shape[:2]
        features = embeddings[:batch, None].expand(-1, structures, -1, -1, -1).flatten(0, 1)  # (B R, C, H', W')
        members = members.flatten(0, 1)
        dtype, maps = dtype_of_products(features), members.unflatten(-1, grid)  # (B R, G, h, w)
        masks, absent, scale = {}, {}, features.shape[-1] // grid[1]
        shares = absent_shares(members, features.dtype)[1].view(-1, *grid) if len(self.coalition_adapters) else None
        while scale:
            masks[scale * grid[1]] = enlarged(maps, scale).unsqueeze(-1).to(dtype)
            if shares is not None:
                absent[scale * grid[1]] = enlarged(shares, scale).unsqueeze(-1)
            scale //= 2
        return features, CellRule(members, masks, absent)

    def adapt(self, index: int, state: Tensor, rule: CellRule) -> Tensor:
        adapter = self._blocks_and_adapters()[index][1]
        if adapter is None:
            return state
        cells = self.coalition_adapters[adapter](state.permute(0, 2, 3, 1), rule.absent[state.shape[-1]])
        return cells.permute(0, 3, 1, 2)

    def tokens(self, state: Tensor, rule: CellRule | None) -> Tensor:
        """Features (B, D, h, w) as tokens (B, N, D)."""
        return state.flatten(2).transpose(1, 2)

    def read(self, state: Tensor, rule: CellRule | None) -> Read:
        head, norm = self.attribution_head, self.stock.layernorm
        tokens = self.tokens(state, rule)
        if not head.pooled:
            cells = norm(tokens)
            return Read(cells, cells, None)
        if rule is not None:
            sizes = rule.members.sum(-1, keepdim=True).clamp(min=1)
            means = (sum_over_coalitions(rule.members, tokens) / sizes).to(tokens.dtype)  # (B, G, D)
            return Read(tokens, norm(means), None)
        cells = tokens if head.own_layers else norm(tokens)
        return Read(cells, norm(state.mean([-2, -1])).unsqueeze(1), self.empty_token())

    def empty_token(self) -> Tensor:
        """The final layer norm of a mean over no cell, which is 0: (D)."""
        weight = self.stock.layernorm.weight
        return self.stock.layernorm(torch.zeros(weight.shape, dtype=weight.dtype, device=self._input_device))

    def recorded(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, **wanted: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        outputs = self.stock(pixel_values.to(self.stock.embeddings.patch_embeddings.weight.dtype), **wanted)
        branch = outputs.last_hidden_state
        if own := self.attribution_head.own_layers:  # the stock backbone records stages, not layers
            branch = self.embed(pixel_values)
            for block in self.blocks()[:-own]:
                branch = block(branch, None)
        return branch, outputs.last_hidden_state, {"hidden_states": outputs.hidden_states}

    def last_layers(self, count: int) -> tuple[Sequence[nn.Module], nn.Module]:
        return self.stock.encoder.stages[-1].layers[-count:], self.stock.layernorm


def _ruleless(layer: nn.Module) -> Callable[[Tensor, CellRule | None], Tensor]:
    """A layer that mixes no players, as a block."""
    return lambda features, rule: layer(features)


class ShapleyConvNextLayer(CellLayer, ConvNextLayer):
    """A ConvNeXt layer that can keep coalitions apart."""

    def narrowed(self, hidden: Tensor, masks: Tensor | None) -> Tensor:
        hidden = self.pwconv2(hidden)
        return hidden if self.layer_scale_parameter is None else self.layer_scale_parameter * hidden


class InfluenceConvNextLayer(InfluenceCellLayer, ShapleyConvNextLayer):
    """A ConvNeXt layer for the influence head."""


class ShapleyConvNextModel(ConvNextModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock ConvNeXt, for its features."""

    config_class = ShapleyConvNextConfig


class ShapleyConvNextForImageClassification(ShapleyImageClassifierMixin, CellBackbone, ConvNextPreTrainedModel):
    """ConvNeXt image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain ConvNeXt ones, whose predictions it keeps. With `vote_readout="patches"` the
    final layer norm is applied to each cell instead of to their mean.
    """

    config_class = ShapleyConvNextConfig
    features_class = ShapleyConvNextModel
    layer_class = ShapleyConvNextLayer
    influence_class = InfluenceConvNextLayer
    supports_gradient_checkpointing = True
    _no_split_modules = ["ShapleyConvNextLayer"]

    def __init__(self, config: ShapleyConvNextConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.convnext = ConvNextModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.complete()
        self.post_init()


ShapleyConvNextForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyConvNextModel.register_for_auto_class("AutoModel")
