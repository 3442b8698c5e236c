"""Which model a training starts from: a checkpoint, with a classifier of the data set's labels, or a small new one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedModel, ViTImageProcessorPil

from ..data.labels import given_names, label_maps
from ..models.configuration_shapley import ShapleyConvNextConfig, ShapleyViTConfig
from ..models.modeling_shapley_convnext import ShapleyConvNextForImageClassification
from ..models.modeling_shapley_vit import ShapleyViTForImageClassification

FAMILIES = {
    "vit": (ShapleyViTConfig, ShapleyViTForImageClassification),
    "convnext": (ShapleyConvNextConfig, ShapleyConvNextForImageClassification),
}

# Options of the attribution head: None leaves what the checkpoint or the recipe says, else the default.
HEAD_OPTIONS = (
    "attribution_head",
    "vote_readout",
    "influence_layers",
    "influence_block",
    "influence_own_layers",
    "influence_gradient",
    "coalition_gradient",
    "coalition_adapter_size",
)


@dataclass
class ModelArguments:
    """Which model to start from."""

    model: str | None = field(
        default=None,
        metadata={"help": "Plain or Shapley checkpoint, ViT or ConvNeXt: folder or Hub id. None = scratch."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint on the Hub."})
    game: str = field(
        default="own",
        metadata={
            "help": "Of a plain checkpoint, what is explained: the classifier's 'own' response to missing patches, or "
            "one that adapters on masked images learn, 'adapted'."
        },
    )
    attribution_head: str | None = field(
        default=None, metadata={"help": "'votes' or 'votes+influence'. None = the checkpoint's, else 'votes'."}
    )
    vote_readout: str | None = field(
        default=None, metadata={"help": "'patches' or 'pooled', which keeps a plain checkpoint's predictions."}
    )
    influence_layers: int | None = field(
        default=None, metadata={"help": "Blocks of the influence head, after its own layers."}
    )
    influence_block: str | None = field(default=None, metadata={"help": "'mlp', 'convolution' or 'backbone'."})
    influence_own_layers: int | None = field(
        default=None, metadata={"help": "Last layers of which the influence head has its own copies."}
    )
    influence_gradient: float | None = field(
        default=None, metadata={"help": "Share of the influence head's gradient that reaches the backbone."}
    )
    coalition_gradient: float | None = field(
        default=None, metadata={"help": "Share of the gradient of v(S) that reaches the classifier's own weights."}
    )
    coalition_adapter_size: int | None = field(
        default=None, metadata={"help": "Width of the adapters that act where patches are absent only; 0 = none."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new classifier where the checkpoint's has other labels."}
    )
    freeze_classifier: bool = field(
        default=False, metadata={"help": "Train influence head and adapters alone: predictions stay what they are."}
    )
    freeze_adapters: bool = field(
        default=False, metadata={"help": "Train the influence head alone: predictions for masked images stay too."}
    )
    backbone: str = field(default="convnext", metadata={"help": "From scratch: 'vit' or 'convnext'."})
    image_size: int = field(
        default=8, metadata={"help": "From scratch: height and width that the model sees, pixels."}
    )
    patch_size: int = field(default=2, metadata={"help": "From scratch: height and width of one player, pixels."})
    hidden_size: int = field(default=64, metadata={"help": "From scratch: width of the tokens."})
    num_layers: int = field(default=2, metadata={"help": "From scratch: number of layers."})

    def __post_init__(self):
        if self.backbone not in FAMILIES:
            raise ValueError(f"`--backbone` must be one of {list(FAMILIES)}, got {self.backbone!r}.")
        for name in ("freeze_classifier", "freeze_adapters"):
            if getattr(self, name) and self.model is None:
                raise ValueError(f"`--{name}` keeps a trained classifier: give its checkpoint with `--model`.")
            if getattr(self, name) and self.ignore_mismatched_sizes:
                raise ValueError(
                    f"`--{name}` keeps a trained classifier, not the new one of `--ignore_mismatched_sizes`."
                )


def model_type_of(model: str, revision: str) -> str:
    """The architecture of a checkpoint, as its configuration names it."""
    return AutoConfig.from_pretrained(model, revision=revision).model_type


def load_model(args: ModelArguments, labels: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The checkpoint and its image processor, or a small model with random weights.

    A checkpoint with the data set's label names, in whatever order, keeps its own order.
    """
    options: dict[str, Any] = {name: value for name in HEAD_OPTIONS if (value := getattr(args, name)) is not None}
    if args.model is None:
        config_class, model_class = FAMILIES[args.backbone]
        size = {"height": args.image_size, "width": args.image_size}
        config = config_class(**_small(args), **options, **label_maps(labels))
        return model_class(config), ViTImageProcessorPil(size=size)
    model_type = model_type_of(args.model, args.revision)
    family = model_type.removeprefix("shapley-")
    if family not in FAMILIES:
        raise ValueError(f"`--model` must be a ViT or ConvNeXt checkpoint, got {args.model!r} of type {model_type!r}.")
    config_class, model_class = FAMILIES[family]
    config = config_class.from_pretrained(args.model, revision=args.revision, **options)
    known = {label: str(name) for label, name in config.id2label.items()}
    if sorted(known.values()) != sorted(labels):
        config = config_class.from_pretrained(args.model, revision=args.revision, **options, **label_maps(labels))
    model, info = model_class.from_pretrained(
        args.model, config=config, revision=args.revision, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _fit_classifier(args, model, info, known)
    if args.freeze_classifier or args.freeze_adapters:
        model.freeze_classifier(adapters=args.freeze_adapters)
    processor = AutoImageProcessor.from_pretrained(args.model, revision=args.revision, trust_remote_code=False)
    return model, processor


def _fit_classifier(args: ModelArguments, model: PreTrainedModel, info: dict[str, Any], known: dict[int, str]) -> None:
    """Refuse a checkpoint's classifier that is for other labels, `known`, or begin it anew if that was asked for."""
    labels, names = model.config.id2label, given_names(known)
    has_none = "classifier.weight" in info["missing_keys"]
    if has_none and (args.freeze_classifier or args.freeze_adapters):
        raise ValueError(f"{args.model!r} has no classifier to keep: train without `--freeze_...` first.")
    is_of_others = bool(names) and not has_none and sorted(names) != sorted(labels.values())
    wrong = sorted(key for key, *_ in info["mismatched_keys"])
    if args.ignore_mismatched_sizes:
        if is_of_others:  # weights of the same size would be those of other labels
            _restart_classifier(model)
    elif is_of_others or "classifier.weight" in wrong:
        raise ValueError(
            f"The classifier of {args.model!r} has {len(known)} labels, {list(known.values())[:10]}, the data set "
            f"{len(labels)}, {list(labels.values())[:10]}: give the data set's classes the checkpoint's names, in any "
            "order, or start with a new classifier by `--ignore_mismatched_sizes`."
        )
    elif wrong:
        raise ValueError(f"{args.model!r} has weights of other sizes than these options make: {wrong[:5]}.")


@torch.no_grad()
def _restart_classifier(model: PreTrainedModel) -> None:
    model.classifier.weight.normal_(std=model.config.initializer_range)
    model.classifier.bias.zero_()


def _small(args: ModelArguments) -> dict:
    """Configuration of a small backbone whose players are single patches."""
    if args.backbone == "convnext":
        shape = {"hidden_sizes": [args.hidden_size], "depths": [args.num_layers], "num_stages": 1}
        return {**shape, "patch_size": args.patch_size, "layer_scale_init_value": 1.0}
    shape = {"hidden_size": args.hidden_size, "intermediate_size": 2 * args.hidden_size}
    layers = {"num_hidden_layers": args.num_layers, "num_attention_heads": 4}
    return {**shape, **layers, "image_size": args.image_size, "patch_size": args.patch_size}
