"""Evaluations against error: one pass refined, and samplers that start from nothing, on a digits ViT of 64 players.

A plain ViT (patches of 1 x 1 pixels) is trained on scikit-learn's digits and frozen; the attribution head learns its
own game, no adapters. "Error" is the squared error over the variance of the true Shapley values, both of the predicted
label, over images that chose nothing. The truth is antithetic permutation sampling with many evaluations; what its own
error adds is stated. Rivals have their best known settings: pairs, and for KernelSHAP of ours spread sizes.

    python benchmarks/refinement.py --model outputs/refinement
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import shapiq
import torch
from common import RESULTS, write_result
from torch import Tensor
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    ShapleyViTForImageClassification,
    digits_dataset,
    kernel_shapley,
    permutation_shapley,
    refine,
)
from hf_shapley.training.digits import SHORT_RUN, trainable

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
PLAYERS = 64
SHARED = dict(per_device_train_batch_size=64, warmup_steps=50, weight_decay=0.05, logging_strategy="no", **SHORT_RUN)


def pixels_of(split) -> Tensor:
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    return processor(split["image"][:], return_tensors="pt")["pixel_values"]


def explained_model(folder: Path, plain_epochs: int, head_epochs: int) -> ShapleyViTForImageClassification:
    """A frozen classifier whose head has learned, trained unless it lies in the folder."""
    if not (folder / "model" / "config.json").exists():
        train = digits_dataset()["train"]
        rows = trainable(pixels_of(train), train["label"][:])
        set_seed(0)
        plain = ViTForImageClassification(ViTConfig(image_size=8, patch_size=1, num_labels=10, **SHAPE))
        args = TrainingArguments(str(folder), num_train_epochs=plain_epochs, learning_rate=1e-3, **SHARED)
        Trainer(plain, args, train_dataset=rows).train()
        plain.save_pretrained(folder / "plain")
        model = ShapleyViTForImageClassification.from_pretrained(folder / "plain")
        model.freeze_classifier()
        args = ShapleyTrainingArguments(str(folder), num_train_epochs=head_epochs, learning_rate=5e-4, **SHARED)
        ShapleyTrainer(model, args, train_dataset=rows).train()
        model.save_pretrained(folder / "model")
    return ShapleyViTForImageClassification.from_pretrained(folder / "model").eval()


def with_shapiq(approximator, game, budget: int, seed: int) -> Tensor:
    """One of shapiq's approximators, whose games are of one label."""

    def values(coalitions: np.ndarray) -> np.ndarray:
        return game(torch.from_numpy(np.atleast_2d(coalitions).astype(bool)))[:, 0].double().numpy()

    found = approximator(n=PLAYERS, random_state=seed).approximate(budget=budget, game=values)
    return torch.from_numpy(found.get_n_order_values(1)).unsqueeze(-1)


def methods(game, one_pass: Tensor, budget: int, seed: int) -> dict[str, Tensor]:
    """Attributions (N, 1) by name; those that cannot do with so few evaluations are left out."""
    options = {"budget": budget, "generator": torch.Generator().manual_seed(seed)}
    found = {
        "one pass, refined": refine(game, one_pass, **options).values,
        "refined from nothing": refine(game, torch.zeros_like(one_pass), **options).values,
    }
    rivals = {
        "permutations, antithetic": partial(permutation_shapley, game, num_players=PLAYERS, **options),
        "KernelSHAP, paired, spread": partial(kernel_shapley, game, num_players=PLAYERS, sizes="spread", **options),
    }
    for name, rival in rivals.items():
        try:
            found[name] = rival().values
        except ValueError as error:
            if "budget" not in str(error):
                raise
    paired = partial(shapiq.KernelSHAP, pairing_trick=True)
    for name, approximator in {
        "shapiq KernelSHAP, paired": paired,
        "shapiq permutations": shapiq.PermutationSamplingSV,
    }.items():
        if budget >= 2 * PLAYERS:
            found[name] = with_shapiq(approximator, game, budget, seed)
    return found


def main() -> None:
    """Train, find the truth, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/refinement"), help="folder of the model")
    parser.add_argument("--plain-epochs", type=int, default=40)
    parser.add_argument("--head-epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--first", type=int, default=200, help="of the test images; earlier ones chose the priors")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64, 256, 512, 1024, 4096, 8192])
    parser.add_argument("--truth", type=int, default=65_536)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "refinement.json")
    options = parser.parse_args()
    model = explained_model(options.model, options.plain_epochs, options.head_epochs)
    test = digits_dataset()["test"]
    pixels = pixels_of(test)
    with torch.no_grad():
        accuracy = (model(pixels).logits.argmax(-1) == torch.tensor(test["label"][:])).float().mean().item()
    pixels = pixels[options.first : options.first + options.images]
    truth, noise, one_pass, games = [], [], [], []
    for index, image in enumerate(pixels):
        output = model(image[None], attributed=1)
        one_pass.append(output.attributions[0].detach())
        game = model.game(image, output.attributed_labels, batch_size=256)
        games.append(game)
        generator = torch.Generator().manual_seed(index)
        exact = permutation_shapley(game, num_players=PLAYERS, budget=options.truth, generator=generator)
        truth.append(exact.values)
        noise.append(exact.standard_errors.square().mean())
    variance = torch.stack(truth).var(1, correction=0).mean()

    def ratio(found: list[Tensor]) -> float:
        return ((torch.stack(found) - torch.stack(truth)).square().mean() / variance).item()

    table = {"one pass": {"0": ratio(one_pass)}}
    for budget in options.budgets:
        found = [
            methods(game, phi, budget, seed) for seed, (game, phi) in enumerate(zip(games, one_pass, strict=True))
        ]
        for name in found[0]:
            table.setdefault(name, {})[str(budget)] = ratio([row[name] for row in found])
        print(
            budget, {name: round(row[str(budget)], 4) for name, row in table.items() if str(budget) in row}, flush=True
        )
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "output")}
    result = {"accuracy": accuracy, "game": model.game_name, "error_over_variance": table}
    result |= {"error_of_the_truth": (torch.stack(noise).mean() / variance).item(), "settings": settings}
    write_result(options.output, result)


if __name__ == "__main__":
    main()
