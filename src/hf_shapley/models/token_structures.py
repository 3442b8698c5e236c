"""Tokens under coalition structures: each coalition's own tokens, and those of no player, once for each coalition.

An absent player's tokens are not there at all. Of a text all tokens of a word are its player's; the tokens of no
player (CLS, the begin and end of a text, padding) are always there, at the places that they have in the full text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .speed import dtype_of_products


class Tokens(NamedTuple):
    """What enters the layers of one side, before tokens are mixed."""

    states: Tensor  # (B, T, D)
    players: Tensor  # long (B, T): the player that each token is of; -1 = of none
    num_players: int  # N
    visible: Tensor  # bool (B, T): what attention may read at all
    read: Tensor | None = None  # long (B): the token that the embedding is made of; None = it is made of all
    causal: bool = False  # whether a token sees those before it only


class Structured(NamedTuple):
    """The tokens (B', L) of structures of G coalitions, each of which sees its own coalition's only."""

    states: Tensor  # (B', L, D)
    mask: Tensor  # (B', 1, L, L), what attention adds to its scores
    ids: Tensor  # long (B', L): each token's coalition; -1 = it fills a row up
    readers: Tensor | None  # long (B', G): the tokens that the coalitions' embeddings are made of


def structured(tokens: Tokens, members: Tensor) -> Structured:
    """Tokens of B images or texts under R structures of each, bool (B, R, G, N): those of B R rows.

    Coalitions need not cover all players: who is in none is in no row either.
    """
    batch, structures, num_coalitions, _ = members.shape
    length = tokens.players.shape[1]
    places = torch.arange(length, device=members.device)
    rows = torch.arange(batch, device=members.device).repeat_interleave(structures)
    players = tokens.players[rows].unsqueeze(1)  # (B', 1, T)
    joined = members.flatten(0, 1).gather(2, players.clamp(min=0).expand(-1, num_coalitions, -1))
    kept = joined | (players < 0)  # (B', G, T)
    if tokens.causal and tokens.read is not None:  # nothing that is read sees what comes after
        kept &= places <= tokens.read[rows, None, None]
    kept = kept.flatten(1)
    most = max(1, int(kept.sum(1).max()))
    order = (~kept).int().argsort(dim=1, stable=True)[:, :most]  # (B', L), coalition by coalition, each in order
    ids, source = order // length, order % length
    ids = ids.masked_fill(~kept.gather(1, order), -1)
    sees = (ids.unsqueeze(2) == ids.unsqueeze(1)) & tokens.visible[rows].gather(1, source).unsqueeze(1)
    if tokens.causal:
        sees &= source.unsqueeze(1) <= source.unsqueeze(2)
    readers = None
    if tokens.read is not None:
        asked = tokens.read[rows, None] + length * torch.arange(num_coalitions, device=members.device)
        readers = (kept.cumsum(1) - 1).gather(1, asked)
    return Structured(tokens.states[rows.unsqueeze(1), source], additive_mask(sees, tokens.states), ids, readers)


def additive_mask(sees: Tensor, like: Tensor) -> Tensor:
    """What attention adds to its scores: bool (B, Q, T) -> (B, 1, Q, T); who would see nothing sees itself."""
    if sees.shape[1] > 1:
        nothing = ~sees.any(-1, keepdim=True)
        sees = sees | (nothing & torch.eye(sees.shape[1], dtype=torch.bool, device=sees.device))
    mask = torch.zeros(sees.shape, dtype=dtype_of_products(like), device=sees.device)
    return mask.masked_fill_(~sees, float("-inf")).unsqueeze(1)


def after_layers(layers: Sequence[Callable[..., Any]], tokens: Structured) -> Tensor:
    """What a stock model's layers make of the tokens: (B', L, D)."""
    state = tokens.states
    for layer in layers:
        state = layer(state, tokens.mask)
    return state


def states_at(states: Tensor, places: Tensor) -> Tensor:
    """Of each row the states at some places: (B, L, D), long (B, G) -> (B, G, D)."""
    return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
