"""Which model a training starts from: a checkpoint, with a classifier of the data set's labels, or a small new one."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel, ViTImageProcessorPil

from ..backbones import FAMILIES, checkpoint_type, model_class
from ..data.labels import given_names, label_maps
from ..models.configuration_shapley import ShapleyConfigMixin

# Options of the attribution head: None leaves what the checkpoint says, else the recommended head of its backbone.
HEAD_OPTIONS = tuple(option.name for option in fields(ShapleyConfigMixin))


@dataclass
class ModelArguments:
    """Which model to start from."""

    model: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of any image classifier, plain or Shapley: folder or Hub id. None = scratch."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint on the Hub."})
    vote_readout: str | None = field(
        default=None,
        metadata={"help": "'pooled' keeps a plain checkpoint's predictions; with 'patches' each votes by itself."},
    )
    influence_own_layers: int | None = field(
        default=None, metadata={"help": "Last layers of which the influence head has its own copies."}
    )
    influence_layers: int | None = field(
        default=None, metadata={"help": "Blocks of the influence head, after its own layers."}
    )
    influence_block: str | None = field(default=None, metadata={"help": "'mlp', 'convolution' or 'backbone'."})
    attribution_gradient: bool | None = field(
        default=None,
        metadata={"help": "Let learning to be explained teach the classifier: from scratch."},
    )
    coalition_adapter_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of adapters that act where patches are absent only: another game than the classifier's own "
            "is explained, and with `--freeze_classifier` they learn it. 0 = none."
        },
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
    backbone: str = field(default="convnext", metadata={"help": f"From scratch: {', '.join(FAMILIES)}."})
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


def load_model(args: ModelArguments, labels: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The checkpoint and its image processor, or a small model with random weights.

    A checkpoint with the data set's label names, in whatever order, keeps its own order.
    """
    options: dict[str, Any] = {name: value for name in HEAD_OPTIONS if (value := getattr(args, name)) is not None}
    if args.model is None:
        family = FAMILIES[args.backbone]
        small = family.small(args.hidden_size, args.num_layers, args.image_size, args.patch_size)
        size = {"height": args.image_size, "width": args.image_size}
        config = family.config(**small, **options, **label_maps(labels))
        return family.model(config), ViTImageProcessorPil(size=size)
    ours = model_class(checkpoint_type(args.model, {"revision": args.revision}), f"`--model` {args.model!r}")
    config = ours.config_class.from_pretrained(args.model, revision=args.revision, **options)
    known = {label: str(name) for label, name in config.id2label.items()}
    if sorted(known.values()) != sorted(labels):
        config = ours.config_class.from_pretrained(args.model, revision=args.revision, **options, **label_maps(labels))
    model, info = ours.from_pretrained(
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
    weights = {f"{layer}.weight" for layer in model.classifier_names}
    has_none = bool(weights & set(info["missing_keys"]))
    if has_none and (args.freeze_classifier or args.freeze_adapters):
        raise ValueError(f"{args.model!r} has no classifier to keep: train without `--freeze_...` first.")
    is_of_others = bool(names) and not has_none and sorted(names) != sorted(labels.values())
    wrong = sorted(key for key, *_ in info["mismatched_keys"])
    if args.ignore_mismatched_sizes:
        if is_of_others:  # weights of the same size would be those of other labels
            _restart_classifier(model)
    elif is_of_others or weights & set(wrong):
        raise ValueError(
            f"The classifier of {args.model!r} has {len(known)} labels, {list(known.values())[:10]}, the data set "
            f"{len(labels)}, {list(labels.values())[:10]}: give the data set's classes the checkpoint's names, in any "
            "order, or start with a new classifier by `--ignore_mismatched_sizes`."
        )
    elif wrong:
        raise ValueError(f"{args.model!r} has weights of other sizes than these options make: {wrong[:5]}.")


@torch.no_grad()
def _restart_classifier(model: PreTrainedModel) -> None:
    for layer in model.classifiers():
        layer.weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
        if layer.bias is not None:
            layer.bias.zero_()
