"""Loading and saving a Shapley classifier: plain checkpoints, ours, and what is wrong with either."""

import logging
import math
import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import load_state_dict
from transformers.utils import ModelOutput, cached_file

from .backbone import Backbone
from .checks import may_be_read
from .configuration_shapley import ShapleyConfigMixin
from .heads import ZeroLinear

logger = logging.getLogger(__name__)

# The last layer of the influence head, and what it was called when each label had weights of its own.
TIED, UNTIED = "attribution_head.correction.weight", "attribution_head.influence.weight"
UNTRAINED = "The attributions of this model have not been trained."
TRAIN = "Train it with `ShapleyTrainer` or `hf-shapley train`."


class LoadingMixin(Backbone):
    """`from_pretrained`, `save_pretrained` and freezing, of every Shapley classifier."""

    # What `AutoModel` makes of a checkpoint: the backbone; None = nothing.
    features_class: type | None = None

    # What the first answer found; None = nobody asked yet.
    _is_untrained: bool | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
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
            model.attribution_head.copy_layers(*model.last_layers(model.attribution_head.own_layers))
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
        if self.features_class is not None:
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
            ValueError: without an influence head, where attributions are what the classifier makes of patches.
        """
        if self.attribution_head.correction is None:
            raise ValueError(
                "A frozen classifier needs an influence head, got none: its attributions are the classifier's own and "
                "could not learn either. Load the checkpoint with `influence_layers` or `influence_own_layers` over 0."
            )
        self.requires_grad_(False)
        self.coalition_adapters.requires_grad_(not adapters)
        self.attribution_head.requires_grad_(True)

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

    def _check_answers(self, outputs: ModelOutput) -> None:
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


class _MismatchedSizes(ValueError, RuntimeError):
    """A ValueError as our refusals are, and a RuntimeError as transformers' own."""


def _check_copies(model: Any, name: str) -> None:
    """Refuse to start own layers as copies where a weight of either is offloaded or quantised, and so not at hand."""
    if all(weight.is_meta for weight in model.parameters()):  # a process that FSDP will send all weights
        return
    layers, norm = model.last_layers(model.attribution_head.own_layers)
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
