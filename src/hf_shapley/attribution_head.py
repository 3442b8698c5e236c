"""From patch tokens to votes, attributions and logits; shared by every backbone.

Each present patch n votes Phi_n(x_S) in R^K, already divided by the number of players N. The value of a coalition is
v(S) = base + sum_{n in S} Phi_n(x_S); the logits are v(all), and the attributions sum to v(all) - v(empty) by
construction.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .checks import (
    check_count,
    check_device,
    check_floats,
    check_label_ids,
    check_pair,
    describe,
    known_labels,
    may_be_read,
)
from .coalitions import check_coalitions, coalitions_to_ids, ids_to_coalitions, sum_over_coalitions
from .configuration_shapley import ShapleyConfigMixin

logger = logging.getLogger(__name__)

UNTRAINED = "The attributions of this model have not been trained."
TRAIN = "Train it with `ShapleyTrainer` or `hf-shapley train`."


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
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    """Return `tensor` unchanged, with `scale` times its gradient: 1 lets it flow, 0 detaches."""
    if scale == 1:
        return tensor
    detached = tensor.detach()
    return detached if scale == 0 else detached + scale * (tensor - detached)


def _is_alone(module: nn.Module) -> bool:
    """Whether the module is nothing but its class's forward: no hook sees what it takes or gives."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks)
    return not (any(hooks) or "forward" in vars(module))


def activated(act: nn.Module, hidden: Tensor, source: nn.Module) -> Tensor:
    """`act(hidden)`, in place where it is GELU and nothing else needs `hidden`, which the linear layer `source` made.

    The hidden tensor is the largest of a layer: to touch new memory of its size takes a CPU longer than GELU does.
    """
    known = getattr(act, "act", None) is nn.functional.gelu and type(source) is nn.Linear
    if hidden.requires_grad or not (may_be_read(hidden) and known and _is_alone(act) and _is_alone(source)):
        return act(hidden)
    return torch.ops.aten.gelu_(hidden)


def learning_less(module: nn.Module, share: float) -> Callable:
    """The module as a function whose weights get `share` of their gradient; its input still gets all of its own."""
    if share == 1 or not torch.is_grad_enabled():
        return module
    # Frozen weights stay what they are: a quantised layer's are more than a tensor.
    learning = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    if not learning:
        return module
    weights = {name: scale_gradient(weight, share) for name, weight in learning.items()}
    if _is_alone(module):
        # The same. To exchange a module's weights takes the host longer than to launch its kernel.
        every = {**dict(module.named_parameters()), **weights}
        if type(module) is nn.Linear:
            return partial(nn.functional.linear, **every)
        if type(module) is nn.LayerNorm:
            shape = module.normalized_shape
            return partial(nn.functional.layer_norm, normalized_shape=shape, eps=module.eps, **every)
    return lambda *args: torch.func.functional_call(module, weights, args)


def dtype_of_products(tensor: Tensor) -> torch.dtype:
    """What matrix products and convolutions of a tensor compute in: its own dtype, or autocast's, if not float64."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


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
    """Patch tokens to votes and, with "votes+influence", to attributions that differ from votes by a zero-sum term.

    Exactly, the Shapley value of player i is the mean of its own vote over the coalitions that hold it, plus the mean
    of its influence on the votes of others. The second part is what the influence term learns.

    Args:
        config: a Shapley configuration.
        hidden_size: D, width of the tokens.
        make_block: builds one backbone layer that takes (tokens, grid); for `influence_block="backbone"` and the
            layers of the influence head's own.
    """

    def __init__(self, config: PreTrainedConfig, hidden_size: int, make_block: Callable[[], nn.Module]):
        super().__init__()
        config.check_head()
        self.pooled = config.vote_readout == "pooled"
        self.vote_gradient = config.vote_gradient
        if self.vote_gradient is None:
            self.vote_gradient = 1.0 if config.attribution_head == "votes" else 0.0
        self.influence_gradient = config.influence_gradient
        self.coalition_gradient = config.coalition_gradient
        self.vote_blocks = nn.ModuleList(
            ResidualMLP(hidden_size, config.hidden_act) for _ in range(config.vote_layers)
        )
        self.influence = None
        self.own_layers = 0
        if config.attribution_head == "votes+influence":
            self.own_layers = config.influence_own_layers
            if self.own_layers:
                self.own_blocks = nn.ModuleList(make_block() for _ in range(self.own_layers))
                self.own_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
            kind = {"mlp": ResidualMLP, "convolution": NarrowConvolution}.get(config.influence_block)
            self.influence_blocks = nn.ModuleList(
                kind(hidden_size, config.hidden_act) if kind else make_block() for _ in range(config.influence_layers)
            )
            self.influence_norm = nn.LayerNorm(hidden_size)
            self.influence = ZeroLinear(hidden_size, config.num_labels, bias=False)

    def voters(self, tokens: Tensor, members: Tensor, empty: Tensor | None, share: float = 1.0) -> Tensor:
        """What the classifier reads for each player.

        Args:
            tokens: of the players, (..., N, D); with `vote_readout="pooled"` one per coalition, (..., G, D).
            members: bool (..., G, N), True = member.
            empty: with "pooled", what `vote_tokens` makes of the empty coalition's token, (D).
            share: of the gradient, what the weights and `empty` get.

        Returns:
            (..., N, D).
        """
        tokens = self.vote_tokens(tokens, share)
        return tokens if empty is None else share_evenly(tokens - scale_gradient(empty, share), members)

    def vote_tokens(self, tokens: Tensor, share: float = 1.0) -> Tensor:
        """Tokens as the classifier reads them: (..., D) -> (..., D)."""
        for block in self.vote_blocks:
            tokens = learning_less(block, share)(tokens)
        return tokens

    def attributions(
        self, tokens: Tensor, votes: Tensor, grid: tuple[int, int], labels: Tensor | None = None
    ) -> Tensor:
        """Votes of the full image, plus the influence term where there is one.

        Args:
            tokens: of the players, (B, N, D).
            votes: of every label, (B, N, K), or of some, (B, N, L).
            grid: (h, w) of the players.
            labels: those labels' ids, (B, L).

        Returns:
            As `votes`.
        """
        votes = scale_gradient(votes, self.vote_gradient)
        if self.influence is None:
            return votes
        influence = linear_of(self._influence_tokens(tokens, grid), self.influence.weight, labels).float()
        influence.div_(tokens.shape[-2])  # in place: with many labels this is the largest tensor of a forward
        return influence.sub_(influence.mean(dim=-2, keepdim=True)).add_(votes)

    def attribution_sums(self, tokens: Tensor, vote_sums: Tensor, coalitions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attributions summed over coalitions: tokens (B, N, D), sums (B, M, K), bool (B, M, N) -> (B, M, K)."""
        vote_sums = scale_gradient(vote_sums, self.vote_gradient)
        if self.influence is None:
            return vote_sums
        tokens = self._influence_tokens(tokens, grid).float()  # half precision would leave a sum that is not 0
        tokens = tokens - tokens.mean(dim=-2, keepdim=True)
        return vote_sums + sums_of_linear(tokens, coalitions, self.influence.weight) / tokens.shape[-2]

    def copy_layers(self, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        """Start the influence head's own layers and norm as copies of the backbone's last ones."""
        for own, other in zip([*self.own_blocks, self.own_norm], [*layers, norm], strict=True):
            own.load_state_dict(other.state_dict())

    def own_tokens(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The tokens that the influence head's own layers make of the backbone's, (B, T, D) -> (B, T, D)."""
        tokens = scale_gradient(tokens, self.influence_gradient)
        for block in self.own_blocks:
            tokens = block(tokens, grid)
        return self.own_norm(tokens)

    def _influence_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if not self.own_layers:
            tokens = scale_gradient(tokens, self.influence_gradient)
        for block in self.influence_blocks:
            tokens = block(tokens, grid)
        return self.influence_norm(tokens)


def is_own_part(name: str) -> bool:
    """Whether a parameter of this name is the attribution head's or a coalition adapter's, not the classifier's."""
    return "attribution_head." in name or "coalition_adapters." in name


def coalition_adapters(config: PreTrainedConfig, widths: Sequence[int]) -> nn.ModuleList:
    """One adapter after each layer, of the layers' widths D; none with `coalition_adapter_size=0`."""
    size = config.coalition_adapter_size
    return nn.ModuleList(CoalitionAdapter(width, size, config.hidden_act) for width in widths if size)


def absent_shares(members: Tensor, coalition_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The share of all players that each coalition lacks, and that each player's own lacks; 0 where none is absent.

    Args:
        members: bool (B', R, G, N).
        coalition_ids: (B', R, N).
        dtype: of the result.

    Returns:
        (B' R, G, 1), (B' R, N, 1).
    """
    absent = 1 - members.flatten(0, 1).float().mean(-1, keepdim=True).to(dtype)
    return absent, absent.gather(1, coalition_ids.flatten(0, 1).unsqueeze(-1))


def share_evenly(pooled: Tensor, members: Tensor) -> Tensor:
    """Give each member N / size times its coalition's token: (..., G, D), bool (..., G, N) -> (..., N, D), float32.

    Summed over the members and divided by N it is that token again; an empty coalition's is lost.
    """
    shares = members.shape[-1] / members.sum(-1).clamp(min=1)  # (..., G)
    with torch.autocast(pooled.device.type, enabled=False):
        return (members * shares.unsqueeze(-1)).transpose(-1, -2) @ pooled.float()


def linear_of(tokens: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
    """A linear map to every label, (B, N, D), (K, D) -> (B, N, K), or to each image's own (B, L) -> (B, N, L)."""
    if labels is None:
        return nn.functional.linear(tokens, weight)
    # Each image's own weights are (B, L, D): where every label's outcome takes no more memory, choose from those.
    if labels.shape[1] * weight.shape[1] >= tokens.shape[1] * weight.shape[0]:
        return _of_labels(nn.functional.linear(tokens, weight), labels)
    return tokens @ weight[labels].mT


def _of_labels(values: Tensor, labels: Tensor) -> Tensor:
    """What players have for each image's own labels: (B, N, K), (B, L) -> (B, N, L)."""
    return values.gather(2, labels.unsqueeze(1).expand(-1, values.shape[1], -1))


def sums_of_linear(tokens: Tensor, coalitions: Tensor, weight: Tensor) -> Tensor:
    """A linear map of tokens, summed over coalitions: (..., N, D), bool (..., M, N), (K, D) -> (..., M, K), float32.

    Sums first and maps then, which for many labels costs much less than the other way round.
    """
    sums = sum_over_coalitions(coalitions, tokens)  # (..., M, D)
    with torch.autocast(tokens.device.type, enabled=False):
        return nn.functional.linear(sums, weight.to(sums.dtype)).float()


class ShapleyImageClassifierMixin:
    """Forward, explanation and game of a Shapley image classifier, over hooks that each backbone provides.

    `_embed(pixel_values, interpolate_pos_encoding)` gives the patch embeddings, `_tokens(embeddings)` the patch tokens
    (B, N, D) of the full image that the influence head's blocks read, those that vote and the empty coalition's,
    `_recorded_tokens` the same and what the stock backbone records, and `_structured_tokens(embeddings,
    coalition_ids, members)` those that vote where players see only their own coalition; `_last_layers(count)` names
    the layers and the norm that the influence head may have copies of. Voting tokens are the patches' own,
    (B', R, N, D), or with `vote_readout="pooled"` one for each of G coalitions, (B', R, G, D); then `_empty_token()`
    gives the one of the empty coalition, (D). `_tokens(embeddings, num_attributed)` may give the influence head's for
    the first images only.
    """

    # The loss is a mean over the batch: the Trainer must divide it by the number of accumulation steps.
    accepts_loss_kwargs = False

    # What `AutoModel` makes of a checkpoint: the backbone.
    features_class: type

    # What the first answer found; None = nobody asked yet.
    _is_untrained: bool | None = None

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a checkpoint of ours or a plain one of the same backbone, as `PreTrainedModel.from_pretrained` does.

        Weights are read from safetensors, never unpickled, unless `use_safetensors=False` asks for it. A plain
        `config` is taken as ours, and options of the attribution head may be given beside it.

        Raises:
            OSError: no such checkpoint, damaged files, weights that are not all of the backbone's, or that are NaN or
                infinite.
            ValueError: weights of other sizes than the configuration's, a configuration that makes no sense, or own
                layers that are to start as copies of offloaded or quantised ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        name = str(pretrained_model_name_or_path)
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            options = {option.name for option in fields(ShapleyConfigMixin)} & kwargs.keys()
            kwargs["config"] = cls.config_class.of(kwargs["config"], **{name: kwargs.pop(name) for name in options})
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise _MismatchedSizes(
                f"The weights of {name!r} have other sizes than its configuration: load them with the one they were "
                "saved with, or set `ignore_mismatched_sizes=True` for a new head."
            ) from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # safetensors' own type is no part of what we may import
                raise
            raise OSError(f"The weights of {name!r} are damaged ({error}): download or save them again.") from error
        _check_backbone(info, cls.base_model_prefix, name)
        if broken := _not_finite(model):
            raise OSError(
                f"The checkpoint {name!r} has NaN or infinity in {len(broken)} weights, such as {broken[:3]}: its "
                "training diverged, or its numbers are too large for the dtype. Take an earlier checkpoint, or set "
                "`dtype=torch.float32`."
            )
        if any(key.startswith("attribution_head.own_") for key in info["missing_keys"]):
            _check_copies(model, name)
            model.attribution_head.copy_layers(*model._last_layers(model.attribution_head.own_layers))
        if model._reads_untrained_tokens():
            logger.warning("%s Nor has the classifier of %r learned to read patch tokens. %s", UNTRAINED, name, TRAIN)
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub: bool = False, *args, **kwargs
    ) -> None:
        """Save weights, configuration and code, the pipeline's included, so that the Hub can serve all of them.

        Args:
            save_directory: folder, created if it does not exist.
            is_main_process: passed on.
            state_dict: passed on.
            push_to_hub: publish the model too, as `model.push_to_hub(repo_id)` does; `repo_id` defaults to the
                folder's name.
            *args: passed on.
            **kwargs: passed on; with `push_to_hub` those of that method as well.
        """
        # Imported here, where transformers finds it too, so that the pipeline's file is copied with the model's.
        from .pipeline_shapley import custom_pipelines

        self.config.custom_pipelines = custom_pipelines()
        features = f"{type(self).__module__.rpartition('.')[2]}.{self.features_class.__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": features}
        names = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
        publishing = {name: kwargs.pop(name) for name in names if push_to_hub and name in kwargs}
        # The original format renames ViT's weights, and Trainer, which resumes by the model's own names, would then
        # go on from random ones.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        if push_to_hub:
            repo_id = publishing.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **publishing)

    def freeze_classifier(self, adapters: bool = False) -> None:
        """Let the influence head and the coalition adapters alone learn from here on: logits stay what they are.

        Without adapters values of coalitions stay too, as they do with frozen ones.

        Args:
            adapters: freeze the coalition adapters as well.

        Raises:
            ValueError: with `attribution_head="votes"`, where attributions are what the classifier makes of patches.
        """
        if self.attribution_head.influence is None:
            raise ValueError(
                "A frozen classifier needs `attribution_head='votes+influence'`, got 'votes': its attributions are "
                "the classifier's own and could not learn either. Load the checkpoint with that option."
            )
        self.requires_grad_(False)
        self.coalition_adapters.requires_grad_(not adapters)
        for name, part in self.attribution_head.named_children():
            part.requires_grad_(name != "vote_blocks")

    def _empty(self, token: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """What the classifier reads of the empty coalition's token (D), None without one, and v(empty) (K)."""
        base_values = self.classifier.bias.to(torch.float32, copy=True)  # a later optimizer step must not change it
        if token is None:
            return None, base_values
        empty = self.attribution_head.vote_tokens(token).float()
        with torch.autocast(empty.device.type, enabled=False):
            return empty, base_values + nn.functional.linear(empty, self.classifier.weight.float())

    @property
    def base_values(self) -> Tensor:
        """v(empty), the same for every image: (K), float32, without gradient."""
        with torch.no_grad(), _evaluating(self):
            return self._empty_alone()[1]

    def _empty_alone(self) -> tuple[Tensor | None, Tensor]:
        """As `_empty`, where there is no image to take the token along with."""
        return self._empty(self._empty_token() if self.attribution_head.pooled else None)

    @property
    def attributions_trained(self) -> bool:
        """Whether training has reached the attribution head, as far as its weights say.

        Its last layers start at zero, and all of them are still there: False. A head without such layers does not say.
        """
        started_at_zero = [
            module
            for name, module in self.attribution_head.named_modules()
            # An adapter's own weights say more than those that it wraps, and offloaded ones nothing.
            if isinstance(module, ZeroLinear) and not name.endswith("base_layer") and not module.weight.is_meta
        ]
        return not started_at_zero or any(bool(module.weight.detach().any()) for module in started_at_zero)

    def _reads_untrained_tokens(self) -> bool:
        """Whether votes are what a plain checkpoint's classifier makes of patch tokens, with no weights that tell."""
        written_by = self.config.architectures or [type(self).__name__]
        ours = any(name == type(self).__name__ or "Shapley" in name for name in written_by)
        return not ours and not any(isinstance(module, ZeroLinear) for module in self.attribution_head.modules())

    def _check_answers(self, outputs: ShapleyImageClassifierOutput) -> None:
        """Refuse outputs that are not finite before a user sees them; say, once per model, that its head is untrained.

        Not part of the forward: on a GPU the host would wait for it in every training step.
        """
        if not may_be_read(outputs.logits):
            return
        given = (outputs.logits, outputs.attributions, outputs.base_values)
        if not all(math.isfinite(extreme) for tensor in given for extreme in torch.aminmax(tensor.detach())):
            broken = _not_finite(self)
            cause = f"weights {broken[:3]} are not finite" if broken else f"its numbers are too large for {self.dtype}"
            raise ValueError(
                f"The model answers NaN or infinity: {cause}. Take a checkpoint from before training diverged, or set "
                "`dtype=torch.float32`."
            )
        if self._is_untrained is None:
            self._is_untrained = not self.attributions_trained
            if self._is_untrained:
                logger.warning("%s %s", UNTRAINED, TRAIN)

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
        if sums_only and coalition_ids is None:
            raise ValueError("`sums_only` sums over coalitions: give `coalition_ids` too.")
        members, structured, recorded = None, None, {}
        if coalition_ids is None:
            attributed = None if attributed is None else self._labels_to_attribute(attributed, len(pixel_values))
            (tokens, voting, empty), recorded = self._recorded_tokens(pixel_values, interpolate_pos_encoding, **kwargs)
        else:
            _check_ordinary_options({**kwargs, "attributed": attributed})
            num_coalitions = _check_coalition_ids(coalition_ids, num_coalitions, pixel_values, grid)
            num_with_gradient = _check_num_with_gradient(num_with_gradient, len(coalition_ids))
            embeddings = self._embed(pixel_values, interpolate_pos_encoding)
            tokens, voting, empty = self._tokens(embeddings, len(coalition_ids) if sums_only else None)
            members = ids_to_coalitions(coalition_ids, num_coalitions)  # (B', R, G, N)
            structured = self._played(embeddings, coalition_ids, members, num_with_gradient)

        head = self.attribution_head
        empty, base_values = self._empty(empty)
        voters = head.voters(voting, tokens.new_ones(voting.shape[0], 1, tokens.shape[1], dtype=torch.bool), empty)
        if structured is not None:
            structured = head.voters(structured, members, empty, head.coalition_gradient)  # (B', R, N, D)
        if sums_only:
            gains, fields = self._sums(tokens, voters, structured, members, grid)
        elif attributed is None:
            gains, fields = self._votes(tokens, voters, structured, grid)
        else:
            gains, fields = self._chosen(tokens, voters, base_values, attributed, grid)
        for name in [name for name in ("coalition_gains", "coalition_votes") if name in fields]:
            fields[name] = _detached_beyond(fields[name], num_with_gradient)
        logits = base_values + gains  # (B, K)
        return ShapleyImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            base_values=base_values,
            **fields,
            **recorded,
        )

    def _played(self, embeddings: Tensor, coalition_ids: Tensor, members: Tensor, num_with_gradient: int) -> Tensor:
        """`_structured_tokens`, those beyond the first `num_with_gradient` images without gradient."""
        embeddings = scale_gradient(embeddings, self.attribution_head.coalition_gradient)
        if num_with_gradient == len(members):
            return self._structured_tokens(embeddings, coalition_ids, members)
        first, others = slice(num_with_gradient), slice(num_with_gradient, None)
        with torch.no_grad():
            constant = self._structured_tokens(embeddings[others], coalition_ids[others], members[others])
        return torch.cat([self._structured_tokens(embeddings[first], coalition_ids[first], members[first]), constant])

    def _votes(
        self, tokens: Tensor, voters: Tensor, structured: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gain of the full image (B, K), and the output's fields that hold something for each player."""
        votes = self._shared_votes(voters) if self.attribution_head.pooled else self._votes_of(voters)  # (B, N, K)
        fields = {"attributions": self.attribution_head.attributions(tokens, votes, grid)}
        if structured is not None:
            fields["coalition_votes"] = self._votes_of(structured, self.attribution_head.coalition_gradient)
        return votes.sum(dim=1), fields

    def _chosen(
        self, tokens: Tensor, voters: Tensor, base_values: Tensor, labels: Tensor | int, grid: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gain of the full image (B, K), and attributions of some labels only: of (B, L), or of so many best."""
        pooled = self.attribution_head.pooled
        if pooled:
            votes = self._shared_votes(voters)
            gains = votes.sum(dim=1)
        else:
            everyone = torch.ones(voters.shape[0], 1, voters.shape[-2], dtype=torch.bool, device=voters.device)
            gains = self._gains(voters, everyone).squeeze(1)
        if isinstance(labels, int):
            labels = (base_values + gains).topk(labels).indices
        if pooled:
            votes = _of_labels(votes, labels)
        else:
            # As precise as their sums are, for these must add up to the logits.
            with torch.autocast(voters.device.type, enabled=False):
                votes = linear_of(voters.float(), self.classifier.weight.float(), labels) / voters.shape[1]
        attributions = self.attribution_head.attributions(tokens, votes, grid, labels)
        return gains, {"attributions": attributions, "attributed_labels": labels}

    def _shared_votes(self, voters: Tensor) -> Tensor:
        """Votes of the full image with a pooled readout, where all patches vote the same: (B, N, D) -> (B, N, K)."""
        return (self._votes_of(voters[:, :1]) / voters.shape[1]).expand(*voters.shape[:2], -1)

    def _votes_of(self, voters: Tensor, share: float = 1.0) -> Tensor:
        """Each player's vote, divided by the number of players: (..., N, D) -> (..., N, K), float32."""
        weight = scale_gradient(self.classifier.weight, share)
        votes = nn.functional.linear(voters.to(weight.dtype), weight).float()
        return votes.div_(voters.shape[-2])  # in place: with many labels this is the largest tensor of a forward

    def _sums(
        self, tokens: Tensor, voters: Tensor, structured: Tensor, members: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gain of the full image (B, K), and the output's fields that hold something for each coalition."""
        gains = self._gains(structured, members, self.attribution_head.coalition_gradient)  # (B', R, G, K)
        total = self._gains(voters, members.new_ones(len(voters), 1, voters.shape[-2])).squeeze(1)
        batch, shape = len(members), members.shape[1:3]
        members = members.flatten(1, 2)  # (B', R G, N)
        votes = self._gains(voters[:batch], members)
        attributions = self.attribution_head.attribution_sums(tokens[:batch], votes, members, grid)
        return total, {"coalition_gains": gains, "coalition_attributions": attributions.unflatten(1, shape)}

    def _gains(self, voters: Tensor, members: Tensor, share: float = 1.0) -> Tensor:
        """Votes summed over coalitions, v(S) - v(empty): (..., N, D), bool (..., M, N) -> (..., M, K), float32."""
        return sums_of_linear(voters, members, scale_gradient(self.classifier.weight, share)) / members.shape[-1]

    @torch.no_grad()
    def explain(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        upsample: bool = False,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        """Attribution maps of every image for all or for chosen labels, in logits.

        Args:
            pixel_values: (B, C, H, W).
            labels: None for all K; L label ids or names, the same for every image; or a long tensor (B, L).
            upsample: spread each patch's value evenly over its pixels, which keeps the sum: (H, W) instead of (h, w).
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.

        Returns:
            (B, K or L, h, w) float32 on the model's device; a map's sum is its label's logit less its base value.

        Raises:
            ValueError: for pixels or labels that do not fit, or an answer that is NaN or infinite.
        """
        height, width = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        if labels is not None:
            labels = self._label_ids(labels, len(pixel_values))
        with _evaluating(self):
            outputs = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, attributed=labels)
        self._check_answers(outputs)
        maps = outputs.attributions.transpose(1, 2).unflatten(-1, (height, width))  # (B, K or L, h, w)
        return upsample_attributions(maps, tuple(pixel_values.shape[-2:])) if upsample else maps

    @torch.no_grad()
    def coalition_values(
        self,
        pixel_values: Tensor,
        coalitions: Tensor,
        *,
        batch_size: int = 1024,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        """The game itself: v(S) for M coalitions of each image.

        Where every second coalition is the complement of the one before, both come from one pass over the tokens.

        Args:
            pixel_values: (B, C, H, W).
            coalitions: (B, M, N) bool, True = present.
            batch_size: coalition structures in one forward, over all images.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.

        Returns:
            (B, M, K) float32, in logits.
        """
        height, width = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        check_coalitions(coalitions, height * width)
        if coalitions.ndim != 3 or len(coalitions) != len(pixel_values):
            raise ValueError(
                f"`coalitions` must be of shape (batch = {len(pixel_values)}, coalitions, players), "
                f"got {tuple(coalitions.shape)}."
            )
        check_count(batch_size, "batch_size")
        coalitions = coalitions.to(pixel_values.device)
        paired = coalitions.shape[1] % 2 == 0 and torch.equal(coalitions[:, 0::2], ~coalitions[:, 1::2])
        chunk = max(1, batch_size // len(pixel_values)) * (2 if paired else 1)
        with _evaluating(self):
            embeddings = self._embed(pixel_values, interpolate_pos_encoding)
            empty = self._empty_alone()
            values = [self._values(embeddings, part, paired, *empty) for part in coalitions.split(chunk, dim=1)]
        return torch.cat(values, dim=1)

    def _values(
        self, embeddings: Tensor, coalitions: Tensor, paired: bool, empty: Tensor | None, base_values: Tensor
    ) -> Tensor:
        """v(S): (B, ...), (B, M, N) -> (B, M, K). With `paired`, coalition 2 j + 1 is the complement of 2 j."""
        structures = coalitions[:, 0::2] if paired else coalitions  # (B, R, N)
        members = torch.stack([structures, ~structures], dim=2)  # (B, R, 2, N)
        tokens = self._structured_tokens(embeddings, coalitions_to_ids(structures), members)
        gains = self._gains(self.attribution_head.voters(tokens, members, empty), members)
        return base_values + (gains if paired else gains[:, :, :1]).flatten(1, 2)

    def _check_pixels(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None, check_values: bool = False
    ) -> tuple[int, int]:
        """Refuse images that the grid of players cannot cover; return the grid (h, w)."""
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4 or pixel_values.shape[0] == 0:
            got = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(
                f"`pixel_values` must be of shape (batch, channels, height, width), batch > 0, got {got}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floating point, got {pixel_values.dtype}: use the image processor."
            )
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` must have {self.config.num_channels} channels, got {pixel_values.shape[1]}."
            )
        for name, module in (("classifier", self.classifier), ("attribution_head", self.attribution_head.influence)):
            if module is not None and module.weight.is_meta and not pixel_values.is_meta:
                raise ValueError(
                    f"The weights of `{name}` are offloaded, which works for the backbone's layers only: give "
                    "`classifier` and `attribution_head` a device in `device_map`."
                )
        check_device(pixel_values, "pixel_values", self.classifier.weight.device)
        grid = self.grid_size(*pixel_values.shape[-2:], bool(interpolate_pos_encoding))
        # Elsewhere than on the CPU the check would make the host wait in every training step.
        checked = (check_values or pixel_values.device.type == "cpu") and may_be_read(pixel_values)
        # NaN is both extremes; asking each pixel takes 20 times as long, which a small model's forward feels.
        if checked and not all(math.isfinite(extreme) for extreme in torch.aminmax(pixel_values.detach())):
            raise ValueError(
                "`pixel_values` must be finite, got NaN or infinity: check the image and its normalisation."
            )
        return grid

    def _check_targets(self, labels: Tensor, pixel_values: Tensor) -> Tensor:
        """Refuse labels that the loss of `config.problem_type` cannot take; integers come back as long."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"`labels` must be a tensor, got {describe(labels)}.")
        batch = len(pixel_values)
        num_labels, problem = self.config.num_labels, self.config.problem_type
        integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        single = problem == "single_label_classification" or (problem is None and num_labels > 1 and integers)
        if not single:
            wanted = (batch,) if num_labels == 1 and labels.ndim == 1 else (batch, num_labels)
            check_floats(labels, "labels", wanted, f"`config.problem_type` is {problem!r}")
        # Elsewhere than on the CPU the check would make the host wait in every training step.
        elif labels.device.type == "cpu" and may_be_read(labels):
            ids = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
            check_label_ids(ids, "labels", batch, num_labels, may_be_unknown=True)
        check_device(labels, "labels", pixel_values.device)
        return labels.long() if single else labels

    def _labels_to_attribute(self, labels: int | Sequence[int | str] | Tensor, batch: int) -> Tensor | int:
        """Label ids (batch, L), or how many of the best; refuse others."""
        if not isinstance(labels, int):
            return self._label_ids(labels, batch)
        if not torch.compiler.is_compiling():
            check_count(labels, "attributed")
            if labels > self.config.num_labels:
                raise ValueError(
                    f"`attributed` must be at most the model's {self.config.num_labels} labels, got {labels}."
                )
        return labels

    def _label_ids(self, labels: Sequence[int | str] | Tensor, batch: int) -> Tensor:
        """Label ids or names to long (batch, L)."""
        device = self.classifier.weight.device
        num_labels = self.config.num_labels
        if not isinstance(labels, Tensor):
            labels = torch.tensor(known_labels(labels, self.config.id2label))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"`labels` must be integers, got {labels.dtype}: give ids or names.")
        ids = labels.to(device=device, dtype=torch.long)
        if ids.ndim == 1:
            ids = ids.expand(batch, -1)
        if ids.ndim != 2 or len(ids) != batch or ids.numel() == 0:
            raise ValueError(f"`labels` must hold L labels or be of shape ({batch}, L), got {tuple(labels.shape)}.")
        if may_be_read(ids) and (ids.min() < 0 or ids.max() >= num_labels):
            raise ValueError(f"`labels` must lie in [0, {num_labels}), got {ids.min().item()} to {ids.max().item()}.")
        return ids


class _MismatchedSizes(ValueError, RuntimeError):
    """A ValueError as our refusals are, and a RuntimeError as transformers' own."""


def _check_copies(model: nn.Module, name: str) -> None:
    """Refuse to start own layers as copies where a weight of either is offloaded or quantised, and so not at hand."""
    if all(weight.is_meta for weight in model.parameters()):  # a process that FSDP will send all weights
        return
    layers, norm = model._last_layers(model.attribution_head.own_layers)
    for module in (*layers, norm, model.attribution_head):
        if any(weight.is_meta or not weight.is_floating_point() for weight in module.parameters()):
            raise ValueError(
                "The influence head's own layers start as copies of the backbone's last ones, of which some are offloaded "
                f"or quantised: load {name!r} once without `device_map` and `quantization_config`, save it, and load "
                "what was saved."
            )


def _not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that hold NaN or infinity; those that hold no numbers here, or only bytes, are passed over."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta and not weight.isfinite().all()
    ]


def _check_backbone(info: dict, prefix: str, name: str) -> None:
    """Refuse a checkpoint that lacks a part of the backbone, or has more of it than the configuration."""
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, beyond its configuration,")):
        keys = sorted(key for key in info[kind] if key.startswith(f"{prefix}.") and ".pooler." not in key)
        if keys:
            raise OSError(
                f"The checkpoint {name!r} {what} {len(keys)} weights of the backbone, such as {keys[:3]}: download or "
                "save it again, with the configuration it belongs to."
            )


def upsample_attributions(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread each patch's value evenly over its pixels: (..., h, w) -> (..., H, W), multiples of h and w; same sum."""
    check_floats(maps, "maps", [*["maps"] * (getattr(maps, "ndim", 2) - 2), "h", "w"])
    size = check_pair(size, "size", "(height, width) in pixels")
    rows, columns = size[0] // maps.shape[-2], size[1] // maps.shape[-1]
    if (maps.shape[-2] * rows, maps.shape[-1] * columns) != size or 0 in (rows, columns):
        raise ValueError(f"`size` must be a multiple of the grid {tuple(maps.shape[-2:])}, got {tuple(size)}.")
    spread = maps.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
    return spread / (rows * columns)


def check_grid(grid: tuple[int, int], step: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise unless patches of `step` pixels tile an image of `size` pixels into at least two players."""
    if (grid[0] * step[0], grid[1] * step[1]) != tuple(size) or grid[0] * grid[1] < 2:
        raise ValueError(
            f"Image height and width must be multiples of the player size {step[0]} x {step[1]} pixels and give at "
            f"least 2 players, got {size[0]} x {size[1]}: resize or crop the image."
        )


def _check_coalition_ids(ids: Tensor, num_coalitions: int | None, images: Tensor, grid: tuple[int, int]) -> int:
    """Refuse ids that are no coalition structure of the images; return the number of coalitions in each."""
    batch, num_players = len(images), grid[0] * grid[1]
    if not isinstance(ids, Tensor) or ids.dtype != torch.long:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"`coalition_ids` must be a long tensor, got {got}: see `coalitions_to_ids`.")
    if ids.ndim != 3 or not 1 <= len(ids) <= batch or ids.shape[1] == 0 or ids.shape[-1] != num_players:
        raise ValueError(
            f"`coalition_ids` must be of shape (batch <= {batch}, structures, players = {num_players}), "
            f"got {tuple(ids.shape)}."
        )
    check_device(ids, "coalition_ids", images.device)
    if num_coalitions is not None:
        if not torch.compiler.is_compiling():
            check_count(num_coalitions, "num_coalitions")
        return num_coalitions
    lowest, highest = (int(x) for x in torch.aminmax(ids))
    if lowest < 0 or highest >= num_players:
        raise ValueError(f"`coalition_ids` must lie in [0, {num_players}), got {lowest} to {highest}.")
    return highest + 1


def _check_ordinary_options(options: dict[str, Any]) -> None:
    """Refuse what a forward under coalition structures does not give."""
    for name in ("output_hidden_states", "output_attentions", "attributed"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"`{name}` is for the ordinary forward only: drop `coalition_ids`.")


def _check_num_with_gradient(count: int | None, images: int) -> int:
    """How many of the images with structures are differentiated through."""
    if count is None:
        return images
    if not torch.compiler.is_compiling():
        check_count(count, "num_with_gradient")
        if count > images:
            raise ValueError(
                f"`num_with_gradient` must be at most {images}, the images of `coalition_ids`, got {count}."
            )
    return count


def _detached_beyond(tensor: Tensor, count: int) -> Tensor:
    """The same, with gradient for the first `count` rows only."""
    return tensor if count == len(tensor) else torch.cat([tensor[:count], tensor[count:].detach()])


_MODES = threading.Lock()
# How many blocks of all threads hold a model in evaluation mode, and which modules were in it before the first one.
_HELD: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


class _evaluating:
    """Evaluation mode within a block; the last of the blocks that overlap puts back every module's mode.

    So threads explain with one model at a time. One that trains it meanwhile would train in evaluation mode.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self):
        with nullcontext() if torch.compiler.is_compiling() else _MODES:  # the compiler knows no locks
            count, evaluated = _HELD.get(self.model, (0, []))
            self.is_held = count > 0 or self.model.training
            if self.model.training:
                evaluated = [module for module in self.model.modules() if not module.training]
                self.model.eval()
            if self.is_held:
                _HELD[self.model] = count + 1, evaluated

    def __exit__(self, *_):
        if not self.is_held:
            return
        with nullcontext() if torch.compiler.is_compiling() else _MODES:
            count, evaluated = _HELD.pop(self.model)
            if count > 1:
                _HELD[self.model] = count - 1, evaluated
                return
            self.model.train()
            for module in evaluated:
                module.training = False
