"""A ViT whose prediction is, exactly, a base value plus the Shapley values of its patches."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, cat, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import (
    ViTLayer,
    ViTMLP,
    ViTModel,
    ViTPreTrainedModel,
    eager_attention_forward,
)

from .configuration_shapley import ShapleyViTConfig
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

# What can hide players from each other; others would ignore the mask, and hidden pixels would leak.
MASKING_BACKENDS = ("eager", "sdpa", "flex_attention")


class ShapleyViTMLP(ViTMLP):
    """The stock MLP, with less memory where nothing is learned."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(activated(self.activation_fn, self.fc1(hidden_states), self.fc1))


class ShapleyViTLayer(ViTLayer):
    """A ViT layer that can leave out what nothing reads, and take along a token that sees only itself."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        num_queries: int | None = None,
        num_images: int | None = None,
        share: float = 1.0,
        reading: Callable[[Tensor], None] | None = None,
        **kwargs,
    ) -> Tensor:
        """The stock layer, (B, T, D) -> (B, T, D), or a part of it.

        Args:
            hidden_states: (B, T, D); with `num_images` packed, see `_packed`, without a mask.
            attention_mask: as the attention backend takes it.
            num_queries: Q, give only the first (B, Q, D).
            num_images: B, give the same packed.
            share: of the gradient that reaches the weights; not packed.
            reading: called with `hidden_states`.
            **kwargs: passed on.
        """
        if reading is not None:
            reading(hidden_states)
        if num_queries is None and num_images is None and share == 1:
            return super().forward(hidden_states, attention_mask, **kwargs)
        normed = learning_less(self.layernorm_before, share)(hidden_states)
        normed = normed.to(dtype_of_products(normed))  # once, where autocast would do it for each that reads it
        if num_images is None:
            if isinstance(attention_mask, Tensor | None):
                rows = None if attention_mask is None else attention_mask[:, :, :num_queries]
                attended = self._attend(normed, rows, num_queries, share)
            else:  # flex attention's block mask has no rows to choose
                attended = self._attend(normed, attention_mask, None, share)[:, :num_queries]
            hidden_states = hidden_states[:, :num_queries]
        else:
            tokens, lone = _unpacked(normed, num_images)
            # The lone token has one key, its own: it reads its own value, whatever the scores.
            attended = _packed(self._attend(tokens, None, num_queries), self.attention.v_proj(lone))
            if num_queries is not None:
                tokens, lone = _unpacked(hidden_states, num_images)
                hidden_states = _packed(tokens[:, :num_queries], lone)
        hidden_states = hidden_states + self.dropout(learning_less(self.attention.o_proj, share)(attended))
        normed = learning_less(self.layernorm_after, share)(hidden_states)
        return hidden_states + self.dropout(learning_less(self.mlp, share)(normed))

    def _attend(self, tokens: Tensor, mask, num_queries: int | None, share: float = 1.0) -> Tensor:
        """What the first tokens read of all: (B, T, D), mask (B, 1, Q, T) -> (B, Q, D), not yet projected."""
        attention = self.attention

        def heads_of(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        queries = heads_of(learning_less(attention.q_proj, share)(tokens[:, :num_queries]))  # (B, H, Q, d)
        dropout = attention.attention_dropout if self.training else 0.0
        few = num_queries is not None and num_queries < attention.head_dim  # beyond that it would cost more
        if few and not dropout and _are_plain(attention.k_proj, attention.v_proj):
            return self._read(queries * attention.scaling, tokens, mask, share)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            queries,
            heads_of(learning_less(attention.k_proj, share)(tokens)),
            heads_of(learning_less(attention.v_proj, share)(tokens)),
            mask,
            dropout=dropout,
            scaling=attention.scaling,
        )
        return attended.flatten(2)

    def _read(self, queries: Tensor, tokens: Tensor, mask: Tensor | None, share: float) -> Tensor:
        """The same for few queries (B, H, Q, d), without making a key and a value of every token.

        A query's score is q . (W_k x + b_k) = (W_k' q) . x + q . b_k, and what it reads is W_v sum_t a_t x_t + b_v:
        the weights meet the few queries in place of all the tokens.
        """
        heads, num_queries, head_dim = queries.shape[1:]
        key, value = self.attention.k_proj, self.attention.v_proj
        key_weight, value_weight = (
            scale_gradient(part.weight, share).unflatten(0, (heads, head_dim)) for part in (key, value)
        )
        seeking = (queries @ key_weight).flatten(1, 2)  # (B, H Q, D)
        scores = (seeking @ tokens.transpose(1, 2)).unflatten(1, (heads, num_queries))  # (B, H, Q, T)
        if key.bias is not None:  # softmax ignores it; left out, the parameter would have no part in a training step
            scores = scores + queries @ scale_gradient(key.bias, share).view(heads, head_dim, 1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)
        read = (weights.flatten(1, 2) @ tokens).unflatten(1, (heads, num_queries))  # (B, H, Q, D)
        attended = read @ value_weight.transpose(1, 2)  # (B, H, Q, d)
        if value.bias is not None:
            attended = attended + scale_gradient(value.bias, share).view(heads, 1, head_dim).to(attended.dtype)
        return attended.transpose(1, 2).flatten(2)


class InfluenceViTLayer(ViTLayer):
    """A ViT layer over the patch tokens, or all, for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return super().forward(tokens)


class ShapleyViTModel(ViTModel):
    """The backbone of such a classifier, as `AutoModel` loads it: the stock ViT, for its features."""

    config_class = ShapleyViTConfig

    def __init__(self, config: ShapleyViTConfig):
        super().__init__(config, add_pooling_layer=False)


class ShapleyViTForImageClassification(ShapleyImageClassifierMixin, ViTPreTrainedModel):
    """ViT image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain ViT ones: the stock `classifier` becomes the vote head, its bias the base
    values.
    """

    config_class = ShapleyViTConfig
    features_class = ShapleyViTModel
    _no_split_modules = ["ViTEmbeddings", "ShapleyViTLayer"]

    def __init__(self, config: ShapleyViTConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        for layer in self.vit.layers:
            layer.__class__ = ShapleyViTLayer  # the same weights, under the same names
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.attribution_head = AttributionHead(config, config.hidden_size, lambda: InfluenceViTLayer(config))
        self.coalition_adapters = coalition_adapters(config, [config.hidden_size] * config.num_hidden_layers)
        for module in self.modules():
            if type(module) is ViTMLP:
                module.__class__ = ShapleyViTMLP
        self.post_init()

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        embeddings = self.vit.embeddings.patch_embeddings
        step = _pair(embeddings.patch_size)
        if not interpolate_pos_encoding and (height, width) != _pair(embeddings.image_size):
            raise ValueError(
                f"Images must be of {embeddings.image_size} pixels (height, width), got ({height}, {width}): use the "
                "image processor, or `interpolate_pos_encoding=True`."
            )
        grid = height // step[0], width // step[1]
        check_grid(grid, step, (height, width))
        return grid

    def _recorded_tokens(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None, **kwargs
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict]:
        recordings = ("output_hidden_states", "output_attentions")
        if not kwargs and not any(getattr(self.config, name, False) for name in recordings):
            return self._tokens(self._embed(pixel_values, interpolate_pos_encoding)), {}
        own = self.attribution_head.own_layers
        # What the last layers read, from the first of those that the influence head has copies of. The backbone hands
        # the function on to every layer; a hook would see what other threads compute.
        inputs: deque[Tensor] = deque(maxlen=own)
        outputs = self.vit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, reading=inputs.append, **kwargs
        )
        cls, patches = _split(outputs.last_hidden_state)
        read = self._own_patches(inputs[0]) if own else patches
        recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        if self.attribution_head.pooled:
            return (read, cls, self._empty_token()), recorded
        return (read, patches, None), recorded

    def _embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None) -> Tensor:
        """CLS and patch embeddings: (B, C, H, W) -> (B, 1 + N, D)."""
        pixel_values = pixel_values.to(self.vit.embeddings.patch_embeddings.projection.weight.dtype)
        return self.vit.embeddings(pixel_values, interpolate_pos_encoding=bool(interpolate_pos_encoding))

    def _tokens(self, embeddings: Tensor, num_attributed: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, 1 + N, D) -> patch tokens for the influence head's blocks, those that vote, and the empty coalition's.

        The last is CLS where there is no patch at all. It goes through the layers with the images' tokens: by itself
        it would read all of the weights once more, which for a single image costs a tenth of the forward.
        """
        own, pooled = self.attribution_head.own_layers, self.attribution_head.pooled
        images = embeddings.shape[0] if pooled else None  # `len` would fix it in an exported program
        # CLS enters the layers alike for every image; its own weights may be sharded or offloaded, out of reach here.
        tokens = _packed(embeddings, embeddings[:1, 0]) if pooled else embeddings
        for layer in self.vit.layers[:-own] if own else []:
            tokens = layer(tokens, None, None, images)
        encoded = self._encode(tokens, None, 1 if pooled and own else None, own, images)
        if not pooled:
            patches = _split(encoded)[1]
            return self._own_patches(tokens[:num_attributed]) if own else patches, patches, None
        cls_and_patches, empty = _unpacked(encoded, images)
        cls, patches = _split(cls_and_patches)
        if own:
            patches = self._own_patches(_unpacked(tokens, images)[0][:num_attributed])
        return patches, cls, empty[0]

    def _own_patches(self, tokens: Tensor) -> Tensor:
        """The influence head's own patch tokens, made of CLS and patches: (B, 1 + N, D) -> (B, N, D)."""
        return _split(self.attribution_head.own_tokens(tokens))[1]

    def _last_layers(self, count: int) -> tuple[Sequence[nn.Module], nn.Module]:
        return self.vit.layers[-count:], self.vit.layernorm

    def _empty_token(self) -> Tensor:
        """CLS where there is no patch at all: (D)."""
        shape = (1, self.config.num_channels, *_pair(self.config.image_size))
        any_image = torch.zeros(shape, device=self._input_device)
        return self._encode(self._embed(any_image, None)[:, :1], None)[0, 0]

    def _structured_tokens(self, embeddings: Tensor, coalition_ids: Tensor, members: Tensor) -> Tensor:
        """Voting tokens where each player sees its own coalition and its CLS only.

        Args:
            embeddings: (B, 1 + N, D).
            coalition_ids: (B', R, N).
            members: the same as bool (B', R, G, N).

        Returns:
            (B', R, N, D), or (B', R, G, D) with `vote_readout="pooled"`.
        """
        if self.config._attn_implementation not in MASKING_BACKENDS:
            raise ValueError(
                f"Attention implementation {self.config._attn_implementation!r} cannot hide players from each other: "
                f"call `set_attn_implementation` with one of {MASKING_BACKENDS}."
            )
        batch, structures, num_coalitions, num_players = members.shape
        embeddings = embeddings[:batch, None].expand(-1, structures, -1, -1)
        cls, patches = embeddings.split([1, num_players], dim=2)
        tokens = cat([cls.expand(-1, -1, num_coalitions, -1), patches], dim=2).flatten(0, 1)  # (B' R, G + N, D)
        cls_ids = torch.arange(num_coalitions, device=members.device).expand(batch, structures, -1)
        token_ids = cat([cls_ids, coalition_ids], dim=2).flatten(0, 1)  # (B' R, G + N)
        mask = self._coalition_mask(tokens, token_ids)
        absent = None
        if self.coalition_adapters:
            absent = cat(absent_shares(members, coalition_ids, tokens.dtype), dim=1)  # (B' R, G + N, 1)
        share = self.attribution_head.coalition_gradient
        if self.attribution_head.pooled:
            encoded = self._encode(tokens, mask, num_coalitions, absent=absent, share=share)
        else:
            encoded = self._encode(tokens, mask, absent=absent, share=share)[:, num_coalitions:]
        return encoded.unflatten(0, (batch, structures))

    def _coalition_mask(self, tokens: Tensor, token_ids: Tensor):
        """What the attention backend needs to keep tokens (B, T, D) of different ids (B, T) apart."""
        if self.config._attn_implementation != "sdpa":
            return create_bidirectional_mask(
                config=self.config,
                inputs_embeds=tokens,
                attention_mask=None,
                and_mask_function=lambda b, head, query, key: token_ids[b, query] == token_ids[b, key],
            )
        # Additive and in the queries' dtype: torch would turn a bool mask into just that, anew in every layer.
        apart = token_ids[:, None, :, None] != token_ids[:, None, None, :]  # (B, 1, T, T)
        nothing = torch.zeros_like(apart, dtype=dtype_of_products(tokens))
        return nothing.masked_fill_(apart, float("-inf"))

    def _encode(
        self,
        tokens: Tensor,
        mask,
        num_queries: int | None = None,
        num_layers: int = 0,
        num_images: int | None = None,
        absent: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """All layers, or the last `num_layers`, and the final norm; the last layer for the first tokens alone.

        With `absent`, the share of players that each token's coalition lacks, (B, T, 1), the adapters act. The layers'
        weights get `share` of their gradient.
        """
        layers = self.vit.layers[-num_layers:]
        for index, layer in enumerate(layers):
            tokens = layer(tokens, mask, num_queries if index == len(layers) - 1 else None, num_images, share)
            if absent is not None:
                tokens = self.coalition_adapters[index](tokens, absent[:, : tokens.shape[1]])
        return learning_less(self.vit.layernorm, share)(tokens)


def _split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """CLS and patches: (B, 1 + N, D) -> (B, 1, D), (B, N, D)."""
    return tokens[:, :1], tokens[:, 1:]


def _are_plain(*modules: nn.Module) -> bool:
    """Whether these are linear layers whose weights say all: no adapter, no quantisation, nothing offloaded."""
    return all(type(module) is nn.Linear and not module.weight.is_meta for module in modules)


def _packed(tokens: Tensor, lone: Tensor) -> Tensor:
    """The rows of all images' tokens, and that of one more token: (B, T, D), (1, D) -> (B T + 1, D)."""
    return cat([tokens.flatten(0, 1), lone])


def _unpacked(rows: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """What `_packed` put together: (B T + 1, D) -> (B, T, D), (1, D)."""
    tokens, lone = rows.split([rows.shape[0] - 1, 1])  # whose gradient is put together in one pass, unlike two slices'
    return tokens.unflatten(0, (num_images, -1)), lone


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


ShapleyViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ShapleyViTModel.register_for_auto_class("AutoModel")
