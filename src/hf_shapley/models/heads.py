"""What an attribution head is made of, and the arithmetic around it: modules and plain functions, no model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .checks import may_be_read
from .coalitions import sum_over_coalitions
from .speed import activated, is_alone


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that what it adds starts at nothing."""


class ResidualMLP(nn.Module):
    """x + MLP(norm(x)) on each token by itself; starts as the identity, so a plain checkpoint keeps its meaning."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = ACT2FN[hidden_act]
        self.fc2 = ZeroLinear(4 * hidden_size, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return tokens + self.fc2(activated(self.act, self.fc1(self.norm(tokens)), self.fc1))


class NarrowConvolution(nn.Module):
    """x + MLP(norm(x + dwconv(x))) on the grid: a ConvNeXt layer with an MLP an eighth as wide as the tokens.

    It mixes cells for about a twenty-fifth of that layer's operations, and starts as the identity.
    """

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        narrow = max(1, hidden_size // 8)
        self.dwconv = nn.Conv2d(hidden_size, hidden_size, kernel_size=7, padding=3, groups=hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, narrow)
        self.act = ACT2FN[hidden_act]
        self.fc2 = ZeroLinear(narrow, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        cells = tokens.transpose(1, 2).unflatten(-1, grid)  # (B, D, h, w)
        mixed = tokens + self.dwconv(cells).flatten(2).transpose(1, 2)
        return tokens + self.fc2(self.act(self.fc1(self.norm(mixed))))


class CoalitionAdapter(nn.Module):
    """What one layer's tokens need when players are absent, and nothing else does: it vanishes for the full image.

    A token whose coalition lacks a share a of the players gets a * up(act(down(norm(x)) + a * shift)) on top: the
    bottleneck of Houlsby et al. (arXiv:1902.00751), gated. So v(S) can learn while v(all), the classifier, stays what
    it is to the bit. Starts at nothing.

    Args:
        hidden_size: D, width of the tokens.
        size: width of the bottleneck.
        hidden_act: its activation.
    """

    def __init__(self, hidden_size: int, size: int, hidden_act: str):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, size)
        self.shift = nn.Linear(1, size, bias=False)
        self.act = ACT2FN[hidden_act]
        self.up = ZeroLinear(size, hidden_size)

    def forward(self, tokens: Tensor, absent: Tensor) -> Tensor:
        """Tokens (..., D) and the share of players that their coalitions lack, (..., 1) -> (..., D)."""
        change = self.up(self.act(self.down(self.norm(tokens)) + self.shift(absent)))
        return torch.addcmul(tokens, absent, change)  # without a tensor between


class AttributionHead(nn.Module):
    """Patch tokens to the Shapley values Phi (N, D') of the readout, up to the even share that makes their sum exact.

    Player i has an N-th of z_all - z_empty, plus a term that sums to zero over the players: what sets its own token
    apart from the mean where patches vote one by one, and a correction, which this head reads from the tokens, unless
    it has no layers. The classifier's weights make attributions of it, for any label: nothing here knows the labels.

    Exactly, the Shapley value of player i is the mean of its own vote over the coalitions that hold it, plus the mean
    of its influence on the votes of others. The second part is what the correction learns.

    Args:
        config: a Shapley configuration.
        hidden_size: D, width of the tokens.
        make_block: builds one backbone layer that takes (tokens, grid); for `influence_block="backbone"` and the
            layers of the influence head's own.
        readout_size: D', width of what the classifier reads; D by default.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        make_block: Callable[[], nn.Module],
        readout_size: int | None = None,
    ):
        super().__init__()
        config.check_head()
        self.readout_size = hidden_size if readout_size is None else readout_size
        self.pooled = config.vote_readout == "pooled"
        self.own_layers = config.influence_own_layers
        self.correction = None
        if config.has_influence_head:
            if self.own_layers:
                self.own_blocks = nn.ModuleList(make_block() for _ in range(self.own_layers))
                self.own_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
            kind = {"mlp": ResidualMLP, "convolution": NarrowConvolution}.get(config.influence_block)
            self.influence_blocks = nn.ModuleList(
                kind(hidden_size, config.hidden_act) if kind else make_block() for _ in range(config.influence_layers)
            )
            self.influence_norm = nn.LayerNorm(hidden_size)
            self.correction = ZeroLinear(hidden_size, self.readout_size, bias=False)
        # Without a correction the attributions have nothing else to learn with.
        self.gradient_flows = config.attribution_gradient or self.correction is None

    def flowing(self, tensor: Tensor) -> Tensor:
        """What attributions read of the classifier, with its gradient only where that may teach the classifier."""
        return tensor if self.gradient_flows else tensor.detach()

    def readouts(self, tokens: Tensor, members: Tensor, empty: Tensor) -> Tensor:
        """What the classifier reads of coalitions.

        Args:
            tokens: that vote, of the players, (..., N, D'); "pooled" of the coalitions, (..., G, D').
            members: bool (..., G, N), True = member.
            empty: readout of the empty coalition, (D').

        Returns:
            (..., G, D'), at least float32.
        """
        if not self.pooled:
            return sum_over_coalitions(members, tokens) / members.shape[-1]
        present = members.any(dim=-1, keepdim=True)  # a coalition without members has tokens, which read themselves
        return torch.where(present, at_least_float32(tokens), empty)

    def deviations(self, tokens: Tensor, voting: Tensor, grid: tuple[int, int]) -> Tensor:
        """What sets players apart: N times Phi_i is this less its mean over players, plus z_all - z_empty.

        Args:
            tokens: of the players, that the influence head reads, (B, N, D).
            voting: tokens that vote, (B, N, D'), or (B, 1, D') with `vote_readout="pooled"`.
            grid: (h, w) of the players.

        Returns:
            (B, N, D').
        """
        parts = [] if self.pooled else [self.flowing(voting)]
        if self.correction is not None:
            parts.append(self.correction(self._influence_tokens(tokens, grid)))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def deviation_sums(self, tokens: Tensor, voting: Tensor, coalitions: Tensor, grid: tuple[int, int]) -> Tensor:
        """`deviations` less their mean, summed over coalitions bool (B, M, N): (B, M, D'), at least float32.

        Sums first and maps then, which costs less than the other way round.
        """
        parts = [] if self.pooled else [sums_of_centred(self.flowing(voting), coalitions)]
        if self.correction is not None:
            parts.append(mapped(self.correction, sums_of_centred(self._influence_tokens(tokens, grid), coalitions)))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def copy_layers(self, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        """Start the influence head's own layers and norm as copies of the backbone's last ones."""
        for own, other in zip([*self.own_blocks, self.own_norm], [*layers, norm], strict=True):
            own.load_state_dict(other.state_dict())

    def own_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens that the influence head's own layers make of the backbone's, (B, T, D) -> (B, T, D)."""
        tokens = self.flowing(tokens)
        return self.own_norm(through(self.own_blocks, tokens, grid))

    def _influence_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if not self.own_layers:
            tokens = self.flowing(tokens)
        return self.influence_norm(through(self.influence_blocks, tokens, grid))


def through(blocks: nn.ModuleList, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """What one block after another makes of tokens, (B, T, D) -> (B, T, D)."""
    for block in blocks:
        if getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled() and not tokens.requires_grad:
            # Reentrant checkpointing leaves a block's weights without gradient unless what it is given asks for one.
            tokens = tokens.detach().requires_grad_()
        tokens = block(tokens, grid)
    return tokens


def is_own_part(name: str) -> bool:
    """Whether a parameter of this name is the attribution head's or a coalition adapter's, not the classifier's."""
    return "attribution_head." in name or "coalition_adapters." in name


def coalition_adapters(config: PreTrainedConfig, widths: Sequence[int]) -> nn.ModuleList:
    """One adapter after each layer, of the layers' widths D; none with `coalition_adapter_size=0`."""
    size = config.coalition_adapter_size
    return nn.ModuleList(CoalitionAdapter(width, size, config.hidden_act) for width in widths if size)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def share_evenly(gains: Tensor, members: Tensor) -> Tensor:
    """Give each member N / size times what its coalition gains: (..., G, D), bool (..., G, N) -> (..., N, D)."""
    shares = members.shape[-1] / members.sum(-1).clamp(min=1)  # (..., G)
    with torch.autocast(gains.device.type, enabled=False):
        return (members * shares.unsqueeze(-1)).to(gains.dtype).transpose(-1, -2) @ gains


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's own weights say all: no adapter, no quantisation, no hook, nothing offloaded."""
    return type(module) in (nn.Linear, ZeroLinear) and is_alone(module) and not module.weight.is_meta


def mapped(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a linear layer makes of inputs, (..., D) -> (..., K), float32.

    A plain layer computes in float32 whatever its weights are in. Any other (with adapters, quantised, offloaded or
    hooked) is called as it wants to be.
    """
    if not is_plain_linear(module):
        return module(inputs.to(_input_dtype(module, inputs))).float()
    inputs = at_least_float32(inputs)
    weights = [weight.to(inputs.dtype) for weight in module.parameters()]
    with torch.autocast(inputs.device.type, enabled=False):
        return nn.functional.linear(inputs, *weights).float()


def _input_dtype(module: nn.Module, inputs: Tensor) -> torch.dtype:
    """What a module that is more than a linear layer's weights wants to be given."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), inputs.dtype)


def weight_of(module: nn.Module, size: int, like: Tensor) -> Tensor:
    """The matrix (K, D) of a linear layer, whatever it is made of: adapters, quantised weights or offloaded ones.

    Args:
        module: the layer.
        size: D.
        like: a tensor of the device and dtype that the layer takes.

    Raises:
        ValueError: for a layer that is not linear.
    """
    if is_plain_linear(module):
        weight: Any = module.weight  # under torch.func not a parameter
        return weight
    basis = 3 * torch.eye(size, dtype=_input_dtype(module, like), device=like.device)  # as long as readouts are
    above, below, middle = module(basis), module(-basis), module(torch.zeros_like(basis[:1]))
    # Dropout of an adapter that learns is no reason to refuse, nor are quantised inputs, which are rounded.
    if not module.training and may_be_read(above):
        bent = (above + below - 2 * middle).abs().max()
        if bent > 0.02 * (above - below).abs().max():
            raise ValueError(
                f"`{type(module).__name__}` in place of a linear layer must be a linear map of what it reads: "
                "attributions would be another model's. Put other layers into the backbone."
            )
    return ((above - below) / 6).T


def linear_of(tokens: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
    """A linear map to every label, (B, N, D), (K, D) -> (B, N, K), or to each image's own (B, L) -> (B, N, L)."""
    tokens = tokens.to(weight.dtype)
    if labels is None:
        return nn.functional.linear(tokens, weight)
    # Each image's own weights are (B, L, D): where every label's outcome takes no more memory, choose from those.
    if labels.shape[1] * weight.shape[1] >= tokens.shape[1] * weight.shape[0]:
        values = nn.functional.linear(tokens, weight)
        return values.gather(2, labels.unsqueeze(1).expand(-1, values.shape[1], -1))
    return tokens @ weight[labels].mT


def sums_of_centred(tokens: Tensor, coalitions: Tensor) -> Tensor:
    """Tokens less their mean over players, summed over coalitions: (B, N, D), bool (B, M, N) -> (B, M, D), float32."""
    tokens = at_least_float32(tokens)  # half precision would leave a sum over all that is not 0
    return sum_over_coalitions(coalitions, tokens - tokens.mean(dim=-2, keepdim=True))
