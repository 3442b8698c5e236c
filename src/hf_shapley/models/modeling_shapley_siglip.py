"""A SigLIP that says why a picture matches a text: what each patch and each word add to their embeddings."""

import torch
from torch import Tensor
from transformers import SiglipModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .configuration_shapley_clip import ShapleySiglipConfig
from .image_text_explaining import ImageTextExplainingMixin
from .token_structures import Structured, states_at


class ShapleySiglipModel(ImageTextExplainingMixin, SiglipModel):
    """SigLIP with the Shapley values of its embeddings: Phi of an image's patches, Psi of a text's words.

    Loads its own checkpoints and plain SigLIP ones, whose outputs it keeps. An image is read by a probe's attention
    to its patches; of no patch at all that attention gives 0.
    """

    config_class = ShapleySiglipConfig
    layer_class = SiglipEncoderLayer
    image_prefix = 0

    def __init__(self, config: ShapleySiglipConfig):
        super().__init__(self.config_class.of(config))
        self.complete()
        self.post_init()

    @property
    def embedding_size(self) -> int:
        return self.vision_model.config.hidden_size

    def image_states(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        return self.vision_model.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)

    def read_images(self, state: Tensor, tokens: Structured, num_coalitions: int) -> Tensor:
        stock, head = self.vision_model, self.vision_model.head
        state = stock.post_layernorm(state)
        coalitions = torch.arange(num_coalitions, device=state.device).unsqueeze(1)
        apart = tokens.ids.unsqueeze(1) != coalitions  # (B, G, L)
        empty = apart.all(-1, keepdim=True)
        apart = (apart & ~empty).repeat_interleave(head.attention.num_heads, dim=0)  # softmax over nothing is NaN
        mask = torch.zeros(apart.shape, dtype=state.dtype, device=state.device).masked_fill_(apart, float("-inf"))
        probe = head.probe.expand(len(state), num_coalitions, -1)
        attended = head.attention(probe, state, state, attn_mask=mask)[0]
        attended = torch.where(empty, head.attention.out_proj.bias.to(attended.dtype), attended)
        return attended + head.mlp(head.layernorm(attended))

    def read_texts(self, state: Tensor, tokens: Structured) -> Tensor:
        assert tokens.readers is not None  # as the last token is read
        return self.text_model.head(states_at(self.text_model.final_layer_norm(state), tokens.readers))

    def read_places(self, input_ids: Tensor) -> Tensor:
        return torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)

    def are_words(self, input_ids: Tensor, places: Tensor) -> Tensor:
        config = self.text_model.config
        ends = torch.tensor([config.pad_token_id, config.eos_token_id, config.bos_token_id], device=input_ids.device)
        return torch.isin(input_ids, ends, invert=True)


ShapleySiglipModel.register_for_auto_class("AutoModel")
