"""From patch tokens to readouts, values and attributions; shared by every backbone.

Of a coalition S the classifier reads z_S in R^D, its readout: what the stock model reads of the present patches, or
the sum of the present patches' tokens over the number of players N. The value is v(S) = W z_S + b with W and b of the
classifier; the logits are v(all). Shapley values are linear in the game, so they are learned once, for the readout:
phi = Phi W' with Phi (N, D), and the attributions sum to v(all) - v(empty) by construction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import Read
from .coalitions import ids_to_coalitions
from .evaluation_mode import evaluating
from .explaining import ExplainingMixin
from .heads import at_least_float32, linear_of, mapped, share_evenly, weight_of
from .inputs import (
    check_coalition_ids,
    check_no_sums,
    check_num_with_gradient,
    check_ordinary_options,
)
from .loading import LoadingMixin


@dataclass
class ShapleyImageClassifierOutput(ModelOutput):
    """What one forward pass of a Shapley image classifier gives: B images, N players, K labels.

    Args:
        loss: classification loss, scalar; when `labels` were given.
        logits: (B, K), float32: v(all) = base_values + votes summed over players.
        attributions: (B, N, K), float32, in logits: what each patch adds for each label; their sum over players is
            logits - base_values. Of L labels, (B, N, L), with `attributed`.
        attributed_labels: (B, L), long: the ids of those labels.
        base_values: (K), float32: v(empty), the same for every image.
        coalition_votes: (B', R, N, K), float32: each player's vote when it sees only its own coalition; when
            `coalition_ids` (B', R, N) were given.
        coalition_gains: (B', R, G, K), float32: v(S) - v(empty) of each coalition; with `sums_only`.
        coalition_attributions: (B', R, G, K), float32: attributions summed over each coalition; with `sums_only`.
        readout_errors: (B', R, G, D), float32: what the readout of each coalition gains over the empty one's, less the
            sum of the readout's attributions over it; the gradient is the attribution head's alone; with `sums_only`.
        hidden_states: the backbone's, when asked for.
        attentions: the backbone's, when asked for (ViT).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attributions: Tensor | None = None
    attributed_labels: Tensor | None = None
    base_values: Tensor | None = None
    coalition_votes: Tensor | None = None
    coalition_gains: Tensor | None = None
    coalition_attributions: Tensor | None = None
    readout_errors: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _Reading(NamedTuple):
    """What a forward reads of the full images and of no player at all."""

    tokens: Tensor  # of the players, for the influence head: (B, N, D)
    voting: Tensor  # (B, N, D), or (B, 1, D) with `vote_readout="pooled"`
    readout_gains: Tensor  # z_all - z_empty, (B, D)
    gains: Tensor  # v(all) - v(empty), (B, K)
    empty: Tensor  # z_empty, (D)
    base_values: Tensor  # v(empty), (K)
    grid: tuple[int, int]


class ShapleyImageClassifierMixin(LoadingMixin, ExplainingMixin):
    """Forward, explanation and game of a Shapley image classifier, over the methods of its `Backbone`."""

    # The loss is a mean over the batch: the Trainer must divide it by the number of accumulation steps.
    accepts_loss_kwargs = False
    # Names of the linear layers whose mean the logits are.
    classifier_names: tuple[str, ...] = ("classifier",)

    def _empty(self, token: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Readout of the empty coalition (D), from its token (D) where there is one, and v(empty) (K)."""
        if token is None:
            readout = torch.zeros(self.attribution_head.readout_size, device=device)
        else:
            readout = at_least_float32(token)
        return readout, mapped(self.classifier, readout[None])[0]  # quantised layers take no single row

    @property
    def game_name(self) -> str:
        """Whose game is explained, and what an absent player is, in words."""
        whose = "the classifier with adapters for masked images" if self.coalition_adapters else "the classifier's own"
        return f"{whose}, absent patches dropped"

    @property
    def base_values(self) -> Tensor:
        """v(empty), the same for every image: (K), float32, without gradient."""
        with torch.no_grad(), evaluating(self):
            return self._empty_alone()[1]

    def _empty_alone(self) -> tuple[Tensor, Tensor]:
        """As `_empty`, where there is no image to take the token along with."""
        return self._empty(self.empty_token() if self.attribution_head.pooled else None, self._input_device)

    @property
    def _input_device(self) -> torch.device:
        """Where inputs belong: with weights that are not offloaded, else where accelerate brings those that are."""
        for weight in self.parameters():
            if not weight.is_meta:
                return weight.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(device) for device in devices if device is not None), self.device)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        coalition_ids: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        num_coalitions: int | None = None,
        sums_only: bool = False,
        num_with_gradient: int | None = None,
        attributed: int | Sequence[int | str] | Tensor | None = None,  # "label" in its name would mislead the Trainer
        **kwargs: Any,
    ) -> ShapleyImageClassifierOutput:
        """Classify images, attribute every label to the patches and, if asked, play the game.

        Args:
            pixel_values: (B, C, H, W).
            coalition_ids: (B', R, N) long, B' <= B: R coalition structures for each of the first B' images; players
                of one id see only each other. Ids lie in [0, N).
            labels: (B) long for a single label; what `config.problem_type` says otherwise.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.
            num_coalitions: G, one more than the largest id; given, the device is not waited for to find it out, and
                the ids' range is not checked.
            sums_only: give `coalition_gains` and `coalition_attributions`, the sums over each coalition, in place of
                every player's `coalition_votes` and `attributions`: all that training needs, at a cost that hardly
                grows with the number of labels.
            num_with_gradient: only the first so many of the B' images' coalitions are differentiated through; those
                of the others are evaluated without gradient, at a third of the cost of a training step. Default all.
            attributed: attribute some labels only, at a cost that does not grow with K: the k best of each image, or
                what `explain` takes. For the ordinary forward only; its logits may round otherwise. Default all.
            **kwargs: `output_hidden_states`, `output_attentions`, for the ordinary forward only.

        Returns:
            `ShapleyImageClassifierOutput`.

        Raises:
            ValueError: for pixels, ids or labels of a wrong shape, dtype or range.
        """
        grid = self._check_pixels(pixel_values, interpolate_pos_encoding)
        labels = None if labels is None else self._check_targets(labels, pixel_values)
        played, recorded = None, {}
        if coalition_ids is None:
            check_no_sums(sums_only)
            if attributed is not None:
                attributed = self._labels_to_attribute(attributed, len(pixel_values))
            read, recorded = self._read_images(pixel_values, interpolate_pos_encoding, grid, kwargs)
        else:
            check_ordinary_options({**kwargs, "attributed": attributed})
            num_coalitions = check_coalition_ids(coalition_ids, num_coalitions, pixel_values, grid)
            num_with_gradient = check_num_with_gradient(num_with_gradient, len(coalition_ids))
            embeddings = self.embed(pixel_values, bool(interpolate_pos_encoding))
            read = self.encode(embeddings, grid, attributed=len(coalition_ids) if sums_only else None)
            members = ids_to_coalitions(coalition_ids, num_coalitions)  # (B', R, G, N)
            played = self._played(embeddings, grid, members, num_with_gradient)

        empty, base_values = self._empty(read.empty, pixel_values.device)
        everyone = read.voting.new_ones(read.voting.shape[0], 1, grid[0] * grid[1], dtype=torch.bool)
        readout = self.attribution_head.readouts(read.voting, everyone, empty).squeeze(1)  # (B, D)
        logits = mapped(self.classifier, readout)  # (B, K)
        if isinstance(attributed, int):
            attributed = logits.topk(attributed).indices
        gains = self.attribution_head.flowing(logits - base_values)
        found = _Reading(read.cells, read.voting, readout - empty, gains, empty, base_values, grid)
        fields = {} if sums_only else {"attributions": self._attributions(found, attributed)}
        if played is not None:
            fields |= self._played_fields(found, played, members, sums_only, num_with_gradient)
        return ShapleyImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            base_values=base_values,
            attributed_labels=attributed,
            **fields,
            **recorded,
        )

    def _read_images(
        self, pixel_values: Tensor, interpolate: bool | None, grid: tuple[int, int], wanted: dict[str, Any]
    ) -> tuple[Read, dict[str, Any]]:
        """What is read of the full images, and what the stock backbone records where that is asked for."""
        recordings = ("output_hidden_states", "output_attentions")
        if not wanted and not any(getattr(self.config, name, False) for name in recordings):
            return self.encode(self.embed(pixel_values, bool(interpolate)), grid), {}
        branch, state, recorded = self.recorded(pixel_values, bool(interpolate), **wanted)
        return self._joined(self.read(state, None), self.tokens(branch, None), grid), recorded

    def _played(
        self, embeddings: Tensor, grid: tuple[int, int], members: Tensor, num_with_gradient: int | None = None
    ) -> Tensor:
        """What votes under the structures bool (B', R, G, N), those of the images beyond the first without gradient.

        Returns:
            (B', R, N, D), or (B', R, G, D) with `vote_readout="pooled"`.
        """
        batch, structures = members.shape[:2]
        if num_with_gradient is None or num_with_gradient == batch:
            return self.encode(embeddings, grid, members).voting.unflatten(0, (batch, structures))
        first, others = slice(num_with_gradient), slice(num_with_gradient, None)
        with torch.no_grad():
            constant = self._played(embeddings[others], grid, members[others])
        return torch.cat([self._played(embeddings[first], grid, members[first]), constant])

    def _attributions(self, read: _Reading, labels: Tensor | None) -> Tensor:
        """Attributions of every label, (B, N, K), or of each image's own labels (B, L), (B, N, L)."""
        deviations = self.attribution_head.deviations(read.tokens, read.voting, read.grid)
        weight = self.attribution_head.flowing(self._weight(deviations))
        attributions = linear_of(deviations, weight, labels).float()
        attributions.div_(deviations.shape[1])  # in place: with many labels this is the largest tensor of a forward
        shares = read.gains if labels is None else read.gains.gather(1, labels)
        shares = (shares / deviations.shape[1]).unsqueeze(1)
        return attributions.sub_(attributions.mean(dim=1, keepdim=True)).add_(shares)

    def _weight(self, like: Tensor) -> Tensor:
        """The classifier's matrix (K, D)."""
        return weight_of(self.classifier, self.attribution_head.readout_size, like)

    def _played_fields(
        self, read: _Reading, played: Tensor, members: Tensor, sums_only: bool, num_with_gradient: int
    ) -> dict[str, Tensor]:
        """The output's fields that hold something for the coalitions bool (B', R, G, N), from what votes in them."""
        readouts = self.attribution_head.readouts(played, members, read.empty)  # (B', R, G, D)
        if not sums_only:
            votes = self._votes(played, readouts - read.empty, members)
            return {"coalition_votes": _detached_beyond(votes, num_with_gradient)}
        gains = mapped(self.classifier, readouts) - read.base_values
        attributions, readout_sums = self._sums(read, members)
        return {
            "coalition_gains": _detached_beyond(gains, num_with_gradient),
            "coalition_attributions": attributions,
            "readout_errors": (readouts - read.empty).detach() - readout_sums,
        }

    def _votes(self, voting: Tensor, readout_gains: Tensor, members: Tensor) -> Tensor:
        """Each player's vote when it sees only its own coalition, divided by their number: (B', R, N, K), float32."""
        # With the pooled readout members share what their coalition gains.
        voters = share_evenly(readout_gains, members) if self.attribution_head.pooled else voting  # (B', R, N, D)
        return linear_of(voters, self._weight(voting)).float().div_(members.shape[-1])

    def _sums(self, read: _Reading, members: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the coalitions bool (B', R, G, N) of attributions (B', R, G, K), and of Phi (B', R, G, D)."""
        batch, num_players = len(members), members.shape[-1]
        head, flat = self.attribution_head, members.flatten(1, 2)  # (B', R G, N)
        deviations = head.deviation_sums(read.tokens[:batch], read.voting[:batch], flat, read.grid) / num_players
        deviations = deviations.unflatten(1, members.shape[1:3])
        shares = members.sum(-1, keepdim=True) / num_players  # (B', R, G, 1)
        weight = head.flowing(self._weight(deviations)).to(deviations.dtype)
        with torch.autocast(deviations.device.type, enabled=False):
            attributions = linear_of(deviations, weight).float()
        attributions = attributions + shares * read.gains[:batch, None, None]
        return attributions, deviations + shares * read.readout_gains[:batch, None, None].detach()


def _detached_beyond(tensor: Tensor, count: int) -> Tensor:
    """The same, with gradient for the first `count` rows only."""
    return tensor if count == len(tensor) else torch.cat([tensor[:count], tensor[count:].detach()])
