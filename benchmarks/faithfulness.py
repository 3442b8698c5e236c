"""One-pass attributions against what people use today, on one trained model and the same images.

    python benchmarks/faithfulness.py
    python benchmarks/faithfulness.py --model path/to/model --data path/to/cifar10 --name faithfulness_cifar10

Without `--model`, the digits ViT of 64 players of `benchmarks/refinement.py` is trained, in its own game.

Each method is judged in three games: absent patches dropped, which is what this library's maps are of, and their
pixels black or blurred, with which other methods are at home. Methods that need a game have the one they are judged
in. The truth of each game are Shapley values: exact by enumeration for up to 16 players, beyond that from many more
evaluations than any method gets, with their own noise stated. Figures are of the predicted label; those of all labels
together stand apart, because even a map without any detail does well there. Two maps that cannot be right, a constant
one and ours upside down, are controls of every figure.

Images that judge come after the first test images, on which the priors of refinement were chosen.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, write_result
from datasets import load_dataset
from matplotlib.figure import Figure
from refinement import explained_model
from rivals import (
    BLACK,
    BLUR,
    BLURRED,
    GAMES,
    OWN,
    STEPS,
    Case,
    attention_rollout,
    chance,
    grad_cam,
    gradient_times_input,
    gradient_weighted_rollout,
    integrated_gradients,
    occlusion,
    refined,
    samplers,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

from hf_shapley import (
    attribution_correlation,
    digits_dataset,
    error_ratio,
    exact_shapley,
    insertion_deletion,
    interaction_share,
    kernel_shapley,
)

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
EVALUATIONS = 256
"""That refine a map, and that a sampler has in the tables of methods."""
ONE_PASS, REFINED, CONSTANT, INVERTED = "ours, one pass", f"ours, refined with {EVALUATIONS}", "constant", "inverted"
WITHOUT_A_UNIT = ("Grad-CAM", "attention rollout", "gradient-weighted rollout", "random")
"""Methods whose maps are no differences of logits, and so have no error."""


def digits_model(folder: Path, head_epochs: int) -> str:
    """Train the model of the refinement benchmark, unless it lies in the folder."""
    explained_model(folder, plain_epochs=40, head_epochs=head_epochs)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    return str(folder / "model")


def load_case(model: str, data: str | None, images: int, first: int = 0) -> Case:
    """The model of a folder and some test images of a data set, or of digits."""
    processor = AutoImageProcessor.from_pretrained(model)
    splits = load_dataset(data) if data else digits_dataset()
    pixels = processor(splits["test"][first : first + images]["image"], return_tensors="pt")["pixel_values"]
    return Case(AutoModelForImageClassification.from_pretrained(model).eval(), pixels)


def ours(case: Case) -> Tensor:
    return case.model.explain(case.pixels, case.labels.unsqueeze(1)).flatten(1)


def sampled(case: Case, name: str, sampler: Callable, budget: int) -> Tensor:
    """A sampler's maps of the predicted label: (B, N)."""
    found = [sampler(case, row, name, budget) for row in range(len(case.pixels))]
    return torch.stack([x[:, label if x.shape[1] > 1 else 0] for x, label in zip(found, case.labels, strict=True)])


class Comparison:
    """One model's images, their truth in each game, and our maps of every label (B, N, K)."""

    def __init__(self, case: Case, budgets: dict[str, int]):
        self.case = case
        with torch.no_grad():
            outputs = case.model(case.pixels)
        self.one_pass = outputs.attributions.double()
        self.even = self.one_pass.mean(1, keepdim=True).expand_as(self.one_pass)
        self.refined = {name: self._refine(name) for name in GAMES}
        self.truth, self.noise = {}, {}
        for name in GAMES:
            self.truth[name], self.noise[name] = ground_truth(case, name, budgets[name])

    def _refine(self, name: str) -> Tensor:
        if name == OWN:
            generator = torch.Generator().manual_seed(0)
            maps = self.case.model.explain(self.case.pixels, evaluations=EVALUATIONS, generator=generator)
            return maps.flatten(2).transpose(1, 2).double()
        rows = range(len(self.case.pixels))
        maps = [refined(self.case, row, name, EVALUATIONS, self.one_pass[row].float()) for row in rows]
        return torch.stack(maps).double()

    def methods(self, name: str) -> dict[str, tuple[Callable[[], Tensor], int]]:
        """What makes a map (B, N) of the predicted label to be judged in a game, and at how many evaluations."""
        case, one = self.case, self.case.of_predicted
        found: dict[str, tuple[Callable[[], Tensor], int]] = {
            ONE_PASS: (lambda: ours(case), 1),
            REFINED: (lambda: one(self.refined[OWN]), EVALUATIONS),
        }
        if name == OWN:
            found[REFINED] = (lambda: one(self._refine(OWN)), EVALUATIONS)
        else:
            found[f"{REFINED} of this game"] = (lambda: one(self._refine(name)), EVALUATIONS)
            found["truth of the game of dropped patches"] = (lambda: one(self.truth[OWN]), 0)
        found["truth"] = (lambda: one(self.truth[name]), 0)
        for title, (sampler, least) in samplers(case.players).items():
            if least <= EVALUATIONS:
                found[f"{title} {EVALUATIONS}"] = (partial(sampled, case, name, sampler, EVALUATIONS), EVALUATIONS)
        return found | self._rivals(name) | self._controls()

    def _rivals(self, name: str) -> dict[str, tuple[Callable[[], Tensor], int]]:
        case = self.case
        found = {
            "occlusion": (lambda: occlusion(case, name), case.players + 1),
            "integrated gradients from black": (lambda: integrated_gradients(case, BLACK), STEPS),
            "integrated gradients from blurred": (lambda: integrated_gradients(case, BLURRED), STEPS),
            "gradient x input": (lambda: gradient_times_input(case), 1),
            "Grad-CAM": (lambda: grad_cam(case), 1),
        }
        if hasattr(case.model, "vit"):
            found["attention rollout"] = (lambda: attention_rollout(case), 1)
            found["gradient-weighted rollout"] = (lambda: gradient_weighted_rollout(case), 1)
        return found

    def _controls(self) -> dict[str, tuple[Callable[[], Tensor], int]]:
        one = self.case.of_predicted
        return {
            "random": (lambda: chance(self.case), 0),
            CONSTANT: (lambda: one(self.even), 1),
            INVERTED: (lambda: one(2 * self.even - self.one_pass), 1),  # about its mean: the sum stays right
        }

    def judged(self, name: str) -> dict[str, dict]:
        """Every method's figures in a game."""
        scores = {}
        for method, (make, evaluations) in self.methods(name).items():
            start = time.perf_counter()
            maps = make().double()
            milliseconds = 1000 * (time.perf_counter() - start) / len(maps)
            found = self._score(name, maps, has_unit=method not in WITHOUT_A_UNIT)
            scores[method] = {"evaluations": evaluations, "milliseconds_per_image": milliseconds, **found}
            print(f"{name:8} {method:40}", *(show(value) for value in scores[method].values()), flush=True)
        return scores

    def _score(self, name: str, maps: Tensor, has_unit: bool) -> dict[str, float | None]:
        truth = self.case.of_predicted(self.truth[name])
        curves = insertion_deletion(
            lambda coalitions: self.case.values(coalitions, name), maps.float(), labels=self.case.labels
        )
        insertion, deletion = curves.insertion_auc.mean().item(), curves.deletion_auc.mean().item()
        return {
            "correlation": number(correlation(maps, truth)),
            "error": error_ratio(maps, truth).pooled if has_unit else None,
            "insertion": insertion,
            "deletion": deletion,
            "insertion_minus_deletion": insertion - deletion,
        }

    def of_all_labels(self) -> dict[str, dict]:
        """Error and correlation in the own game over all labels' values at once, and of each label by itself."""
        maps = {ONE_PASS: self.one_pass, REFINED: self.refined[OWN], CONSTANT: self.even}
        maps[INVERTED] = 2 * self.even - self.one_pass
        found = {}
        for method, values in maps.items():
            pair = values, self.truth[OWN]
            each = [x.transpose(1, 2).flatten(0, 1) for x in pair]
            found[method] = {
                "pooled": {"error": error_ratio(*pair).pooled, "correlation": attribution_correlation(*pair).pooled},
                "each label": {"error": error_ratio(*each).pooled, "correlation": number(correlation(*each))},
            }
        return found

    def interactions(self, name: str) -> dict[str, float]:
        """Of the truth, and for comparison by the map itself, whose own error is part of it."""

        def share(values: Tensor) -> float:
            generator = torch.Generator().manual_seed(0)
            game = partial(self.case.values, name=name)
            return interaction_share(game, values, num_samples=500, generator=generator).mean().item()

        by = {"by the truth": self.truth[name], "by the one pass": self.one_pass, "by the refined": self.refined[name]}
        return {title: share(values) for title, values in by.items()}

    def curves(self) -> dict[str, dict[str, float]]:
        """Error of the predicted label in the own game by sampler and evaluations, and of our map refined by them."""
        truth, found = self.case.of_predicted(self.truth[OWN]), {}

        def ours_refined(case: Case, row: int, name: str, budget: int) -> Tensor:
            return refined(case, row, name, budget, self.one_pass[row].float())

        for title, (sampler, least) in {**samplers(self.case.players), "ours, refined": (ours_refined, 4)}.items():
            found[title] = {}
            for budget in (budget for budget in BUDGETS if budget >= least):
                maps = sampled(self.case, OWN, sampler, budget).double()
                found[title][str(budget)] = error_ratio(maps, truth).pooled
            print(title, {budget: show(error) for budget, error in found[title].items()}, flush=True)
        return found


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def number(value: float) -> float | None:
    """JSON knows no NaN: what a constant map's correlation is."""
    return None if math.isnan(value) else value


def correlation(maps: Tensor, truth: Tensor) -> float:
    """Pearson's of each image's players, on average: NaN if any map is constant, but for rounding."""
    spread = maps.std(1) > 1e-6 * (1e-12 + maps.abs().amax(1))
    return attribution_correlation(maps, truth).mean if spread.all() else math.nan


def ground_truth(case: Case, name: str, budget: int) -> tuple[Tensor, float]:
    """Shapley values (B, N, K), and the error of those of the predicted label: 0 up to 16 players."""
    games = [case.image_game(row, name) for row in range(len(case.pixels))]
    if case.players <= 16:
        return torch.stack([exact_shapley(game, num_players=case.players) for game in games]).double(), 0.0
    generator = torch.Generator().manual_seed(1)
    options = {"num_players": case.players, "budget": budget, "sizes": "spread", "generator": generator}
    estimates = [kernel_shapley(game, **options) for game in tqdm(games, desc=f"truth, {name}", unit="image")]
    truth, errors = (
        torch.stack([getattr(x, part) for x in estimates]).double() for part in ("values", "standard_errors")
    )
    noise = case.of_predicted(errors).square().mean() / case.of_predicted(truth).var(1, correction=0).mean()
    return truth, noise.item()


def equivalent_evaluations(curve: dict[str, float], error: float) -> float | None:
    """Budget at which a falling error curve crosses `error`, interpolated in logarithms; None if it never does."""
    previous = None
    for budget, value in sorted((int(budget), value) for budget, value in curve.items()):
        if value <= error:
            if previous is None:
                return float(budget)
            (b0, e0), (b1, e1) = previous, (budget, value)
            share = (math.log(e0) - math.log(error)) / (math.log(e0) - math.log(max(e1, 1e-300)))
            return math.exp(math.log(b0) + share * (math.log(b1) - math.log(b0)))
        previous = budget, value
    return None


def best_of(curves: dict[str, dict[str, float]], without: tuple[str, ...] = ()) -> dict[str, float]:
    """The lowest error at each budget, of all samplers that start from nothing."""
    allowed = [curve for title, curve in curves.items() if title not in ("ours, refined", *without)]
    return {
        str(budget): min(curve[str(budget)] for curve in allowed if str(budget) in curve)
        for budget in BUDGETS
        if any(str(budget) in curve for curve in allowed)
    }


def equivalents(curves: dict[str, dict[str, float]], errors: dict[str, float]) -> dict[str, dict]:
    """For each of our maps, how many evaluations each sampler takes, and the best of them at each budget."""
    against = {title: curve for title, curve in curves.items() if title != "ours, refined"}
    against["best sampler"] = best_of(curves)
    against["best sampler but refined from nothing"] = best_of(curves, without=("refined from nothing",))
    return {
        name: {title: equivalent_evaluations(curve, error) for title, curve in against.items()}
        for name, error in errors.items()
    }


def draw(curves: dict[str, dict[str, float]], one_pass: float, path: Path) -> None:
    """Error against number of model evaluations."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for title, curve in curves.items():
        style = "s-" if title == "ours, refined" else "o--"
        axes.plot([int(budget) for budget in curve], list(curve.values()), style, markersize=4, label=title)
    axes.plot([1], [one_pass], "*", markersize=16, label=ONE_PASS)
    axes.set(xlabel="model evaluations per image", ylabel="squared error / variance of the truth")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a trained model; default a digits ViT, trained in --output")
    parser.add_argument("--output", type=Path, default=Path("outputs/faithfulness"), help="folder of the digits ViT")
    parser.add_argument("--head-epochs", type=int, default=60, help="of the digits ViT")
    parser.add_argument("--data", help="folder for datasets.load_dataset with a test split; default digits")
    parser.add_argument("--truth-budget", type=int, default=16_384, help="evaluations per image beyond 16 players")
    parser.add_argument("--painted-truth-budget", type=int, default=8192, help="the same where pixels are painted")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--first", type=int, default=200, help="of the test images; earlier ones chose the priors")
    parser.add_argument("--name", default="faithfulness_digits", help="of the result file")
    return parser.parse_args()


def main() -> None:
    """Compare, print, write the table and the figure."""
    options = arguments()
    model = options.model or digits_model(options.output, options.head_epochs)
    case = load_case(model, options.data, options.images, options.first)
    budgets = dict.fromkeys(GAMES, options.painted_truth_budget) | {OWN: options.truth_budget}
    comparison = Comparison(case, budgets)
    last = options.first + options.images - 1
    settings = {
        "players": case.players,
        "judged on": f"test images {options.first} to {last}, which chose nothing",
        "chosen on": "priors of refinement: earlier test images; recipe of the model: other data",
        "truth_budgets": budgets,
        "blur, in sides of the image": BLUR,
    }
    if not options.model:
        settings["head_epochs"] = options.head_epochs
    games = {
        name: {
            "noise_of_the_truth": comparison.noise[name],
            "interaction_share": comparison.interactions(name),
            "methods": comparison.judged(name),
        }
        for name in GAMES
    }
    curves = comparison.curves()
    errors = {name: games[OWN]["methods"][name]["error"] for name in (ONE_PASS, REFINED)}
    summary = {
        "settings": settings,
        "game_of_the_model": case.model.game_name,
        "images": options.images,
        "equivalent_evaluations": equivalents(curves, errors),
        "error_by_evaluations": curves,
        "all_labels": comparison.of_all_labels(),
    }
    print(summary["equivalent_evaluations"], summary["all_labels"])
    path = RESULTS / f"{options.name}.json"
    write_result(path, {**summary, "games": games})
    draw(curves, errors[ONE_PASS], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
