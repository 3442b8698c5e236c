"""How many evaluations coalition sizes drawn more evenly than the Shapley kernel's save KernelSHAP.

    make demo && python benchmarks/coalition_sizes.py --models outputs/demo/model
    python benchmarks/coalition_sizes.py --models path/to/vit path/to/convnext --data path/to/cifar10

The game is that of each image's predicted label. The variance of an estimator is half the mean squared difference of
two independent estimates; the ratio is that of `sizes="kernel"` over `sizes="spread"` on the same images and budget.
Variance falls with one over the budget, so it is also how many times fewer evaluations reach the same error.
"""

import argparse

import torch
from common import RESULTS, write_result
from faithfulness import load_case, ours
from rivals import Case
from torch import Tensor
from tqdm.auto import tqdm

from hf_shapley import kernel_shapley

ESTIMATORS = ("regression", "unbiased, attributions as control variate")


def variance(case: Case, attributions: Tensor, sizes: str, estimator: str, budget: int) -> float:
    """Mean over images and players, from two independent estimates of each image."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for row in tqdm(range(len(case.pixels)), desc=f"{estimator}, {sizes}", leave=False):
        options = {"num_players": attributions.shape[1], "budget": budget, "sizes": sizes, "generator": generator}
        if estimator != "regression":
            options |= {"unbiased": True, "control_variate": attributions[row].unsqueeze(-1)}
        first, second = (kernel_shapley(case.game(row), **options).values for _ in range(2))
        total += (first - second).square().mean().item() / 2
    return total / len(case.pixels)


def main() -> None:
    """Compare both laws on each model; print and write ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["outputs/demo/model"], help="folders of trained models")
    parser.add_argument("--data", help="folder for datasets.load_dataset with a test split; default digits")
    parser.add_argument("--budget", type=int, default=1024, help="evaluations per image and estimate")
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    results = {}
    for model in options.models:
        case = load_case(model, options.data, options.images)
        attributions, found = ours(case), {}
        for estimator in ESTIMATORS:
            kernel, spread = (
                variance(case, attributions, sizes, estimator, options.budget) for sizes in ("kernel", "spread")
            )
            found[estimator] = {"kernel": kernel, "spread": spread, "ratio": kernel / spread}
            print(
                f"{case.model.config.model_type}, {estimator}: {kernel / spread:.2f} times less variance", flush=True
            )
        results[f"{len(results) + 1}, {case.model.config.model_type}"] = found
    settings = {"budget": options.budget, "images": options.images}
    write_result(RESULTS / "coalition_sizes.json", {"settings": settings, "models": results})


if __name__ == "__main__":
    main()
