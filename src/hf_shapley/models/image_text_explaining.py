"""What a model of image and text is asked when it does not learn: why do this picture and these words match?"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .checks import check_count, check_device, check_finite, check_floats
from .coalitions import check_coalitions
from .evaluation_mode import evaluating
from .explaining import attribution_maps
from .heads import at_least_float32
from .image_text import ImageTextMixin, ShapleyImageTextOutput
from .token_structures import Tokens

logger = logging.getLogger(__name__)


@dataclass
class ImageTextExplanation(ModelOutput):
    """Why I images match J texts, or do not; all in logits. h w patches, at most M words, float32.

    Args:
        maps: (I, J, h, w): what each patch adds; a map's sum is the logit less `image_base_logits`.
        word_attributions: (I, J, M): what each word adds; their sum is the logit less `text_base_logits`.
        logits_per_image: (I, J).
        image_base_logits: (J): of an image without patches.
        text_base_logits: (I, J): of a text without words.
    """

    maps: Tensor | None = None
    word_attributions: Tensor | None = None
    logits_per_image: Tensor | None = None
    image_base_logits: Tensor | None = None
    text_base_logits: Tensor | None = None


class ImageTextExplainingMixin(ImageTextMixin):
    """`explain`, `explain_pair`, `image_game` and `text_game`."""

    @property
    def game_name(self) -> str:
        """Whose game is explained, and what an absent player is, in words."""
        return "the model's own, absent patches and words dropped"

    @torch.no_grad()
    def explain(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> ImageTextExplanation:
        """Attribute the logit of every image with every text to the patches, and to the words.

        Args:
            pixel_values: (I, C, H, W).
            input_ids: (J, T) long.
            attention_mask: (J, T), 0 = padding.
            word_ids: (J, T) long, see `word_ids_of`; None = each token between begin and end is a word.
            interpolate_pos_encoding: allow other image sizes than the configuration's.

        Returns:
            `ImageTextExplanation`.

        Raises:
            ValueError: for what does not fit, or an answer that is NaN or infinite.
        """
        found = self._explained(pixel_values, input_ids, attention_mask, word_ids, interpolate_pos_encoding)
        scale, images, texts = self._scale(), found["image_embeds"], found["text_embeds"]
        grid = self.grid_size(pixel_values.shape[-2], pixel_values.shape[-1], interpolate_pos_encoding)
        phi, psi = found["image_attributions"], found["text_attributions"]
        return ImageTextExplanation(
            maps=attribution_maps(scale * phi @ at_least_float32(texts).T, grid),
            word_attributions=scale * torch.einsum("jmd,id->ijm", psi, at_least_float32(images)),
            logits_per_image=found.logits_per_image,
            image_base_logits=self._logits(found["image_base_embeds"], texts),
            text_base_logits=self._logits(images, found["text_base_embeds"]),
        )

    @torch.no_grad()
    def explain_pair(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """What each patch and each word of a pair have to do with each other: s Phi Psi'.

        Entry (i, j) is the Shapley value of word j in the game "Shapley value of patch i", and the other way round.
        All of a matrix sums to v(all, all) - v(empty, all) - v(all, empty) + v(empty, empty).

        Args:
            pixel_values: (B, C, H, W).
            input_ids: (B, T) long: the text of each image.
            attention_mask: (B, T), 0 = padding.
            word_ids: (B, T) long, see `word_ids_of`; None = each token between begin and end is a word.
            interpolate_pos_encoding: allow other image sizes than the configuration's.

        Returns:
            (B, N, M) in logits; 0 beyond a text's own words.

        Raises:
            ValueError: for what does not fit, or an answer that is NaN or infinite.
        """
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"Pairs need as many texts as images, got {len(pixel_values)} images and {len(input_ids)} texts: "
                "`explain` takes every image with every text."
            )
        found = self._explained(pixel_values, input_ids, attention_mask, word_ids, interpolate_pos_encoding)
        return self._scale() * found["image_attributions"] @ found["text_attributions"].mT

    def _explained(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        word_ids: Tensor | None,
        interpolate_pos_encoding: bool,
    ) -> ShapleyImageTextOutput:
        with evaluating(self):
            found = self(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                word_ids=word_ids,
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
            )
        for name in ("logits_per_image", "image_attributions", "text_attributions"):
            check_finite(found[name], f"outputs.{name}")
        if not self.attributions_trained:
            logger.warning("The attributions of this model have not been trained: each is an even share.")
        return found

    def _scale(self) -> Tensor:
        """s, the scale of the logits: scalar, at least float32."""
        return at_least_float32(self.logit_scale.exp())

    def _logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """v of embeddings, (..., D) and (K, D) -> (..., K)."""
        logits = self._scale() * at_least_float32(images) @ at_least_float32(texts).T
        bias = getattr(self, "logit_bias", None)  # SigLIP's
        return logits if bias is None else logits + at_least_float32(bias)

    def image_game(
        self,
        pixel_values: Tensor,
        text_embeds: Tensor | None = None,
        *,
        batch_size: int = 1024,
        interpolate_pos_encoding: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        """The game of an image's patches: of the embedding, or of its logits with texts.

        Args:
            pixel_values: (C, H, W) for the game of one image, (I, C, H, W) for one of many.
            text_embeds: (K, D), such as the output's; None = the vector-valued game.
            batch_size: coalition structures in one forward, over all images.
            interpolate_pos_encoding: allow other image sizes than the configuration's.

        Returns:
            bool (R, N), True = present -> e_S (R, D), or s <e_S, t> (R, K); of many images bool (I, R, N) ->
            (I, R, D or K).
        """
        is_one = isinstance(pixel_values, Tensor) and pixel_values.ndim == 3
        with torch.no_grad():
            images = self._image_tokens(pixel_values[None] if is_one else pixel_values, interpolate_pos_encoding)
        return self._game(images, self._image_embeds, text_embeds, "text_embeds", batch_size, is_one)

    def text_game(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        image_embeds: Tensor | None = None,
        *,
        batch_size: int = 1024,
    ) -> Callable[[Tensor], Tensor]:
        """The game of a text's words: of the embedding, or of its logits with images.

        Args:
            input_ids: (T) long for the game of one text, (J, T) for one of many.
            attention_mask: of the same shape, 0 = padding.
            word_ids: of the same shape, see `word_ids_of`; None = each token between begin and end is a word.
            image_embeds: (K, D), such as the output's; None = the vector-valued game.
            batch_size: coalition structures in one forward, over all texts.

        Returns:
            bool (R, M), True = present -> t_T (R, D), or s <e, t_T> (R, K); of many texts bool (J, R, M) ->
            (J, R, D or K).
        """
        is_one = isinstance(input_ids, Tensor) and input_ids.ndim == 1
        given = [x[None] if is_one and isinstance(x, Tensor) else x for x in (input_ids, attention_mask, word_ids)]
        with torch.no_grad():
            texts = self._text_tokens(given[0], given[1], given[2])  # type: ignore[arg-type]
        return self._game(texts, self._text_embeds, image_embeds, "image_embeds", batch_size, is_one)

    def _game(
        self,
        tokens: Tokens,
        embeds_of: Callable[[Tokens, Tensor], Tensor],
        others: Tensor | None,
        name: str,
        batch_size: int,
        is_one: bool,
    ) -> Callable[[Tensor], Tensor]:
        """The game of one side, by itself or through embeddings of the other, (K, D)."""
        check_count(batch_size, "batch_size")
        if others is not None:
            check_floats(others, name, ("embeddings", self.embedding_size), f"take the output's `{name}`")
            check_device(others, name, tokens.players.device)
        batch = len(tokens.players)

        @torch.no_grad()
        def values_of(coalitions: Tensor) -> Tensor:
            check_coalitions(coalitions, tokens.num_players)
            asked = coalitions.unsqueeze(0) if is_one else coalitions
            if asked.ndim != 3 or len(asked) != batch or not asked.shape[1]:
                wanted = () if is_one else (batch,)
                raise ValueError(
                    f"`coalitions` must be of shape {(*wanted, 'coalitions', tokens.num_players)}, got "
                    f"{tuple(coalitions.shape)}."
                )
            asked = asked.to(tokens.players.device)
            paired = asked.shape[1] % 2 == 0 and torch.equal(asked[:, 0::2], ~asked[:, 1::2])
            members = asked.unflatten(1, (-1, 2 if paired else 1))  # (B, R, G, N)
            with evaluating(self):
                parts = members.split(max(1, batch_size // batch), dim=1)
                values = torch.cat([embeds_of(tokens, part) for part in parts], dim=1).flatten(1, 2)
            values = at_least_float32(values) if others is None else self._logits(values, others)
            return values.squeeze(0) if is_one else values

        return values_of
