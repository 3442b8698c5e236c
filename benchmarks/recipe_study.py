"""Which joint recipe keeps accuracy and finds Shapley values: one change at a time, on CIFAR-10.

A plain classifier is trained first (the usual case), then fine-tuned with each recipe for the same number of epochs,
one of them "plain" as the control. Measured on the test split: accuracy, attribution error and correlation with their
certificate, interaction share, insertion and deletion. Each run keeps its model and writes its own result file as soon
as it ends, and a run whose file is there is not repeated.

    python benchmarks/recipe_study.py --data path/to/cifar10 --backbone vit --recipes "plain;pooled, values 0.1"

The data is any folder that `datasets.load_dataset` reads, with columns `image` (32 x 32) and `label`.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import write_result
from datasets import load_dataset
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_shapley import (
    ShapleyConvNextForImageClassification,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    ShapleyViTForImageClassification,
    fine_tuning_recipe,
    refinement_recipe,
)
from hf_shapley.faithfulness.certificate import attribution_error_certificate
from hf_shapley.faithfulness.correlations import interaction_share
from hf_shapley.faithfulness.curves import insertion_deletion

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

# Patches of 4 x 4 pixels: 64 players.
PLAIN = {
    "vit": (
        ViTForImageClassification,
        ViTConfig,
        dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192),
    ),
    "convnext": (
        ConvNextForImageClassification,
        ConvNextConfig,
        dict(hidden_sizes=[96], depths=[4], num_stages=1, layer_scale_init_value=1.0),
    ),
}
# On CPUs the backward pass of torch's fused attention is slow in bfloat16: 65 tokens do not need it.
ATTENTION = {"attn_implementation": "eager"}
SHAPLEY = {"vit": ShapleyViTForImageClassification, "convnext": ShapleyConvNextForImageClassification}


@dataclass
class Recipe:
    """Arguments of the trainer and options of the configuration; everything else is shared.

    After the shared epochs the attribution head may learn on alone for `head_epochs`: everything else is frozen, the
    classifier and its accuracy stay as they are, and a step costs little, because nothing but the head has a gradient.
    With `frozen` the classifier is so from the beginning, and coalition adapters, where there are any, learn with the
    head until it learns alone: at once where there are no `shared_epochs`. `start` is the checkpoint that a recipe
    starts from: "plain/model" is what the control, run before, ended with. Without `augmented` images are shown as
    they are in the test.
    """

    training: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    head_epochs: float = 0.0
    frozen: bool = False
    shared_epochs: bool = True
    augmented: bool = True
    start: str = "start"


def _influence(**options) -> dict:
    return {"attribution_head": "votes+influence", "influence_block": "backbone", **options}


def _without_rate(options: dict) -> dict:
    """A recipe's options, the learning rate aside, which all runs share."""
    return {name: value for name, value in options.items() if name != "learning_rate"}


def _pooled(**options) -> dict:
    return _influence(influence_block="mlp", vote_readout="pooled", influence_gradient=0.1, **options)


BASE = dict(coalition_weight=0.3, shapley_weight=1.0, shapley_warmup=0.5)
POOLED = BASE | dict(shapley_warmup=0.3, even_weight=0.1, value_gradient=0.1, attribution_learning_rate=4e-3)
FOUR_PAIRS = POOLED | dict(num_pairs=4, value_gradient_fraction=0.125, attribution_learning_rate=8e-3)
OWN_LAYER = FOUR_PAIRS | dict(attribution_learning_rate=4e-3)
FINE_TUNING = POOLED | dict(value_gradient_fraction=0.25, shapley_fraction=0.75)
OWN_LAYER_ALONE = dict(influence_own_layers=1, influence_layers=0)
ADAPTERS = BASE | dict(
    shapley_warmup=0.3,
    even_weight=0.0,
    value_gradient=0.03,
    value_gradient_fraction=0.25,
    attribution_learning_rate=4e-3,
)
# The labels alone teach the classifier.
APART = dict(coalition_adapter_size=64, influence_gradient=0.0, coalition_gradient=0.0)
HEAD_ALONE = dict(coalition_weight=0.0, shapley_warmup=0.0, value_gradient=0.0)
RECIPES = {
    "plain": None,
    "votes": Recipe(BASE),
    "votes, weight 1/4": Recipe(BASE | dict(shapley_weight=0.25)),
    "votes, no warm-up": Recipe(BASE | dict(shapley_warmup=0.0)),
    "votes, odd part": Recipe(BASE | dict(even_weight=0.0)),
    "votes, detached values": Recipe(BASE | dict(value_gradient=0.0)),
    "votes, two layers": Recipe(BASE, dict(vote_layers=2)),
    "votes, label target": Recipe(BASE | dict(coalition_target="label")),
    "votes, two pairs": Recipe(BASE | dict(num_pairs=2)),
    "votes, half of the batch": Recipe(BASE | dict(shapley_fraction=0.5)),
    "influence, detached": Recipe(BASE | dict(value_gradient=0.0), _influence()),
    "influence, mlp, detached": Recipe(BASE | dict(value_gradient=0.0), _influence(influence_block="mlp")),
    "influence, detached, tokens too": Recipe(BASE | dict(value_gradient=0.0), _influence(influence_gradient=0.0)),
    "influence, values 0.1": Recipe(BASE | dict(value_gradient=0.1), _influence()),
    "influence, values 0.3": Recipe(BASE | dict(value_gradient=0.3), _influence()),
    "influence, values 0.3, odd part": Recipe(BASE | dict(value_gradient=0.3, even_weight=0.0), _influence()),
    "influence, votes 0.3, values 0.3": Recipe(BASE | dict(value_gradient=0.3), _influence(vote_gradient=0.3)),
    "influence, votes 1, values 1": Recipe(BASE, _influence(influence_block="mlp", vote_gradient=1.0)),
    "pooled, values 0.1": Recipe(POOLED, _pooled()),
    "pooled, values 0": Recipe(POOLED | dict(value_gradient=0.0), _pooled()),
    "pooled, values 0.3": Recipe(POOLED | dict(value_gradient=0.3), _pooled()),
    "pooled, half of the batch": Recipe(POOLED | dict(shapley_fraction=0.5), _pooled()),
    "pooled, values 0.1 of a quarter": Recipe(POOLED | dict(value_gradient_fraction=0.25), _pooled()),
    "pooled, values 0.1 of an eighth": Recipe(POOLED | dict(value_gradient_fraction=0.125), _pooled()),
    "pooled, four pairs, values 0.1 of an eighth": Recipe(FOUR_PAIRS, _pooled()),
    "pooled, four pairs, then the head alone": Recipe(FOUR_PAIRS, _pooled(), head_epochs=3),
    "pooled, own layer alone, values 0.1 of a quarter": Recipe(
        POOLED | dict(value_gradient_fraction=0.25), _pooled(**OWN_LAYER_ALONE)
    ),
    "pooled, own layer alone, values 0.1 of an eighth": Recipe(
        POOLED | dict(value_gradient_fraction=0.125), _pooled(**OWN_LAYER_ALONE)
    ),
    "pooled, own layer, four pairs, then the head alone": Recipe(
        OWN_LAYER, _pooled(influence_own_layers=1), head_epochs=4
    ),
    "pooled, own layer, two pairs, values 1, then the head alone": Recipe(
        OWN_LAYER | dict(num_pairs=2, value_gradient=1.0, value_gradient_fraction=0.25),
        _pooled(influence_own_layers=1),
        head_epochs=2,
    ),
    "frozen classifier, four pairs": Recipe(OWN_LAYER | HEAD_ALONE, _pooled(influence_own_layers=1), frozen=True),
    "plain, then the head alone, four pairs": Recipe(
        OWN_LAYER | HEAD_ALONE, _pooled(influence_own_layers=1), frozen=True, start="plain/model"
    ),
    **{
        f"plain, then frozen with adapters{change}": Recipe(
            ADAPTERS | training,
            _pooled(**OWN_LAYER_ALONE, coalition_adapter_size=64),
            frozen=True,
            start="plain/model",
        )
        for change, training in {
            "": {},
            ", values 0": dict(value_gradient=0.0),
            ", values 0.1": dict(value_gradient=0.1),
            ", spread sizes": dict(coalition_sizes="spread"),
        }.items()
    },
    "plain, then frozen with adapters, four pairs, then the head alone": Recipe(
        ADAPTERS | dict(num_pairs=4, value_gradient_fraction=0.125),
        _pooled(influence_own_layers=1, coalition_adapter_size=64),
        head_epochs=4,
        frozen=True,
        start="plain/model",
    ),
    **{
        f"plain, then frozen with adapters, {change}four pairs, four own layers, then the head alone{longer}": Recipe(
            ADAPTERS | dict(num_pairs=4, value_gradient_fraction=0.125) | training,
            _pooled(influence_own_layers=4, coalition_adapter_size=64),
            head_epochs=head_epochs,
            frozen=True,
            start="plain/model",
        )
        for change, training, longer, head_epochs in (
            ("", {}, ", longer", 12),
            ("", {}, " for 32 epochs", 32),
            ("values 0.1, ", dict(value_gradient=0.1), " for 32 epochs", 32),
        )
    },
    # The second of the three above goes on, and then the first of these two.
    **{
        f"plain, then frozen with adapters, four own layers, sixteen spread pairs for the last {name} epochs": Recipe(
            ADAPTERS | dict(num_pairs=16, coalition_sizes="spread", attribution_learning_rate=rate),
            _pooled(influence_own_layers=4, coalition_adapter_size=64),
            head_epochs=epochs,
            frozen=True,
            shared_epochs=False,
            start=f"plain-then_frozen_with_adapters-{start}_epochs/model",
        )
        for name, epochs, rate, start in (
            ("16 of 48", 16, 2e-3, "four_pairs-four_own_layers-then_the_head_alone_for_32"),
            ("20 of 52", 4, 1e-3, "four_own_layers-sixteen_spread_pairs_for_the_last_16_of_48"),
        )
    },
    # The same in fewer epochs: sixteen pairs as soon as the head learns alone.
    "plain, then frozen with adapters, four own layers, four spread pairs": Recipe(
        ADAPTERS | dict(num_pairs=4, value_gradient_fraction=0.125, coalition_sizes="spread"),
        _pooled(influence_own_layers=4, coalition_adapter_size=64),
        frozen=True,
        start="plain/model",
    ),
    **{
        f"plain, then frozen with adapters, four own layers, four spread pairs, then {more}": Recipe(
            ADAPTERS | dict(num_pairs=pairs, coalition_sizes="spread", attribution_learning_rate=rate),
            _pooled(influence_own_layers=4, coalition_adapter_size=64),
            head_epochs=epochs,
            frozen=True,
            shared_epochs=False,
            augmented=augmented,
            start=f"plain-then_frozen_with_adapters-four_own_layers-four_spread_pairs{start}/model",
        )
        for more, pairs, epochs, rate, augmented, start in (
            ("sixteen for 24 epochs", 16, 24, 4e-3, True, ""),
            ("sixty-four for 10 epochs", 64, 10, 4e-3, True, ""),
            # The one above goes on: with many steps again, where it has many pairs, or with images as in the test.
            ("sixty-four for 10 epochs, four for 20", 4, 20, 2e-3, True, "-then_sixty-four_for_10_epochs"),
            (
                "sixty-four for 10 epochs, sixteen without augmentation for 6",
                16,
                6,
                1e-3,
                False,
                "-then_sixty-four_for_10_epochs",
            ),
        )
    },
    "influence, four pairs, detached": Recipe(BASE | dict(value_gradient=0.0, num_pairs=4), _influence()),
    # What the library recommends, by its own functions: the classifier's own game.
    **{
        f"own game{kind}{change}": recipe
        for backbone, kind in (("vit", ""), ("convnext", ", convolutions"))
        for change, recipe in {
            "": Recipe(_without_rate(fine_tuning_recipe(5e-4, backbone)[1]), fine_tuning_recipe(5e-4, backbone)[0]),
            ", then the head alone": Recipe(
                _without_rate(refinement_recipe(5e-4)),
                head_epochs=8,
                frozen=True,
                shared_epochs=False,
                augmented=False,
                start=f"own_game{kind.replace(', ', '-')}/model",
            ),
            ", frozen": Recipe(
                _without_rate(refinement_recipe(5e-4)),
                fine_tuning_recipe(5e-4, backbone)[0],
                head_epochs=8,
                frozen=True,
                shared_epochs=False,
                start="plain/model",
            ),
        }.items()
    },
    # `fine_tuning_recipe(game="adapted")` recommends "with adapters, spread sizes" for a ViT; the others differ from
    # the first one in one thing each.
    **{
        f"with adapters{change}": Recipe(ADAPTERS | training, _pooled(**OWN_LAYER_ALONE) | APART)
        for change, training in {
            "": {},
            ", an eighth learns through v(S)": dict(value_gradient_fraction=0.125),
            ", whole gradient": dict(value_gradient_fraction=1.0),
            ", spread sizes": dict(coalition_sizes="spread"),
        }.items()
    },
    **{
        f"with adapters, convolutions{change}": Recipe(  # with spread sizes what it recommends for a ConvNeXt
            ADAPTERS | training, _pooled(influence_layers=5) | dict(influence_block="convolution") | APART
        )
        for change, training in {"": {}, ", spread sizes": dict(coalition_sizes="spread")}.items()
    },
    # What the recommended recipes end with goes on, the head alone.
    **{
        f"{start}, then the head alone, {more}": Recipe(
            ADAPTERS | dict(num_pairs=pairs, coalition_sizes="spread"),
            head_epochs=epochs,
            frozen=True,
            shared_epochs=False,
            augmented=augmented,
            start=f"{start.replace(', ', '-').replace(' ', '_')}/model",
        )
        for start in ("with adapters, spread sizes", "with adapters, convolutions, spread sizes")
        for more, pairs, epochs, augmented in (
            ("four pairs", 4, 4, True),  # `refinement_recipe`
            ("four pairs, 8 epochs", 4, 8, True),
            ("four pairs, 8 epochs without augmentation", 4, 8, False),
            ("sixteen pairs", 16, 4, True),
        )
    },
    "with adapters, four pairs, then the head alone": Recipe(
        ADAPTERS | dict(num_pairs=4, value_gradient_fraction=0.125),
        _pooled(influence_own_layers=1) | APART,
        head_epochs=4,
    ),
    "fine-tuning": Recipe(FINE_TUNING, _pooled(**OWN_LAYER_ALONE)),
    # What follows differs from "fine-tuning" in one thing each.
    **{
        f"fine-tuning, {change}": Recipe(FINE_TUNING | training, _pooled(**OWN_LAYER_ALONE))
        for change, training in {
            "values 0": dict(value_gradient=0.0),
            "values 0.3": dict(value_gradient=0.3),
            "values 1": dict(value_gradient=1.0),
            "weight 1/4": dict(shapley_weight=0.25),
            "weight 4": dict(shapley_weight=4.0),
            "no warm-up": dict(shapley_warmup=0.0),
            "coalition weight 0.1": dict(coalition_weight=0.1),
            "coalition weight 1": dict(coalition_weight=1.0),
            "label target": dict(coalition_target="label"),
            "even part 0": dict(even_weight=0.0),
            "even part 1": dict(even_weight=1.0),
            "two pairs": dict(num_pairs=2),
            "four pairs": dict(num_pairs=4),
            "whole batch": dict(shapley_fraction=1.0),
            "whole batch and gradient": dict(shapley_fraction=1.0, value_gradient_fraction=1.0),
            "a third learns through v(S)": dict(value_gradient_fraction=1 / 3),
            "every second step": dict(shapley_every=2),
            "head at the shared rate": dict(attribution_learning_rate=None),
        }.items()
    },
    "fine-tuning, everything flows": Recipe(
        FINE_TUNING | dict(shapley_fraction=1.0, value_gradient_fraction=1.0, value_gradient=1.0, even_weight=1.0),
        _pooled(**OWN_LAYER_ALONE) | dict(influence_gradient=1.0),
    ),
    "fine-tuning, patches vote": Recipe(FINE_TUNING, _influence(influence_gradient=0.1, **OWN_LAYER_ALONE)),
    "fine-tuning, influence gradient 0.3": Recipe(
        FINE_TUNING, _pooled(**OWN_LAYER_ALONE) | dict(influence_gradient=0.3)
    ),
    "fine-tuning, influence gradient 1": Recipe(
        FINE_TUNING, _pooled(**OWN_LAYER_ALONE) | dict(influence_gradient=1.0)
    ),
    "fine-tuning, influence gradient 1, values 0": Recipe(
        FINE_TUNING | dict(value_gradient=0.0), _pooled(**OWN_LAYER_ALONE) | dict(influence_gradient=1.0)
    ),
    "fine-tuning, influence gradient 0": Recipe(
        FINE_TUNING, _pooled(**OWN_LAYER_ALONE) | dict(influence_gradient=0.0)
    ),
    "fine-tuning, no own layer": Recipe(FINE_TUNING, _pooled()),
    "fine-tuning, two own layers": Recipe(FINE_TUNING, _pooled(influence_own_layers=2, influence_layers=0)),
    "fine-tuning, own layer and two blocks": Recipe(FINE_TUNING, _pooled(influence_own_layers=1)),
}


class Images(torch.utils.data.Dataset):
    """Images kept as bytes in memory; a batch is normalised, and augmented (shift up to 4 pixels, flip), at once."""

    def __init__(self, split, count: int | None):
        split = split if count is None else split.select(range(min(count, len(split))))
        self.pixels = torch.stack([_to_bytes(image) for image in split["image"]])
        self.labels = torch.tensor(split["label"])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": normalise(self.pixels[indices]), "labels": self.labels[indices]}

    def augment(self, indices: list[int]) -> dict[str, Tensor]:
        pixels = torch.nn.functional.pad(self.pixels[indices], (4, 4, 4, 4))
        rows, columns = (torch.randint(0, 9, (len(indices), 1)) + torch.arange(32) for _ in range(2))
        batch = torch.arange(len(indices)).view(-1, 1, 1)
        pixels = pixels[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        flipped = torch.rand(len(indices)) < 0.5
        pixels[flipped] = pixels[flipped].flip(-1)
        return {"pixel_values": normalise(pixels), "labels": self.labels[indices]}


def _to_bytes(image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) to floats of zero mean and unit variance."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


class Averaging(TrainerCallback):
    """Exponential moving average of the weights, taken over by the model when training ends."""

    def __init__(self, decay: float):
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, tensor in model.state_dict().items():
            shadow = self.shadow.setdefault(name, tensor.detach().clone())
            shadow.lerp_(tensor, 1 - decay)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.shadow)


def arguments(cls, options, folder: Path, rate: float, **extra) -> TrainingArguments:
    """Training arguments that all runs share, plain and joint."""
    return cls(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        learning_rate=rate,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **extra,
    )


def train(
    model: PreTrainedModel, images: Images, folder: Path, options, recipe: Recipe | None, epochs: float, rate: float
):
    """Train, resuming from the last checkpoint in `folder` where there is one."""
    saving = dict(
        num_train_epochs=epochs, save_strategy="epoch", save_total_limit=1, disable_tqdm=not options.progress
    )
    if recipe is None:
        make_trainer, args = Trainer, arguments(TrainingArguments, options, folder, rate, **saving)
    else:
        make_trainer = ShapleyTrainer
        args = arguments(ShapleyTrainingArguments, options, folder, rate, **saving, **recipe.training)
    callbacks = [Averaging(options.average)] if options.average else None
    collate = images.augment if recipe is None or recipe.augmented else images.collate
    trainer = make_trainer(model, args, train_dataset=images, data_collator=collate, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return model.eval(), trainer.state.log_history[-1]["train_runtime"]


@torch.no_grad()
def measure(model: PreTrainedModel, test: Images, options) -> dict:
    """Accuracy on the whole test split; faithfulness on its first images."""
    device = model.device
    pixels = normalise(test.pixels)
    logits = torch.cat([model(batch.to(device)).logits.float().cpu() for batch in pixels.split(500)])
    results = {"accuracy": (logits.argmax(-1) == test.labels).double().mean().item(), "test_images": len(test)}
    if not hasattr(model, "coalition_values"):
        return results
    chosen = pixels[: options.images].to(device)
    attributions = torch.cat([model(batch).attributions for batch in chosen.split(100)])
    generator = torch.Generator(device).manual_seed(0)

    predicted = attributions.sum(1).add(model.base_values).argmax(-1)

    def games(labels: Tensor | None = None):
        for image, label in zip(chosen, predicted[:, None], strict=True):
            of_label = slice(None) if labels is None else label
            yield lambda coalitions, x=image, k=of_label: model.coalition_values(x[None], coalitions[None])[0][:, k]

    judge = {"budget": options.budget, "generator": generator, "device": device}
    certificate = attribution_error_certificate(games(), attributions, **judge)
    of_predicted = attributions.gather(2, predicted[:, None, None].expand(-1, attributions.shape[1], 1))
    certificate_predicted = attribution_error_certificate(games(predicted), of_predicted, **judge)
    few = chosen[:100]

    def game(coalitions: Tensor) -> Tensor:
        return model.coalition_values(few, coalitions)

    curves = insertion_deletion(game, attributions[:100])
    share = interaction_share(game, attributions[:100], num_samples=256, generator=generator)
    return results | {
        "certificate": {name: _plain(value) for name, value in vars(certificate).items()},
        "certificate_of_predicted_label": {name: _plain(value) for name, value in vars(certificate_predicted).items()},
        "insertion": curves.insertion_auc.mean().item(),
        "deletion": curves.deletion_auc.mean().item(),
        "interaction_share": share.mean().item(),
    }


def _plain(value):
    return value.tolist() if isinstance(value, Tensor) else value


def run(name: str, options, train_images: Images, test_images: Images, first_images: Images) -> None:
    """Pre-train if needed, fine-tune with one recipe, measure, write."""
    slug = name.replace(", ", "-").replace(" ", "_").replace("/", "_")
    result = options.results / f"{options.backbone}-{slug}-seed{options.seed}.json"
    if result.exists():
        return
    work = options.output / f"{options.backbone}-seed{options.seed}"
    plain_class, plain_config, shape = PLAIN[options.backbone]
    start = work / "start"
    if not (start / "config.json").exists():
        set_seed(options.seed)
        model = plain_class(plain_config(**shape, image_size=32, patch_size=4, num_labels=10, **ATTENTION))
        if options.pretrain:
            model, _ = train(
                model, first_images, work / "pretraining", options, None, options.pretrain, options.pretrain_rate
            )
        model.save_pretrained(start)
    recipe = RECIPES[name]
    set_seed(options.seed)
    model = (
        plain_class.from_pretrained(start, **ATTENTION)
        if recipe is None
        else SHAPLEY[options.backbone].from_pretrained(work / recipe.start, **ATTENTION, **recipe.config)
    )
    if recipe is not None and recipe.frozen:
        model.freeze_classifier()
    seconds = 0.0
    if recipe is None or recipe.shared_epochs:
        model, seconds = train(
            model, train_images, work / slug, options, recipe, options.epochs, options.learning_rate
        )
    if recipe is not None and recipe.head_epochs:
        model.freeze_classifier(adapters=True)
        alone = Recipe(recipe.training | HEAD_ALONE, augmented=recipe.augmented)
        rate = options.learning_rate
        model, more = train(
            model.train(), train_images, work / slug / "head", options, alone, recipe.head_epochs, rate
        )
        seconds += more
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    for part in (model, processor):
        part.save_pretrained(work / slug / "model")
    measured = measure(model, test_images, options)
    settings = {
        key: value for key, value in vars(options).items() if key not in ("data", "output", "results", "recipes")
    }
    details = {} if recipe is None else vars(recipe)
    write_result(result, {"recipe": name, **details, **measured, "training_seconds": seconds, "settings": settings})
    print(json.dumps({"recipe": name, **{k: v for k, v in measured.items() if k != "certificate"}}), flush=True)


def main() -> None:
    """Run the recipes asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 for datasets.load_dataset")
    parser.add_argument("--backbone", choices=list(PLAIN), default="vit")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="names separated by semicolons; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", type=float, default=10, help="plain epochs before; 0 = from scratch")
    parser.add_argument("--epochs", type=float, default=10, help="epochs of every recipe, the plain one included")
    parser.add_argument("--train-images", type=int, help="use the first so many; default all")
    parser.add_argument("--pretrain-on-all", action="store_true", help="the plain epochs before see every image")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--pretrain-rate", type=float, default=1e-3, help="learning rate of the plain epochs before")
    parser.add_argument("--average", type=float, default=0.0, help="decay of a moving average of the weights")
    parser.add_argument("--images", type=int, default=64, help="test images for the certificate")
    parser.add_argument("--budget", type=int, default=4096, help="evaluations per image for the certificate")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/recipe_study"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/recipe_study"))
    options = parser.parse_args()
    unknown = set(options.recipes.split(";")) - set(RECIPES)
    if unknown:
        raise SystemExit(f"Unknown recipes {sorted(unknown)}: choose from {list(RECIPES)}.")
    data = load_dataset(options.data)
    train_images, test_images = Images(data["train"], options.train_images), Images(data["test"], None)
    first_images = Images(data["train"], None) if options.pretrain_on_all else train_images
    for name in options.recipes.split(";"):
        run(name, options, train_images, test_images, first_images)


if __name__ == "__main__":
    main()
