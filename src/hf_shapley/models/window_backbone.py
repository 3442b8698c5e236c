"""Backbones of cells under attention in windows: stages of layers, with 2 x 2 merging between them.

The players are the cells of the last stage's grid, so that merging never mixes them. Under a structure an additive
mask keeps cells of different coalitions apart, on top of the mask by which the stock model keeps apart what only its
cyclic shift brings together. Cells that pad a map say nothing of any image: every coalition sees them, as the stock
model does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .backbone import Backbone, Read, absent_shares, check_grid, chosen_states, enlarged, ids_of, pair_of
from .checks import check_count
from .configuration_shapley import Fewest, ShapleyConfigMixin, Sizes
from .heads import AttributionHead, coalition_adapters
from .token_backbone import mean_of_members

if TYPE_CHECKING:
    from transformers.modeling_layers import GradientCheckpointingLayer as StockLayer
else:
    StockLayer = object  # a form of ours joins the stock layer that a class inherits from besides

SHIFTED_APART = -100.0
"""What the stock models add to scores of cells that only the cyclic shift brings together."""


class WindowConfigMixin(ShapleyConfigMixin):
    """`ShapleyConfigMixin` for backbones of Swin's shape."""

    recommended_head = {"influence_own_layers": 0, "influence_layers": 5, "influence_block": "convolution"}

    @property
    def num_stages(self) -> int:
        """Stages, one for each entry of `depths`."""
        return len(self.depths)

    def _check_backbone(self) -> None:
        super()._check_backbone()
        check_count(self.embed_dim, "embed_dim")
        check_count(self.window_size, "window_size")
        for stage, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**stage % heads:
                raise ValueError(
                    f"The width {self.embed_dim * 2**stage} of stage {stage + 1}, `embed_dim` times 2 for each before "
                    f"it, must be a multiple of its `num_heads`, got {heads}."
                )

    def _last_layers(self) -> int:
        return self.depths[-1]

    @classmethod
    def _fewest_of_backbone(cls, sizes: Sizes) -> Fewest:
        embed, patch = sizes("embed_dim")[0], sizes("patch_size")
        widths = [(depth, embed * 2**stage) for stage, depth in enumerate(sizes("depths"))]
        needed = {
            "depths": sum(depth * 4 * width**2 for depth, width in widths),
            "patch_size": sizes("num_channels")[0] * patch[0] * patch[-1] * embed,
        }
        return needed, widths, 4 * widths[-1][1] ** 2


class Windows(NamedTuple):
    """How a map of cells is cut into square windows, after a cyclic shift up and to the left."""

    size: int
    shift: int

    def cut(self, cells: Tensor, padding: int = 0) -> Tensor:
        """Cells (B, H, W, C), padded below and to the right where windows do not tile them -> (B W, n, C)."""
        below, right = -cells.shape[1] % self.size, -cells.shape[2] % self.size
        cells = nn.functional.pad(cells, (0, 0, 0, right, 0, below), value=padding)
        if self.shift:
            cells = cells.roll((-self.shift, -self.shift), (1, 2))
        cells = cells.unflatten(2, (-1, self.size)).unflatten(1, (-1, self.size))  # (B, rows, s, columns, s, C)
        return cells.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def joined(self, windows: Tensor, height: int, width: int) -> Tensor:
        """What `cut` made of a map of height x width cells, put together again: (B W, n, C) -> (B, H, W, C)."""
        rows, columns = -(-height // self.size), -(-width // self.size)
        cells = windows.unflatten(1, (self.size, self.size)).unflatten(0, (-1, rows, columns))
        cells = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.shift:
            cells = cells.roll((self.shift, self.shift), (1, 2))
        return cells[:, :height, :width]

    def shift_mask(self, height: int, width: int, like: Tensor) -> Tensor | None:
        """What the stock model adds to scores, (W, n, n); None without a shift."""
        if not self.shift:
            return None
        regions = []
        for length in (height, width):
            length += -length % self.size
            place = torch.arange(length, device=like.device)
            regions.append((place >= length - self.size).long() + (place >= length - self.shift).long())
        ids = 3 * regions[0][:, None] + regions[1]  # of the map after the shift
        ids = Windows(self.size, 0).cut(ids[None, :, :, None])
        return torch.zeros_like(ids @ ids.mT, dtype=like.dtype).masked_fill_(ids != ids.mT, SHIFTED_APART)

    def mask(self, ids: Tensor, like: Tensor) -> Tensor:
        """What lets cells of one id, long (B, H, W), see each other and padding, (B W, n, n)."""
        own = self.cut(ids.unsqueeze(-1), padding=-1)  # (B W, n, 1)
        apart = (own != own.mT) & (own.mT >= 0)
        mask = torch.zeros_like(apart, dtype=like.dtype).masked_fill_(apart, float("-inf"))
        shift = self.shift_mask(ids.shape[1], ids.shape[2], like)
        return mask if shift is None else (mask.unflatten(0, (-1, len(shift))) + shift).flatten(0, 1)


class WindowRule(NamedTuple):
    """Which cells belong together, at each resolution of the features."""

    members: Tensor  # bool (B, G, N)
    masks: dict[tuple[int, Windows], Tensor]  # by the height of the map: (B W, n, n), added to scores
    absent: dict[int, Tensor]  # for adapters, by height: share of players that a cell's coalition lacks (B, H, W, 1)


class WindowLayer(StockLayer):
    """A stock layer that can keep coalitions apart.

    A subclass says how the stock layer is made: `ruled`, which calls `attended`.
    """

    stock_windows: Windows  # as the stock layer was made with

    def windows(self, height: int, width: int) -> Windows:
        """How a map of height x width cells is cut."""
        return self.stock_windows

    def attended(self, cells: Tensor, rule: WindowRule | None) -> Tensor:
        """What the stock attention makes of cells in their windows, (B, H, W, C) -> (B, H, W, C)."""
        height, width = cells.shape[1:3]
        windows = self.windows(height, width)
        mask = windows.shift_mask(height, width, cells) if rule is None else rule.masks[height, windows]
        return windows.joined(self.attention(windows.cut(cells), mask)[0], height, width)

    def ruled(self, cells: Tensor, rule: WindowRule | None) -> Tensor:
        """The layer, (B, H, W, C) -> (B, H, W, C)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, input_dimensions: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The stock layer of tokens (B, H W, C), or of cells (B, H, W, C) with a rule in the dimensions' place."""
        if hidden_states.ndim == 3:
            return super().forward(hidden_states, input_dimensions, *args, **kwargs)
        return self.ruled(hidden_states, input_dimensions)


class InfluenceWindowLayer(WindowLayer):
    """The same over the patch tokens, for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]  # tokens, not cells
        return self.ruled(tokens.unflatten(1, grid), None).flatten(1, 2)


class WindowBackbone(Backbone):
    """The methods of a backbone for stock models of Swin's shape.

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

    @property
    def takes_any_size(self) -> bool:
        """Whether the stock model does, without `interpolate_pos_encoding`."""
        return not self.config.use_absolute_embeddings

    def influence_options(self) -> dict[str, Any]:
        """How the stock layer is made, for the influence head."""
        last, heads = self.stock.encoder.layers[-1].blocks[-1], self.config.num_heads[-1]
        return {"dim": self.stock.num_features, "input_resolution": last.input_resolution, "num_heads": heads}

    def complete(self) -> None:
        """Make the stock layers ours, the same weights under the same names, and add what a stock model lacks."""
        config, stages = self.config, self.stock.encoder.layers
        self.attribution_head = head = AttributionHead(
            config, self.stock.num_features, lambda: self.influence_class(config, **self.influence_options())
        )
        for own, layer in zip(getattr(head, "own_blocks", []), stages[-1].blocks[-head.own_layers :], strict=False):
            own.shift_size = layer.shift_size
        for layer in [layer for stage in stages for layer in stage.blocks]:
            layer.__class__ = self.layer_class
        self.coalition_adapters = coalition_adapters(config, self.adapter_widths())
        for module in self.modules():
            if isinstance(module, WindowLayer):
                module.stock_windows = Windows(module.window_size, module.shift_size)
            if type(module) in self.own_forms:
                module.__class__ = self.own_forms[type(module)]

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        size = pair_of(self.config.image_size)
        if not (interpolate_pos_encoding or self.takes_any_size) and (height, width) != size:
            raise ValueError(
                f"Images must be of {size} pixels (height, width), got ({height}, {width}): use the image processor, "
                "or `interpolate_pos_encoding=True`."
            )
        patch, merged = pair_of(self.config.patch_size), 2 ** (len(self.config.depths) - 1)
        step = patch[0] * merged, patch[1] * merged
        grid = height // step[0], width // step[1]
        check_grid(grid, step, (height, width))
        return grid

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Patch embeddings: (B, 3, H, W) -> (B, H', W', C)."""
        pixel_values = pixel_values.to(self.stock.embeddings.patch_embeddings.projection.weight.dtype)
        tokens, size = self.stock.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return tokens.unflatten(1, size)

    def blocks(self) -> Sequence[Callable[[Tensor, WindowRule | None], Tensor]]:
        return [block for block, _ in self._blocks_and_adapters()]

    def _blocks_and_adapters(self) -> list[tuple[Callable[[Tensor, WindowRule | None], Tensor], int | None]]:
        """Each block, and which adapter follows it: merging, which mixes no players, has none."""
        found: list[tuple[Callable, int | None]] = []
        adapters = 0
        for stage in self.stock.encoder.layers:
            found += [(layer, adapters + place) for place, layer in enumerate(stage.blocks)]
            adapters += len(stage.blocks)
            if stage.downsample is not None:
                found.append((_merging(stage.downsample), None))
        return found

    def adapter_widths(self) -> Sequence[int]:
        embed = self.config.embed_dim
        return [embed * 2**stage for stage, depth in enumerate(self.config.depths) for _ in range(depth)]

    def enter(
        self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None
    ) -> tuple[Tensor, WindowRule | None]:
        if members is None:
            return embeddings, None
        batch, structures = members.shape[:2]
        cells = embeddings[:batch, None].expand(-1, structures, -1, -1, -1).flatten(0, 1)  # (B R, H', W', C)
        members = members.flatten(0, 1)
        ids = ids_of(members).unflatten(-1, grid)  # (B R, h, w)
        shares = absent_shares(members, cells.dtype)[1].view(-1, *grid) if len(self.coalition_adapters) else None
        masks, absent, stages = {}, {}, self.stock.encoder.layers
        for place, stage in enumerate(stages):
            scale = 2 ** (len(stages) - 1 - place)
            height, width = scale * grid[0], scale * grid[1]
            for windows in {layer.windows(height, width) for layer in stage.blocks}:
                masks[height, windows] = windows.mask(enlarged(ids, scale), cells)
            if shares is not None:
                absent[height] = enlarged(shares, scale).unsqueeze(-1)
        return cells, WindowRule(members, masks, absent)

    def adapt(self, index: int, state: Tensor, rule: WindowRule) -> Tensor:
        adapter = self._blocks_and_adapters()[index][1]
        return state if adapter is None else self.coalition_adapters[adapter](state, rule.absent[state.shape[1]])

    def tokens(self, state: Tensor, rule: WindowRule | None) -> Tensor:
        """Cells (B, h, w, D) as tokens (B, N, D)."""
        return state.flatten(1, 2)

    def read(self, state: Tensor, rule: WindowRule | None) -> Read:
        cells = self.stock.layernorm(self.tokens(state, rule))
        if not self.attribution_head.pooled:
            return Read(cells, cells, None)
        if rule is not None:
            return Read(cells, mean_of_members(cells, rule.members), None)
        return Read(cells, mean_of_members(cells, None), self.empty_token())

    def empty_token(self) -> Tensor:
        """The mean over no cell, which is 0: (D)."""
        weight = self.stock.layernorm.weight
        return torch.zeros(weight.shape, dtype=weight.dtype, device=self._input_device)

    def recorded(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, **wanted: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        chosen = wanted.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, "output_hidden_states": True, **wanted}
        outputs = self.stock(pixel_values, **options)
        states = outputs.hidden_states  # what enters the first stage, and what each stage gives, before the norm
        grid = self.grid_size(pixel_values.shape[-2], pixel_values.shape[-1], interpolate_pos_encoding)
        branch = state = states[-1].unflatten(1, grid)
        if own := self.attribution_head.own_layers:  # the stock backbone records stages, not layers
            branch = self.embed(pixel_values, interpolate_pos_encoding)
            for block in self.blocks()[:-own]:
                branch = block(branch, None)
        kept = chosen_states(states, chosen)
        return branch, state, {"hidden_states": kept, "attentions": outputs.attentions}

    def last_layers(self, count: int) -> tuple[Sequence[nn.Module], nn.Module]:
        return self.stock.encoder.layers[-1].blocks[-count:], self.stock.layernorm


def _merging(downsample: nn.Module) -> Callable[[Tensor, WindowRule | None], Tensor]:
    """The stock 2 x 2 merging, as a block: (B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def merge(cells: Tensor, rule: WindowRule | None) -> Tensor:
        height, width = cells.shape[1:3]
        return downsample(cells.flatten(1, 2), (height, width)).unflatten(1, (height // 2, width // 2))

    return merge
