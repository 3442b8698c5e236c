"""A ViT whose prediction is, exactly, a base value plus the Shapley values of its patches."""

import torch
from torch import Tensor, cat, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.vit.modeling_vit import ViTLayer, ViTModel, ViTPreTrainedModel

from .attribution_head import AttributionHead, ShapleyImageClassifierMixin, check_grid
from .configuration_shapley import ShapleyViTConfig

# What can hide players from each other; others would ignore the mask, and hidden pixels would leak.
MASKING_BACKENDS = ("eager", "sdpa", "flex_attention")


class InfluenceViTLayer(ViTLayer):
    """A ViT layer over the patch tokens, for the influence head."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(tokens)


class ShapleyViTForImageClassification(ShapleyImageClassifierMixin, ViTPreTrainedModel):
    """ViT image classifier that gives logits and every patch's Shapley value for every label in one forward pass.

    Loads its own checkpoints and plain ViT ones: the stock `classifier` becomes the vote head, its bias the base
    values.
    """

    config_class = ShapleyViTConfig

    def __init__(self, config: ShapleyViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.attribution_head = AttributionHead(config, config.hidden_size, lambda: InfluenceViTLayer(config))
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
    ) -> tuple[tuple[Tensor, Tensor], dict]:
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return self._patches_and_voting(outputs.last_hidden_state), recorded

    def _embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None) -> Tensor:
        """CLS and patch embeddings: (B, C, H, W) -> (B, 1 + N, D)."""
        pixel_values = pixel_values.to(self.vit.embeddings.patch_embeddings.projection.weight.dtype)
        return self.vit.embeddings(pixel_values, interpolate_pos_encoding=bool(interpolate_pos_encoding))

    def _tokens(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, D) -> patch tokens (B, N, D), and those that vote."""
        return self._patches_and_voting(self._encode(embeddings, None))

    def _patches_and_voting(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = encoded.split([1, encoded.shape[1] - 1], dim=1)
        return patches, cls if self.attribution_head.pooled else patches

    def _empty_token(self) -> Tensor:
        """CLS where there is no patch at all: (D)."""
        embeddings = self.vit.embeddings
        return self._encode(embeddings.cls_token + embeddings.position_embeddings[:, :1], None)[0, 0]

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
        encoded = self._encode(tokens, self._coalition_mask(tokens, token_ids)).unflatten(0, (batch, structures))
        return encoded[:, :, :num_coalitions] if self.attribution_head.pooled else encoded[:, :, num_coalitions:]

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
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        apart = token_ids[:, None, :, None] != token_ids[:, None, None, :]  # (B, 1, T, T)
        return torch.zeros(apart.shape, dtype=dtype, device=tokens.device).masked_fill_(apart, float("-inf"))

    def _encode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.vit.layers:
            tokens = layer(tokens, mask)
        return self.vit.layernorm(tokens)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


ShapleyViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
