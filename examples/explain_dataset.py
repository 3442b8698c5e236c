"""Explain a whole data set into parquet files, then ask them where the model looks for each label.

With no argument, a small model first learns scikit-learn's digits (seconds on the CPU) and explains the test digits:

    python examples/explain_dataset.py

The real thing: a Shapley checkpoint and a data set, each a folder or a Hub id. A run that was cut off goes on where it
stopped when called again, `--streaming` needs no room for the data set, and under `accelerate launch` several devices
share the work:

    python examples/explain_dataset.py \
        --model outputs/food101 --dataset ethz/food101 --split validation --streaming -o outputs/food101_explained
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from hf_shapley import (
    digits_dataset,
    explain_dataset,
    load_explanations,
    map_colours,
    symmetric_scale,
    train_digits_model,
)

PANEL = 120  # width and height of one label's map in the picture, pixels


def load_model(path: str | None, epochs: float) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The checkpoint, or a digits model trained on the spot."""
    if path is not None:
        return AutoModelForImageClassification.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
    print("No --model: training a small one on digits.")
    return train_digits_model(epochs=epochs)


def load_rows(options: argparse.Namespace) -> Dataset | IterableDataset:
    if options.dataset is None:
        rows = digits_dataset()[options.split]
        return rows.to_iterable_dataset() if options.streaming else rows
    return load_dataset(options.dataset, split=options.split, streaming=options.streaming)


def mean_maps(explanations: IterableDataset) -> dict[str, tuple[int, float, Tensor]]:
    """For each predicted label: how often, mean score, and mean map (h, w) in logits; the most frequent first."""
    counts, scores, maps = defaultdict(int), defaultdict(float), {}
    for row in explanations:
        label, attributions = row["predicted_label"], torch.tensor(row["attributions"][0], dtype=torch.float64)
        counts[label] += 1
        scores[label] += row["score"]
        maps[label] = maps.get(label, 0) + attributions
    ordered = sorted(counts, key=lambda label: (-counts[label], label))
    return {label: (n := counts[label], scores[label] / n, maps[label] / n) for label in ordered}


def draw(maps: Sequence[Tensor], gap: int = 6) -> Image.Image:
    """Mean maps side by side on one scale: red speaks for the label, blue against it."""
    scale = symmetric_scale(list(maps))
    row = Image.new("RGB", (len(maps) * (PANEL + gap) - gap, PANEL), "white")
    for place, values in enumerate(maps):
        panel = Image.fromarray(map_colours(values, scale=scale).numpy())
        row.paste(panel.resize((PANEL, PANEL), Image.Resampling.NEAREST), (place * (PANEL + gap), 0))
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Explain, read back, print one line per label, draw the mean maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a Shapley checkpoint; default: digits, trained now")
    parser.add_argument("--dataset", help="folder or Hub id with pictures; default: digits")
    parser.add_argument("--split", default="test", help="split to explain")
    parser.add_argument("--image_column", default="image", help="column with the pictures")
    parser.add_argument("--streaming", action="store_true", help="read the data set as it comes, keep none of it")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures in one forward pass")
    parser.add_argument("--labels_shown", type=int, default=10, help="labels to print and draw")
    parser.add_argument("--epochs", type=float, default=16, help="of the digits model")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/explained"), help="folder to write")
    options = parser.parse_args(argv)

    model, image_processor = load_model(options.model, options.epochs)
    run = explain_dataset(
        model,
        load_rows(options),
        options.output,
        image_processor=image_processor,
        image_column=options.image_column,
        batch_size=options.batch_size,
    )
    if not PartialState().is_main_process:
        return
    print(f"{run.num_rows} rows in {run.output_dir}, {run.computed_rows} of them from this call.")
    shown = list(mean_maps(load_explanations(run.output_dir, streaming=True)).items())[: options.labels_shown]
    print(f"{'predicted':<24}{'pictures':>9}{'mean score':>12}   patch that speaks most for it (row, column), logits")
    for label, (count, score, values) in shown:
        row, column = divmod(int(values.argmax()), values.shape[1])
        print(f"{label:<24}{count:>9}{score:>12.1%}   ({row}, {column}) {values.max():+.3f}")
    path = options.output / "mean_attributions.png"
    draw([values for _, (_, _, values) in shown]).save(path)
    print(f"Wrote {path}: one map per label in this order.")


if __name__ == "__main__":
    main()
