"""Configurations of the Shapley classifiers: the stock ViT and ConvNeXt ones plus the attribution head's options."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import ConvNextConfig, PreTrainedConfig, ViTConfig
from transformers.activations import ACT2FN
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .checks import check_count, check_number, describe
from .stored_checkpoint import stored_bytes, stored_config

INFLUENCE_BLOCKS = ("mlp", "convolution", "backbone")
VOTE_READOUTS = ("pooled", "patches")
# Of a config.json: an option's sizes; and how many weights each option calls for, numbers and widths of the layers,
# ending with the last, and the weights of that one.
Sizes = Callable[[str], list[int]]
Fewest = tuple[dict[str, int], list[tuple[int, int]], int]
FORMER_OPTIONS = ("attribution_head", "vote_layers", "vote_gradient", "influence_gradient", "coalition_gradient")
SIZES = (
    "hidden_size",
    "hidden_sizes",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_stages",
    "depths",
    "num_channels",
    "patch_size",
    "image_size",
)
MOST_UNNAMED_LABELS = 1_000_000
"""Each would get a name of its own, in memory."""
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    Config = object  # the options join those of the stock configuration that a class inherits from besides


@dataclass(repr=False)
class ShapleyConfigMixin(Config):
    """Options shared by all backbones.

    Args:
        vote_readout: "pooled" (the classifier reads what the stock model reads, such as ViT's CLS or ConvNeXt's mean
            over cells, so that a plain checkpoint keeps its predictions; needs an influence head, which tells the
            patches apart) or "patches" (it reads every patch's token, and attributions start as the patches' votes).
        influence_own_layers: how many of the backbone's last layers the influence head has its own copies of: it reads
            the tokens from before those layers, and from a plain checkpoint starts with what they have learned.
            ConvNeXt: of the last stage's. One costs a ViT little, whose last layer then has CLS alone to compute. None
            = the backbone's recommended head: ViT 1, ConvNeXt 0.
        influence_layers: blocks of the influence head, after its own layers. None: ViT 0, ConvNeXt 5. Without blocks
            and own layers there is no influence head: with `vote_readout="patches"` attributions are patches' votes.
        influence_block: "mlp" (each token by itself), "convolution" (narrow ConvNeXt layers, which mix tokens at
            little cost) or "backbone" (layers of its kind). None: ViT "mlp", ConvNeXt "convolution".
        attribution_gradient: whether learning to be explained teaches the classifier what its patches say: the
            gradient of the attributions reaches its tokens and weights. For training from scratch; a checkpoint pays
            for it with accuracy. Without an influence head it always does.
        coalition_adapter_size: width of adapters after every layer that act where players are absent and not at
            all on the full image: what is explained is then the game of the classifier with them. 0 = none.
    """

    vote_readout: str = "pooled"
    influence_own_layers: int | None = None
    influence_layers: int | None = None
    influence_block: str | None = None
    attribution_gradient: bool = False
    coalition_adapter_size: int = 0

    # What None stands for.
    recommended_head: ClassVar[dict[str, Any]] = {}

    # Trainer's evaluation would otherwise gather every attribution of the data set (images x players x labels).
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "attributions",
        "attributed_labels",
        "base_values",
        "coalition_votes",
        "coalition_gains",
        "coalition_attributions",
        "readout_errors",
        "maps",
        "hidden_states",
        "attentions",
    ]
    plain_model_type: ClassVar[str]

    def __post_init__(self, **kwargs: Any) -> None:
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # The library registers its own pipeline: a repository's copy of it, and trust in that, is not needed.
            kwargs.pop("custom_pipelines", None)
        kwargs = self._of_former_options(kwargs)
        for name, value in self.recommended_head.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_backbone()
        self._check_maps()
        if not self.id2label and kwargs.get("num_labels") is not None:
            check_count(kwargs["num_labels"], "num_labels")
            if kwargs["num_labels"] > MOST_UNNAMED_LABELS:
                raise ValueError(
                    f"`num_labels` must be at most {MOST_UNNAMED_LABELS} without names, got {kwargs['num_labels']}: "
                    "give `id2label`."
                )
        super().__post_init__(**kwargs)
        self._check_labels()
        self.check_head()

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:
            raise TypeError(f"`{name}` must be of another type than {describe(value)}: {error}") from error

    def _check_backbone(self) -> None:
        """Refuse sizes and rates from which no model can be built."""
        for name in SIZES:
            value = getattr(self, name, None)
            sizes = value if isinstance(value, list | tuple) else [value]
            for size in [] if value is None else sizes:
                check_count(size, name)
            wanted = {"patch_size": 2, "image_size": 2}
            length = wanted.get(name) or getattr(self, "num_stages", None)
            if isinstance(value, list | tuple) and length is not None and len(value) != length:
                stages = "" if name in wanted else ", one per stage (`num_stages`)"
                raise ValueError(f"`{name}` must have {length} entries{stages}, got {list(value)}.")
        heads = getattr(self, "num_attention_heads", 1)
        if isinstance(heads, int) and getattr(self, "hidden_size", 0) % heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads` = {self.num_attention_heads}, "
                f"got {self.hidden_size}."
            )
        for name in RATES:
            check_number(getattr(self, name, 0), name, "between 0 and 1", lambda rate: 0 <= rate <= 1)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")

    def _check_maps(self) -> None:
        """Refuse label maps that are no maps, before transformers reads them."""
        for name in ("id2label", "label2id"):
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"`{name}` must be a dict, got {describe(getattr(self, name))}.")
        names = self.id2label or {}
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise ValueError(f"`id2label` must have the keys 0 to {len(names) - 1}, got {list(names)[:20]}.")

    def _check_labels(self) -> None:
        """One name per label; with a reverse map that does not contradict it."""
        if not self.id2label:
            raise ValueError("`id2label` must name at least one label, got none: set `num_labels` or `id2label`.")
        # Whoever names the labels by `id2label` alone leaves transformers' own names in the reverse map.
        given: Any = self
        unnamed = {f"LABEL_{index}": index for index in range(len(given.label2id or {}))}
        if not given.label2id or given.label2id == unnamed:
            given.label2id = {label: index for index, label in self.id2label.items()}
        for label, index in given.label2id.items():
            if not str(index).isdecimal() or self.id2label.get(int(index)) != label:
                raise ValueError(
                    f"`label2id` says {label!r} is {index!r}, `id2label` says {self.id2label.get(index)!r}: give "
                    "`id2label` alone."
                )
        given.label2id = {label: int(index) for label, index in given.label2id.items()}

    def _of_former_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take options of a head as version 0.1.0 stored them; return the others."""
        former = {name: kwargs.pop(name) for name in list(kwargs) if name in FORMER_OPTIONS}
        if former.get("vote_layers"):
            raise ValueError("`vote_layers` is no option any more: load this checkpoint with version 0.1.0.")
        if former.get("attribution_head") == "votes":
            self.influence_layers = self.influence_own_layers = 0
            self.vote_readout = "patches"
        if former.get("attribution_head") == "votes+influence":
            self.attribution_gradient = bool(former.get("vote_gradient"))
            self.influence_own_layers = self.influence_own_layers or 0
        return kwargs

    def _last_layers(self) -> int:
        """How many layers there are for the influence head to copy."""
        raise NotImplementedError

    @classmethod
    def _fewest_of_backbone(cls, sizes: Sizes) -> Fewest:
        """As `_fewest_weights`, of the backbone alone."""
        raise NotImplementedError

    @property
    def has_influence_head(self) -> bool:
        """Whether a head corrects what patches vote."""
        return bool(self.influence_own_layers or self.influence_layers)

    def check_head(self) -> None:
        """Refuse unknown options of the attribution head; models ask again, as options can be set after creation."""
        for name, choices in (("influence_block", INFLUENCE_BLOCKS), ("vote_readout", VOTE_READOUTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        got: Any = self.attribution_gradient
        if not isinstance(got, bool):
            raise TypeError(f"`attribution_gradient` must be True or False, got {describe(got)}.")
        for name in ("influence_own_layers", "influence_layers", "coalition_adapter_size"):
            check_count(getattr(self, name), name, 0)
        if self.vote_readout == "pooled" and not self.has_influence_head:
            raise ValueError(
                '`vote_readout="pooled"` gives all patches the same vote: set `influence_layers` or '
                "`influence_own_layers` above 0."
            )
        if (self.influence_own_layers or 0) > self._last_layers():
            raise ValueError(
                f"`influence_own_layers` must be at most {self._last_layers()}, the layers there are to copy, "
                f"got {self.influence_own_layers}."
            )

    @classmethod
    def check_stored_sizes(cls, name: str | os.PathLike, **options: Any) -> None:
        """Refuse a checkpoint whose config.json calls for more weights than its files can hold.

        To be asked before a model is built: a size takes a line of config.json, and what it calls for all of the
        memory. A file of so many bytes holds at most 8 weights in each.

        Args:
            name: folder or Hub id.
            **options: what `from_pretrained` was given besides.

        Raises:
            OSError: the checkpoint is not to be believed.
        """
        stored = stored_config(name, options)
        is_ours = stored.get("model_type") in (cls.model_type, cls.plain_model_type)  # others will be refused anyway
        length = stored_bytes(name, options) if is_ours else None
        if length is None:
            return
        needed = cls._fewest_weights(stored)
        if sum(needed.values()) > 8 * length:
            option = max(needed, key=lambda option: needed[option])
            raise OSError(
                f"The weights of {str(name)!r} are damaged (its config.json calls for at least "
                f"{sum(needed.values())}, most of them by `{option}` = {describe(stored.get(option))}, and the files "
                f"of {length} bytes cannot hold so many): download or save them again."
            )

    @classmethod
    def _fewest_weights(cls, stored: Mapping[str, Any]) -> dict[str, int]:
        """How many weights the sizes in a config.json call for, at least, each under the option that says so."""

        def sizes(option: str) -> list[int]:
            """One size or several; what is none, and will be refused later, counts as 0."""
            value = stored.get(option, getattr(cls, option, None))
            values = value if isinstance(value, list | tuple) and value else [value]
            return [size if isinstance(size, int) and size > 0 else 0 for size in values]

        needed, widths, layer = cls._fewest_of_backbone(sizes)
        hidden = widths[-1][1]
        needed["num_labels"] = hidden * max(sizes("num_labels")[0], len(stored.get("id2label") or ()))
        needed["coalition_adapter_size"] = sizes("coalition_adapter_size")[0] * sum(
            2 * n * width for n, width in widths
        )
        block = {"mlp": 8 * hidden**2, "convolution": 49 * hidden, "backbone": layer}
        if stored.get("attribution_head") != "votes":  # which version 0.1.0 stored beside layers that there were not
            needed["influence_layers"] = sizes("influence_layers")[0] * block.get(
                str(stored.get("influence_block")), 0
            )
            needed["influence_own_layers"] = sizes("influence_own_layers")[0] * layer
        return needed

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a config, taking plain checkpoints of the same backbone as our own and refusing other architectures."""
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            found = config_dict.get("model_type")
        except (AttributeError, TypeError) as error:  # transformers takes any JSON for an object
            raise OSError(
                f"The config.json of {str(pretrained_model_name_or_path)!r} is not a configuration ({error}): "
                "download or save the checkpoint again."
            ) from error
        if found is not None:
            cls._check_type(found, repr(str(pretrained_model_name_or_path)))
            if found != cls.model_type:
                config_dict = cls._of_plain(config_dict)
        return config_dict, kwargs

    @classmethod
    def _of_plain(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A plain configuration's entries as ours."""
        return {**entries, "model_type": cls.model_type}

    @classmethod
    def from_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """As the stock one, which sets what is given beside the entries after they were checked."""
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._check_labels()
        return made

    @classmethod
    def of(cls, config: PreTrainedConfig, **options: Any) -> PreTrainedConfig:
        """A configuration of ours as it is, or a plain one of the same backbone as ours; with options, a copy.

        Args:
            config: what a model is made from; what is no configuration at all is left to transformers to refuse.
            **options: fields to set.

        Raises:
            ValueError: a configuration of another architecture.
        """
        # Asked of the class, as a repository's copy of ours has our type, and an instance may have its checkpoint's.
        found = getattr(type(config), "model_type", cls.model_type)
        if found != cls.model_type:
            cls._check_type(found, "the configuration given")
            entries = {**cls._of_plain(config.to_dict()), **options}
            return cls(**entries, attn_implementation=config._attn_implementation)
        if options:
            config = copy.deepcopy(config)
            for name, value in options.items():
                setattr(config, name, value)
        return config

    @classmethod
    def _check_type(cls, found: str, what: str) -> None:
        """Refuse another architecture than ours and the plain one."""
        if found not in (cls.model_type, cls.plain_model_type):
            raise ValueError(
                f"{cls.__name__} reads checkpoints of type {cls.plain_model_type!r} or {cls.model_type!r}, but "
                f"{what} is of type {found!r}: use a checkpoint of that backbone."
            )


class TokenConfigMixin(ShapleyConfigMixin):
    """`ShapleyConfigMixin` for backbones of tokens."""

    recommended_head = {"influence_own_layers": 1, "influence_layers": 0, "influence_block": "mlp"}

    def _last_layers(self) -> int:
        return self.num_hidden_layers

    @classmethod
    def _fewest_of_backbone(cls, sizes: Sizes) -> Fewest:
        layers, hidden = sizes("num_hidden_layers")[0], sizes("hidden_size")[0]
        image, patch = sizes("image_size"), sizes("patch_size")
        layer = 4 * hidden**2 + 2 * hidden * sizes("intermediate_size")[0]
        needed = {
            "num_hidden_layers": layers * layer,
            "image_size": (image[0] // max(1, patch[0])) * (image[-1] // max(1, patch[-1])) * hidden,
            "patch_size": sizes("num_channels")[0] * patch[0] * patch[-1] * hidden,
        }
        return needed, [(layers, hidden)], layer


class CellConfigMixin(ShapleyConfigMixin):
    """`ShapleyConfigMixin` for backbones of ConvNeXt's shape."""

    recommended_head = {"influence_own_layers": 0, "influence_layers": 5, "influence_block": "convolution"}

    def _last_layers(self) -> int:
        return self.depths[-1]

    @classmethod
    def _fewest_of_backbone(cls, sizes: Sizes) -> Fewest:
        hidden, patch = sizes("hidden_sizes"), sizes("patch_size")
        widths = list(zip(sizes("depths"), hidden, strict=False))
        needed = {
            "depths": sum(depth * 8 * width**2 for depth, width in widths),
            "patch_size": sizes("num_channels")[0] * patch[0] * patch[-1] * hidden[0],
        }
        return needed, widths, 8 * widths[-1][1] ** 2


class ShapleyViTConfig(TokenConfigMixin, ViTConfig):
    """Configuration of `ShapleyViTForImageClassification`: `ViTConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-vit"
    plain_model_type = "vit"


class ShapleyConvNextConfig(CellConfigMixin, ConvNextConfig):
    """Configuration of `ShapleyConvNextForImageClassification`: `ConvNextConfig` plus `ShapleyConfigMixin`."""

    model_type = "shapley-convnext"
    plain_model_type = "convnext"


ShapleyViTConfig.register_for_auto_class()
ShapleyConvNextConfig.register_for_auto_class()
