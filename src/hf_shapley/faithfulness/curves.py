"""Curves: what an image's value does as its most relevant players come or go.

The order of the players is all that counts here; how large attributions are is for `correlations`. Values are returned
in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.checks import check_count, check_device, check_floats, check_label_ids, check_number, check_sequence
from ..models.coalitions import enumerate_coalitions, ranked_coalitions, with_complements
from .games import BatchedGame, LabelGame, Link


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
    target = LabelGame(game, attributions, labels, link, batch_size, progress)
    top = ranked_coalitions(target.scores)[:, 1:-1]  # (images, N - 1, players)
    inner = target(with_complements(top))  # (images, 2 (N - 1))
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
    target = LabelGame(game, attributions, labels, link, batch_size, progress)
    # The tolerance keeps 0.07 * 100 = 7.000000000000001 at 7 players.
    sizes = [math.ceil(share * attributions.shape[1] - 1e-9) for share in shares]
    top = ranked_coalitions(target.scores)[:, sizes]  # (images, shares, players)
    lost = target.full.unsqueeze(1) - target(with_complements(~top))
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
    target = LabelGame(game, blank, labels, link, batch_size, progress)
    if beam_size is None:
        lowest, highest = _extreme_chains(target, num_players)
    else:
        lowest, highest = _beam_chains(target, num_players, beam_size)
    return target.full - highest / (num_players + 1), target.full - lowest / (num_players + 1)


def _extreme_chains(target: LabelGame, num_players: int) -> tuple[Tensor, Tensor]:
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


def _beam_chains(target: LabelGame, num_players: int, beam_size: int) -> tuple[Tensor, Tensor]:
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
