"""Joint training against published recipes: quality of the attributions per unit of training cost.

A peer is ViT-Shapley (arXiv:2206.05282): a surrogate learns the plain classifier's predictions under random masks;
then an explainer, a second network, learns the Shapley values of the frozen surrogate from 32 paired masks per image.
Written here on the same backbone, start checkpoint, images and optimizer as the joint model. Two things differ from
the publication in the peer's favour: masks follow the true Shapley kernel, and logits are explained, not
probabilities, so that errors have one unit.

Cost is in plain training steps of the same batch, twice: `cost` is processor time over that of a plain step, measured
in the same run; `counted_cost` counts passes over a batch, a forward as one and a backward as two of a plain step's
three. Each curve is one run, its quality measured on the way against the certificate of the game that is being
explained: the surrogate's, or the joint model's own.

On CIFAR-10, both start from one plain checkpoint:

    python benchmarks/recipe_study.py --data path/to/cifar10 --study peer --recipes plain --bf16
    python benchmarks/peer_amortized.py --data path/to/cifar10 --start outputs/recipe_study/peer/vit-seed0/start --bf16

On scikit-learn's digits everything starts from nothing, and there is a third: ViaSHAP (arXiv:2505.04775), one network
whose prediction is the sum of its attributions, after its authors' code for images. It has the same backbone, images,
optimizer and counted cost, and each is judged in its own game and in that of the others: ViaSHAP's absent patches
have zeroed pixels, those of the others are dropped.

    python benchmarks/peer_amortized.py
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, write_result
from datasets import load_dataset
from recipe_study import ATTENTION, RECIPES, Images, normalise
from recipe_study import arguments as shared_arguments
from sanity import SCRATCH_RATE, SHAPE, TUNING_RATE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    set_seed,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTLayer

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    ShapleyViTConfig,
    ShapleyViTForImageClassification,
    attribution_error_certificate,
    digits_dataset,
    interaction_share,
    kernel_shapley,
    sample_coalitions,
    shapley_loss,
)
from hf_shapley.training.digits import EVERYTHING_FLOWS, SHORT_RUN, VOTES, trainable

Game = Callable[[Tensor, Tensor], Tensor]
"""Images (B, C, H, W) and coalitions (B, M, N) -> values (B, M, K)."""
VIASHAP_WEIGHT, VIASHAP_COALITIONS = 16.0, 2
FROZEN_PAIRS = 4  # of each image and step, as the trainer has it where the classifier is frozen
PLAIN_STEPS = 330
"""Of the plain classifier of digits, and of its surrogate: 15 epochs."""
NEARLY_EXACT, INTERACTION_IMAGES = 1024, 6


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


class ViaShap(nn.Module):
    """A vote of each patch for each label, (B, N, K), whose sum is the prediction."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def attributions(self, pixel_values: Tensor) -> Tensor:
        tokens = self.vit(pixel_values).last_hidden_state[:, 1:]
        return self.classifier(tokens) / tokens.shape[1]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.attributions(pixel_values).sum(1))


def zeroed(pixel_values: Tensor, coalitions: Tensor) -> Tensor:
    """Images whose absent patches, of a square grid, have zeroed pixels: (B, C, H, W), (B, M, N) -> (B M, C, H, W)."""
    side = round(coalitions.shape[-1] ** 0.5)
    step = pixel_values.shape[-1] // side
    present = coalitions.unflatten(-1, (side, side)).repeat_interleave(step, -1).repeat_interleave(step, -2)
    return (pixel_values.unsqueeze(1) * present.unsqueeze(2)).flatten(0, 1)


@torch.no_grad()
def zeroed_values(model: nn.Module, pixel_values: Tensor, coalitions: Tensor) -> Tensor:
    """The game of zeroed pixels, of any classifier: (B, M, K)."""
    return model(zeroed(pixel_values, coalitions)).logits.float().unflatten(0, coalitions.shape[:2])


@torch.no_grad()
def votes_of_present(model: ViaShap, pixel_values: Tensor, coalitions: Tensor) -> Tensor:
    """The game of dropped patches: what the present ones, which see no other, vote together: (B, M, K)."""
    images = pixel_values.repeat_interleave(coalitions.shape[1], dim=0)
    mask = F.pad(coalitions.flatten(0, 1), (1, 0), value=True)
    tokens = model.vit(images, attention_mask=mask.long()).last_hidden_state[:, 1:]
    votes = model.classifier(tokens) / tokens.shape[1] * mask[:, 1:, None]
    return votes.sum(1).unflatten(0, coalitions.shape[:2])


class ViaShapTrainer(Trainer):
    """MSE on one-hot labels, and 16 times that of f(0) + sum_{i in S} phi_i from f(x_S), gradients through both."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values = inputs["pixel_values"]
        phi = model.attributions(pixel_values)
        empty = model(torch.zeros_like(pixel_values[:1])).logits
        coalitions = sample_coalitions(len(phi), VIASHAP_COALITIONS, num_players=phi.shape[1])
        values = model(zeroed(pixel_values, coalitions)).logits.unflatten(0, coalitions.shape[:2])
        wanted = F.one_hot(inputs["labels"], phi.shape[-1]).float()
        regression = F.mse_loss(empty.unsqueeze(0) + coalitions.float() @ phi, values)
        return F.mse_loss(phi.sum(1), wanted) + VIASHAP_WEIGHT * regression


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
    passes = 3 + (args.num_pairs or 1) * (1 + 2 * args.value_gradient_fraction)
    meter = Meter(options.joint_at, measure, study.plain_seconds, passes)
    study.fit(ShapleyTrainer, model, steps, [meter], args)
    return {"recipe": options.recipe, "curve": meter.points}


class DigitsStudy:
    """Digits, 16 players: every network starts from nothing, and may cost so many plain steps in all."""

    def __init__(self, options):
        self.options = options
        processor, splits = ViTImageProcessorPil(size={"height": 8, "width": 8}), digits_dataset()
        pixels = {
            name: processor(split["image"][:], return_tensors="pt")["pixel_values"] for name, split in splits.items()
        }
        self.train = trainable(pixels["train"], splits["train"]["label"][:])
        self.test, self.labels = pixels["test"], torch.tensor(splits["test"]["label"][:])
        self.judges = self.test[options.first : options.first + options.images]
        clock = Meter([30], lambda model: {}, 1.0, 3)
        self.fit(Trainer, self.new(ViTForImageClassification), 30, [clock])
        self.plain_seconds = clock.cost / 30

    def new(self, cls: type, config: type = ViTConfig) -> nn.Module:
        set_seed(self.options.seed)
        return cls(config(**SHAPE))

    def plain(self) -> tuple[ViTForImageClassification, Meter]:
        """A plain classifier, and what it cost."""
        model, meter = self.new(ViTForImageClassification), self.meter([PLAIN_STEPS], lambda model: {}, 3)
        self.fit(Trainer, model, PLAIN_STEPS, [meter])
        return model, meter

    def meter(self, points: list[int], measure: Callable, passes: float, before: Meter | None = None) -> Meter:
        return Meter(points, measure, self.plain_seconds, passes, before)

    def fit(self, trainer_class, model, steps: int, callbacks=(), cls=TrainingArguments, attributes=(), **extra):
        """Train for so many steps; `attributes` are what the trainer needs beside."""
        set_seed(self.options.seed)
        args = cls(
            output_dir=str(self.options.output),
            seed=self.options.seed,
            max_steps=steps,
            per_device_train_batch_size=64,
            weight_decay=0.05,
            logging_strategy="no",
            disable_tqdm=True,
            **{"learning_rate": SCRATCH_RATE, "warmup_steps": 50, **SHORT_RUN, **extra},
        )
        trainer = trainer_class(model, args, train_dataset=self.train, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        for name, value in dict(attributes).items():
            setattr(trainer, name, value)
        trainer.train()
        model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        return (model(self.test).logits.argmax(-1) == self.labels).double().mean().item()

    @torch.no_grad()
    def quality(self, game: Game, phi: Tensor, labels: Tensor) -> dict:
        """The certificate of the maps of one label of each image: (B, N, K), (B)."""
        chosen = phi.gather(2, labels.view(-1, 1, 1).expand(-1, phi.shape[1], 1)).detach()
        games = [
            lambda coalitions, x=x, label=label: game(x[None], coalitions[None])[0][:, label, None]
            for x, label in zip(self.judges, labels, strict=True)
        ]
        options = {"budget": self.options.digits_budget, "generator": torch.Generator().manual_seed(0)}
        found = attribution_error_certificate(games, chosen, **options)
        return {
            "error_ratio": found.error_ratio,
            "interval": found.error_ratio_interval,
            "correlation": found.correlation,
        }

    @torch.no_grad()
    def interactions(self, game: Game) -> float:
        """Share that nearly exact values leave unexplained, of a game of all labels."""
        images, generator = self.judges[:INTERACTION_IMAGES], torch.Generator().manual_seed(0)
        options = {"num_players": 16, "budget": NEARLY_EXACT, "sizes": "spread", "generator": generator}
        exact = [kernel_shapley(lambda s, x=x: game(x[None], s[None])[0], **options).values for x in images]
        values = partial(game, images)
        return (
            interaction_share(values, torch.stack(exact).float(), num_samples=500, generator=generator).mean().item()
        )

    def at_the_end(self, games: dict[str, Game], phi: Tensor, labels: Tensor) -> dict:
        """Both games: what the map's error is, and how much of the game no map can show."""
        return {
            name: self.quality(game, phi, labels) | {"interaction_share": self.interactions(game)}
            for name, game in games.items()
        }


def points(steps: int, count: int = 6) -> list[int]:
    return sorted({max(1, round(steps * part / count)) for part in range(1, count + 1)})


def digits_viashap(study: DigitsStudy) -> dict:
    """One stage; three passes with their backward passes."""
    model: ViaShap = study.new(ViaShap)
    games: dict[str, Game] = {
        "zeroed pixels": partial(zeroed_values, model),
        "dropped": partial(votes_of_present, model),
    }

    @torch.no_grad()
    def maps(spread: bool) -> tuple[Tensor, Tensor]:
        phi, empty = model.attributions(study.judges), model(torch.zeros_like(study.judges[:1])).logits
        labels = phi.sum(1).argmax(-1)
        # That they add up to f(x), and not to f(x) - f(0), is made up for: evenly, which is best for the peer.
        return phi - empty.unsqueeze(1) / phi.shape[1] if spread else phi, labels

    def measure(model) -> dict:
        return study.quality(games["zeroed pixels"], *maps(True)) | {"accuracy": study.accuracy(model)}

    steps = study.options.cost // (1 + VIASHAP_COALITIONS)
    meter = study.meter(points(int(steps)), measure, 3 * (1 + VIASHAP_COALITIONS))
    study.fit(ViaShapTrainer, model, int(steps), [meter])
    return {
        "own_game": "zeroed pixels",
        "curve": meter.points,
        "at_the_end": study.at_the_end(games, *maps(True)),
        "as_it_is": study.quality(games["zeroed pixels"], *maps(False)),
    }


def judged_in_own_game(study: DigitsStudy, model: ShapleyViTForImageClassification) -> tuple[Callable, Callable]:
    """What measures our model on the way, and at the end."""
    games: dict[str, Game] = {"dropped": model.coalition_values, "zeroed pixels": partial(zeroed_values, model)}

    @torch.no_grad()
    def maps() -> tuple[Tensor, Tensor]:
        outputs = model(study.judges)
        return outputs.attributions, outputs.logits.argmax(-1)

    def measure(model) -> dict:
        return study.quality(games["dropped"], *maps()) | {"accuracy": study.accuracy(model)}

    return measure, lambda: study.at_the_end(games, *maps())


def digits_joint(study: DigitsStudy) -> dict:
    """Everything learns together from nothing, patches vote: a plain step, and a pair that is learned through."""
    set_seed(study.options.seed)
    model = ShapleyViTForImageClassification(ShapleyViTConfig(**SHAPE, **VOTES))
    measure, at_the_end = judged_in_own_game(study, model)
    steps = study.options.cost // 2
    meter = study.meter(points(steps), measure, 3 + 3)
    study.fit(ShapleyTrainer, model, steps, [meter], ShapleyTrainingArguments, **EVERYTHING_FLOWS)
    return {"own_game": "dropped", "curve": meter.points, "at_the_end": at_the_end()}


def digits_head_alone(study: DigitsStudy) -> dict:
    """The recommended recipe: from the plain classifier a third of the rest together, then the head alone."""
    plain, before = study.plain()
    plain.save_pretrained(study.options.output / "plain")
    model = ShapleyViTForImageClassification.from_pretrained(study.options.output / "plain")
    measure, at_the_end = judged_in_own_game(study, model)
    rest = study.options.cost - before.counted_cost
    passes = 3 + 1 + 2 * ShapleyTrainingArguments.value_gradient_fraction
    steps = int(rest / 3 / (passes / 3))
    first = study.meter(points(steps, 2), measure, passes, before)
    study.fit(ShapleyTrainer, model, steps, [first], ShapleyTrainingArguments, learning_rate=TUNING_RATE)
    model.freeze_classifier()
    passes = 1 + FROZEN_PAIRS + 0.5  # a forward, the pairs, and a backward pass through the head's one layer
    steps = int(2 * rest / 3 / (passes / 3))
    second = study.meter(points(steps, 4), measure, passes, before=first)
    study.fit(ShapleyTrainer, model, steps, [second], ShapleyTrainingArguments, learning_rate=TUNING_RATE)
    stages = {"together": first, "head alone": second}
    curve = [{"stage": stage, **point} for stage, meter in stages.items() for point in meter.points]
    return {"own_game": "dropped", "curve": curve, "at_the_end": at_the_end()}


def digits_two_stages(study: DigitsStudy) -> dict:
    """The plain classifier and its surrogate have as many steps, the explainer what is left of the cost."""
    classifier, first = study.plain()
    surrogate = copy.deepcopy(classifier)
    second = study.meter([PLAIN_STEPS], lambda model: {}, 1 + 3, before=first)  # the teacher's forward, a plain step
    options = {"attributes": {"teacher": classifier}, "learning_rate": TUNING_RATE}
    study.fit(SurrogateTrainer, surrogate, PLAIN_STEPS, [second], **options)
    games: dict[str, Game] = {
        "dropped": partial(_dropped, surrogate),
        "zeroed pixels": partial(zeroed_values, surrogate),
    }
    explainer = Explainer(surrogate)

    @torch.no_grad()
    def maps() -> tuple[Tensor, Tensor]:
        return normalised(explainer, surrogate, study.judges)[0], surrogate(study.judges).logits.argmax(-1)

    def measure(model) -> dict:
        return study.quality(games["dropped"], *maps())

    passes = 32 + 2 + 3
    steps = int((study.options.cost - second.counted_cost) / (passes / 3))
    third = study.meter(points(steps), measure, passes, before=second)
    options = {"attributes": {"surrogate": surrogate}, "learning_rate": TUNING_RATE}
    study.fit(ExplainerTrainer, explainer, steps, [third], **options)
    return {
        "own_game": "dropped",
        "accuracy_classifier": study.accuracy(classifier),
        "accuracy_surrogate": study.accuracy(surrogate),
        "cost_before_the_explainer": second.counted_cost,
        "curve": third.points,
        "at_the_end": study.at_the_end(games, *maps()),
    }


@torch.no_grad()
def _dropped(model: nn.Module, pixel_values: Tensor, coalitions: Tensor) -> Tensor:
    return masked_logits(model, pixel_values, coalitions)


def on_digits(options) -> None:
    if options.cost < 3 * PLAIN_STEPS:
        raise SystemExit(
            f"--cost must be at least {3 * PLAIN_STEPS}: classifier and surrogate come before the explainer."
        )
    study = DigitsStudy(options)
    last = options.first + options.images - 1
    settings = {
        "counted cost in plain steps of 64 images": options.cost,
        "judged on": f"test images {options.first} to {last}, which chose nothing",
        "evaluations of the certificate": options.digits_budget,
        "learning rates": {"from nothing": SCRATCH_RATE, "later stages": TUNING_RATE},
        "seed": options.seed,
    }
    results: dict = {"settings": settings, "plain_step_seconds": study.plain_seconds}
    runs = {
        "ViaSHAP": digits_viashap,
        "fine-tuned, then head alone": digits_head_alone,
        "surrogate and explainer": digits_two_stages,
        "joint from nothing": digits_joint,
    }
    for name, run in runs.items():
        print(name, flush=True)
        results[name] = run(study)
        print(results[name]["at_the_end"], flush=True)
        write_result(RESULTS / "peer_amortized_digits.json", results)


def main() -> None:
    """Train all, print and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of CIFAR-10 for datasets.load_dataset; default digits")
    parser.add_argument("--start", type=Path, help="plain ViT checkpoint that both start from on CIFAR-10")
    parser.add_argument("--cost", type=int, default=2500, help="on digits: plain steps that each recipe may cost")
    parser.add_argument("--first", type=int, default=200, help="on digits: first of the test images that judge")
    parser.add_argument("--digits-budget", type=int, default=512, help="on digits: evaluations for the certificate")
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
    if not options.data:
        on_digits(options)
        return
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
