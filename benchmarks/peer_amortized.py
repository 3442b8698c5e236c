"""Joint training against the published two-stage recipe: quality of the attributions per unit of training cost.

The peer is ViT-Shapley (arXiv:2206.05282): a surrogate learns the plain classifier's predictions under random masks;
then an explainer, a second network, learns the Shapley values of the frozen surrogate from 32 paired masks per image.
Written here on the same backbone, start checkpoint, images and optimizer as the joint model. Two things differ from
the publication in the peer's favour: masks follow the true Shapley kernel, and logits are explained, not
probabilities, so that errors have one unit.

Cost is in plain training steps of the same batch, twice: `cost` is processor time over that of a plain step, measured
in the same run; `counted_cost` counts passes over a batch, a forward as one and a backward as two of a plain step's
three. Each curve is one run, its quality measured on the way against the certificate of the game that is being
explained: the surrogate's, or the joint model's own.

    python benchmarks/recipe_study.py --data path/to/cifar10 --study peer --recipes plain --bf16
    python benchmarks/peer_amortized.py --data path/to/cifar10 --start outputs/recipe_study/peer/vit-seed0/start --bf16
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from common import RESULTS, write_result
from datasets import load_dataset
from recipe_study import ATTENTION, RECIPES, Images, normalise
from recipe_study import arguments as shared_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification, set_seed
from transformers.models.vit.modeling_vit import ViTLayer

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    ShapleyViTForImageClassification,
    attribution_error_certificate,
    sample_coalitions,
    shapley_loss,
)


def masked_logits(model: nn.Module, pixel_values: Tensor, coalitions: Tensor) -> Tensor:
    """Logits of a stock ViT that sees each image's present patches only: (B, M, N) bool -> (B, M, K)."""
    images = pixel_values.repeat_interleave(coalitions.shape[1], dim=0)
    mask = F.pad(coalitions.flatten(0, 1), (1, 0), value=True)  # CLS is always there
    return model(images, attention_mask=mask.long()).logits.float().unflatten(0, coalitions.shape[:2])


class SurrogateTrainer(Trainer):
    """Predictions under masks of uniform size learn the classifier's prediction for the full image."""

    teacher: nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values, players = inputs["pixel_values"], model.vit.embeddings.patch_embeddings.num_patches
        sizes = torch.randint(0, players + 1, (len(pixel_values), 1), device=pixel_values.device)
        ranks = torch.rand(len(pixel_values), players, device=pixel_values.device).argsort(-1).argsort(-1)
        with torch.no_grad():
            target = self.teacher(pixel_values).logits.float().softmax(-1)
        logits = masked_logits(model, pixel_values, (ranks < sizes).unsqueeze(1)).squeeze(1)
        return F.cross_entropy(logits, target)


class Explainer(nn.Module):
    """A backbone of its own, one more layer and a linear map: Shapley values (B, N, K) up to their sum."""

    def __init__(self, surrogate: ViTForImageClassification):
        super().__init__()
        self.vit = copy.deepcopy(surrogate.vit)
        self.layer = ViTLayer(surrogate.config)
        self.classifier = nn.Linear(surrogate.config.hidden_size, surrogate.config.num_labels)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        tokens = self.layer(self.vit(pixel_values).last_hidden_state)[:, 1:]
        return self.classifier(tokens).float() / tokens.shape[1]


def normalised(explainer: Explainer, surrogate: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Attributions (B, N, K) that add up, by spreading the gap evenly, and the empty coalition's value (B, 1, K)."""
    phi = explainer(pixel_values)
    players = phi.shape[1]
    ends = torch.tensor([[False], [True]], device=phi.device).expand(2, players)
    with torch.no_grad():
        empty, full = masked_logits(surrogate, pixel_values, ends.expand(len(phi), -1, -1)).unbind(1)
    gap = full - empty - phi.sum(1)
    return phi + gap.unsqueeze(1) / players, empty.unsqueeze(1)


class ExplainerTrainer(Trainer):
    """Regression of the frozen surrogate's values of 32 coalitions per image, 16 and their complements."""

    surrogate: nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values = inputs["pixel_values"]
        phi, empty = normalised(model, self.surrogate, pixel_values)
        drawn = sample_coalitions(len(phi), 16, num_players=phi.shape[1], device=phi.device)
        coalitions = torch.cat([drawn, ~drawn], dim=1)
        with torch.no_grad():
            values = torch.cat(
                [masked_logits(self.surrogate, pixel_values, part) for part in coalitions.split(2, dim=1)], dim=1
            )
        return shapley_loss(phi, coalitions, values - empty)


class Meter(TrainerCallback):
    """Measures at chosen steps, and keeps account of the processor time of training alone."""

    def __init__(self, steps: list[int], measure, plain_seconds: float, passes: float, before: "Meter | None" = None):
        self.steps, self.measure, self.plain_seconds, self.passes = set(steps), measure, plain_seconds, passes
        self.cost, self.counted_cost = (before.cost, before.counted_cost) if before else (0.0, 0.0)
        self.points: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.cost += (time.process_time() - self.clock) / self.plain_seconds
        self.counted_cost += self.passes / 3
        if state.global_step in self.steps:
            model.eval()
            costs = {"cost": round(self.cost, 1), "counted_cost": round(self.counted_cost, 1)}
            self.points.append({"step": state.global_step, **costs, **self.measure(model)})
            print(json.dumps(self.points[-1]), flush=True)
            model.train()
        self.clock = time.process_time()


def arguments(cls, options, steps: int, **extra) -> TrainingArguments:
    """Training arguments of every stage: those of the recipe study, for a number of steps and without checkpoints."""
    extra |= dict(max_steps=steps, save_strategy="no", disable_tqdm=True)
    return shared_arguments(cls, options, options.output, options.learning_rate, **extra)


class Study:
    """The shared start, images and measurements."""

    def __init__(self, options):
        data = load_dataset(options.data)
        self.options, self.train, self.test = options, Images(data["train"], None), Images(data["test"], None)
        self.pixels = normalise(self.test.pixels)
        self.plain_seconds = self._time_a_plain_step()

    def plain(self) -> ViTForImageClassification:
        return ViTForImageClassification.from_pretrained(self.options.start, **ATTENTION)

    def fit(self, trainer_class, model: nn.Module, steps: int, callbacks=(), args=None, **attributes) -> Trainer:
        set_seed(self.options.seed)
        args = args or arguments(TrainingArguments, self.options, steps)
        trainer = trainer_class(
            model, args, train_dataset=self.train, data_collator=self.train.augment, callbacks=list(callbacks)
        )
        for name, value in attributes.items():
            setattr(trainer, name, value.to(args.device))
        trainer.train()
        model.eval()
        return trainer

    def _time_a_plain_step(self, steps: int = 30) -> float:
        clock = Meter([steps], lambda model: {}, 1.0, 3)
        self.fit(Trainer, self.plain(), steps, [clock])
        return clock.cost / steps

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        logits = torch.cat([model(part.to(model.device)).logits.cpu() for part in self.pixels.split(500)])
        return (logits.argmax(-1) == self.test.labels).double().mean().item()

    @torch.no_grad()
    def quality(self, game, attributions: Tensor) -> dict:
        """Certificate over the first test images; `game` takes one image and its coalitions."""
        images = self.pixels[: self.options.images].to(attributions.device)
        found = attribution_error_certificate(
            [lambda coalitions, image=image: game(image[None], coalitions[None])[0] for image in images],
            attributions,
            budget=self.options.budget,
            batch_size=512,
            generator=torch.Generator(attributions.device).manual_seed(0),
        )
        return {
            "error_ratio": found.error_ratio,
            "interval": found.error_ratio_interval,
            "correlation": found.correlation,
        }


def peer(study: Study) -> dict:
    """Surrogate, then explainer; the curve is the explainer's, its costs hold the surrogate's."""
    options, classifier = study.options, study.plain().eval()
    surrogate = study.plain()
    # The teacher's forward, and a plain step.
    clock = Meter([options.surrogate_steps], lambda model: {}, study.plain_seconds, 1 + 3)
    study.fit(SurrogateTrainer, surrogate, options.surrogate_steps, [clock], teacher=classifier)
    first = study.pixels[: options.images].to(surrogate.device)

    @torch.no_grad()
    def measure(explainer: Explainer) -> dict:
        phi, _ = normalised(explainer, surrogate, first)
        return study.quality(lambda image, coalitions: masked_logits(surrogate, image, coalitions), phi)

    # 32 coalitions and both ends through the surrogate, and a plain step of the explainer.
    meter = Meter(options.explainer_at, measure, study.plain_seconds, 32 + 2 + 3, before=clock)
    study.fit(ExplainerTrainer, Explainer(surrogate), max(options.explainer_at), [meter], surrogate=surrogate)
    return {
        "accuracy_classifier": study.accuracy(classifier),
        "accuracy_surrogate": study.accuracy(surrogate),
        "surrogate": clock.points[-1],
        "curve": meter.points,
    }


def joint(study: Study) -> dict:
    """The recipe named by the options, from the same start."""
    options, recipe = study.options, RECIPES[study.options.recipe]
    set_seed(options.seed)
    model = ShapleyViTForImageClassification.from_pretrained(options.start, **ATTENTION, **recipe.config)

    @torch.no_grad()
    def measure(model: ShapleyViTForImageClassification) -> dict:
        phi = model(study.pixels[: options.images].to(model.device)).attributions
        return study.quality(model.coalition_values, phi) | {"accuracy": study.accuracy(model)}

    steps = max(options.joint_at)
    args = arguments(ShapleyTrainingArguments, options, steps, **recipe.training)
    # A plain step, and pairs of coalitions in one pass over their image's tokens, some with a backward pass.
    pairs = args.num_pairs * args.shapley_fraction
    meter = Meter(options.joint_at, measure, study.plain_seconds, 3 + pairs * (1 + 2 * args.value_gradient_fraction))
    study.fit(ShapleyTrainer, model, steps, [meter], args)
    return {"recipe": options.recipe, "curve": meter.points}


def main() -> None:
    """Train both, print and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10 for datasets.load_dataset")
    parser.add_argument("--start", type=Path, required=True, help="plain ViT checkpoint that both start from")
    joint_recipes = [name for name, recipe in RECIPES.items() if recipe]
    parser.add_argument("--recipe", default="own game", choices=joint_recipes)
    parser.add_argument("--surrogate-steps", type=int, default=390)
    parser.add_argument("--explainer-at", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--joint-at", type=int, nargs="+", default=[50, 100, 200, 390])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=32, help="test images for the certificate")
    parser.add_argument("--budget", type=int, default=1024, help="evaluations per image for the certificate")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/peer_amortized"))
    parser.add_argument("--result", type=Path, default=RESULTS / "peer_amortized.json")
    options = parser.parse_args()
    study = Study(options)
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("data", "result")
    }
    results = {"settings": settings, "plain_step_seconds": study.plain_seconds}
    for name, run in (("peer", peer), ("joint", joint)):
        results[name] = run(study)
        write_result(options.result, results)


if __name__ == "__main__":
    main()
