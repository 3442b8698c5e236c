"""From patch tokens to readouts, values and attributions; shared by every backbone.

Of a coalition S the classifier reads z_S in R^D, its readout: what the stock model reads of the present patches, or
the sum of the present patches' tokens over the number of players N. The value is v(S) = W z_S + b with W and b of the
classifier; the logits are v(all). Shapley values are linear in the game, so they are learned once, for the readout:
phi = Phi W' with Phi (N, D), and the attributions sum to v(all) - v(empty) by construction.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import load_state_dict
from transformers.utils import ModelOutput, cached_file
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
from .coalitions import (
    check_coalitions,
    coalitions_to_ids,
    ids_to_coalitions,
    with_complements,
)
from .configuration_shapley import ShapleyConfigMixin
from .heads import (
    ZeroLinear,
    at_least_float32,
    linear_of,
    mapped,
    scale_gradient,
    share_evenly,
    weight_of,
)
from .posterior import ShapleyPosterior, coalitions_to_ask, shapley_posterior

logger = logging.getLogger(__name__)

# The last layer of the influence head, and what it was called when each label had weights of its own.
TIED, UNTIED = "attribution_head.correction.weight", "attribution_head.influence.weight"
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
        readout_errors: (B', R, G, D), float32: what the readout of each coalition gains over the empty one's, less the
            sum of the readout's attributions over it; the gradient is the attribution head's alone; with `sums_only`.
        maps: (B, K, h, w): the attributions on the grid of patches, a view of them. Of L labels with `attributed`.
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
    maps: Tensor | None = None  # a field: accelerate builds outputs anew and would drop a grid that is no tensor
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
        cls.config_class.check_stored_sizes(pretrained_model_name_or_path, **kwargs)
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
        if UNTIED in info["unexpected_keys"]:
            _tie(model, name, kwargs)
            info["missing_keys"] = set(info["missing_keys"]) - {TIED}
            info["unexpected_keys"] = set(info["unexpected_keys"]) - {UNTIED}
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
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
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
        if self.attribution_head.correction is None:
            raise ValueError(
                "A frozen classifier needs `attribution_head='votes+influence'`, got 'votes': its attributions are "
                "the classifier's own and could not learn either. Load the checkpoint with that option."
            )
        self.requires_grad_(False)
        self.coalition_adapters.requires_grad_(not adapters)
        for name, part in self.attribution_head.named_children():
            part.requires_grad_(name != "vote_blocks")

    def _empty(self, token: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Readout of the empty coalition (D), from its token (D) where there is one, and v(empty) (K)."""
        if token is None:
            readout = torch.zeros(self.attribution_head.hidden_size, device=device)
        else:
            readout = at_least_float32(self.attribution_head.vote_tokens(token))
        return readout, mapped(self.classifier, readout[None])[0]  # quantised layers take no single row

    @property
    def game_name(self) -> str:
        """Whose game is explained, and what an absent player is, in words."""
        whose = "the classifier with adapters for masked images" if self.coalition_adapters else "the classifier's own"
        return f"{whose}, absent patches dropped"

    @property
    def base_values(self) -> Tensor:
        """v(empty), the same for every image: (K), float32, without gradient."""
        with torch.no_grad(), _evaluating(self):
            return self._empty_alone()[1]

    def _empty_alone(self) -> tuple[Tensor, Tensor]:
        """As `_empty`, where there is no image to take the token along with."""
        return self._empty(self._empty_token() if self.attribution_head.pooled else None, self._input_device)

    @property
    def _input_device(self) -> torch.device:
        """Where inputs belong: with weights that are not offloaded, else where accelerate brings those that are."""
        for weight in self.parameters():
            if not weight.is_meta:
                return weight.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(device) for device in devices if device is not None), self.device)

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
        extremes = [torch.aminmax(tensor.detach()) for tensor in given if tensor is not None]
        if not all(math.isfinite(extreme) for pair in extremes for extreme in pair):
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
        structured, recorded = None, {}
        if coalition_ids is None:
            _check_no_sums(sums_only)
            if attributed is not None:
                attributed = self._labels_to_attribute(attributed, len(pixel_values))
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
        empty, base_values = self._empty(empty, pixel_values.device)
        voting = head.vote_tokens(voting)
        everyone = voting.new_ones(voting.shape[0], 1, tokens.shape[1], dtype=torch.bool)
        readout = head.readouts(voting, everyone, empty).squeeze(1)  # (B, D)
        logits = mapped(self.classifier, readout)  # (B, K)
        if isinstance(attributed, int):
            attributed = logits.topk(attributed).indices
        gains = scale_gradient(logits - base_values, head.vote_gradient)
        read = _Reading(tokens, voting, readout - empty, gains, empty, base_values, grid)
        fields = {} if sums_only else self._explained(read, attributed)
        if structured is not None:
            fields |= self._played_fields(read, structured, members, sums_only, num_with_gradient)
        return ShapleyImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            base_values=base_values,
            attributed_labels=attributed,
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

    def _explained(self, read: _Reading, labels: Tensor | None) -> dict[str, Tensor]:
        """The output's fields that hold the attributions of every label, or of each image's own labels (B, L)."""
        attributions = self._attributions(read, labels)
        return {"attributions": attributions, "maps": attribution_maps(attributions, read.grid)}

    def _attributions(self, read: _Reading, labels: Tensor | None) -> Tensor:
        """Attributions of every label, (B, N, K), or of each image's own labels (B, L), (B, N, L)."""
        deviations = self.attribution_head.deviations(read.tokens, read.voting, read.grid)
        attributions = linear_of(deviations, self._weight(deviations), labels).float()
        attributions.div_(deviations.shape[1])  # in place: with many labels this is the largest tensor of a forward
        shares = read.gains if labels is None else read.gains.gather(1, labels)
        shares = (shares / deviations.shape[1]).unsqueeze(1)
        return attributions.sub_(attributions.mean(dim=1, keepdim=True)).add_(shares)

    def _weight(self, like: Tensor) -> Tensor:
        """The classifier's matrix (K, D), with as much of the attributions' gradient as votes get."""
        weight = weight_of(self.classifier, self.attribution_head.hidden_size, like)
        return scale_gradient(weight, self.attribution_head.vote_gradient)

    def _played_fields(
        self, read: _Reading, structured: Tensor, members: Tensor, sums_only: bool, num_with_gradient: int
    ) -> dict[str, Tensor]:
        """The output's fields that hold something for the coalitions bool (B', R, G, N), from their tokens."""
        head = self.attribution_head
        structured = head.vote_tokens(structured, head.coalition_gradient)
        readouts = head.readouts(structured, members, read.empty)  # (B', R, G, D)
        if not sums_only:
            gained = readouts - scale_gradient(read.empty, head.coalition_gradient)
            votes = self._votes(structured, gained, members)
            return {"coalition_votes": _detached_beyond(votes, num_with_gradient)}
        share = head.coalition_gradient
        gains = mapped(self.classifier, readouts, share) - scale_gradient(read.base_values, share)
        attributions, readout_sums = self._sums(read, members)
        return {
            "coalition_gains": _detached_beyond(gains, num_with_gradient),
            "coalition_attributions": attributions,
            "readout_errors": (readouts - read.empty).detach() - readout_sums,
        }

    def _votes(self, voting: Tensor, readout_gains: Tensor, members: Tensor) -> Tensor:
        """Each player's vote when it sees only its own coalition, divided by their number: (B', R, N, K), float32."""
        head = self.attribution_head
        voters = share_evenly(readout_gains, members) if head.pooled else voting  # (B', R, N, D)
        weight = scale_gradient(weight_of(self.classifier, head.hidden_size, voting), head.coalition_gradient)
        return linear_of(voters, weight).float().div_(members.shape[-1])

    def _sums(self, read: _Reading, members: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the coalitions bool (B', R, G, N) of attributions (B', R, G, K), and of Phi (B', R, G, D)."""
        batch, num_players = len(members), members.shape[-1]
        head, flat = self.attribution_head, members.flatten(1, 2)  # (B', R G, N)
        deviations = head.deviation_sums(read.tokens[:batch], read.voting[:batch], flat, read.grid) / num_players
        deviations = deviations.unflatten(1, members.shape[1:3])
        shares = members.sum(-1, keepdim=True) / num_players  # (B', R, G, 1)
        with torch.autocast(deviations.device.type, enabled=False):
            attributions = linear_of(deviations, self._weight(deviations).to(deviations.dtype)).float()
        attributions = attributions + shares * read.gains[:batch, None, None]
        return attributions, deviations + shares * read.readout_gains[:batch, None, None].detach()

    @torch.no_grad()
    def explain(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        evaluations: int = 0,
        upsample: bool = False,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attribution maps of every image for all or for chosen labels, in logits.

        Args:
            pixel_values: (B, C, H, W).
            labels: None for all K; L label ids or names, the same for every image; or a long tensor (B, L).
            evaluations: 0 takes the one pass as it is. From 2 to 16,384: so many values of the game bring it nearer to
                the exact Shapley values, which half of their forwards under coalition structures cost.
            upsample: spread each patch's value evenly over its pixels, which keeps the sum: (H, W) instead of (h, w).
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.
            generator: source of randomness for `evaluations`, on the CPU; None uses torch's global one.

        Returns:
            (B, K or L, h, w) float32 on the model's device; a map's sum is its label's logit less its base value.

        Raises:
            ValueError: for pixels or labels that do not fit, or an answer that is NaN or infinite.
        """
        grid = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        check_count(evaluations, "evaluations", 0)
        if labels is not None:
            labels = self._label_ids(labels, len(pixel_values))
        with _evaluating(self):
            outputs = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, attributed=labels)
        self._check_answers(outputs)
        attributions = outputs.attributions
        if evaluations > 1:
            asked = self._ask(pixel_values, attributions, labels, evaluations, interpolate_pos_encoding, generator)
            attributions = torch.stack([found.values for found in asked]).to(attributions)
        maps = attribution_maps(attributions, grid)  # (B, K or L, h, w)
        return upsample_attributions(maps, tuple(pixel_values.shape[-2:])) if upsample else maps

    @torch.no_grad()
    def check_explanation(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        maps: Tensor | None = None,
        evaluations: int = 16,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How wrong each map of one pass is, judged by a few values of the game: a check that every map can carry.

        A map from a head that has learned too little, or of an image unlike those it learned from, shows. The fewer
        the evaluations, the less sure the judgement; `attribution_error_certificate` judges many images together.

        Args:
            pixel_values: (B, C, H, W).
            labels: as for `explain`; None for the predicted label alone.
            maps: (B, L, h, w), refined ones of these labels, to judge in place of those of one pass. The draws that
                refined them cannot judge them: pass `generator` on as `explain` left it, do not seed it again.
            evaluations: values of the game for each image, from 2 to 16,384.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.
            generator: source of randomness, on the CPU; None uses torch's global one.

        Returns:
            (B, L) float32: expected squared error over the expected variance of the exact values over the patches.
            0 is exact; 1 is no better than a map that gives every patch the same.
        """
        grid = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        check_count(evaluations, "evaluations", 2)
        with _evaluating(self):
            outputs = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        self._check_answers(outputs)
        chosen = outputs.logits.argmax(-1, keepdim=True)
        if labels is not None:
            chosen = self._label_ids(labels, len(pixel_values))
        judged, judged_labels = outputs.attributions, None  # of all labels, which are wrong alike
        if maps is not None:
            check_floats(maps, "maps", (*chosen.shape, *grid), "give those that `explain` gives for these labels")
            judged, judged_labels = maps.flatten(2).transpose(1, 2), chosen
        asked = self._ask(pixel_values, judged, judged_labels, evaluations, interpolate_pos_encoding, generator)
        ratios = torch.stack([found.error_ratios for found in asked]).to(judged)  # (B, K or L)
        return ratios.gather(1, chosen) if maps is None else ratios

    def _ask(
        self,
        pixel_values: Tensor,
        attributions: Tensor,
        labels: Tensor | None,
        evaluations: int,
        interpolate_pos_encoding: bool | None,
        generator: torch.Generator | None,
    ) -> list[ShapleyPosterior]:
        """What evaluations say of each image's attributions, (B, N, K), or of its own labels (B, L), (B, N, L)."""
        device = pixel_values.device
        drawn = [
            coalitions_to_ask(evaluations, num_players=attributions.shape[1], generator=generator, device="cpu")
            for _ in pixel_values
        ]
        coalitions = torch.stack([torch.cat([torch.ones_like(rows[:1]), rows]) for rows in drawn])  # (B, R, N)
        game = self.game(pixel_values, labels, interpolate_pos_encoding=interpolate_pos_encoding)
        values = game(with_complements(coalitions).to(device))  # (B, 2 R, K or L)
        odd = ((values[:, 0::2] - values[:, 1::2]) / 2).double().cpu()
        return list(map(shapley_posterior, attributions.double().cpu(), coalitions, odd))

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
            empty, base_values = self._empty_alone()
            values = [self._values(embeddings, part, paired, empty) for part in coalitions.split(chunk, dim=1)]
        # That of no player at all to the bit: a product with many rows rounds otherwise than one with a single row.
        return torch.where(coalitions.any(-1, keepdim=True), torch.cat(values, dim=1), base_values)

    def game(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        batch_size: int = 1024,
        interpolate_pos_encoding: bool | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """The game of one image or of many as a function of coalitions, which estimators and metrics take.

        Args:
            pixel_values: (C, H, W) for the game of one image, (B, C, H, W) for one of many.
            labels: None for all K; else as for `explain`. An image's own may be a long tensor (L).
            batch_size: coalition structures in one forward, over all images.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.

        Returns:
            v: bool (M, N), True = present -> float32 (M, K or L), in logits; of many images bool (B, M, N) ->
            (B, M, K or L).

        Raises:
            ValueError: for pixels or labels that do not fit; the function, for coalitions that do not.
        """
        is_one = isinstance(pixel_values, Tensor) and pixel_values.ndim == 3
        images = pixel_values.unsqueeze(0) if is_one else pixel_values
        self._check_pixels(images, interpolate_pos_encoding, check_values=True)
        check_count(batch_size, "batch_size")
        ids = None if labels is None else self._label_ids(labels, len(images))

        def values_of(coalitions: Tensor) -> Tensor:
            check_coalitions(coalitions)
            if is_one and coalitions.ndim != 2:
                raise ValueError(
                    f"`coalitions` must be of shape (coalitions, players) in the game of one image, got "
                    f"{tuple(coalitions.shape)}: give `game` many images (B, C, H, W) for (B, coalitions, players)."
                )
            asked = coalitions.unsqueeze(0) if is_one else coalitions
            values = self.coalition_values(
                images, asked, batch_size=batch_size, interpolate_pos_encoding=interpolate_pos_encoding
            )
            if ids is not None:
                values = values.gather(2, ids.unsqueeze(1).expand(-1, values.shape[1], -1))
            return values.squeeze(0) if is_one else values

        return values_of

    def _values(self, embeddings: Tensor, coalitions: Tensor, paired: bool, empty: Tensor) -> Tensor:
        """v(S): (B, ...), (B, M, N) -> (B, M, K). With `paired`, coalition 2 j + 1 is the complement of 2 j."""
        structures = coalitions[:, 0::2] if paired else coalitions  # (B, R, N)
        members = torch.stack([structures, ~structures], dim=2)  # (B, R, 2, N)
        tokens = self._structured_tokens(embeddings, coalitions_to_ids(structures), members)
        readouts = self.attribution_head.readouts(self.attribution_head.vote_tokens(tokens), members, empty)
        return mapped(self.classifier, (readouts if paired else readouts[:, :, :1]).flatten(1, 2))

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
            channels_last = pixel_values.shape[3] == self.config.num_channels
            fix = "permute(0, 3, 1, 2) puts the channels first" if channels_last else "use the model's image processor"
            raise ValueError(
                f"`pixel_values` must have {self.config.num_channels} channels, (batch, channels, height, width), got "
                f"{pixel_values.shape[1]} in shape {tuple(pixel_values.shape)}: {fix}."
            )
        check_device(pixel_values, "pixel_values", self._input_device)
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
        device = self._input_device
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


def _check_copies(model: Any, name: str) -> None:
    """Refuse to start own layers as copies where a weight of either is offloaded or quantised, and so not at hand."""
    if all(weight.is_meta for weight in model.parameters()):  # a process that FSDP will send all weights
        return
    layers, norm = model._last_layers(model.attribution_head.own_layers)
    for module in (*layers, norm, model.attribution_head):
        if any(weight.is_meta or not weight.is_floating_point() for weight in module.parameters()):
            raise ValueError(
                "The influence head's own layers start as copies of the backbone's last ones, of which some are "
                f"offloaded or quantised: load {name!r} once without `device_map` and `quantization_config`, save it, "
                "and load what was saved."
            )


def _not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that hold NaN or infinity; those that hold no numbers here, or only bytes, do not count."""
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


def _tie(model: nn.Module, name: str, options: dict[str, Any]) -> None:
    """Make an influence head with weights of its own for each label, U (K, D), the correction pinv(W) U, the same."""
    places = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    file = cached_file(name, "model.safetensors", **{key: options[key] for key in places if key in options})
    head, classifier = model.get_submodule("attribution_head"), model.get_submodule("classifier")
    untied, weight = load_state_dict(file)[UNTIED].double(), classifier.get_parameter("weight").detach().cpu().double()
    if weight.shape[0] > weight.shape[1] or torch.linalg.matrix_rank(weight) < weight.shape[0]:
        raise ValueError(
            f"The checkpoint {name!r} has an influence head of {weight.shape[0]} labels, which the classifier's "
            f"{weight.shape[1]} features cannot express: train its attribution head anew, from the plain one."
        )
    head.get_parameter("correction.weight").data.copy_(torch.linalg.pinv(weight) @ untied)


def attribution_maps(attributions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attributions on the grid of players, a view of them: (B, N, K) -> (B, K, h, w), N = h w."""
    return attributions.transpose(1, 2).unflatten(-1, grid)


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


def _check_no_sums(sums_only: bool) -> None:
    if sums_only:
        raise ValueError("`sums_only` sums over coalitions: give `coalition_ids` too.")


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
