"""The demo: train a self-explaining digit classifier, and hold its attributions against exact Shapley values."""

import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from ..backbones import FAMILIES
from ..data.digits import digits_dataset
from ..data.labels import label_maps
from ..faithfulness.agreement import attribution_correlation, error_ratio
from ..faithfulness.axioms import leak
from ..faithfulness.estimators import exact_shapley
from ..figures.optional_matplotlib import matplotlib_parts
from ..terminal import say
from ..training.arguments import ShapleyTrainingArguments
from ..training.digits import EVERYTHING_FLOWS, SHORT_RUN, VOTES, trainable
from ..training.trainer import ShapleyTrainer
from .demo_report import write_report

# 4 x 4 = 16 players each, so that all 65,536 coalitions can be evaluated.
BACKBONES = {
    "vit": dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2
    ),
    "convnext": dict(
        hidden_sizes=[32, 64], depths=[1, 3], num_stages=2, patch_size=1, image_size=8, layer_scale_init_value=1.0
    ),
}
EPOCHS = {"vit": 60, "convnext": 100}
# Shared by the joint and the plain model of a backbone.
TRAINING = {
    "vit": dict(per_device_train_batch_size=64, learning_rate=1e-3, warmup_steps=0.1),
    "convnext": dict(per_device_train_batch_size=64, learning_rate=6e-3, warmup_steps=0.1),
}
SHAPLEY_TRAINING = {
    "vit": EVERYTHING_FLOWS | dict(shapley_weight=1.0, attribution_learning_rate=1e-3),
    "convnext": EVERYTHING_FLOWS | dict(shapley_weight=4.0, attribution_learning_rate=6e-3),
}
# One more layer of the backbone's kind reads the influence of each patch on the others' votes.
SHAPLEY_CONFIG = VOTES | dict(influence_block="backbone", influence_layers=1, attribution_gradient=True)


@dataclass
class DemoSettings:
    """What `hf-shapley demo` can be asked for.

    Args:
        backbone: "vit" or "convnext".
        seeds: number of seeds to train, from 0 on.
        epochs: passes over the 1,347 training images; None = 60 for ViT, 100 for ConvNeXt.
        images: test images whose exact Shapley values are computed, from 2 to 450.
        output: folder that receives model, results, figure and report.
    """

    backbone: str = "vit"
    seeds: int = 1
    epochs: int | None = None
    images: int = 32
    output: str = "outputs/demo"

    def __post_init__(self):
        if self.backbone not in BACKBONES:
            raise ValueError(f"`backbone` must be one of {list(BACKBONES)}, got {self.backbone!r}.")
        self.epochs = EPOCHS[self.backbone] if self.epochs is None else self.epochs
        for name, low, high in (("seeds", 1, 100), ("epochs", 1, 10_000), ("images", 2, 450)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must lie in [{low}, {high}], got {getattr(self, name)}.")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise ValueError(f"`output` must be a folder, got the file {self.output}.")


def run_demo(settings: DemoSettings) -> dict:
    """Train with and without explanations, compare with exact Shapley values, write everything to `settings.output`.

    Returns:
        The results, as written to `results.json`; with several seeds, means over seeds, and a list by seed.
    """
    matplotlib_parts()  # in the end, when the figure is drawn, it would be late to find it missing
    start = time.perf_counter()
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    data = digits_dataset()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    tensors = {name: _tensors(split, processor) for name, split in data.items()}
    runs = []
    for seed in range(settings.seeds):
        _say(f"Seed {seed}: training {settings.backbone} with explanations.")
        joint = _train(settings, tensors["train"], seed, joint=True)
        _say(f"Seed {seed}: training the plain {settings.backbone} beside it.")
        plain = _train(settings, tensors["train"], seed, joint=False)
        _say(f"Seed {seed}: evaluating all 65,536 coalitions of {settings.images} test images.")
        runs.append(_measure(joint, plain, tensors["test"], settings.images))
        _say(" ".join(f"{name} {value:.6g}" for name, value in runs[-1].items()))
        if seed == 0:
            first = joint
    results = _results(settings, runs, time.perf_counter() - start)
    write_report(output, first, processor, data["test"], tensors["test"][0], results)
    return results


def _tensors(split, processor: ViTImageProcessorPil) -> tuple[Tensor, Tensor]:
    """Pixels (images, 3, 8, 8) and labels (images)."""
    return processor(split["image"][:], return_tensors="pt")["pixel_values"], torch.tensor(split["label"][:])


def _train(settings: DemoSettings, train: tuple[Tensor, Tensor], seed: int, joint: bool) -> PreTrainedModel:
    """Train from scratch; joint and plain share backbone, schedule and seed."""
    options = BACKBONES[settings.backbone] | label_maps([str(digit) for digit in range(10)])
    family = FAMILIES[settings.backbone]
    set_seed(seed)
    if joint:
        model = family.model(family.config(**options, **SHAPLEY_CONFIG))
        make_trainer, make_args, extra = ShapleyTrainer, ShapleyTrainingArguments, SHAPLEY_TRAINING[settings.backbone]
    else:
        model = family.plain_model(family.plain_config(**options))
        make_trainer, make_args, extra = Trainer, TrainingArguments, {}
    checkpoints = Path(settings.output) / "training"
    args = make_args(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        seed=seed,
        logging_steps=200,
        weight_decay=0.05,
        **SHORT_RUN,
        **TRAINING[settings.backbone],
        **extra,
    )
    try:
        with _one_thread():
            make_trainer(model, args, train_dataset=trainable(*train)).train()
    finally:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Each operation on one core: the models are so small that the threads of one would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _measure(joint: PreTrainedModel, plain: PreTrainedModel, test: tuple[Tensor, Tensor], images: int) -> dict:
    """Accuracy of both models on the whole test split, and the joint one's attributions against exact values."""
    pixels, labels = test
    output = joint(pixels)
    gap = output.attributions.sum(1) - (output.logits - output.base_values)
    predicted = output.attributions[:images].double()  # (images, 16, 10)
    exact = _exact_values(joint, pixels[:images])
    return {
        "accuracy_joint": _accuracy(output.logits, labels),
        "accuracy_plain": _accuracy(plain(pixels).logits, labels),
        "shapley_correlation": attribution_correlation(predicted, exact).mean,
        "shapley_error_ratio": error_ratio(predicted, exact).mean,
        "efficiency_gap": gap.abs().max().item(),
        "leak": _leak(joint, pixels),
    }


def _exact_values(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Exact Shapley values (images, 16, 10), an image at a time on each core."""
    with _one_thread(), ThreadPool(_cores()) as pool:
        values = pool.imap(lambda image: _exact(model, image), images)
        return torch.stack(list(_progress(values, "exact Shapley values", len(images))))


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exact(model: PreTrainedModel, image: Tensor) -> Tensor:
    """Exact Shapley values (16, 10) of one image, from all 65,536 coalitions."""
    # So few at a time that what the layers make of them stays in the core's cache.
    return exact_shapley(model.game(image, batch_size=256), num_players=16, batch_size=8192)


def _leak(model: PreTrainedModel, pixels: Tensor) -> float:
    """Largest change of v(S) when the pixels of absent players are replaced by another image's."""
    generator = torch.Generator().manual_seed(0)
    coalitions = torch.rand(len(pixels), 1, 16, generator=generator) < 0.5
    present = coalitions.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed = torch.where(present, pixels, pixels.roll(1, dims=0))
    return leak(model.game(pixels), model.game(changed), coalitions).max().item()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def _results(settings: DemoSettings, runs: list[dict], seconds: float) -> dict:
    """Means over seeds under the plain names, each run's value in a list, settings and versions."""
    results: dict = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    results["accuracy_difference"] = results["accuracy_joint"] - results["accuracy_plain"]
    if len(runs) > 1:
        results |= {f"{name}_by_seed": [run[name] for run in runs] for name in runs[0]}
        differences = [run["accuracy_joint"] - run["accuracy_plain"] for run in runs]
        results["accuracy_difference_standard_deviation"] = statistics.stdev(differences)
    results["seconds"] = round(seconds, 1)
    results |= {name: value for name, value in asdict(settings).items() if name != "output"}
    results |= TRAINING[settings.backbone] | SHAPLEY_TRAINING[settings.backbone] | SHAPLEY_CONFIG
    results |= {"test_images": 450, "train_images": 1347}
    results |= {f"{name}_version": version(name) for name in ("hf_shapley", "torch", "transformers")}
    results |= {"python_version": platform.python_version(), "cpus": os.cpu_count()}
    results["command"] = f"hf-shapley demo --backbone {settings.backbone} --seeds {settings.seeds} " + (
        f"--epochs {settings.epochs} --images {settings.images}"
    )
    return results


def _progress(items: Iterator[Tensor], title: str, total: int):
    from tqdm.auto import tqdm

    return tqdm(items, desc=title, total=total, unit="image")


def _say(text: str) -> None:
    say(text, file=sys.stderr)
