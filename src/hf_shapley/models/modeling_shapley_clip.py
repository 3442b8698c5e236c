"""A CLIP that says why a picture matches a text: what each patch and each word adds to their embeddings."""

from torch import Tensor
from transformers import CLIPModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .configuration_shapley_clip import ShapleyCLIPConfig
from .image_text_explaining import ImageTextExplainingMixin
from .token_structures import Structured, states_at

LEGACY_END = 2  # what old configurations say; the end of a text is then its largest id


class ShapleyCLIPModel(ImageTextExplainingMixin, CLIPModel):
    """CLIP with the Shapley values of its embeddings: Phi of an image's patches, Psi of a text's words.

    Loads its own checkpoints and plain CLIP ones, whose outputs it keeps.
    """

    config_class = ShapleyCLIPConfig
    layer_class = CLIPEncoderLayer
    is_causal = True

    def __init__(self, config: ShapleyCLIPConfig):
        super().__init__(self.config_class.of(config))
        self.complete()
        self.post_init()

    @property
    def embedding_size(self) -> int:
        return self.projection_dim

    def image_states(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        stock = self.vision_model
        return stock.pre_layrnorm(stock.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))

    def read_images(self, state: Tensor, tokens: Structured, num_coalitions: int) -> Tensor:
        assert tokens.readers is not None  # as CLS is read
        return self.visual_projection(self.vision_model.post_layernorm(states_at(state, tokens.readers)))

    def read_texts(self, state: Tensor, tokens: Structured) -> Tensor:
        assert tokens.readers is not None  # as the end of a text is read
        return self.text_projection(states_at(self.text_model.final_layer_norm(state), tokens.readers))

    def read_places(self, input_ids: Tensor) -> Tensor:
        end = self.text_model.eos_token_id
        if end == LEGACY_END:
            return input_ids.int().argmax(-1)
        is_end = input_ids == end
        if not is_end.any(-1).all():
            raise ValueError(
                f"Each text must have its end, `eos_token_id` = {end}, got texts without it, such as "
                f"{input_ids[~is_end.any(-1)][0].tolist()[-8:]}: use the model's tokenizer, with special tokens."
            )
        return is_end.int().argmax(-1)

    def are_words(self, input_ids: Tensor, places: Tensor) -> Tensor:
        # The first token is the begin, of which old configurations do not know the id.
        return (places > 0).expand_as(input_ids)


ShapleyCLIPModel.register_for_auto_class("AutoModel")
