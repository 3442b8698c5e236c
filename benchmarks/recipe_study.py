"""Which joint recipe keeps accuracy and finds Shapley values, on CIFAR-10.

A plain classifier is trained first (the usual case), then fine-tuned with each recipe for the same number of epochs,
one of them "plain" as the control. Measured on the test split: accuracy, attribution error and correlation with their
certificate, interaction share, insertion and deletion. Each run keeps its model and adds its row to the CSV of all
runs (`recipe_runs.py`) as soon as it ends. A run whose row is there is not repeated.

    python benchmarks/recipe_study.py --data path/to/cifar10 --study "my study" --bf16 --recipes "plain;own game"

The data is any folder that `datasets.load_dataset` reads, with columns `image` (32 x 32) and `label`.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import VOTES_AND_INFLUENCE, made_by
from datasets import load_dataset
from recipe_runs import RUNS, add_run, has_run, make_row
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    Trainer,
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
)
from hf_shapley.faithfulness.certificate import attribution_error_certificate
from hf_shapley.faithfulness.correlations import interaction_share
from hf_shapley.faithfulness.curves import insertion_deletion
from hf_shapley.training.digits import EVERYTHING_FLOWS

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
    """What a recipe sets, for the trainer and for the configuration; everything else is shared.

    `start` is the checkpoint that it starts from: "plain/model" is what the control, run before, ended with. A recipe
    has the epochs of all unless it names its own. With `frozen` nothing but the head and the adapters learns. Without
    `augmented` images are shown as they are in the test.
    """

    training: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    start: str = "start"
    epochs: float | None = None
    frozen: bool = False
    augmented: bool = True


# None is the control, plain training; a recipe that sets nothing is what the library does by default.
RECIPES: dict[str, Recipe | None] = {
    "plain": None,
    "own game": Recipe(),
    "own game, then the head alone": Recipe(start="own_game/model", epochs=8, frozen=True, augmented=False),
    "own game, frozen": Recipe(start="plain/model", epochs=8, frozen=True),
    # Fewer images learn through v(S), which costs most of a step.
    "own game, four pairs": Recipe({"num_pairs": 4, "value_gradient_fraction": 0.125}),
    "frozen with adapters": Recipe(config={"coalition_adapter_size": 64}, start="plain/model", frozen=True),
    "from scratch, everything flows": Recipe(
        EVERYTHING_FLOWS | {"coalition_weight": 0.3, "shapley_warmup": 0.5, "attribution_learning_rate": 5e-4},
        VOTES_AND_INFLUENCE | {"attribution_gradient": True},
    ),
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
) -> float:
    """Train, from the last checkpoint in `folder` where there is one; gives the seconds."""
    saving = dict(
        num_train_epochs=epochs, save_strategy="epoch", save_total_limit=1, disable_tqdm=not options.progress
    )
    if recipe is None:
        make_trainer, args = Trainer, arguments(TrainingArguments, options, folder, rate, **saving)
    else:
        make_trainer = ShapleyTrainer
        args = arguments(ShapleyTrainingArguments, options, folder, rate, **saving, **recipe.training)
    collate = images.augment if recipe is None or recipe.augmented else images.collate
    trainer = make_trainer(model.train(), args, train_dataset=images, data_collator=collate)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    model.eval()
    return trainer.state.log_history[-1]["train_runtime"]


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
        "head": "tied",
        "game": "adapted" if model.config.coalition_adapter_size else "own",
        "certificate": {name: _plain(value) for name, value in vars(certificate).items()},
        "certificate_of_predicted_label": {name: _plain(value) for name, value in vars(certificate_predicted).items()},
        "insertion": curves.insertion_auc.mean().item(),
        "deletion": curves.deletion_auc.mean().item(),
        "interaction_share": share.mean().item(),
    }


def _plain(value):
    return value.tolist() if isinstance(value, Tensor) else value


def make_start(folder: Path, options, images: Images) -> None:
    """Leave the plain model that all recipes start from in a folder, if it is not there: pre-trained, or random."""
    if (folder / "config.json").exists():
        return
    plain_class, plain_config, shape = PLAIN[options.backbone]
    set_seed(options.seed)
    model = plain_class(plain_config(**shape, image_size=32, patch_size=4, num_labels=10, **ATTENTION))
    if options.pretrain:
        checkpoints = folder.parent / "pretraining"
        train(model, images, checkpoints, options, None, options.pretrain, options.pretrain_rate)
    model.save_pretrained(folder)


def run(name: str, options, train_images: Images, test_images: Images, first_images: Images) -> None:
    """Train with one recipe, measure, add the row; nothing where the row is there."""
    left_out = ("data", "output", "results", "recipes", "study", "progress")
    settings = {key: value for key, value in vars(options).items() if key not in left_out}
    if has_run(options.study, name, settings, options.results):
        return
    work = options.output / slug(options.study) / f"{options.backbone}-seed{options.seed}"
    make_start(work / "start", options, first_images)
    recipe = RECIPES[name]
    set_seed(options.seed)
    if recipe is None:
        model = PLAIN[options.backbone][0].from_pretrained(work / "start", **ATTENTION)
    else:
        if not (work / recipe.start).exists():
            raise SystemExit(f"Recipe {name!r} starts from {recipe.start}: run the recipe that ends with it before.")
        model = SHAPLEY[options.backbone].from_pretrained(work / recipe.start, **ATTENTION, **recipe.config)
        if recipe.frozen:
            model.freeze_classifier()
    epochs = (recipe and recipe.epochs) or options.epochs
    seconds = train(model, train_images, work / slug(name), options, recipe, epochs, options.learning_rate)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    for part in (model, processor):
        part.save_pretrained(work / slug(name) / "model")
    found = measure(model, test_images, options) | {"recipe": name, "training_seconds": seconds}
    details = {} if recipe is None else vars(recipe)
    row = make_row({**made_by(), **details, **found, "settings": settings}, options.study)
    add_run(row, options.results)
    print(json.dumps({column: row[column] for column in ("recipe", "accuracy", "error", "correlation")}), flush=True)


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(", ", "-").replace(" ", "_")


def main() -> None:
    """Run the recipes asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 for datasets.load_dataset")
    parser.add_argument("--study", required=True, help="name of the runs that share data, epochs and schedule")
    parser.add_argument("--backbone", choices=list(PLAIN), default="vit")
    parser.add_argument("--recipes", help="names separated by semicolons; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", type=float, default=10, help="plain epochs before; 0 = from scratch")
    parser.add_argument("--epochs", type=float, default=10, help="epochs of a recipe that names none, plain included")
    parser.add_argument("--train-images", type=int, help="use the first so many; default all")
    parser.add_argument("--pretrain-on-all", action="store_true", help="the plain epochs before see every image")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--pretrain-rate", type=float, default=1e-3, help="learning rate of the plain epochs before")
    parser.add_argument("--images", type=int, default=64, help="test images for the certificate")
    parser.add_argument("--budget", type=int, default=4096, help="evaluations per image for the certificate")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/recipe_study"))
    parser.add_argument("--results", type=Path, default=RUNS)
    options = parser.parse_args()
    known = list(RECIPES)
    names = options.recipes.split(";") if options.recipes else known
    if unknown := set(names) - set(known):
        raise SystemExit(f"Unknown recipes {sorted(unknown)}: choose from {known}.")
    data = load_dataset(options.data)
    train_images, test_images = Images(data["train"], options.train_images), Images(data["test"], None)
    first_images = Images(data["train"], None) if options.pretrain_on_all else train_images
    for name in names:
        run(name, options, train_images, test_images, first_images)


if __name__ == "__main__":
    main()
