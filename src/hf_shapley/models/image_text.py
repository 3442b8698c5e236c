"""Models of image and text whose embeddings are attributed: to patches, and to words.

Of a coalition S of an image's patches the model makes an embedding e_S of length 1, of a coalition T of a text's
words t_T. The value of both is v(S, T) = s <e_S, t_T>, s the scale of the logits. It is linear in either, and so are
Shapley values: with Phi (N, D) those of the vector-valued game e_S, the attributions of any text t are s Phi t, with
Psi (M, D) those of t_T the attributions of any image e are s Psi e, and s Phi Psi' (N, M) says what each patch and
each word have to do with each other. Phi sums to e_all - e_empty and Psi to t_all - t_empty, by construction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils.generic import can_return_tuple

from .backbone import check_grid
from .checks import check_device, check_floats
from .coalitions import check_coalitions
from .heads import AttributionHead, ZeroLinear, at_least_float32
from .image_text_loading import ImageTextLoadingMixin
from .token_structures import Structured, Tokens, additive_mask, after_layers, structured
from .words import check_text, check_word_ids

MASKING_BACKENDS = ("eager", "sdpa")  # what takes a mask that keeps coalitions apart


@dataclass
class ShapleyImageTextOutput(CLIPOutput):
    """What one forward of I images and J texts gives, beside what the stock model does: N patches, at most M words.

    Args:
        image_attributions: Phi, (I, N, D): what each patch adds to its image's embedding.
        text_attributions: Psi, (J, M, D): what each word adds to its text's; 0 beyond a text's own words.
        image_base_embeds: e_empty, (D), of an image without patches: the same for all.
        text_base_embeds: t_empty, (J, D), of a text without words, as long as it is.
        image_coalition_embeds: e_S and that of S's complement, (I, R, 2, D); with `image_coalitions`.
        text_coalition_embeds: t_T and that of T's complement, (J, R, 2, D); with `text_coalitions`.
    """

    image_attributions: Tensor | None = None
    text_attributions: Tensor | None = None
    image_base_embeds: Tensor | None = None
    text_base_embeds: Tensor | None = None
    image_coalition_embeds: Tensor | None = None
    text_coalition_embeds: Tensor | None = None


class ImageTextMixin(ImageTextLoadingMixin):
    """The forward of a model of image and text over the stock one; a subclass says what differs between those.

    Its constructor makes the stock model, then calls `complete`.
    """

    layer_class: type[nn.Module]  # the stock layer of both sides
    image_prefix: int = 1  # tokens before an image's patches; the embedding is made of the first one, or of patches
    is_causal: bool = False  # whether a text's tokens see those before them only

    # The loss is a mean over the batch: the Trainer must divide it by the number of accumulation steps.
    accepts_loss_kwargs = False

    def image_states(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """What enters the layers of the image's side: (I, P + N, D'), patches last."""
        raise NotImplementedError

    def read_images(self, state: Tensor, tokens: Structured, num_coalitions: int) -> Tensor:
        """Embeddings of G coalitions, not yet of length 1, from what the layers gave: (B, L, D') -> (B, G, D)."""
        raise NotImplementedError

    def read_texts(self, state: Tensor, tokens: Structured) -> Tensor:
        """As `read_images`, of texts."""
        raise NotImplementedError

    def read_places(self, input_ids: Tensor) -> Tensor:
        """The token of each text that its embedding is made of: long (J, T) -> long (J)."""
        raise NotImplementedError

    def are_words(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """Where no `word_ids` are given, the tokens that are words by themselves: bool (J, T)."""
        raise NotImplementedError

    def complete(self) -> None:
        """Add the attribution heads to the stock model."""
        self.image_attribution_head, self.text_attribution_head = (
            self._head(stock.config) for stock in (self.vision_model, self.text_model)
        )

    def _head(self, config: PreTrainedConfig) -> AttributionHead:
        """The attribution head of the side that has this configuration."""
        options = self.config.side_options(config)
        return AttributionHead(options, config.hidden_size, partial(self.layer_class, config), self.embedding_size)

    @property
    def embedding_size(self) -> int:
        """D, the width of embeddings."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        word_ids: Tensor | None = None,
        image_coalitions: Tensor | None = None,
        text_coalitions: Tensor | None = None,
        num_with_gradient: int | None = None,
        **kwargs: Any,
    ) -> ShapleyImageTextOutput:
        """Compare images and texts as the stock model does, attribute the embeddings and, if asked, play the games.

        Args:
            input_ids: (J, T) long.
            pixel_values: (I, C, H, W).
            attention_mask: (J, T), 0 = padding.
            position_ids: as the stock model takes them.
            return_loss: give the contrastive loss too, of as many images as texts, pair by pair.
            interpolate_pos_encoding: allow other image sizes than the configuration's.
            word_ids: (J, T) long, the word that each token is of, from 0 on, and -1 for those of none, which are
                always there; see `word_ids_of`. None = each token between begin and end is a word.
            image_coalitions: bool (I, R, N): evaluate the embeddings of these coalitions and of their complements.
            text_coalitions: bool (J, R, M): the same of words; what is beyond a text's own words is ignored.
            num_with_gradient: only the first so many images' and texts' coalitions are differentiated through.
            **kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `ShapleyImageTextOutput`.

        Raises:
            ValueError: for pixels, texts, words or coalitions that do not fit.
        """
        images = self._image_tokens(pixel_values, interpolate_pos_encoding)
        texts = self._text_tokens(input_ids, attention_mask, word_ids, position_ids)
        stock, image_branch, text_branch = self._stock_forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_loss=return_loss,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        image_base = self._image_embeds(_rows(images, slice(1)), _nobody(images, 1))[0, 0, 0]
        text_base = self._text_embeds(texts, _nobody(texts, len(input_ids)))[:, 0, 0]
        played = {}
        for side, tokens, coalitions, embeds_of in (
            ("image", images, image_coalitions, self._image_embeds),
            ("text", texts, text_coalitions, self._text_embeds),
        ):
            if coalitions is not None:
                members = _pairs(coalitions, f"{side}_coalitions", tokens)
                played[f"{side}_coalition_embeds"] = _played(embeds_of, tokens, members, num_with_gradient)
        return ShapleyImageTextOutput(
            **stock,
            image_attributions=self._image_attributions(image_branch, stock.image_embeds, image_base),
            text_attributions=self._text_attributions(text_branch, texts, stock.text_embeds, text_base),
            image_base_embeds=image_base,
            text_base_embeds=text_base,
            **played,
        )

    def _stock_forward(self, **given: Any) -> tuple[CLIPOutput, Tensor, Tensor]:
        """The stock model's output, and the tokens of both sides at which the heads' own layers leave."""
        wanted = given.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        stock = super().forward(**given, output_hidden_states=True, return_dict=True)
        names = ("vision_model_output", "text_model_output")
        left = -1 - self.config.influence_own_layers
        image_branch, text_branch = (stock[name].hidden_states[left] for name in names)
        if not wanted:
            for name in names:
                kept = {key: value for key, value in stock[name].items() if key != "hidden_states"}
                stock[name] = type(stock[name])(**kept)
        return stock, image_branch, text_branch

    def _image_attributions(self, branch: Tensor, embeds: Tensor, base: Tensor) -> Tensor:
        """Phi: tokens (I, P + N, D') at which the head leaves, e_all (I, D), e_empty (D) -> (I, N, D)."""
        head, everyone = self.image_attribution_head, _mask_for_head(None)
        own = head.own_tokens(branch, everyone) if head.own_layers else branch
        deviations = at_least_float32(head.deviations(own[:, self.image_prefix :], embeds, everyone))
        gains = head.flowing(at_least_float32(embeds) - at_least_float32(base)).unsqueeze(1)
        return (deviations - deviations.mean(1, keepdim=True) + gains) / deviations.shape[1]

    def _text_attributions(self, branch: Tensor, texts: Tokens, embeds: Tensor, base: Tensor) -> Tensor:
        """Psi: tokens (J, T, D') at which the head leaves, t_all and t_empty (J, D) -> (J, M, D)."""
        head, seen = self.text_attribution_head, texts.visible
        if texts.causal and texts.read is not None:
            seen = seen & (torch.arange(seen.shape[1], device=seen.device) <= texts.read.unsqueeze(1))
        # Each word asks what those after it make of it too, so the head looks both ways.
        mask = _mask_for_head(additive_mask(seen.unsqueeze(1), branch))
        own = head.own_tokens(branch, mask) if head.own_layers else branch
        of_tokens = at_least_float32(head.deviations(own, embeds, mask))  # (J, T, D)
        numbers = torch.arange(texts.num_players, device=seen.device).unsqueeze(1)
        words = (texts.players.unsqueeze(1) == numbers).to(of_tokens.dtype)  # (J, M, T)
        sizes = words.sum(-1, keepdim=True)
        exists = (sizes > 0).to(of_tokens.dtype)  # (J, M, 1)
        count = exists.sum(1, keepdim=True)
        with torch.autocast(of_tokens.device.type, enabled=False):
            deviations = words @ of_tokens / sizes.clamp(min=1)
        gains = head.flowing(at_least_float32(embeds) - at_least_float32(base)).unsqueeze(1)
        return exists * (deviations - deviations.sum(1, keepdim=True) / count + gains) / count

    def _image_embeds(self, images: Tokens, members: Tensor) -> Tensor:
        """e_S of G coalitions in each of R structures: bool (I, R, G, N) -> (I, R, G, D)."""
        self._check_attention(self.vision_model.config)
        tokens = structured(images, members)
        state = after_layers(self.vision_model.encoder.layers, tokens)
        return unit(self.read_images(state, tokens, members.shape[2])).unflatten(0, members.shape[:2])

    def _text_embeds(self, texts: Tokens, members: Tensor) -> Tensor:
        """t_T of G coalitions in each of R structures: bool (J, R, G, M) -> (J, R, G, D)."""
        self._check_attention(self.text_model.config)
        tokens = structured(texts, members)
        state = after_layers(self.text_model.encoder.layers, tokens)
        return unit(self.read_texts(state, tokens)).unflatten(0, members.shape[:2])

    def _check_attention(self, config: PreTrainedConfig) -> None:
        if config._attn_implementation not in MASKING_BACKENDS:
            raise ValueError(
                f"Attention implementation {config._attn_implementation!r} cannot hide players from each other: call "
                f"`set_attn_implementation` with one of {MASKING_BACKENDS}."
            )

    def _image_tokens(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tokens:
        """Images (I, C, H, W), checked, as what enters the layers."""
        channels = self.vision_model.config.num_channels
        check_floats(
            pixel_values, "pixel_values", ("images", channels, "height", "width"), "use the model's image processor"
        )
        check_device(pixel_values, "pixel_values", self.device)
        grid = self.grid_size(pixel_values.shape[-2], pixel_values.shape[-1], interpolate_pos_encoding)
        states = self.image_states(pixel_values, interpolate_pos_encoding)
        players = torch.arange(states.shape[1], device=states.device) - self.image_prefix
        players = players.clamp(min=-1).expand(len(states), -1)
        read = torch.zeros_like(players[:, 0]) if self.image_prefix else None
        return Tokens(states, players, grid[0] * grid[1], torch.ones_like(players, dtype=torch.bool), read)

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        size, step = self.vision_model.config.image_size, self.vision_model.config.patch_size
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"Images must be of {size} x {size} pixels, got {height} x {width}: use the image processor, or "
                "`interpolate_pos_encoding=True`."
            )
        grid = height // step, width // step
        check_grid(grid, (step, step), (height, width))
        return grid

    def word_counts(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, word_ids: Tensor | None = None
    ) -> Tensor:
        """How many words each text has, as `forward` takes texts: (J)."""
        with torch.no_grad():
            return self._text_tokens(input_ids, attention_mask, word_ids).players.amax(1) + 1

    def _text_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tokens:
        """Texts (J, T), checked, as what enters the layers."""
        check_text(input_ids, attention_mask, self.text_model.config.max_position_embeddings, self.device)
        read = self.read_places(input_ids)
        visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        # What a word may not be: the token that is read, which is always there, and what nothing reads.
        allowed = visible & (places < read[:, None] if self.is_causal else places != read[:, None])
        if word_ids is None:
            words = allowed & self.are_words(input_ids, places)
            word_ids = torch.where(words, words.long().cumsum(1) - 1, -1)
        num_words = check_word_ids(word_ids, allowed)
        states = self.text_model.embeddings(input_ids=input_ids, position_ids=position_ids)
        return Tokens(states, word_ids, num_words, visible, read, self.is_causal)


def _mask_for_head(mask: Tensor | None) -> Any:
    """What a head hands to its blocks beside the tokens: for layers of this kind a mask in the grid's place."""
    return mask


def unit(embeds: Tensor) -> Tensor:
    """Embeddings (..., D) of length 1, as the stock models make them."""
    return embeds / embeds.square().sum(-1, keepdim=True).sqrt()


def _nobody(tokens: Tokens, batch: int) -> Tensor:
    """One structure that holds the empty coalition, for each of a batch: bool (B, 1, 1, N)."""
    return torch.zeros(batch, 1, 1, tokens.num_players, dtype=torch.bool, device=tokens.players.device)


def _rows(tokens: Tokens, rows: slice) -> Tokens:
    """Some of the images or texts."""
    states, players, num_players, visible, read, causal = tokens
    read = None if read is None else read[rows]
    return Tokens(states[rows], players[rows], num_players, visible[rows], read, causal)


def _played(
    embeds_of: Callable[[Tokens, Tensor], Tensor], tokens: Tokens, members: Tensor, count: int | None
) -> Tensor:
    """Embeddings of coalitions bool (B, R, G, N), those of all but the first `count` rows without gradient."""
    if count is None or count >= len(members):
        return embeds_of(tokens, members)
    first, others = slice(count), slice(count, None)
    with torch.no_grad():
        constant = embeds_of(_rows(tokens, others), members[others])
    return torch.cat([embeds_of(_rows(tokens, first), members[first]), constant])


def _pairs(coalitions: Tensor, name: str, tokens: Tokens) -> Tensor:
    """Structures of a coalition and its complement, (B, R, 2, N), from coalitions (B, R, N), which are checked."""
    check_coalitions(coalitions, tokens.num_players, name)
    if coalitions.ndim != 3 or len(coalitions) != len(tokens.players) or not coalitions.shape[1]:
        raise ValueError(
            f"`{name}` must be of shape ({len(tokens.players)}, coalitions, {tokens.num_players}), got "
            f"{tuple(coalitions.shape)}."
        )
    check_device(coalitions, name, tokens.players.device)
    return torch.stack([coalitions, ~coalitions], dim=2)
