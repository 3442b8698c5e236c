"""Backbones of tokens under global attention: a few prefix tokens (CLS and the like) and one token for each player.

Under a structure the prefix tokens are repeated, one set for each coalition, and an additive mask keeps tokens of
different coalitions apart: an absent player is no token at all, as if it had been dropped.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, cat, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from .backbone import Backbone, Read, absent_shares, check_grid, chosen_states, ids_of, pair_of
from .coalitions import sum_over_coalitions
from .heads import AttributionHead, coalition_adapters
from .speed import activated, are_plain, dtype_of_products, packed, read, unpacked

if TYPE_CHECKING:
    from transformers.modeling_layers import GradientCheckpointingLayer as StockLayer
else:
    StockLayer = object  # a form of ours joins the stock layer that a class inherits from besides

# What can hide players from each other; others would ignore the mask, and hidden pixels would leak.
MASKING_BACKENDS = ("eager", "sdpa", "flex_attention")


class TokenRule(NamedTuple):
    """Who sees whom among tokens, and which of them are read in the end."""

    mask: Any = None  # as the attention backend takes it; None = every token sees every token of its image
    readers: int | None = None  # the last layer is run for the first so many tokens alone; None = for all
    images: int | None = None  # B, where the state is `packed`: the empty coalition's prefix tokens come along
    coalitions: int = 1  # sets of prefix tokens, G
    members: Tensor | None = None  # bool (B, G, N); None = all players are in one
    absent: Tensor | None = None  # for adapters: the share of players that each token's coalition lacks, (B, T, 1)
    grid: tuple[int, int] | None = None  # for layers with biases of their own, the players', (h, w)
    places: Tensor | None = None  # likewise: which of an image's P + N tokens each token is, (T); None = they are all
    bias: Tensor | None = None  # likewise: what all layers share, (1, H, T, T)


class TokenLayer(StockLayer):
    """A stock layer that can leave out what nothing reads, and take along tokens that see only each other.

    A subclass says how the stock layer is made: `normed`, what its attention reads, and `finished`, the rest.
    """

    is_last = False
    prefix = 1

    def normed(self, tokens: Tensor) -> Tensor:
        """What the attention reads: (..., D) -> (..., D)."""
        raise NotImplementedError

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: what entered it (..., D), and what the attention read, not yet projected (..., D)."""
        raise NotImplementedError

    def projections(self) -> Any:
        """The part of the stock attention that has `q_proj`, `k_proj`, `v_proj`, `head_dim`, `scaling` and so on."""
        return self.attention

    def whole(self, tokens: Tensor, rule: TokenRule) -> Tensor:
        """The layer for all tokens, (B, T, D) -> (B, T, D)."""
        return super().forward(tokens, rule.mask)

    def mask_of(self, rule: TokenRule) -> Any:
        """What the attention adds to its scores."""
        return rule.mask

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """The stock layer (B, T, D) -> (B, T, D), or under a `TokenRule` in the mask's place a part of it."""
        rule = attention_mask
        if not isinstance(rule, TokenRule):
            return super().forward(hidden_states, rule, **kwargs)
        readers = rule.readers if self.is_last else None
        if readers is None and rule.images is None:
            return self.whole(hidden_states, rule)
        normed = self.normed(hidden_states)
        normed = normed.to(dtype_of_products(normed))  # once, where autocast would do it for each that reads it
        if rule.images is None:
            return self.finished(hidden_states[:, :readers], self._attend(normed, self.mask_of(rule), readers))
        tokens, lone = unpacked(normed, rule.images, self.prefix)
        # A lone token has one key, its own: it reads its own value, whatever the scores.
        alone = self.projections().v_proj(lone) if self.prefix == 1 else self._attend(lone[None])[0]
        if readers is not None:
            whole, entered = unpacked(hidden_states, rule.images, self.prefix)
            hidden_states = packed(whole[:, :readers], entered)
        return self.finished(hidden_states, packed(self._attend(tokens, self.mask_of(rule), readers), alone))

    def _attend(self, tokens: Tensor, mask: Any = None, readers: int | None = None) -> Tensor:
        """What the first tokens read of all: (B, T, D), a mask of T rows -> (B, Q, D), not yet projected."""
        attention = self.projections()

        def heads_of(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        rows = readers
        if not isinstance(mask, Tensor | None):  # flex attention's block mask has no rows to choose
            rows = None
        elif mask is not None:
            mask = mask[:, :, :rows]
        queries = heads_of(attention.q_proj(tokens[:, :rows]))  # (B, H, Q, d)
        dropout = attention.attention_dropout if self.training else 0.0
        few = rows is not None and rows < attention.head_dim  # beyond that it would cost more
        if few and not dropout and are_plain(attention.k_proj, attention.v_proj):
            return read(queries * attention.scaling, tokens, mask, attention.k_proj, attention.v_proj)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        keys, values = heads_of(attention.k_proj(tokens)), heads_of(attention.v_proj(tokens))
        attended, _ = attend(attention, queries, keys, values, mask, dropout=dropout, scaling=attention.scaling)
        return attended.flatten(2)[:, :readers]


class PreNormLayer(TokenLayer):
    """A `TokenLayer` for stock layers that normalise before attention and before an MLP, under ViT's names."""

    def normed(self, tokens: Tensor) -> Tensor:
        return self.layernorm_before(tokens)

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention.o_proj(attended))
        return tokens + self.dropout(self.mlp(self.layernorm_after(tokens)))


class TokenMLP(StockLayer):
    """A stock MLP, with less memory where nothing is learned."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(activated(self.activation_fn, self.fc1(hidden_states), self.fc1))


class InfluenceLayer(StockLayer):
    """A stock layer over all tokens, or the patches', for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(tokens)


class TokenBackbone(Backbone):
    """The methods of a backbone for stock models that embed, run layers of tokens, and normalise.

    A subclass names this package's forms of the stock layer, `layer_class`, and of the same for the influence head,
    `influence_class`. Its constructor makes the stock model and the classifier, then calls `complete`.
    """

    prefix: int = 1  # number of prefix tokens, P
    reads_prefix: bool = True  # whether the pooled readout is of the prefix tokens
    reads_cells: bool = False  # whether the pooled readout is of the players' tokens too
    takes_any_size: ClassVar[bool] = False  # whether the stock model does, without `interpolate_pos_encoding`
    layer_class: ClassVar[type]
    influence_class: ClassVar[type]
    own_forms: ClassVar[Mapping[type, type]] = {}  # of parts of a layer: the stock class -> ours

    @property
    def stock(self) -> Any:
        """The stock backbone."""
        return getattr(self, self.base_model_prefix)

    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self.stock.layernorm

    def finish(self, tokens: Tensor) -> Tensor:
        """What follows the last layer."""
        return self.final_norm()(tokens)

    def stock_layers(self) -> Sequence[Any]:
        """The stock model's layers."""
        return self.stock.layers

    def blocks(self) -> Sequence[nn.Module]:
        return self.stock_layers()

    def pool(self, prefix: Tensor, cells: Tensor | None, members: Tensor | None) -> Tensor:
        """What the classifier reads of G coalitions, (B, G, D').

        Args:
            prefix: their prefix tokens, (B, G, P, D).
            cells: of the players, (B, N, D), where `reads_cells`; None where there is no player.
            members: bool (B, G, N); None = all.
        """
        return prefix[:, :, 0]

    def votes(self, cells: Tensor) -> Tensor:
        """With `vote_readout="patches"`: what the classifier reads of players' tokens, (B, N, D) -> (B, N, D')."""
        return cells

    def complete(self, readout_size: int | None = None) -> None:
        """Make the stock layers ours, the same weights under the same names, and add what a stock model lacks.

        Args:
            readout_size: D', width of what the classifier reads; D by default.
        """
        config, layers = self.config, self.stock_layers()
        for layer in layers:
            layer.__class__, layer.prefix = self.layer_class, self.prefix
        layers[-1].is_last = True
        self.attribution_head = AttributionHead(
            config, config.hidden_size, lambda: self.influence_class(config), readout_size
        )
        self.coalition_adapters = coalition_adapters(config, self.adapter_widths())
        for module in self.modules():
            if type(module) in self.own_forms:
                module.__class__ = self.own_forms[type(module)]

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        step, size = pair_of(self.config.patch_size), pair_of(self.config.image_size)
        if not (interpolate_pos_encoding or self.takes_any_size) and (height, width) != size:
            raise ValueError(
                f"Images must be of {size} pixels (height, width), got ({height}, {width}): use the image processor, "
                "or `interpolate_pos_encoding=True`."
            )
        grid = height // step[0], width // step[1]
        check_grid(grid, step, (height, width))
        return grid

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Prefix tokens and patch embeddings: (B, C, H, W) -> (B, P + N, D)."""
        pixel_values = pixel_values.to(self.stock.embeddings.patch_embeddings.projection.weight.dtype)
        return self.stock.embeddings(pixel_values, **self._size_options(interpolate_pos_encoding))

    def _size_options(self, interpolate_pos_encoding: bool) -> dict[str, bool]:
        return {} if self.takes_any_size else {"interpolate_pos_encoding": interpolate_pos_encoding}

    def adapter_widths(self) -> Sequence[int]:
        return [self.config.hidden_size] * len(self.blocks())

    def enter(
        self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None
    ) -> tuple[Tensor, TokenRule | None]:
        head = self.attribution_head
        if members is None:
            # Layers that drop what they add do so image by image, of which packed rows know nothing.
            drops = self.training and getattr(self.config, "drop_path_rate", 0) > 0
            if drops or not (head.pooled and self.reads_prefix):
                return embeddings, None
            # Prefix tokens enter the layers alike for every image; by themselves they would read all of the weights
            # once more, and those that they are made of may be sharded or offloaded, out of reach here.
            readers = self.prefix if head.own_layers and not self.reads_cells else None
            # `len` would become a constant in an exported program.
            rule = TokenRule(readers=readers, images=embeddings.shape[0])
            return packed(embeddings, embeddings[0, : self.prefix]), rule
        self._check_attention()
        batch, structures, num_coalitions, num_players = members.shape
        embeddings = embeddings[:batch, None].expand(-1, structures, -1, -1)
        prefix, patches = embeddings.split([self.prefix, num_players], dim=2)
        tokens = cat([prefix.repeat(1, 1, num_coalitions, 1), patches], dim=2).flatten(0, 1)  # (B R, G P + N, D)
        members = members.flatten(0, 1)
        prefix_ids = torch.arange(num_coalitions, device=members.device).repeat_interleave(self.prefix)
        ids = cat([prefix_ids.expand(len(members), -1), ids_of(members)], dim=1)  # (B R, G P + N)
        readers = num_coalitions * self.prefix if head.pooled and not self.reads_cells else None
        absent = None
        if len(self.coalition_adapters):
            of_coalitions, of_players = absent_shares(members, tokens.dtype)
            absent = cat([of_coalitions.repeat_interleave(self.prefix, dim=1), of_players], dim=1)
        return tokens, TokenRule(self._mask(tokens, ids), readers, None, num_coalitions, members, absent)

    def _check_attention(self) -> None:
        if self.config._attn_implementation not in MASKING_BACKENDS:
            raise ValueError(
                f"Attention implementation {self.config._attn_implementation!r} cannot hide players from each other: "
                f"call `set_attn_implementation` with one of {MASKING_BACKENDS}."
            )

    def _mask(self, tokens: Tensor, ids: Tensor) -> Any:
        """What the attention backend needs to keep tokens (B, T, D) of different ids (B, T) apart."""
        if self.config._attn_implementation != "sdpa":
            return create_bidirectional_mask(
                config=self.config,
                inputs_embeds=tokens,
                attention_mask=None,
                and_mask_function=lambda b, head, query, key: ids[b, query] == ids[b, key],
            )
        # Additive and in the queries' dtype: torch would turn a bool mask into just that, anew in every layer.
        apart = ids[:, None, :, None] != ids[:, None, None, :]  # (B, 1, T, T)
        nothing = torch.zeros_like(apart, dtype=dtype_of_products(tokens))
        return nothing.masked_fill_(apart, float("-inf"))

    def adapt(self, index: int, state: Tensor, rule: TokenRule) -> Tensor:
        assert rule.absent is not None  # as there are adapters
        return self.coalition_adapters[index](state, rule.absent[:, : state.shape[1]])

    def tokens(self, state: Tensor, rule: TokenRule | None) -> Tensor:
        """Prefix tokens and the players', (B, P + N, D)."""
        return state if rule is None or rule.images is None else unpacked(state, rule.images, self.prefix)[0]

    def read(self, state: Tensor, rule: TokenRule | None) -> Read:
        rule = rule or TokenRule()
        normed, lone = self.finish(state), None
        if rule.images is not None:
            normed, lone = unpacked(normed, rule.images, self.prefix)
        prefix, cells = normed.tensor_split([rule.coalitions * self.prefix], dim=1)
        if not self.attribution_head.pooled:
            return Read(cells, self.votes(cells), None)
        voting = self.pool(prefix.unflatten(1, (rule.coalitions, self.prefix)), cells, rule.members)
        if lone is not None:
            return Read(cells, voting, self._pool_of_none(lone))
        return Read(cells, voting, self.empty_token() if rule.members is None else None)

    def _pool_of_none(self, lone: Tensor) -> Tensor:
        """What is read of the empty coalition, (D'), from its prefix tokens after the norm, (P, D)."""
        return self.pool(lone[None, None], None, None)[0, 0]

    def rule_of_none(self) -> TokenRule | None:
        """The rule for the prefix tokens of the empty coalition by themselves."""
        return None

    def empty_token(self) -> Tensor:
        """What the classifier reads where there is no patch at all: (D')."""
        if not self.reads_prefix:
            nothing = torch.zeros(1, 1, self.config.hidden_size, dtype=self.dtype, device=self._input_device)
            return self.pool(nothing[:, :, None], nothing, None)[0, 0]
        shape = (1, self.config.num_channels, *pair_of(self.config.image_size))
        state = self.embed(torch.zeros(shape, device=self._input_device))[:, : self.prefix]
        for block in self.blocks():
            state = block(state, self.rule_of_none())
        return self._pool_of_none(self.finish(state)[0])

    def recorded(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, **wanted: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        chosen = wanted.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        options = {**self._size_options(interpolate_pos_encoding), **wanted}
        outputs = self.stock(pixel_values, output_hidden_states=True, **options)
        states = outputs.hidden_states  # what enters the first layer, and what each layer gives, before the norm
        recorded = {"hidden_states": chosen_states(states, chosen), "attentions": outputs.attentions}
        return states[-1 - self.attribution_head.own_layers], states[-1], recorded

    def last_layers(self, count: int) -> tuple[Sequence[nn.Module], nn.Module]:
        return self.blocks()[-count:], self.final_norm()


def mean_of_members(cells: Tensor | None, members: Tensor | None) -> Tensor:
    """Mean of the players' tokens (B, N, D) over each coalition of bool (B, G, N), None = all: (B, G, D).

    Over no player at all it is 0.

    Raises:
        ValueError: there are no tokens, of whose width nothing is known.
    """
    if cells is None:
        raise ValueError("The mean of no tokens has no width.")
    if members is None:
        return cells.mean(1, keepdim=True)
    sizes = members.sum(-1, keepdim=True).clamp(min=1)
    return (sum_over_coalitions(members, cells) / sizes).to(cells.dtype)
