"""How faithful attributions are to the game they explain: plain functions of tensors and games.

A *batched game* is any callable from coalitions, bool (B, M, N), True = present, to values, float (B, M, K): the same
number of coalitions for each of B images. Attributions are (B, N, K), or (B, N) for methods that explain one label per
image. No function here knows a model, so all of them run on any classifier that can drop patches.

Values and correlations are returned in float64. A correlation with a constant is NaN.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.checks import (
    check_callable,
    check_count,
    check_data,
    check_device,
    check_floats,
    check_generator,
    check_label_ids,
    check_number,
    check_pair,
    check_sequence,
    describe,
)
from ..models.coalitions import check_coalitions, enumerate_coalitions, ranked_coalitions, sample_coalitions

BatchedGame = Callable[[Tensor], Tensor]
Link = Literal["probability", "sigmoid", "logit"]


def _check_finite(tensor: Tensor, name: str, dims: Sequence[str]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"`{name}` must be a float tensor ({', '.join(dims)}), got {got}: convert it first.")
    if tensor.ndim != len(dims) or tensor.numel() == 0:
        raise ValueError(f"`{name}` must be ({', '.join(dims)}) and not empty, got shape {tuple(tensor.shape)}.")
    check_data(tensor, name)
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinite entries: drop or repair those images.")


def _check_attributions(attributions: Tensor, name: str = "attributions") -> None:
    """Accept (B, N, K), or (B, N) for one label per image."""
    dims = ("images", "players") if getattr(attributions, "ndim", 3) == 2 else ("images", "players", "labels")
    _check_finite(attributions, name, dims)
    if attributions.shape[1] < 2:
        raise ValueError(f"`{name}` must cover at least 2 players, got shape {tuple(attributions.shape)}.")


def _check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def _pairwise(first: Tensor, second: Tensor) -> Tensor:
    """Interleave coalitions: two (B, M, N) -> (B, 2 M, N), rows 2 j and 2 j + 1 from row j of each."""
    return torch.stack([first, second], dim=2).flatten(1, 2)


@torch.no_grad()
def _evaluate(game: BatchedGame, coalitions: Tensor, batch_size: int, progress: bool = False) -> Tensor:
    """Call the game in batches of whole pairs and check each answer: (B, M, N) -> float64 (B, M, K)."""
    check_callable(game, "game", "a function from bool (images, coalitions, players) to (images, coalitions, labels)")
    check_count(batch_size, "batch_size", 2, "a coalition and its complement go together")
    images = len(coalitions)
    chunks = coalitions.split(max(2, batch_size // images // 2 * 2), dim=1)
    values = []
    for chunk in tqdm(chunks, unit="batch", disable=not progress):
        values.append(game(chunk))
        _check_batched_values(values[-1], chunk)
    return torch.cat(values, dim=1).double()


def _check_batched_values(values: Tensor, coalitions: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"The game must return a float tensor, got {got}: convert its values with `.float()`.")
    if values.ndim != 3 or values.shape[:2] != coalitions.shape[:2] or values.shape[2] == 0:
        raise ValueError(
            f"The game must map coalitions (images, coalitions, players) = {tuple(coalitions.shape)} to values "
            f"(images, coalitions, labels), got shape {tuple(values.shape)}: is it a game of the same images?"
        )
    if not values.isfinite().all():
        raise ValueError("The game returned NaN or infinite values: check the model on the empty coalition first.")


def _apply_link(values: Tensor, link: Link) -> Tensor:
    """Values of the game -> probabilities or the values themselves, same shape (..., K)."""
    _check_choice(link, "link", ("probability", "sigmoid", "logit"))
    if link == "logit":
        return values
    if link == "sigmoid":
        return values.sigmoid()
    if values.shape[-1] < 2:
        raise ValueError(
            "A probability by softmax needs at least 2 labels, got 1: give `link='sigmoid'` or `link='logit'`."
        )
    return values.softmax(-1)


class _LabelGame:
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
        _check_attributions(attributions)
        self.game, self.link, self.batch_size, self.progress = game, link, batch_size, progress
        images, players = attributions.shape[:2]
        empty = torch.zeros(images, 1, players, dtype=torch.bool, device=attributions.device)
        ends = _evaluate(game, _pairwise(empty, ~empty), batch_size)  # (images, 2, labels)
        self.labels = _check_labels(labels, ends)
        self.empty, self.full = self._choose(ends).unbind(1)  # two (images,)
        self.scores = _attributions_of(attributions, self.labels, num_labels=ends.shape[-1])  # (images, players)

    def __call__(self, coalitions: Tensor) -> Tensor:
        """(B, M, N) -> float64 (B, M)."""
        return self._choose(_evaluate(self.game, coalitions, self.batch_size, self.progress))

    def _choose(self, values: Tensor) -> Tensor:
        index = self.labels.view(-1, 1, 1).expand(-1, values.shape[1], 1)
        return _apply_link(values, self.link).gather(2, index).squeeze(2)


def _check_labels(labels: Tensor | None, ends: Tensor) -> Tensor:
    """The given labels, or argmax v(full): ends (B, 2, K) -> long (B,)."""
    images, _, num_labels = ends.shape
    if labels is None:
        return ends[:, 1].argmax(-1)
    return check_label_ids(labels, "labels", images, num_labels).to(ends.device)


def _attributions_of(attributions: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Attributions of one label per image: (B, N, K) or (B, N) -> float64 (B, N)."""
    scores = attributions.to(labels.device, torch.float64)
    if scores.ndim == 2:
        return scores
    if scores.shape[-1] != num_labels:
        raise ValueError(
            f"`attributions` must have the game's {num_labels} labels, got shape {tuple(attributions.shape)}: "
            "give (images, players, labels), or (images, players) for one label per image."
        )
    return scores.gather(2, labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1)).squeeze(2)


@dataclass(frozen=True)
class RankingCurves:
    """What an image's value does as players come (insertion) or go (deletion), most relevant first.

    Attributes:
        insertion: (B, N + 1), entry k = value of the k players of highest attribution.
        deletion: (B, N + 1), entry k = value of all players but those k.
        labels: (B,), the label that is followed in each image.
    """

    insertion: Tensor
    deletion: Tensor
    labels: Tensor

    @property
    def insertion_auc(self) -> Tensor:
        """(B,), plain mean of the N + 1 points, as in ViT-Shapley; higher is better."""
        return self.insertion.mean(-1)

    @property
    def deletion_auc(self) -> Tensor:
        """(B,), plain mean of the N + 1 points, as in ViT-Shapley; lower is better."""
        return self.deletion.mean(-1)

    @property
    def aopc(self) -> Tensor:
        """(B,), area over the deletion curve; higher is better.

        1 / (N + 1) sum_{k=0}^N v(full) - v(without the top k): Samek et al., arXiv:1509.06321, with one player per
        step and all N steps.
        """
        return (self.deletion[:, :1] - self.deletion).mean(-1)


def insertion_deletion(
    game: BatchedGame,
    attributions: Tensor,
    *,
    labels: Tensor | None = None,
    link: Link = "probability",
    batch_size: int = 1024,
    progress: bool = False,
) -> RankingCurves:
    """Insertion and deletion curves over all N + 1 sizes, and with them the AOPC.

    RISE (Petsiuk et al., arXiv:1806.07421) with players for pixels, in the form of ViT-Shapley (arXiv:2206.05282):
    the k players of highest attribution are kept, or removed, for k = 0 ... N, and the area is the plain mean. The two
    coalitions of one k are complements and are sent side by side. 2 N evaluations per image.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        labels: long (B,), the label to follow; default the most likely one of the full image.
        link: "probability" follows softmax(v)[label], "sigmoid" follows sigmoid(v[label]), the probability of labels
            that may hold together or of a single one, "logit" follows v[label].
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        RankingCurves.

    Raises:
        ValueError: attributions that are not finite or do not fit the game, labels out of range.
    """
    target = _LabelGame(game, attributions, labels, link, batch_size, progress)
    top = ranked_coalitions(target.scores)[:, 1:-1]  # (images, N - 1, players)
    inner = target(_pairwise(top, ~top))  # (images, 2 (N - 1))
    empty, full = target.empty.unsqueeze(1), target.full.unsqueeze(1)
    return RankingCurves(
        insertion=torch.cat([empty, inner[:, 0::2], full], dim=1),
        deletion=torch.cat([full, inner[:, 1::2], empty], dim=1),
        labels=target.labels,
    )


@dataclass(frozen=True)
class Erasure:
    """Comprehensiveness and sufficiency at several shares of the players; see `comprehensiveness_sufficiency`.

    Attributes:
        comprehensiveness_curve: (B, F), one column per share.
        sufficiency_curve: (B, F).
        labels: (B,).
    """

    comprehensiveness_curve: Tensor
    sufficiency_curve: Tensor
    labels: Tensor

    @property
    def comprehensiveness(self) -> Tensor:
        """(B,), mean over the shares; higher is better."""
        return self.comprehensiveness_curve.mean(-1)

    @property
    def sufficiency(self) -> Tensor:
        """(B,), mean over the shares; lower is better."""
        return self.sufficiency_curve.mean(-1)


def comprehensiveness_sufficiency(
    game: BatchedGame,
    attributions: Tensor,
    *,
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5),
    labels: Tensor | None = None,
    link: Link = "probability",
    batch_size: int = 1024,
    progress: bool = False,
) -> Erasure:
    """What is lost without the most relevant players, and what is lost with nothing but them.

    For a share q, T = the ceil(q N) players of highest attribution:
    comprehensiveness = v(full) - v(full without T), sufficiency = v(full) - v(T); both averaged over the shares
    (ERASER, DeYoung et al., arXiv:1911.03429, with its five shares). Two evaluations per share.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        shares: shares of the players, each in (0, 1].
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        Erasure.

    Raises:
        ValueError: no shares or shares outside (0, 1], and as `insertion_deletion`.
    """
    wanted = "one or more numbers in (0, 1]"
    shares = check_sequence(shares, "shares", wanted)
    for share in shares:
        check_number(share, "shares", "in (0, 1]", lambda value: 0 < value <= 1)
    if not shares:
        raise ValueError(f"`shares` must be {wanted}, got none.")
    target = _LabelGame(game, attributions, labels, link, batch_size, progress)
    # The tolerance keeps 0.07 * 100 = 7.000000000000001 at 7 players.
    sizes = [math.ceil(share * attributions.shape[1] - 1e-9) for share in shares]
    top = ranked_coalitions(target.scores)[:, sizes]  # (images, shares, players)
    lost = target.full.unsqueeze(1) - target(_pairwise(~top, top))
    return Erasure(lost[:, 0::2], lost[:, 1::2], target.labels)


def aopc_bounds(
    game: BatchedGame,
    labels: Tensor,
    *,
    num_players: int,
    beam_size: int | None = None,
    link: Link = "probability",
    batch_size: int = 1024,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The lowest and the highest AOPC that any order of an image's players reaches.

    AOPC is v(full) minus the mean of v along a chain of coalitions from the full to the empty one, so its extremes
    over all N! orders are found exactly by dynamic programming over the 2^N coalitions:
    best(S) = v(S) + best over i in S of best(S without i). Beyond 16 players a beam search over removals
    (Edin et al., arXiv:2408.08137) gives orders that are near the extremes: then the bounds are attained
    but may lie inside the true ones, and a normalised AOPC can leave [0, 1].

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        labels: long (B,), the label followed in each image; on the device of the game.
        num_players: N; at most 16 without a beam.
        beam_size: None for the exact bounds (2^N evaluations per image); else the number of coalitions kept at each
            size, for beam_size N (N + 1) evaluations per image at most.
        link: "probability", "sigmoid" or "logit".
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        lower (B,), upper (B,).

    Raises:
        ValueError: too many players for exact bounds, a beam size under 1.
    """
    check_count(num_players, "num_players", 2)
    if num_players < 2 or (beam_size is None and num_players > 16):
        raise ValueError(
            f"`num_players`: exact bounds need 2 to 16 players, got {num_players}: give `beam_size` for a search."
        )
    if beam_size is not None:
        check_count(beam_size, "beam_size")
    labels = check_label_ids(labels, "labels", len(check_sequence(labels, "labels", "one integer per image")))
    blank = torch.zeros(len(labels), num_players, dtype=torch.float64, device=labels.device)
    target = _LabelGame(game, blank, labels, link, batch_size, progress)
    if beam_size is None:
        lowest, highest = _extreme_chains(target, num_players)
    else:
        lowest, highest = _beam_chains(target, num_players, beam_size)
    return target.full - highest / (num_players + 1), target.full - lowest / (num_players + 1)


def _extreme_chains(target: _LabelGame, num_players: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest sum of v along a chain of N + 1 coalitions, by dynamic programming: two (B,)."""
    device = target.full.device
    coalitions = enumerate_coalitions(num_players, device=device)
    paired = target(coalitions.expand(len(target.full), -1, -1))  # (images, 2^N)
    values = torch.cat([paired[:, 0::2], paired[:, 1::2].flip(1)], dim=1)  # column c = the coalition with bits c
    codes = torch.arange(2**num_players, device=device)
    bits = 2 ** torch.arange(num_players, device=device)
    sizes = (codes.unsqueeze(-1) & bits).ne(0).sum(-1)
    extremes = []
    for sign in (-1, 1):
        best = sign * values
        for size in range(1, num_players + 1):
            level = codes[sizes == size]
            members = (level.unsqueeze(-1) & bits).ne(0)  # (coalitions, players)
            before = (level.unsqueeze(-1) ^ bits)[members].view(-1, size)  # (coalitions, size): one member fewer
            best[:, level] += best[:, before].amax(-1)
        extremes.append(sign * best[:, -1])
    return extremes[0], extremes[1]


def _beam_chains(target: _LabelGame, num_players: int, beam_size: int) -> tuple[Tensor, Tensor]:
    """Low and high sums of v along chains of N + 1 coalitions, removing one player at a time: two (B,)."""
    extremes = []
    for sign in (-1, 1):
        present = torch.ones(len(target.full), 1, num_players, dtype=torch.bool, device=target.full.device)
        scores = sign * target.full.unsqueeze(1)  # (images, beam)
        for size in range(num_players, 0, -1):
            members = present.nonzero()[:, 2].view(*present.shape[:2], size)  # every coalition has `size` members
            fewer = present.unsqueeze(2).expand(-1, -1, size, -1).scatter(3, members.unsqueeze(3), False)
            fewer = fewer.flatten(1, 2)  # (images, beam * size, players)
            candidates = scores.repeat_interleave(size, dim=1) + sign * target(fewer)
            scores, kept = _best_distinct(fewer, candidates, beam_size)
            present = fewer.gather(1, kept.unsqueeze(-1).expand(-1, -1, num_players))
        extremes.append(sign * scores[:, 0])
    return extremes[0], extremes[1]


def _best_distinct(coalitions: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best scores among distinct coalitions: (B, C, N), (B, C) -> scores (B, count), their columns (B, count)."""
    scores, order = scores.sort(dim=1, descending=True)
    coalitions = coalitions.gather(1, order.unsqueeze(-1).expand_as(coalitions)).double()
    overlap = coalitions @ coalitions.transpose(
        1, 2
    )  # all coalitions have one size: equal if they overlap in all of it
    repeats = (overlap == coalitions.sum(-1, keepdim=True)).tril(-1).any(-1)
    scores, columns = scores.masked_fill(repeats, -math.inf).topk(min(count, scores.shape[1]), dim=1)
    return scores, order.gather(1, columns)


def normalised_aopc(aopc: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """AOPC on the scale of what is possible for the image: (aopc - lower) / (upper - lower), not clamped.

    NAOPC (Edin et al., arXiv:2408.08137): comparable between models, which the AOPC itself is not.

    Args:
        aopc: (B,), from `insertion_deletion` with the same link and labels as the bounds.
        lower: (B,), from `aopc_bounds`.
        upper: (B,), from `aopc_bounds`.

    Returns:
        (B,); 0 for the worst order, 1 for the best one; NaN where every order is as good.
    """
    for name, tensor in (("aopc", aopc), ("lower", lower), ("upper", upper)):
        check_floats(tensor, name, ("images",))
        check_device(tensor, name, aopc.device)
    if not aopc.shape == lower.shape == upper.shape:
        raise ValueError(
            f"`aopc`, `lower` and `upper` must share a shape (images,), "
            f"got {tuple(aopc.shape)}, {tuple(lower.shape)} and {tuple(upper.shape)}."
        )
    return (aopc - lower) / (upper - lower)


def sample_uniform_sizes(
    images: int,
    num_samples: int,
    *,
    num_players: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw coalitions whose size is uniform on 0 ... N, each followed by its complement (which has the same law).

    Args:
        images: B.
        num_samples: M, coalitions per image; even.
        num_players: N.
        generator: source of randomness; None uses torch's global one.
        device: where to draw; defaults to the generator's device, else CPU.

    Returns:
        Bool (B, M, N).
    """
    check_count(images, "images")
    check_count(num_players, "num_players")
    _check_even(num_samples)
    check_generator(generator)
    sizes = torch.randint(
        num_players + 1, (images, num_samples // 2, 1), generator=generator, device=_draw_device(device, generator)
    )
    first = _sample_members(sizes, num_players, generator)
    return _pairwise(first, ~first).to(device)


def _check_even(num_samples: int) -> None:
    check_count(num_samples, "num_samples", 2)
    if num_samples % 2:
        raise ValueError(f"`num_samples` must be even and at least 2 (coalitions come in pairs), got {num_samples}.")


def _draw_device(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device | str | None:
    return generator.device if generator is not None else device


def _sample_members(sizes: Tensor, num_players: int, generator: torch.Generator | None) -> Tensor:
    """Uniform coalitions of given sizes: long (B, M, 1) -> bool (B, M, N)."""
    keys = torch.rand(*sizes.shape[:2], num_players, generator=generator, device=sizes.device)
    return keys.argsort(-1).argsort(-1) < sizes


def _check_drawn(coalitions: Tensor, attributions: Tensor, minimum: int) -> Tensor:
    """Given coalitions as (B, M, N): one list for all images (M, N), or one per image (B, M, N)."""
    images, players = attributions.shape[:2]
    check_coalitions(coalitions, players)
    if coalitions.ndim == 2:
        coalitions = coalitions.expand(images, -1, -1)
    if coalitions.ndim != 3 or len(coalitions) != images or coalitions.shape[1] < minimum:
        raise ValueError(
            f"`coalitions` must be (coalitions, {players}) or ({images}, coalitions, {players}) "
            f"with at least {minimum} coalitions, got shape {tuple(coalitions.shape)}."
        )
    return coalitions.to(attributions.device)


def _drawn_or_given(
    coalitions: Tensor | None, attributions: Tensor, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    images, players = attributions.shape[:2]
    if coalitions is not None:
        return _check_drawn(coalitions, attributions, minimum=2)
    return sample_uniform_sizes(
        images, num_samples, num_players=players, generator=generator, device=attributions.device
    )


def _sum_scores(coalitions: Tensor, scores: Tensor) -> Tensor:
    """Attribution of each coalition: (B, M, N), (B, N) -> float64 (B, M)."""
    return torch.einsum("bmn,bn->bm", coalitions.to(scores.device, torch.float64), scores)


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation along the last dimension: two (..., M) -> (...); NaN where one is constant."""
    first = first - first.mean(-1, keepdim=True)
    second = second - second.mean(-1, keepdim=True)
    norms = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return ((first * second).sum(-1) / norms).clamp(-1, 1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, ties averaged: (..., M) -> float64 (..., M)."""
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / 2


def faithfulness_correlation(
    game: BatchedGame,
    attributions: Tensor,
    *,
    coalitions: Tensor | None = None,
    num_samples: int = 1000,
    method: Literal["pearson", "spearman"] = "pearson",
    labels: Tensor | None = None,
    link: Link = "logit",
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Correlation between the attribution of a coalition, sum_{i in S} phi_i, and its value v(S).

    Bhatt et al., arXiv:2005.00631, correlate the attribution of the *removed* players with the drop
    v(full) - v(rest); both are constants minus ours, so the correlation is the same. By default sizes are uniform on
    0 ... N as in ViT-Shapley (arXiv:2206.05282), which uses method="spearman"; Bhatt's coalitions of one size are
    `sensitivity_n`. Across sizes the size alone explains most of v(S), so numbers near 1 say little:
    see `interaction_share` and `sensitivity_n`.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        coalitions: bool (M, N) or (B, M, N), to use instead of drawing; at least 2.
        num_samples: M, coalitions per image, even: drawn in complementary pairs.
        method: "pearson", or "spearman" (ties averaged).
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B,); NaN where attributions or values do not vary.

    Raises:
        ValueError: attributions that are not finite or do not fit the game, labels or coalitions that do not fit.
    """
    _check_choice(method, "method", ("pearson", "spearman"))
    target = _LabelGame(game, attributions, labels, link, batch_size, progress)
    coalitions = _drawn_or_given(coalitions, attributions, num_samples, generator)
    values = target(coalitions)
    sums = _sum_scores(coalitions, target.scores)
    return _pearson(sums, values) if method == "pearson" else _pearson(_ranks(sums), _ranks(values))


def sensitivity_n(
    game: BatchedGame,
    attributions: Tensor,
    *,
    sizes: Sequence[int],
    num_samples: int = 100,
    labels: Tensor | None = None,
    link: Link = "logit",
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Sensitivity-n: correlation over random sets of n players of their attribution and the drop without them.

    Pearson correlation of sum_{i in S} phi_i and v(full) - v(full without S) over S with |S| = n
    (Ancona et al., arXiv:1711.06104). The size being fixed, it cannot help.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        sizes: the numbers n of players to remove, each from 1 to N - 1.
        num_samples: sets per image and size, at least 2.
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B, len(sizes)); NaN where attributions or values do not vary.

    Raises:
        ValueError: sizes out of range, fewer than 2 samples, and as `faithfulness_correlation`.
    """
    target = _LabelGame(game, attributions, labels, link, batch_size, progress)
    images, players = attributions.shape[:2]
    wanted = f"one or more integers from 1 to {players - 1}"
    sizes = check_sequence(sizes, "sizes", wanted)
    if not sizes or not all(isinstance(size, int) and 1 <= size < players for size in sizes):
        raise ValueError(f"`sizes` must be {wanted}, got {sizes}.")
    check_count(num_samples, "num_samples", 2, "a correlation needs two points")
    check_generator(generator)
    device = _draw_device(attributions.device, generator)
    drawn = torch.tensor(sizes, device=device).repeat_interleave(num_samples).view(1, -1, 1).expand(images, -1, 1)
    removed = _sample_members(drawn, players, generator).to(attributions.device)  # (images, sizes * samples, players)
    drops = (target.full.unsqueeze(1) - target(~removed)).unflatten(1, (len(sizes), num_samples))
    sums = _sum_scores(removed, target.scores).unflatten(1, (len(sizes), num_samples))
    return _pearson(sums, drops)


def infidelity(
    game: BatchedGame,
    attributions: Tensor,
    *,
    coalitions: Tensor | None = None,
    num_samples: int = 1000,
    normalize: bool = False,
    labels: Tensor | None = None,
    link: Link = "logit",
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Mean squared difference between the attribution of the removed players and the drop in value without them.

    E_S[(sum_{i not in S} phi_i - (v(full) - v(S)))^2]: the infidelity of Yeh et al., arXiv:1901.09392, with
    the perturbation I = indicator of the players not in S.

    Args:
        game: bool (B, M, N) -> float (B, M, K), logits.
        attributions: (B, N, K), or (B, N) for one label per image.
        coalitions: bool (M, N) or (B, M, N), the present players, to use instead of drawing; at least 2.
        num_samples: M, coalitions per image, even: complementary pairs, sizes uniform on 0 ... N.
        normalize: scale the attributions by the best factor E[I phi drop] / E[(I phi)^2] first, as captum does.
        labels: long (B,); default the most likely label of the full image.
        link: "probability", "sigmoid" or "logit".
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B,), in squared units of the value; lower is better.

    Raises:
        ValueError: as `faithfulness_correlation`.
    """
    target = _LabelGame(game, attributions, labels, link, batch_size, progress)
    coalitions = _drawn_or_given(coalitions, attributions, num_samples, generator)
    drops = target.full.unsqueeze(1) - target(coalitions)
    sums = _sum_scores(~coalitions, target.scores)
    if normalize:
        power = sums.square().mean(1)
        # Attributions of zero predict no drop at any scale.
        scale = torch.where(power == 0, 0.0, (sums * drops).mean(1) / power)
        sums = sums * scale.unsqueeze(1)
    return (sums - drops).square().mean(1)


def efficiency_gap(game: BatchedGame, attributions: Tensor) -> Tensor:
    """How far the attributions are from adding up: max over labels of |sum_i phi_i - (v(full) - v(empty))|.

    Args:
        game: bool (B, M, N) -> float (B, M, K).
        attributions: (B, N, K).

    Returns:
        (B,); 0 up to rounding for attributions that satisfy the efficiency axiom (Shapley, 1953).

    Raises:
        ValueError: attributions that are not finite or do not fit the game.
    """
    _check_finite(attributions, "attributions", ("images", "players", "labels"))
    empty = torch.zeros_like(attributions[:, :1, :1], dtype=torch.bool).expand(-1, -1, attributions.shape[1])
    ends = _evaluate(game, _pairwise(empty, ~empty), batch_size=2)
    _check_same_labels(attributions, ends)
    sums = attributions.to(ends.device, torch.float64).sum(1)
    return (sums - (ends[:, 1] - ends[:, 0])).abs().amax(-1)


def _check_same_labels(attributions: Tensor, values: Tensor) -> None:
    if attributions.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"`attributions` must have the game's {values.shape[-1]} labels, got shape {tuple(attributions.shape)}."
        )


def leak(game: BatchedGame, changed_game: BatchedGame, coalitions: Tensor, *, batch_size: int = 1024) -> Tensor:
    """What hidden pixels change: max over coalitions and labels of |v(S; x) - v(S; x')|, x and x' equal on S.

    Args:
        game: the game of images x, bool (B, M, N) -> float (B, M, K).
        changed_game: the game of images x' that equal x on every player of every given coalition.
        coalitions: bool (B, M, N).
        batch_size: coalitions per call of a game, all images together.

    Returns:
        (B,); exactly 0 for a game that never sees an absent player, in any precision.

    Raises:
        ValueError: no coalitions, or games that do not fit them.
    """
    if not isinstance(coalitions, Tensor) or coalitions.ndim != 3 or coalitions.numel() == 0:
        got = tuple(coalitions.shape) if isinstance(coalitions, Tensor) else type(coalitions).__name__
        raise ValueError(f"`coalitions` must be bool (images, coalitions, players) and not empty, got {got}.")
    check_coalitions(coalitions, coalitions.shape[-1])
    values = _evaluate(game, coalitions, batch_size)
    changed = _evaluate(changed_game, coalitions, batch_size)
    return (values - changed).abs().amax((1, 2))


def interaction_share(
    game: BatchedGame,
    attributions: Tensor,
    *,
    coalitions: Tensor | None = None,
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Share of the variance of v(S) among coalitions of one size that the attributions do not explain.

    sum_S (r(S) - mean of r at size |S|)^2 / sum_S (v(S) - mean of v at size |S|)^2, r(S) = v(S) - sum_{i in S} phi_i,
    over all labels at once. Means within a size are taken out because the size alone explains nearly all of v(S). For
    exact Shapley values it measures how far the game is from additive: near 0, a faithful explanation is no feat.
    Attributions of zero give 1; wrong ones may give more.

    Args:
        game: bool (B, M, N) -> float (B, M, K).
        attributions: (B, N, K).
        coalitions: bool (M, N) or (B, M, N), to use instead of drawing, such as all 2^N of them.
        num_samples: M, coalitions per image, even: complementary pairs from the Shapley kernel.
        generator: source of randomness; None uses torch's global one.
        batch_size: coalitions per call of the game, all images together.
        progress: show a progress bar.

    Returns:
        (B,); NaN where the value depends on nothing but the size.

    Raises:
        ValueError: attributions that are not finite or do not fit the game, an odd number of samples.
    """
    _check_finite(attributions, "attributions", ("images", "players", "labels"))
    images, players = attributions.shape[:2]
    if coalitions is not None:
        coalitions = _check_drawn(coalitions, attributions, minimum=2)
    else:
        _check_even(num_samples)
        check_generator(generator)
        device = _draw_device(attributions.device, generator)
        half = sample_coalitions(images, num_samples // 2, num_players=players, generator=generator, device=device).to(
            attributions.device
        )
        coalitions = _pairwise(half, ~half)
    values = _evaluate(game, coalitions, batch_size, progress)
    _check_same_labels(attributions, values)
    coalitions = coalitions.to(values.device)
    residuals = values - coalitions.double() @ attributions.to(values.device, torch.float64)
    sizes = coalitions.sum(-1)  # (images, coalitions)
    return _within_sizes(residuals, sizes, players) / _within_sizes(values, sizes, players)


def _within_sizes(values: Tensor, sizes: Tensor, num_players: int) -> Tensor:
    """Sum of squared distances to the mean of one's size: (B, M, K), (B, M) -> (B,)."""
    same = torch.nn.functional.one_hot(sizes, num_players + 1).to(values.dtype)  # (images, coalitions, N + 1)
    means = same.transpose(1, 2) @ values / same.sum(1).clamp(min=1).unsqueeze(-1)  # (images, N + 1, labels)
    return (values - same @ means).square().sum((1, 2))


def make_mosaics(
    images: Tensor,
    labels: Tensor,
    *,
    num_mosaics: int,
    grid: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Build mosaics of images with different labels, for `grid_pointing_game`.

    Args:
        images: (B, C, H, W).
        labels: long (B,).
        num_mosaics: M, how many to build.
        grid: rows and columns of cells; no more cells than distinct labels.
        generator: source of randomness, on the CPU; None uses torch's global one.

    Returns:
        mosaics (M, C, rows * H, columns * W), and long (M, rows * columns): the label of each cell, row by row.

    Raises:
        ValueError: shapes that do not fit, or fewer labels than cells.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"`images` must be a tensor (images, channels, height, width) and not empty, got {describe(images)}."
        )
    labels = check_label_ids(labels, "labels", len(images))
    check_count(num_mosaics, "num_mosaics")
    check_generator(generator)
    rows, columns = check_pair(grid, "grid", "two integers of at least 1, rows and columns")
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    if len(members) < rows * columns:
        raise ValueError(
            f"`grid`: a mosaic of {rows} x {columns} cells needs as many distinct labels, got {len(members)} in "
            "`labels`: give more labels or a smaller grid."
        )
    drawn = []
    for _ in range(num_mosaics):
        for which in torch.randperm(len(members), generator=generator)[: rows * columns].tolist():
            pick = torch.randint(len(members[which]), (1,), generator=generator).item()
            drawn.append(members[which][pick])
    picks = torch.stack(drawn).view(num_mosaics, rows, columns)
    mosaics = images[picks].permute(0, 3, 1, 4, 2, 5)  # (mosaics, channels, rows, height, columns, width)
    return mosaics.flatten(4, 5).flatten(2, 3), labels[picks].flatten(1)


def grid_pointing_game(maps: Tensor, cells: Tensor, *, grid: tuple[int, int] = (2, 2)) -> Tensor:
    """Share of the positive attribution that lies in the right cell of a mosaic.

    sum over the cell of max(phi, 0) / sum over the map of max(phi, 0): the grid pointing game of Boehle et al.,
    arXiv:2104.00032. Chance level: 1 / number of cells.

    Args:
        maps: (B, h, w), attributions of the label that belongs in `cells`; h and w divisible by the grid.
        cells: long (B,), the index of the right cell, counted row by row.
        grid: rows and columns of cells.

    Returns:
        (B,); 0 where no attribution is positive.

    Raises:
        ValueError: maps that are not finite or not divisible by the grid, cells out of range.
    """
    _check_finite(maps, "maps", ("images", "height", "width"))
    rows, columns = check_pair(grid, "grid", "two integers of at least 1, rows and columns")
    height, width = maps.shape[1:]
    if height % rows or width % columns:
        raise ValueError(
            f"`maps` must divide into {rows} x {columns} equal cells (`grid`), got {height} x {width}: resize them."
        )
    cells = check_label_ids(cells, "cells", len(maps), rows * columns)
    positive = maps.double().clamp(min=0)
    per_cell = (
        positive.view(-1, rows, height // rows, columns, width // columns).sum((2, 4)).flatten(1)
    )  # (images, cells)
    total = per_cell.sum(1)
    right = per_cell.gather(1, cells.to(maps.device).long().unsqueeze(1)).squeeze(1)
    return torch.where(total > 0, right / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


@dataclass(frozen=True)
class Agreement:
    """A comparison with reference attributions, image by image and for all of them.

    Attributes:
        per_image: (B,).
        mean: mean of `per_image`.
        pooled: the same quantity from the moments of all images together, each image centred on its own mean, so
            that differences between images count for nothing.
    """

    per_image: Tensor
    mean: float
    pooled: float


def _entries(attributions: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Check two sets of attributions and flatten each image's entries: two (B, ...) -> two float64 (B, E)."""
    for tensor, name in ((attributions, "attributions"), (references, "references")):
        _check_attributions(tensor, name)
    if attributions.shape != references.shape:
        raise ValueError(
            f"`attributions` and `references` must share a shape (images, players, labels), "
            f"got {tuple(attributions.shape)} and {tuple(references.shape)}."
        )
    references = references.flatten(1).double()
    constant = (references == references[:, :1]).all(1)
    if constant.any():
        raise ValueError(
            f"`references` must vary within each image, but are constant for image {constant.nonzero()[0].item()}: "
            "leave such images out."
        )
    return attributions.flatten(1).to(references.device, torch.float64), references


def attribution_correlation(attributions: Tensor, references: Tensor) -> Agreement:
    """Pearson correlation of attributions with reference values, such as exact Shapley values.

    Per image over its N K entries; pooled: sum_b cov_b / sqrt(sum_b var_b(attributions) sum_b var_b(references)).

    Args:
        attributions: (B, N, K) or (B, N).
        references: the same shape.

    Returns:
        Agreement; NaN for an image with constant attributions (and then for the mean).

    Raises:
        ValueError: shapes that differ, entries that are not finite, references constant within an image.
    """
    attributions, references = _entries(attributions, references)
    per_image = _pearson(attributions, references)
    attributions = attributions - attributions.mean(1, keepdim=True)
    references = references - references.mean(1, keepdim=True)
    pooled = (attributions * references).sum() / (attributions.square().sum() * references.square().sum()).sqrt()
    return Agreement(per_image, per_image.mean().item(), pooled.item())


def error_ratio(attributions: Tensor, references: Tensor) -> Agreement:
    """Mean squared error of attributions over the variance of the reference values (1 - R^2); 0 is exact.

    Per image `mean (phi - phi*)^2 / var phi*` over players and labels, the variance with denominator N K; pooled: the
    sum over images of the numerators over the sum of the denominators. Unlike a correlation it sees a wrong scale.

    Args:
        attributions: (B, N, K) or (B, N).
        references: the same shape.

    Returns:
        Agreement.

    Raises:
        ValueError: as `attribution_correlation`.
    """
    attributions, references = _entries(attributions, references)
    errors = (attributions - references).square().mean(1)
    variances = references.var(1, correction=0)
    per_image = errors / variances
    return Agreement(per_image, per_image.mean().item(), (errors.sum() / variances.sum()).item())
