"""One-pass attributions against what people use today, on one trained model and the same images.

    make demo && python benchmarks/faithfulness.py --model outputs/demo/model
    python benchmarks/faithfulness.py --model path/to/model --data path/to/cifar10 --name faithfulness_cifar10

Ground truth are the Shapley values of the predicted label's logit: exact by enumeration for up to 16 players, beyond
that from many more evaluations than any method in the table gets, with their own noise stated. Gradient and attention
methods attribute pixels or tokens; their pixels are summed over each patch. An error means something only for methods
that estimate Shapley values; compare the others by correlation, insertion and deletion.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients, Occlusion
from common import RESULTS, write_result
from datasets import load_dataset
from matplotlib.figure import Figure
from shapiq import KernelSHAP
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_shapley import (
    as_shapiq_game,
    digits_dataset,
    exact_shapley,
    insertion_deletion,
    kernel_shapley,
    permutation_shapley,
)

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
STEPS = 50
GRADIENTS_AND_ATTENTION = ("integrated gradients", "gradient x input", "Grad-CAM", "attention rollout")


class Case:
    """A model, images (B, 3, H, W), their predicted labels (B) and the game of each."""

    def __init__(self, model: PreTrainedModel, pixels: Tensor):
        self.model, self.pixels = model, pixels
        with torch.no_grad():
            self.labels = model(pixels).logits.argmax(-1)
        self.grid = model.grid_size(*pixels.shape[-2:])
        self.step = tuple(size // cells for size, cells in zip(pixels.shape[-2:], self.grid, strict=True))

    def logits(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits

    def game(self, row: int) -> Callable[[Tensor], Tensor]:
        """Coalitions (M, N) -> values (M, 1) of the predicted label."""

        def values(coalitions: Tensor) -> Tensor:
            all_labels = self.model.coalition_values(self.pixels[row][None], coalitions[None])[0]
            return all_labels[:, self.labels[row]].double().unsqueeze(-1)

        return values

    def pool(self, pixel_attributions: Tensor) -> Tensor:
        """Sum over channels and over each patch's pixels: (B, 3, H, W) -> (B, N)."""
        summed = pixel_attributions.detach().sum(1, keepdim=True)
        return torch.nn.functional.avg_pool2d(summed, self.step, divisor_override=1).flatten(1)


def load_case(model: str, data: str | None, images: int) -> Case:
    """The model of a folder and the first test images of a data set, or of digits."""
    processor = AutoImageProcessor.from_pretrained(model)
    splits = load_dataset(data) if data else digits_dataset()
    pixels = processor(splits["test"][:images]["image"], return_tensors="pt")["pixel_values"]
    return Case(AutoModelForImageClassification.from_pretrained(model).eval(), pixels)


def ours(case: Case) -> Tensor:
    return case.model.explain(case.pixels, case.labels.unsqueeze(1)).flatten(1)


def integrated_gradients(case: Case) -> Tensor:
    method = IntegratedGradients(case.logits)
    black = case.pixels.amin().expand_as(case.pixels)
    return case.pool(method.attribute(case.pixels, baselines=black, target=case.labels, n_steps=STEPS))


def gradient_times_input(case: Case) -> Tensor:
    return case.pool(InputXGradient(case.logits).attribute(case.pixels.clone().requires_grad_(), target=case.labels))


def grad_cam(case: Case) -> Tensor:
    """Gradient times activation of the tokens that enter the last layer, with gradients averaged over the image."""
    layer = (
        case.model.vit.layers[-1] if hasattr(case.model, "vit") else case.model.convnext.encoder.stages[-1].layers[-1]
    )
    kept: list[Tensor] = []

    def keep(module, inputs):
        kept.append(inputs[0])

    hook = layer.register_forward_pre_hook(keep)
    try:
        score = case.logits(case.pixels).gather(1, case.labels.unsqueeze(1)).sum()
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    tokens = kept[0].detach()
    if tokens.ndim == 2:  # with the pooled readout: the images' rows, and the empty coalition's CLS
        tokens, gradient = (x[:-1].unflatten(0, (len(case.pixels), -1)) for x in (tokens, gradient))
    if tokens.ndim == 4:  # ConvNeXt: (B, C, h, w)
        tokens, gradient = (x.flatten(2).transpose(1, 2) for x in (tokens, gradient))
    else:  # ViT: CLS is no patch
        tokens, gradient = tokens[:, 1:], gradient[:, 1:]
    return (tokens * gradient.mean(1, keepdim=True)).sum(-1)


def occlusion(case: Case) -> Tensor:
    black = case.pixels.amin().item()
    window = (3, *case.step)
    found = Occlusion(case.logits).attribute(
        case.pixels, sliding_window_shapes=window, strides=window, baselines=black, target=case.labels
    )
    return case.pool(found)


def attention_rollout(case: Case) -> Tensor:
    """Product of (attention + identity) / 2 over layers, CLS row (Abnar and Zuidema, arXiv:2005.00928)."""
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = case.model(case.pixels, output_attentions=True).attentions
    case.model.set_attn_implementation(before)
    rollout = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixed = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2
        rollout = mixed @ rollout
    return rollout[:, 0, 1:]


def chance(case: Case) -> Tensor:
    players = case.grid[0] * case.grid[1]
    return torch.randn(len(case.pixels), players, generator=torch.Generator().manual_seed(0))


def kernel_shap(case: Case, budget: int) -> Tensor:
    """shapiq's KernelSHAP, one image at a time."""
    found = []
    for row, label in enumerate(case.labels.tolist()):
        game = as_shapiq_game(case.model, case.pixels[row : row + 1], label)
        values = KernelSHAP(n=case.grid[0] * case.grid[1], random_state=row).approximate(budget, game)
        found.append(torch.from_numpy(np.asarray(values.get_n_order_values(1))))
    return torch.stack(found)


def permutations(case: Case, budget: int) -> Tensor:
    players = case.grid[0] * case.grid[1]
    generator = torch.Generator().manual_seed(0)
    estimates = [
        permutation_shapley(case.game(row), num_players=players, budget=budget, generator=generator)
        for row in range(len(case.pixels))
    ]
    return torch.stack([estimate.values[:, 0] for estimate in estimates])


def score(case: Case, attributions: Tensor, truth: Tensor, seconds: float, evaluations: float) -> dict:
    """What the table shows of one method; attributions and truth (B, N)."""
    attributions = attributions.double()
    a, t = (x - x.mean(1, keepdim=True) for x in (attributions, truth))
    curves = insertion_deletion(
        lambda coalitions: case.model.coalition_values(case.pixels, coalitions),
        attributions.float(),
        labels=case.labels,
    )
    insertion, deletion = curves.insertion_auc.mean().item(), curves.deletion_auc.mean().item()
    return {
        "evaluations": evaluations,
        "milliseconds_per_image": 1000 * seconds / len(truth),
        "correlation": ((a * t).sum(1) / (a.norm(dim=1) * t.norm(dim=1)).clamp(min=1e-12)).mean().item(),
        "error_ratio": ((attributions - truth).square().mean(1) / truth.var(1, correction=0)).mean().item(),
        "insertion": insertion,
        "deletion": deletion,
        "insertion_minus_deletion": insertion - deletion,
    }


def equivalent_evaluations(curve: dict[int, float], error: float) -> float | None:
    """Budget at which a falling error curve crosses `error`, interpolated in logarithms; None if it never does."""
    previous = None
    for budget, value in sorted(curve.items()):
        if value <= error:
            if previous is None:
                return float(budget)
            (b0, e0), (b1, e1) = previous, (budget, value)
            share = (np.log(e0) - np.log(error)) / (np.log(e0) - np.log(max(e1, 1e-300)))
            return float(np.exp(np.log(b0) + share * (np.log(b1) - np.log(b0))))
        previous = budget, value
    return None


def ground_truth(case: Case, budget: int) -> tuple[Tensor, float]:
    """Shapley values (B, N), and the share of their variance that is sampling noise: 0 up to 16 players."""
    players = case.grid[0] * case.grid[1]
    games = [case.game(row) for row in range(len(case.pixels))]
    if players <= 16:
        return torch.stack([exact_shapley(game, num_players=players, batch_size=8192)[:, 0] for game in games]), 0.0
    generator = torch.Generator().manual_seed(1)
    options = {"num_players": players, "budget": budget, "batch_size": 8192, "generator": generator}
    estimates = [kernel_shapley(game, **options) for game in tqdm(games, desc="ground truth", unit="image")]
    truth = torch.stack([estimate.values[:, 0] for estimate in estimates])
    noise = torch.stack([estimate.standard_errors[:, 0] for estimate in estimates]).square()
    return truth, (noise.mean(1) / truth.var(1, correction=0)).mean().item()


def compare(case: Case, truth: Tensor) -> tuple[dict[str, dict], float | None]:
    """Every method's scores, and the equivalent evaluations of KernelSHAP."""
    players = case.grid[0] * case.grid[1]
    methods: dict[str, tuple[Callable[[], Tensor], float]] = {
        "ours, one pass": (lambda: ours(case), 1),
        "integrated gradients": (lambda: integrated_gradients(case), STEPS),
        "gradient x input": (lambda: gradient_times_input(case), 1),
        "Grad-CAM": (lambda: grad_cam(case), 1),
        "occlusion": (lambda: occlusion(case), players + 1),
        "random": (lambda: chance(case), 0),
    }
    if hasattr(case.model, "vit"):
        methods["attention rollout"] = lambda: attention_rollout(case), 1
    for budget in BUDGETS:
        methods[f"KernelSHAP {budget}"] = lambda budget=budget: kernel_shap(case, budget), budget
        if budget >= 4 * players:  # two orders and their reverses
            methods[f"permutations {budget}"] = lambda budget=budget: permutations(case, budget), budget
    scores = {}
    for name, (method, evaluations) in methods.items():
        start = time.perf_counter()
        attributions = method()
        scores[name] = score(case, attributions, truth, time.perf_counter() - start, evaluations)
        print(f"{name:24}" + "".join(f"{value:12.4g}" for value in scores[name].values()), flush=True)
    curve = {budget: scores[f"KernelSHAP {budget}"]["error_ratio"] for budget in BUDGETS}
    return scores, equivalent_evaluations(curve, scores["ours, one pass"]["error_ratio"])


def draw(scores: dict[str, dict], path: Path) -> None:
    """Error against number of model evaluations."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for name in ("KernelSHAP", "permutations"):
        budgets = [budget for budget in BUDGETS if f"{name} {budget}" in scores]
        axes.plot(budgets, [scores[f"{name} {budget}"]["error_ratio"] for budget in budgets], "o-", label=name)
    axes.plot([1], [scores["ours, one pass"]["error_ratio"]], "*", markersize=16, label="ours, one pass")
    axes.set(xlabel="model evaluations per image", ylabel="squared error / variance of exact values")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def best_of_gradients_and_attention(scores: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Which of them has the largest insertion - deletion, and how much larger ours is, relative to it."""
    measured = {name: score["insertion_minus_deletion"] for name, score in scores.items()}
    best = max((name for name in measured if name in GRADIENTS_AND_ATTENTION), key=lambda name: measured[name])
    return best, measured["ours, one pass"] / measured[best] - 1


def main() -> None:
    """Compare, print, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="outputs/demo/model", help="folder of a trained model")
    parser.add_argument("--data", help="folder for datasets.load_dataset with a test split; default digits")
    parser.add_argument("--truth-budget", type=int, default=65536, help="evaluations per image beyond 16 players")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--name", default="faithfulness_digits", help="of the result file")
    options = parser.parse_args()
    case = load_case(options.model, options.data, options.images)
    truth, noise = ground_truth(case, options.truth_budget)
    scores, equivalent = compare(case, truth)
    best, gain = best_of_gradients_and_attention(scores)
    summary = {
        "equivalent_evaluations_of_kernel_shap": equivalent,
        "best_gradient_or_attention_method": best,
        "insertion_minus_deletion_gain_over_it": gain,
        "noise_of_ground_truth": noise,
    }
    print(summary)
    path = RESULTS / f"{options.name}.json"
    write_result(path, {**summary, "images": options.images, "methods": scores})
    draw(scores, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
