"""A ConvNeXt whose prediction is, exactly, a base value plus the Shapley values of its patches.

The players are the cells of the last stage's grid. Stem and downsampling do not overlap and norms and pointwise layers
work per position, so the depthwise convolution is the only operation that mixes players.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextModel, ConvNextPreTrainedModel

from .coalitions import sum_over_coalitions
from .configuration_shapley import ShapleyConvNextConfig
from .heads import (
    AttributionHead,
    absent_shares,
    activated,
    coalition_adapters,
    dtype_of_products,
    learning_less,
    scale_gradient,
)
from .modeling_shapley import ShapleyImageClassifierMixin, check_grid


class _Apart(torch.autograd.Function):
    """Each coalition's own cells: (B, H, W, C), masks (B, G, H, W, 1) -> (B, G, H, W, C), 0 where others are.

    It and `_Together` are each other's gradient, in fewer and smaller passes over memory than those torch derives.
    """

    generate_vmap_rule = True  # for gradients of each image by itself

    @staticmethod
    def forward(cells: Tensor, masks: Tensor) -> Tensor:
        return cells.unsqueeze(1) * masks

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Together.apply(gradient, *ctx.saved_tensors), None


class _Together(torch.autograd.Function):
    """Each cell as the coalition that holds it has it: (B, G, H, W, C), masks (B, G, H, W, 1) -> (B, H, W, C)."""

    generate_vmap_rule = True  # for gradients of each image by itself

    @staticmethod
    def forward(apart: Tensor, masks: Tensor) -> Tensor:
        (first, *others), (mask, *other_masks) = apart.unbind(1), masks.unbind(1)
        cells = first * mask
        # In place, but where torch is compiling: torch 2.11 would lose the gradient without a word.
        add = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
        for own, mask in zip(others, other_masks, strict=True):
            cells = add(cells, own, mask)  # exact: at each cell one coalition alone is not 0
        return cells

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Apart.apply(gradient, *ctx.saved_tensors), None


class _LearningBias(torch.autograd.Function):
    """A convolution's output (B, C, H, W) as it is; the bias (C), which is in it already, gets the gradient's sum."""

    generate_vmap_rule = True  # for gradients of each image by itself

    @staticmethod
    def forward(convolved: Tensor, bias: Tensor) -> Tensor:
        return convolved.view_as(convolved)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 2, 3)).to(ctx.dtype)


class DepthwiseConv2d(nn.Conv2d):
    """The same convolution, whose bias learns from the sum of the output's gradient.

    On a CPU, oneDNN's own gradient of the bias takes a fifth of the whole backward pass of a depthwise convolution.
    """

    def forward(self, features: Tensor) -> Tensor:
        bias = self.bias
        if bias is None or not (bias.requires_grad and torch.is_grad_enabled()) or features.device.type != "cpu":
            return super().forward(features)
        return _LearningBias.apply(self._conv_forward(features, self.weight, bias.detach()), bias)


class ShapleyConvNextLayer(GradientCheckpointingLayer, ConvNextLayer):
    """A ConvNeXt layer that can keep coalitions apart, and be run again in the backward pass to save memory."""

    def forward(self, features: Tensor, masks: Tensor | None = None, share: float = 1.0) -> Tensor:
        """The stock layer; with masks its depthwise convolution becomes sum_c mask_c * dwconv(mask_c * features).

        Args:
            features: (B, C, H, W).
            masks: (B, G, H, W, 1), 1 = member; the coalitions of one structure are disjoint and cover all players. In
                the dtype that the convolution computes in.
            share: with masks, of the gradient that reaches the weights.
        """
        if masks is None:
            mixed = self.dwconv(features).permute(0, 2, 3, 1)  # (B, H, W, C)
        else:
            # Channels last, as in the stock layer: there the convolution's weight gradient is up to 3 times cheaper.
            features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            mixed = self._mix_apart(features, masks, share)
        hidden = learning_less(self.pwconv1, share)(learning_less(self.layernorm, share)(mixed))
        hidden = learning_less(self.pwconv2, share)(activated(self.act, hidden, self.pwconv1))
        if self.layer_scale_parameter is not None:
            hidden = scale_gradient(self.layer_scale_parameter, share) * hidden
        return features + self.drop_path(hidden.permute(0, 3, 1, 2))

    def _mix_apart(self, features: Tensor, masks: Tensor, share: float) -> Tensor:
        """The depthwise convolution with coalitions kept apart: (B, C, H, W), (B, G, H, W, 1) -> (B, H, W, C)."""
        apart, together = _Apart.apply, _Together.apply
        if not torch.is_grad_enabled():  # to apply a function takes the host longer than to launch its kernel
            apart, together = _Apart.forward, _Together.forward
        hidden = apart(features.permute(0, 2, 3, 1).to(masks.dtype), masks)  # (B, G, H, W, C)
        hidden = learning_less(self.dwconv, share)(hidden.flatten(0, 1).permute(0, 3, 1, 2))
        return together(hidden.permute(0, 2, 3, 1).unflatten(0, masks.shape[:2]), masks)


class InfluenceConvNextLayer(ShapleyConvNextLayer):
    """A ConvNeXt layer over the patch tokens, for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]  # tokens, not features
        features = tokens.transpose(1, 2).unflatten(-1, grid)  # (B, D, h, w)
        return super().forward(features).flatten(2).transpose(1, 2)


class ShapleyConvNextModel(ConvNextModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock ConvNeXt, for its features."""

    config_class = ShapleyConvNextConfig


class ShapleyConvNextForImageClassification(ShapleyImageClassifierMixin, ConvNextPreTrainedModel):
    """ConvNeXt image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain ConvNeXt ones: the stock `classifier` becomes the vote head, its bias the base
    values, and the final layer norm is applied to each cell instead of to their mean.
    """

    config_class = ShapleyConvNextConfig
    features_class = ShapleyConvNextModel
    supports_gradient_checkpointing = True
    _no_split_modules = ["ShapleyConvNextLayer"]

    def __init__(self, config: ShapleyConvNextConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.convnext = ConvNextModel(config)
        for stage in self.convnext.encoder.stages:
            for layer in stage.layers:
                layer.__class__ = ShapleyConvNextLayer  # the same weights, under the same names
                layer.dwconv.__class__ = DepthwiseConv2d
        hidden_size = config.hidden_sizes[-1]
        self.classifier = nn.Linear(hidden_size, config.num_labels)
        self.attribution_head = AttributionHead(
            config, hidden_size, lambda: InfluenceConvNextLayer(config, dim=hidden_size)
        )
        widths = [width for stage, width in enumerate(config.hidden_sizes) for _ in range(config.depths[stage])]
        self.coalition_adapters = coalition_adapters(config, widths)
        self.post_init()

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        step = self.convnext.embeddings.patch_embeddings.stride
        for stage in self.convnext.encoder.stages:
            if stage.downsampling_layer:
                stride = stage.downsampling_layer[1].stride
                step = step[0] * stride[0], step[1] * stride[1]
        grid = height // step[0], width // step[1]
        check_grid(grid, step, (height, width))
        return grid

    def _recorded_tokens(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None, **kwargs
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict]:
        if not kwargs and not getattr(self.config, "output_hidden_states", False):
            return self._tokens(self._embed(pixel_values, interpolate_pos_encoding)), {}
        outputs = self.convnext(self._cast(pixel_values), **kwargs)
        features = branch = outputs.last_hidden_state
        if self.attribution_head.own_layers:  # the stock backbone records stages, not layers
            branch = self._branch(self._embed(pixel_values, interpolate_pos_encoding))
        return self._read_and_voting(branch, features), {"hidden_states": outputs.hidden_states}

    def _embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None) -> Tensor:
        """Stem features: (B, 3, H, W) -> (B, C, H', W')."""
        return self.convnext.embeddings(self._cast(pixel_values))

    def _tokens(self, embeddings: Tensor, num_attributed: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, C, H', W') -> tokens for the influence head's blocks, those that vote, and the empty coalition's."""
        features = branch = self._branch(embeddings)
        for layer in self._last_layers(self.attribution_head.own_layers)[0]:
            features = layer(features)
        return self._read_and_voting(branch[:num_attributed], features)

    def _branch(self, features: Tensor) -> Tensor:
        """Stem features (B, C, H', W') -> (B, D, h, w), from which the influence head goes its own way."""
        *others, last = self.convnext.encoder.stages
        for stage in others:
            features = stage(features)
        for layer in [*last.downsampling_layer, *last.layers[: len(last.layers) - self.attribution_head.own_layers]]:
            features = layer(features)
        return features

    def _last_layers(self, count: int) -> tuple[Sequence[nn.Module], nn.Module]:
        layers = self.convnext.encoder.stages[-1].layers
        return layers[len(layers) - count :], self.convnext.layernorm

    def _read_and_voting(self, branch: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `_tokens`, from where the influence head leaves the backbone and from its end: twice (B, D, h, w)."""
        head = self.attribution_head
        cells = None if head.pooled and head.own_layers else self._normed(features)
        voting = self.convnext.layernorm(features.mean([-2, -1])).unsqueeze(1) if head.pooled else cells
        if head.own_layers:
            cells = head.own_tokens(branch.flatten(2).transpose(1, 2), tuple(branch.shape[-2:]))
        return cells, voting, self._empty_token() if head.pooled else None

    def _empty_token(self) -> Tensor:
        """The final layer norm of a mean over no cell, which is 0: (D)."""
        weight = self.convnext.layernorm.weight
        return self.convnext.layernorm(torch.zeros(weight.shape, dtype=weight.dtype, device=self._input_device))

    def _structured_tokens(self, embeddings: Tensor, coalition_ids: Tensor, members: Tensor) -> Tensor:
        """Voting tokens where each player sees its own coalition only.

        Args:
            embeddings: (B, C, H', W').
            coalition_ids: (B', R, N).
            members: the same as bool (B', R, G, N).

        Returns:
            (B', R, N, D), or (B', R, G, D) with `vote_readout="pooled"`.
        """
        batch, structures, _ = coalition_ids.shape
        features = embeddings[:batch, None].expand(-1, structures, -1, -1, -1).flatten(0, 1)  # (B' R, C, H', W')
        grid = self._grid_of(embeddings)
        maps = members.flatten(0, 1).unflatten(-1, grid)  # (B' R, G, h, w)
        adapters = iter(self.coalition_adapters)
        share = self.attribution_head.coalition_gradient
        dtype = dtype_of_products(features)
        if self.coalition_adapters:
            absent = absent_shares(members, coalition_ids, features.dtype)[1].view(-1, *grid)  # (B' R, h, w)
        for stage in self.convnext.encoder.stages:
            for layer in stage.downsampling_layer:
                features = learning_less(layer, share)(features)
            scale = features.shape[-1] // grid[1]
            masks = _enlarged(maps, scale).unsqueeze(-1).to(dtype)  # (B' R, G, H', W', 1)
            for layer in stage.layers:
                features = layer(features, masks, share)
                if self.coalition_adapters:
                    shares = _enlarged(absent, scale).unsqueeze(-1)  # (B' R, H', W', 1)
                    features = next(adapters)(features.permute(0, 2, 3, 1), shares).permute(0, 3, 1, 2)
        if self.attribution_head.pooled:
            return self._pooled(features.flatten(2).transpose(1, 2).unflatten(0, (batch, structures)), members)
        return self._normed(features, share).unflatten(0, (batch, structures))

    def _pooled(self, cells: Tensor, members: Tensor) -> Tensor:
        """The final layer norm of each coalition's mean: (..., N, D), bool (..., G, N) -> (..., G, D)."""
        sizes = members.sum(-1, keepdim=True).clamp(min=1)
        norm = learning_less(self.convnext.layernorm, self.attribution_head.coalition_gradient)
        return norm((sum_over_coalitions(members, cells) / sizes).to(cells.dtype))

    def _grid_of(self, embeddings: Tensor) -> tuple[int, int]:
        reduction = 2 ** sum(len(stage.downsampling_layer) > 0 for stage in self.convnext.encoder.stages)
        return embeddings.shape[-2] // reduction, embeddings.shape[-1] // reduction

    def _normed(self, features: Tensor, share: float = 1.0) -> Tensor:
        """(B, D, h, w) -> (B, N, D), the final layer norm applied to each cell."""
        return learning_less(self.convnext.layernorm, share)(features.flatten(2).transpose(1, 2))

    def _cast(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.to(self.convnext.embeddings.patch_embeddings.weight.dtype)


def _enlarged(maps: Tensor, scale: int) -> Tensor:
    """(..., h, w) -> (..., scale h, scale w), each entry repeated."""
    return maps.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


ShapleyConvNextForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyConvNextModel.register_for_auto_class("AutoModel")
