"""What the shared model asks of a backbone, and the one loop over its layers.

A backbone is a stock model that can also be run under a coalition structure, where every player sees the members of
its own coalition only. It knows nothing of labels, losses or explanations. Throughout: B images, N = h w players,
G coalitions in a structure, D the width of a token, D' that of what the classifier reads.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig

from .heads import AttributionHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object  # a backbone's methods join those of the stock model that a class inherits from besides


class Read(NamedTuple):
    """What the classifier and the attribution head read where the blocks end."""

    cells: (
        Tensor  # one token per player, (B, N, D); where own layers of the head take their place, whatever is at hand
    )
    voting: Tensor  # (B, N, D') with `vote_readout="patches"`, else one per coalition, (B, G, D')
    empty: Tensor | None  # "pooled": that of the empty coalition, (D'), where it came along with the images


class Backbone(Model):
    """The methods that a backbone must have; `TokenBackbone` and the ConvNeXt have them.

    A state is whatever a layer takes and gives for a batch. A rule says who sees whom, in the backbone's own terms;
    None is the stock forward.
    """

    config: PreTrainedConfig
    attribution_head: AttributionHead
    coalition_adapters: nn.ModuleList

    def grid_size(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> tuple[int, int]:
        """Grid (h, w) of players for images of height x width pixels; ValueError if they do not fit."""
        raise NotImplementedError

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Pixels (B, C, H, W) to what enters the first layer, which does not yet mix players."""
        raise NotImplementedError

    def blocks(self) -> Sequence[Callable[[Any, Any], Any]]:
        """Everything from there to the last layer, in order; each takes (state, rule) and gives a state."""
        raise NotImplementedError

    def adapter_widths(self) -> Sequence[int]:
        """Widths of the states after those blocks that mix players; a coalition adapter may follow each of them."""
        raise NotImplementedError

    def enter(self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None) -> tuple[Tensor, Any]:
        """The first block's state, of B' R structures, and the rule: from embeddings, and bool members (B', R, G, N).

        B' <= B: the first images. Without members, the ordinary forward of all images.
        """
        raise NotImplementedError

    def adapt(self, index: int, state: Tensor, rule: Any) -> Tensor:
        """The state after block `index`, adapted to what is absent; only under a structure, only with adapters."""
        raise NotImplementedError

    def tokens(self, state: Any, rule: Any) -> Tensor:
        """A state as tokens, the players last: (B, T, D), T >= N."""
        raise NotImplementedError

    def read(self, state: Any, rule: Any) -> Read:
        """What is read where the blocks end."""
        raise NotImplementedError

    def empty_token(self) -> Tensor:
        """With the pooled readout: what the classifier reads of the empty coalition, (D')."""
        raise NotImplementedError

    def recorded(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, **wanted: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The stock forward that records: the states from which the head's own layers leave and where blocks end."""
        raise NotImplementedError

    def last_layers(self, count: int) -> tuple[Sequence[nn.Module], nn.Module]:
        """The layers that the head's own are copies of, and the norm that follows them."""
        raise NotImplementedError

    def encode(
        self, embeddings: Tensor, grid: tuple[int, int], members: Tensor | None = None, attributed: int | None = None
    ) -> Read:
        """Run the blocks, with or without a structure; the head's own layers leave before the last ones.

        Args:
            embeddings: of B images.
            grid: (h, w) of the players.
            members: bool (B', R, G, N), B' <= B: R structures of disjoint coalitions that cover all players, for each
                of the first images; what is read is then that of B' R structures. None = the ordinary forward.
            attributed: how many of the images, the first ones, the head will attribute; None = all.
        """
        state, rule = self.enter(embeddings, grid, members)
        blocks, adapted = self.blocks(), members is not None and len(self.coalition_adapters) > 0
        leaving, branch = len(blocks) - self.attribution_head.own_layers, state
        for index, block in enumerate(blocks):
            if index == leaving:
                branch = state
            state = block(state, rule)
            if adapted:
                state = self.adapt(index, state, rule)
        read = self.read(state, rule)
        return read if members is not None else self._joined(read, self.tokens(branch, rule), grid, attributed)

    def _joined(self, read: Read, branch: Tensor, grid: tuple[int, int], attributed: int | None = None) -> Read:
        """What is read, with the tokens that the head's own layers make of those (B, T, D) at which they left."""
        if not self.attribution_head.own_layers:
            return read._replace(cells=read.cells[:attributed])
        own = self.attribution_head.own_tokens(branch[:attributed], grid)
        return read._replace(cells=own[:, -(grid[0] * grid[1]) :])


def check_grid(grid: tuple[int, int], step: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise unless patches of `step` pixels tile an image of `size` pixels into at least two players."""
    if (grid[0] * step[0], grid[1] * step[1]) != tuple(size) or grid[0] * grid[1] < 2:
        raise ValueError(
            f"Image height and width must be multiples of the player size {step[0]} x {step[1]} pixels and give at "
            f"least 2 players, got {size[0]} x {size[1]}: resize or crop the image."
        )


def absent_shares(members: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
    """The share of all players that each coalition lacks, and that each player's own lacks; 0 where none is absent.

    Args:
        members: bool (B, G, N).
        dtype: of the result.

    Returns:
        (B, G, 1), (B, N, 1).
    """
    absent = 1 - members.float().mean(-1, keepdim=True).to(dtype)
    return absent, absent.gather(1, ids_of(members).unsqueeze(-1))


def ids_of(members: Tensor) -> Tensor:
    """Which coalition each player is in: bool (B, G, N), disjoint and covering all players -> long (B, N)."""
    return members.int().argmax(dim=1)


def enlarged(maps: Tensor, scale: int) -> Tensor:
    """(..., h, w) -> (..., scale h, scale w), each entry repeated."""
    return maps.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def pair_of(size: Any) -> tuple[int, int]:
    """(height, width) of a configuration's size, which may be one number for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def chosen_states(states: tuple[Tensor, ...], chosen: Any) -> tuple[Tensor | None, ...] | None:
    """Those of a stock model's hidden states that `output_hidden_states` asks for, as transformers gives them.

    Args:
        states: all of them.
        chosen: True for all, or the places of some, where the others become None.
    """
    if not chosen:
        return None
    if isinstance(chosen, bool):
        return states
    places = {place % len(states) for place in ([chosen] if isinstance(chosen, int) else chosen)}
    return tuple(state if place in places else None for place, state in enumerate(states))
