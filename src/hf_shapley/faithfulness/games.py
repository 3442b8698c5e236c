"""Games, and how they are played: in batches of whole pairs, every answer checked, every evaluation counted.

A *game* is any callable from coalitions, bool (M, N), True = present, to values, float (M, K). A *batched game* plays
the same number of coalitions for each of B images: (B, M, N) to (B, M, K). Nothing here knows a model, so all of it
runs on any classifier that can drop patches; `model.game(pixel_values)` gives either kind.

A coalition is sent next to its complement (rows 2 j and 2 j + 1) wherever both are needed: some games evaluate the two
in one forward.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.checks import check_callable, check_choice, check_count, check_data, check_label_ids
from ..models.coalitions import with_complements

Game = Callable[[Tensor], Tensor]
BatchedGame = Callable[[Tensor], Tensor]
Link = Literal["probability", "sigmoid", "logit"]


class CheckedGame:
    """A game of one image or of many, called in batches of whole pairs, without gradients."""

    def __init__(self, game: Game | BatchedGame, batch_size: int, total: int | None = None, progress: bool = False):
        check_callable(
            game,
            "game",
            "a function from bool (coalitions, players) to float (coalitions, labels), or both with images before",
        )
        check_count(batch_size, "batch_size", 2, "a coalition and its complement go together")
        self.game = game
        self.batch_size = batch_size // 2 * 2
        self.evaluations = 0
        self.bar = tqdm(total=total, unit="coalition", disable=not progress)

    def __enter__(self) -> "CheckedGame":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    @torch.no_grad()
    def __call__(self, coalitions: Tensor) -> Tensor:
        """(M, N) -> (M, K) or (B, M, N) -> (B, M, K), in the dtype of the game."""
        images = coalitions.shape[:-2].numel()
        rows = max(2, self.batch_size // images // 2 * 2)
        return torch.cat([self._evaluate(batch) for batch in coalitions.split(rows, dim=-2)], dim=-2)

    def _evaluate(self, coalitions: Tensor) -> Tensor:
        values = self.game(coalitions)
        _check_values(values, coalitions)
        count = coalitions.shape[:-1].numel()
        self.evaluations += count
        self.bar.update(count)
        return values


def _check_values(values: Tensor, coalitions: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"The game must return a float tensor, got {got}: convert its values with `.float()`.")
    if values.shape[:-1] != coalitions.shape[:-1] or values.ndim != coalitions.ndim or values.shape[-1] == 0:
        raise ValueError(
            f"The game must map coalitions {tuple(coalitions.shape)} to values ({_sizes(coalitions)}, labels), got "
            f"shape {tuple(values.shape)}: one row per coalition, of a batch the same images; a single label needs "
            "`.unsqueeze(-1)`."
        )
    if not values.isfinite().all():
        raise ValueError("The game returned NaN or infinite values: check the model on the empty coalition first.")


def _sizes(coalitions: Tensor) -> str:
    return ", ".join(map(str, coalitions.shape[:-1]))


def evaluated(game: Game | BatchedGame, coalitions: Tensor, batch_size: int = 1024, progress: bool = False) -> Tensor:
    """Values of all coalitions at once: (..., M, N) -> float64 (..., M, K)."""
    with CheckedGame(game, batch_size, coalitions.shape[:-1].numel(), progress) as checked:
        return checked(coalitions).double()


def check_finite_floats(tensor: Tensor, name: str, dims: Sequence[str]) -> None:
    """Raise unless `tensor` is a float tensor of these dimensions, not empty and finite."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"`{name}` must be a float tensor ({', '.join(dims)}), got {got}: convert it first.")
    if tensor.ndim != len(dims) or tensor.numel() == 0:
        raise ValueError(f"`{name}` must be ({', '.join(dims)}) and not empty, got shape {tuple(tensor.shape)}.")
    check_data(tensor, name)
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinite entries: drop or repair those images.")


def check_attributions(attributions: Tensor, name: str = "attributions") -> None:
    """Accept (B, N, K), or (B, N) for one label per image."""
    dims = ("images", "players") if getattr(attributions, "ndim", 3) == 2 else ("images", "players", "labels")
    check_finite_floats(attributions, name, dims)
    if attributions.shape[1] < 2:
        raise ValueError(f"`{name}` must cover at least 2 players, got shape {tuple(attributions.shape)}.")


def check_same_labels(attributions: Tensor, values: Tensor) -> None:
    """Raise unless attributions (B, N, K) have the labels of values (B, M, K)."""
    if attributions.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"`attributions` must have the game's {values.shape[-1]} labels, got shape {tuple(attributions.shape)}: "
            "give those of this game."
        )


class LabelGame:
    """A batched game and its attributions, seen through one label per image."""

    def __init__(
        self,
        game: BatchedGame,
        attributions: Tensor,
        labels: Tensor | None,
        link: Link,
        batch_size: int,
        progress: bool,
    ):
        check_attributions(attributions)
        self.game, self.link, self.batch_size, self.progress = game, link, batch_size, progress
        images, players = attributions.shape[:2]
        empty = torch.zeros(images, 1, players, dtype=torch.bool, device=attributions.device)
        ends = evaluated(game, with_complements(empty), batch_size)  # (images, 2, labels)
        self.labels = _check_labels(labels, ends)
        self.empty, self.full = self._choose(ends).unbind(1)  # two (images,)
        self.scores = _attributions_of(attributions, self.labels, ends)  # (images, players)

    def __call__(self, coalitions: Tensor) -> Tensor:
        """(B, M, N) -> float64 (B, M)."""
        return self._choose(evaluated(self.game, coalitions, self.batch_size, self.progress))

    def _choose(self, values: Tensor) -> Tensor:
        index = self.labels.view(-1, 1, 1).expand(-1, values.shape[1], 1)
        return _apply_link(values, self.link).gather(2, index).squeeze(2)


def _apply_link(values: Tensor, link: Link) -> Tensor:
    """Values of the game -> probabilities or the values themselves, same shape (..., K)."""
    check_choice(link, "link", ("probability", "sigmoid", "logit"))
    if link == "logit":
        return values
    if link == "sigmoid":
        return values.sigmoid()
    if values.shape[-1] < 2:
        raise ValueError(
            "A probability by softmax needs at least 2 labels, got 1: give `link='sigmoid'` or `link='logit'`."
        )
    return values.softmax(-1)


def _check_labels(labels: Tensor | None, ends: Tensor) -> Tensor:
    """The given labels, or argmax v(full): ends (B, 2, K) -> long (B,)."""
    images, _, num_labels = ends.shape
    if labels is None:
        return ends[:, 1].argmax(-1)
    return check_label_ids(labels, "labels", images, num_labels).to(ends.device)


def _attributions_of(attributions: Tensor, labels: Tensor, values: Tensor) -> Tensor:
    """Attributions of one label per image: (B, N, K) or (B, N) -> float64 (B, N)."""
    scores = attributions.to(labels.device, torch.float64)
    if scores.ndim == 2:
        return scores
    check_same_labels(attributions, values)
    return scores.gather(2, labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1)).squeeze(2)
