"""From one pass towards the exact values: attributions refined by evaluations of any game."""

import torch
from torch import Tensor

from ..models.checks import check_finite, check_floats
from ..models.coalitions import with_complements
from ..models.posterior import coalitions_to_ask, shapley_posterior
from .estimators import ShapleyEstimate, check_budget, check_request, covers_every_coalition, exact_estimate
from .games import CheckedGame, Game


@torch.no_grad()
def refine(
    game: Game,
    attributions: Tensor,
    *,
    budget: int,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ShapleyEstimate:
    """Bring attributions nearer to a game's Shapley values, with evaluations of the game.

    Args:
        game: bool (M, N) -> float (M, K).
        attributions: (N, K), such as those of one forward pass; the better they are, the fewer evaluations it takes.
        budget: most evaluations to spend, from 4 to 16,384: two for v(empty) and v(full), two for each pair. Where it
            covers all 2^N coalitions they are enumerated and the result is exact.
        batch_size: coalitions per call of the game, at least 2.
        generator: source of randomness; None uses torch's global one.
        device: where coalitions are made; defaults to that of `attributions`.
        progress: show a progress bar.

    Returns:
        ShapleyEstimate, whose values add up to v(full) - v(empty); the standard errors are the posterior's.

    Raises:
        ValueError: attributions that are not finite (N, K), or not of the game's labels; too small a budget; values
            that are not finite floats of shape (M, K).
    """
    check_floats(attributions, "attributions", ("players", "labels"))
    check_finite(attributions, "attributions")
    num_players = len(attributions)
    check_request(num_players, budget, generator)
    device = attributions.device if device is None else torch.device(device)
    if covers_every_coalition(budget, num_players):
        return exact_estimate(game, num_players=num_players, batch_size=batch_size, device=device, progress=progress)
    check_budget(budget, 4, num_players)
    drawn = coalitions_to_ask(budget - 2, num_players=num_players, generator=generator, device=device)
    coalitions = torch.cat([torch.ones_like(drawn[:1]), drawn])
    with CheckedGame(game, batch_size, 2 * len(coalitions), progress) as checked:
        values = checked(with_complements(coalitions))
    if values.shape[1] != attributions.shape[1]:
        raise ValueError(
            f"`attributions` must be of the game's {values.shape[1]} labels, got {tuple(attributions.shape)}."
        )
    odd = (values[0::2] - values[1::2]).double().cpu() / 2
    found = shapley_posterior(attributions.double().cpu(), coalitions.cpu(), odd)
    dtype = torch.promote_types(values.dtype, torch.float32)
    estimate, errors = (part.to(values.device, dtype) for part in (found.values, found.standard_errors))
    return ShapleyEstimate(estimate, errors, checked.evaluations)
