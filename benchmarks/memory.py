"""Memory over long runs: training steps with checkpoints, explained images, saved figures. It must stay flat.

python benchmarks/memory.py --steps 2000 --images 2000 --figures 200
"""

import argparse
import ctypes
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from common import RESULTS, build, write_result
from PIL import Image
from transformers import PrinterCallback, TrainerCallback, ViTImageProcessorPil, pipeline
from transformers.utils import logging

from hf_shapley import TASK, ShapleyTrainer, ShapleyTrainingArguments, attribution_figure

MAX_GROWTH = 4.0  # MiB from a fifth of the way to its end: below what one lost image or figure each time would take


def resident() -> float:
    """MiB of this process that are in use, by glibc's rules."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but not given back yet is no leak
    return round(psutil.Process().memory_info().rss / 2**20, 2)


class Readings(TrainerCallback):
    """Memory after each tenth of a run."""

    def __init__(self, steps: int):
        self.steps = steps
        self.found: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (self.steps // 10) == 0:
            self.found.append(resident())


def readings(step: Callable[[], object], length: int) -> list[float]:
    """Memory after each tenth of so many calls."""
    found = []
    for number in range(length):
        step()
        if (number + 1) % (length // 10) == 0:
            found.append(resident())
    return found


def train(steps: int) -> list[float]:
    """Joint training, a log every ten steps, ten checkpoints."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 16, 24, generator=generator), "labels": torch.tensor(i % 5)} for i in range(40)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = ShapleyTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=steps // 10,
            save_total_limit=1,
            logging_steps=10,
            dataloader_pin_memory=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        model = build("vit-test", num_labels=5)
        note = Readings(steps)
        trainer = ShapleyTrainer(model, args, train_dataset=data, callbacks=[note])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return note.found


def explain(images: int) -> list[float]:
    """The pipeline with an overlay, and maps at the pixels' resolution, each time for another picture."""
    model = build("convnext-test", num_labels=5)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    classifier = pipeline(TASK, model=model, image_processor=processor, device="cpu")
    draw = np.random.default_rng(0)

    def step() -> None:
        picture = Image.fromarray(draw.integers(0, 256, (200, 300, 3), dtype=np.uint8))
        classifier(picture, overlay=True)
        classifier.model.explain(classifier.preprocess(picture)["pixel_values"], upsample=True)

    return readings(step, images)


def figures(count: int) -> list[float]:
    """Figures of two labels, each written to the same file."""
    with tempfile.TemporaryDirectory() as folder:

        def step() -> None:
            figure = attribution_figure(Image.new("RGB", (300, 200)), torch.randn(2, 4, 6), ["a", "b"])
            figure.savefig(Path(folder) / "figure.png")

        return readings(step, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--images", type=int, default=2000, help="explained")
    parser.add_argument("--figures", type=int, default=200, help="saved")
    parser.add_argument("--output", default=RESULTS / "memory.json")
    args = parser.parse_args()
    logging.disable_progress_bar()
    runs = {"training steps": (train, args.steps), "explained images": (explain, args.images)}
    runs["saved figures"] = (figures, args.figures)
    result = {}
    for name, (run, length) in runs.items():
        found = run(length)
        growth = round(found[-1] - found[1], 2)
        result[name] = {
            "count": length,
            "mib_after_each_tenth": found,
            "growth_mib": growth,
            "flat": growth < MAX_GROWTH,
        }
        print(f"{length} {name}: {growth:+.2f} MiB", flush=True)
    write_result(args.output, {"max_growth_mib": MAX_GROWTH, "runs": result})
    if not all(run["flat"] for run in result.values()):
        sys.exit(1)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' and torch's own
        main()
