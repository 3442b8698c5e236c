"""Turn a plain checkpoint into one that explains itself, and see what that costs in accuracy.

With no argument, a plain ViT first learns scikit-learn's digits (seconds on the CPU):

    python examples/finetune_from_plain_checkpoint.py

The real thing: a fine-tuned checkpoint, and the data set it was fine-tuned on, each a folder or a Hub id:

    python examples/finetune_from_plain_checkpoint.py \
        --model nateraw/vit-base-beans --dataset AI-Lab-Makerere/beans --label_column labels \
        --epochs 10 --learning_rate 2e-5 --output outputs/beans

A plain checkpoint loads with its predictions unchanged, and with `--freeze_classifier` they stay so: only the
explanation is learned. The table shows three models: the plain one, its weights as a Shapley model before any
training, and after. The error is the mean squared distance of the attributions to the exact Shapley values, over the
variance of those.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_shapley import (
    AutoShapleyForImageClassification,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    attribution_error_certificate,
    digits_dataset,
    to_rgb,
)

# 4 x 4 patches of 2 x 2 pixels.
SMALL_VIT = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def settings(output: Path, epochs: float, learning_rate: float, batch_size: int) -> dict:
    """What both trainings share."""
    return {
        "output_dir": str(output),
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # of all steps
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_plain_checkpoint(splits: DatasetDict, output: Path, epochs: float) -> Path:
    """Train a stock ViT on the digits and save it."""
    names = splits["train"].features["label"].names
    config = ViTConfig(
        **SMALL_VIT, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    trainer = Trainer(
        ViTForImageClassification(config),
        TrainingArguments(**settings(output, epochs, learning_rate=3e-3, batch_size=64)),
        train_dataset=with_pixels(splits["train"], processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return output


def with_pixels(
    rows: Dataset, processor: BaseImageProcessor, image_column: str = "image", label_column: str = "label"
) -> Dataset:
    """Rows whose pictures are read and processed on the fly: pixel_values and labels."""

    def transform(batch: dict) -> dict:
        images = [to_rgb(image) for image in batch[image_column]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixel_values), "labels": batch[label_column]}

    return rows.with_transform(transform)


def explanation_error(model: PreTrainedModel, pixels: Tensor, budget: int) -> float:
    """Squared distance of the attributions to the exact Shapley values over the variance of those; estimated."""
    own = model.explain(pixels).flatten(2).transpose(1, 2)  # (images, players, labels)
    games = map(model.game, pixels)
    generator = torch.Generator().manual_seed(0)
    return attribution_error_certificate(games, own, budget=budget, generator=generator).error_ratio


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="plain checkpoint; default: a ViT trained now on digits")
    parser.add_argument("--dataset", help="folder or Hub id; default: digits")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--eval_split", default="test")
    parser.add_argument("--plain_epochs", type=float, default=15, help="of the plain ViT on digits")
    parser.add_argument("--epochs", type=float, default=30, help="of the joint fine-tuning")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the joint fine-tuning")
    parser.add_argument("--shapley_weight", type=float, default=1.0, help="of the Shapley regression")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--certified_images", type=int, default=16, help="pictures whose attributions are checked")
    parser.add_argument("--budget", type=int, default=1024, help="coalitions per picture checked")
    parser.add_argument("--freeze_classifier", action="store_true", help="keep the checkpoint's predictions")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/finetuned"), help="folder of the models")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, print the three rows, save the model."""
    options = parse_arguments(argv)
    set_seed(0)
    splits = digits_dataset() if options.dataset is None else load_dataset(options.dataset)
    path = options.model or make_plain_checkpoint(splits, options.output / "plain", options.plain_epochs)
    processor = AutoImageProcessor.from_pretrained(path)
    plain = AutoModelForImageClassification.from_pretrained(path)
    model = AutoShapleyForImageClassification.from_pretrained(path)
    if options.freeze_classifier:
        model.freeze_classifier()

    columns = options.image_column, options.label_column
    training = settings(options.output / "shapley", options.epochs, options.learning_rate, options.batch_size)
    held_out = with_pixels(splits[options.eval_split], processor, *columns)
    trainer = ShapleyTrainer(
        model,
        ShapleyTrainingArguments(**training, shapley_weight=options.shapley_weight),
        train_dataset=with_pixels(splits[options.train_split], processor, *columns),
        eval_dataset=held_out,
        processing_class=processor,
        compute_metrics=accuracy,
    )
    stock_trainer = Trainer(plain, TrainingArguments(**training), eval_dataset=held_out, compute_metrics=accuracy)
    pixels = torch.stack(held_out[: options.certified_images]["pixel_values"]).to(model.device)

    def row(trainer: Trainer) -> tuple[float, float | None]:
        explains = trainer.model is model
        error = explanation_error(model, pixels, options.budget) if explains else None
        return trainer.evaluate()["eval_accuracy"], error

    rows = {"plain checkpoint": row(stock_trainer), "loaded as Shapley model": row(trainer)}
    trainer.train()
    trainer.save_model()
    rows["explained while frozen" if options.freeze_classifier else "fine-tuned jointly"] = row(trainer)

    print(f"\n{'':<26}{'accuracy':>10}{'error of attributions':>24}")
    for name, (share, error) in rows.items():
        print(f"{name:<26}{share:>10.4f}{'-' if error is None else f'{error:.4f}':>24}")
    print(f"Saved {training['output_dir']}.")


if __name__ == "__main__":
    main()
