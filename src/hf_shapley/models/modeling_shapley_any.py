"""Any stock image classifier, whose prediction is, exactly, a base value plus the Shapley values of image patches.

The stock model is inside as it is. Its game is played in pixels: those of absent players are painted over, and v(S) is
the stock model's answer to the painted image, one forward for each coalition. What an absent player was cannot reach
it. That of no player at all is its answer to an image that is all paint, the same for all images.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel

from .backbone import Backbone, Read, check_grid
from .configuration_shapley_any import ShapleyAnyConfig
from .heads import AttributionHead, coalition_adapters
from .modeling_shapley import ShapleyImageClassifierMixin
from .stock_places import find_places, listening

IMAGES_AT_ONCE = 128
"""In one stock forward of the game where nothing is learned; so many images' activations are in memory at a time."""


class Heard(NamedTuple):
    """What a stock forward lets hear of B images."""

    cells: Tensor  # one token per player, (B, N, D)
    readouts: Tensor  # what the classifier reads, (B, D')


class ShapleyForImageClassification(ShapleyImageClassifierMixin, Backbone, PreTrainedModel):
    """Any image classifier of transformers that takes pixels, with every patch's Shapley value in the same forward.

    Loads its own checkpoints and the stock model's, whose logits it keeps. Batch normalisation keeps its statistics
    in training: those of a batch would let images, and what is painted on them, see each other.
    """

    config_class = ShapleyAnyConfig
    base_model_prefix = "stock"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # Whatever is asked for is asked of the stock model, which knows what it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: ShapleyAnyConfig):
        config = self.config_class.of(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        stock_class = _stock_class(config)
        with torch.device("meta"):  # before there are any weights: it may be no classifier that can be explained
            trial = stock_class(config.stock_config).eval()
        self._stock_options = _stock_options(trial, config)
        self.places = find_places(trial, config.num_channels, config.size, **self._stock_options)
        self.classifier_names = tuple(f"{self.base_model_prefix}.{name}" for name in self.places.classifiers)
        is_meta = torch.get_default_device().type == "meta"
        self.stock = trial.train() if is_meta else stock_class(config.stock_config)
        self.supports_gradient_checkpointing = self.stock.supports_gradient_checkpointing
        self.grid = _grid_of_players(config, self.places.features.grid)
        self.attribution_head = AttributionHead(
            config, self.places.features.width, _no_stock_layer, self.places.readout_size
        )
        self.coalition_adapters = coalition_adapters(config, self.adapter_widths())
        self.post_init()

    @property
    def game_name(self) -> str:
        """Whose game is explained, and what an absent player is, in words."""
        return "the classifier's own, absent patches painted"

    def train(self, mode: bool = True) -> "ShapleyForImageClassification":
        """As for any module; batch normalisation stays in evaluation mode."""
        super().train(mode)
        for module in self.stock.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; raises if they do not fit."""
        if (height, width) != self.config.size:
            raise ValueError(
                f"Images must be of {self.config.size} pixels (height, width), got ({height}, {width}): "
                "use the image processor, or load the model with another `image_size`."
            )
        return self.grid

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """The images themselves, in the stock model's dtype: (B, C, H, W)."""
        return pixel_values.to(self.dtype)

    def blocks(self) -> Sequence[Callable[[Any, Any], Any]]:
        return [self._run]

    def adapter_widths(self) -> Sequence[int]:
        return []

    def enter(self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None) -> tuple[Tensor, int | None]:
        """The images, or B' R G painted ones of them; the rule is G."""
        if members is None:
            return embeddings, None
        step = embeddings.shape[-2] // grid[0], embeddings.shape[-1] // grid[1]
        pixels = members.unflatten(-1, grid).repeat_interleave(step[0], -2).repeat_interleave(step[1], -1)
        images = embeddings[: len(members), None, None]  # (B', 1, 1, C, H, W)
        painted = torch.where(pixels.unsqueeze(3), images, self.config.paint)
        return painted.flatten(0, 2), members.shape[2]

    def _run(self, images: Tensor, num_coalitions: int | None) -> Heard:
        """The stock forward: of all images at once where these are as they are, or where something is learned."""
        if num_coalitions is None or torch.is_grad_enabled():
            return self._heard(images)[0]
        heard = [self._heard(part)[0] for part in images.split(IMAGES_AT_ONCE)]
        return Heard(*map(torch.cat, zip(*heard, strict=True)))

    def _heard(self, images: Tensor, **wanted: Any) -> tuple[Heard, Any]:
        """What one stock forward lets hear, and what it gives."""
        with listening(self.stock, self.places) as heard:
            outputs = self.stock(images, **self._stock_options, **wanted)
        cells = self.places.features.cells(heard[""], self.grid)
        readouts = [heard[name].flatten(1) for name in self.places.classifiers]
        return Heard(cells, readouts[0] if len(readouts) == 1 else torch.cat(readouts, dim=-1)), outputs

    def tokens(self, state: Any, rule: int | None) -> Any:
        """No layers of the head's own leave on the way: nobody reads it."""
        return state

    def read(self, state: Heard, rule: int | None) -> Read:
        if rule is None:
            return Read(state.cells, state.readouts.unsqueeze(1), self.empty_token())
        return Read(state.cells, state.readouts.unflatten(0, (-1, rule)), None)

    def empty_token(self) -> Tensor:
        """What the classifier reads of an image that is all paint: (D')."""
        shape = (1, self.config.num_channels, *self.config.size)
        image = torch.full(shape, self.config.paint, dtype=self.dtype, device=self._input_device)
        return self._heard(image)[0].readouts[0]

    def recorded(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, **wanted: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        state, outputs = self._heard(self.embed(pixel_values), **wanted)
        return state, state, {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}

    def _values(
        self, embeddings: Tensor, grid: tuple[int, int], coalitions: Tensor, paired: bool, empty: Tensor
    ) -> Tensor:
        """v(S): (B, ...), (B, M, N) -> (B, M, K). A coalition's complement costs a forward of its own here."""
        members = coalitions.unsqueeze(2)  # (B, M, 1, N)
        readouts = self.attribution_head.readouts(self._played(embeddings, grid, members), members, empty)
        return self.classify(readouts.flatten(1, 2))


def _stock_class(config: ShapleyAnyConfig) -> type[PreTrainedModel]:
    """The stock classifier's class: the one that wrote the checkpoint, if there are several."""
    stock: Any = config.stock_config
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(stock)]
    classes = found if isinstance(found, list | tuple) else (found,)
    written_by = stock.architectures or ()
    return next((known for known in classes if known.__name__ in written_by), classes[0])


def _stock_options(stock: PreTrainedModel, config: ShapleyAnyConfig) -> dict[str, bool]:
    """What the stock forward is told beside the images: that these are of another size, where it wants to know."""
    name = "interpolate_pos_encoding"
    takes_it = name in inspect.signature(stock.forward).parameters
    return {name: True} if takes_it and config.size != config.stock_size else {}


def _grid_of_players(config: ShapleyAnyConfig, finest: tuple[int, int]) -> tuple[int, int]:
    """The grid (h, w) of players that is asked for, or the finest that tiles the image, no finer than the features."""
    height, width = config.size
    if config.player is None:
        grid = _finest_divisor(height, finest[0]), _finest_divisor(width, finest[1])
    else:
        grid = height // config.player[0], width // config.player[1]
        if grid[0] > finest[0] or grid[1] > finest[1]:
            raise ValueError(
                f"`player_size` must be at least the cells of the features, which are {finest[0]} x {finest[1]} on "
                f"{height} x {width} pixels, got {config.player}."
            )
    check_grid(grid, config.player or (height // grid[0], width // grid[1]), (height, width))
    return grid


def _finest_divisor(length: int, most: int) -> int:
    """The largest number up to `most` into which many equal parts a length divides."""
    return next(parts for parts in range(min(most, length), 0, -1) if length % parts == 0)


def _no_stock_layer() -> nn.Module:
    raise ValueError("The layers of a stock model are not known here: `influence_block` must be another.")


ShapleyForImageClassification.register_for_auto_class("AutoModelForImageClassification")
