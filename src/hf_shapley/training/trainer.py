"""Trainer that learns classification and Shapley values jointly."""

import logging
import shutil
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, has_length

from ..data.labels import check_labels_of_checkpoint
from ..data.picture_rows import named_pictures
from ..faithfulness.certificate import attribution_error_certificate
from ..models.checks import check_count, check_number, check_shapley_model
from ..models.coalitions import COALITION_SIZES, coalitions_to_ids, importance_weights, sample_coalitions
from ..models.heads import is_own_part, scale_gradient, weight_of
from ..models.modeling_shapley import ShapleyImageClassifierOutput
from ..publishing.hub import keep_card_of_hub
from ..publishing.model_card import write_model_card
from ..publishing.training_card import render_training_card
from .checkpoints import complete_checkpoint, discard_surplus_checkpoints, marked_incomplete
from .losses import coalition_label_loss, coalition_loss, coalition_regression_loss, paired_residual_loss

logger = logging.getLogger(__name__)

COALITION_TARGETS = ("prediction", "label")
MEASURED = "attribution_error"  # of an evaluation, with its interval
NO_STEP = (-1, 0)  # (optimizer step, batches of it seen) before the first one


@dataclass
class ShapleyTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the knobs of the joint loss."""

    shapley_weight: float = field(default=1.0, metadata={"help": "Weight of the Shapley regression."})
    shapley_warmup: float = field(
        default=0.0, metadata={"help": "Fraction of the training steps over which `shapley_weight` ramps up from 0."}
    )
    coalition_weight: float = field(default=1.0, metadata={"help": "Weight of the masked predictions' loss."})
    coalition_target: str = field(
        default="prediction",
        metadata={"help": "What masked predictions learn: the full image's 'prediction', or the true 'label'."},
    )
    value_gradient: float = field(
        default=1.0,
        metadata={"help": "Share of the Shapley regression's gradient that flows through v(S): 0 detaches it."},
    )
    odd_weight: float = field(
        default=1.0, metadata={"help": "Weight of the odd part of a pair's error, which Shapley values depend on."}
    )
    readout_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight, beside the Shapley regression on the labels and times its own, of that on what the "
            "classifier reads, whatever the labels: attributions then hold for labels to come."
        },
    )
    even_weight: float = field(
        default=1.0, metadata={"help": "Weight of the even part of a pair's error, which measures interactions."}
    )
    num_pairs: int = field(default=1, metadata={"help": "Pairs (coalition and complement) per image and step."})
    coalition_sizes: str = field(
        default="kernel",
        metadata={"help": "Sizes of coalitions: drawn by the Shapley 'kernel', or 'spread' more evenly and weighted."},
    )
    shapley_fraction: float = field(
        default=1.0, metadata={"help": "Fraction of each batch that takes the Shapley branch, above 0."}
    )
    value_gradient_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of the Shapley branch's images that learn through v(S), with a weight that makes up for "
            "the others, whose v(S) is evaluated without gradient; above 0."
        },
    )
    shapley_every: int = field(default=1, metadata={"help": "Take the Shapley branch on every k-th step only."})
    attribution_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the attribution head and coalition adapters, whose weights start new; default "
            "that of all."
        },
    )
    attribution_error_images: int = field(
        default=0,
        metadata={
            "help": "Images of each evaluation data set, its first ones, to measure the attribution error on: "
            "`eval_attribution_error`, and its interval `eval_attribution_error_low` and `_high`, to be trusted for "
            "20 images or more. Each image costs two forwards for each of its patches. 0 leaves it out."
        },
    )

    def __post_init__(self):
        self._prepare_to_measure()
        super().__post_init__()
        for name in ("shapley_warmup", "value_gradient"):
            check_number(getattr(self, name), name, "in [0, 1]", lambda share: 0 <= share <= 1)
        for name in ("shapley_fraction", "value_gradient_fraction"):
            check_number(getattr(self, name), name, "above 0, at most 1", lambda share: 0 < share <= 1)
        for name in ("shapley_weight", "coalition_weight", "readout_weight", "odd_weight", "even_weight"):
            check_number(getattr(self, name), name, "0 or more, finite", lambda weight: 0 <= weight < float("inf"))
        if self.attribution_learning_rate is not None:
            check_number(
                self.attribution_learning_rate,
                "attribution_learning_rate",
                "above 0, finite",
                lambda x: 0 < x < float("inf"),
            )
        for name in ("num_pairs", "shapley_every"):
            check_count(getattr(self, name), name)
        for name, choices in (("coalition_target", COALITION_TARGETS), ("coalition_sizes", COALITION_SIZES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if self.ddp_find_unused_parameters is None:
            # One forward per step uses every parameter: looking for unused ones would only cost time.
            self.ddp_find_unused_parameters = False

    def _prepare_to_measure(self) -> None:
        """Refuse too few images for the attribution error; the best model is that of the least."""
        images, chooses = self.attribution_error_images, MEASURED in (self.metric_for_best_model or "")
        check_count(images, "attribution_error_images", 0)
        if images == 1 or (chooses and images == 0):
            raise ValueError(
                f"`attribution_error_images` must be at least 2 to measure an error, got {images}: 32 is a good start."
            )
        if chooses and self.greater_is_better is None:
            self.greater_is_better = False  # the stock rule is that greater is better, of a loss alone not


def _collate(rows: list[Any]) -> dict[str, Any]:
    """A batch as transformers' default collator makes it, which leaves text out: labels that are text are refused."""
    first = rows[0] if isinstance(rows[0], Mapping) else {}
    for name in ("label", "labels", "label_ids"):
        if isinstance(first.get(name), str):
            raise ValueError(
                f"`{name}` must hold ids of labels, got the text {first[name]!r}: number them in the order of the "
                f"model's `config.label2id`, as `dataset.cast_column({name!r}, ClassLabel(names=names))` does."
            )
    return default_data_collator(rows)


class ShapleyTrainer(Trainer):
    """A `Trainer` for Shapley image classifiers: classes, masked predictions and Shapley regression in one forward.

    Each term is logged next to `loss`, averaged over the steps since the last log and over processes, unweighted:
    `loss_classification`, `loss_coalition`, `loss_shapley`, `loss_readout`; and the current `shapley_weight`.
    Coalitions are a function of the seed, the step and the image's place in the global batch alone, so that a resumed
    run draws what an uninterrupted one would, and several processes draw what one would.

    A loss given as `compute_loss_func` takes the place of the classification loss; as in `Trainer`, labels then do not
    reach the model.
    """

    # The loss is a mean over the batch: the Trainer must divide it by the number of accumulation steps. With
    # `compute_loss_func`, where older versions of transformers never do, `compute_loss` does.
    loss_is_scaled_for_ga = False

    def __init__(self, model=None, args: ShapleyTrainingArguments | None = None, **kwargs):
        args = args or ShapleyTrainingArguments()
        if not isinstance(args, ShapleyTrainingArguments):
            raise TypeError(f"`args` must be ShapleyTrainingArguments, got {type(args).__name__}.")
        if model is not None:
            check_shapley_model(model)
        # Steps without coalitions leave adapters out; the accelerator asks before `model_init` says if there are any.
        if args.shapley_every > 1 and (model is None or getattr(model.config, "coalition_adapter_size", 0)):
            args.ddp_find_unused_parameters = True
        kwargs["data_collator"] = kwargs.get("data_collator") or _collate
        super().__init__(model, args, **kwargs)
        if args.attribution_error_images and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "`attribution_error_images` needs the whole model in one process, but FSDP and DeepSpeed ZeRO-3 "
                "divide it: set it to 0, and measure the saved model with `attribution_error_certificate`."
            )
        self._term_sums: dict[str, Tensor] = {}
        self._term_counts: dict[str, int] = defaultdict(int)
        self._micro_step = NO_STEP
        self._has_warned = False
        if self.compute_loss_func is not None:
            self.loss_is_scaled_for_ga = True

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The stock optimizer; an attribution head with a learning rate of its own has parameter groups of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self.args.attribution_learning_rate is None or not is_new:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        head = {id(parameter) for name, parameter in named if is_own_part(name)}
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in head]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            if mine:
                optimizer.add_param_group({**group, "params": mine, "lr": self.args.attribution_learning_rate})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Joint loss of one batch while training; the stock classification loss while evaluating."""
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs or "pixel_values" not in inputs:
            raise ValueError(
                f"Training needs `pixel_values` and `labels` in each batch, got {sorted(inputs)}: check the data "
                "set's columns, the data collator and `remove_unused_columns`."
            )
        micro_step = self._count_micro_step()
        labels = inputs["labels"]
        inputs = self._for_model(inputs)
        if self.state.global_step % self.args.shapley_every:
            outputs = model(**inputs)
            terms = {"classification": self._classification_loss(outputs, labels, num_items_in_batch)}
            # Every parameter takes part in every step, as distributed training expects.
            loss = terms["classification"] + 0.0 * outputs.attributions.sum()
        else:
            coalitions = self._draw_coalitions(model, inputs, micro_step)  # (B', R, N)
            learning = _share(self.args.value_gradient_fraction, len(coalitions))
            structures = {"coalition_ids": coalitions_to_ids(coalitions), "num_coalitions": 2}
            outputs = model(**inputs, **structures, sums_only=True, num_with_gradient=learning)
            importance = importance_weights(coalitions, self.args.coalition_sizes)
            terms = self.loss_terms(outputs, coalitions.shape[-1], labels, learning, importance, num_items_in_batch)
            weights = {
                "classification": 1.0,
                "coalition": self.args.coalition_weight,
                "shapley": self.shapley_weight,
                "readout": self.shapley_weight * self.args.readout_weight,
            }
            loss = sum(weights[name] * term for name, term in terms.items())
        for name, term in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term.detach()
            self._term_counts[name] += 1
        if self.loss_is_scaled_for_ga:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _evaluation_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """The stock classification loss, of probabilities too."""
        if self.compute_loss_func is not None or not self._are_probabilities(inputs.get("labels")):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**self._for_model(inputs))
        loss = self._classification_loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model takes it: without labels where the loss is not the model's own.

        The model would take them for what its own loss does, and note that as its `problem_type`.
        """
        if self.compute_loss_func is None and not self._are_probabilities(inputs["labels"]):
            return inputs
        return {name: value for name, value in inputs.items() if name != "labels"}

    def _are_probabilities(self, labels: Any) -> bool:
        """Whether labels are probabilities of classes that exclude each other, as MixUp and CutMix make them."""
        is_single = self.model.config.problem_type == "single_label_classification"
        return is_single and isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 2

    def loss_terms(
        self,
        outputs: ShapleyImageClassifierOutput,
        num_players: int,
        labels: Tensor,
        num_with_gradient: int | None = None,
        importance: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The joint loss's unweighted terms, from the sums over pairs of coalitions (B', R, 2, K) of a forward.

        Each pair counts by its `importance` (B', R), by default all alike. Of the B' images only the first
        `num_with_gradient` learn through v(S): masked predictions and the even part, which does not depend on how
        attributions are split, are theirs alone; in the odd part their gradient through v(S) stands for everyone's.
        `num_items_in_batch` is for `compute_loss_func`.
        """
        gains = outputs.coalition_gains
        learning = len(gains) if num_with_gradient is None else num_with_gradient
        importance = torch.ones_like(gains[:, :, 0, 0]) if importance is None else importance
        base_values = scale_gradient(outputs.base_values, self.model.config.coalition_gradient)
        values = base_values + gains[:learning]

        def regression(images: int, value_gradient: float, odd_weight: float, even_weight: float) -> Tensor:
            residuals = scale_gradient(gains[:images], value_gradient) - outputs.coalition_attributions[:images]
            parts = {"odd_weight": odd_weight, "even_weight": even_weight}
            return paired_residual_loss(residuals, num_players, **parts, weights=importance[:images])

        through_values = self.args.value_gradient
        odd = regression(len(gains), through_values * len(gains) / learning, self.args.odd_weight, 0.0)
        even = regression(learning, through_values, 0.0, self.args.even_weight)
        return {
            "classification": self._classification_loss(outputs, labels, num_items_in_batch),
            "coalition": self._coalition_term(values, outputs.logits[:learning], labels[:learning], importance),
            "shapley": odd + even,
            **self._readout_term(outputs.readout_errors, num_players, importance),
        }

    def _readout_term(self, errors: Tensor, num_players: int, importance: Tensor) -> dict[str, Tensor]:
        """The odd part of the regression on directions of the readout as long as the classifier's, all on average.

        Over random directions v of mean squared length L^2 the mean of (v' r)^2 is L^2 times the mean of r^2.
        """
        model = self.accelerator.unwrap_model(self.model)
        if model.attribution_head.correction is None or self.args.readout_weight == 0:
            return {}
        weight = weight_of(model.classifier, errors.shape[-1], errors).detach().float()
        errors = weight.square().sum(-1).mean().sqrt() * errors
        return {"readout": paired_residual_loss(errors, num_players, even_weight=0.0, weights=importance)}

    def _coalition_term(self, values: Tensor, logits: Tensor, labels: Tensor, importance: Tensor) -> Tensor:
        """Loss of masked predictions v(S), (B', R, 2, K), of which those of a pair count alike."""
        weights = importance[: len(values)].unsqueeze(-1).expand(values.shape[:-1])
        to_label = self.args.coalition_target == "label"
        problem = self.model.config.problem_type
        if problem == "regression" or (problem is None and values.shape[-1] == 1):  # as transformers has it
            return coalition_regression_loss(values, labels if to_label else logits, weights=weights)
        multi_label = problem == "multi_label_classification"
        if to_label:
            return coalition_label_loss(values, labels, multi_label=multi_label, weights=weights)
        return coalition_loss(values, logits, multi_label=multi_label, weights=weights)

    @property
    def shapley_weight(self) -> float:
        """Weight of the Shapley regression at the current step, warm-up included."""
        ramp = self.args.shapley_warmup * self.state.max_steps
        return self.args.shapley_weight * min(1.0, self.state.global_step / ramp if ramp > 0 else 1.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term since the last log, over all processes, to the training logs."""
        if "loss" in logs and self._term_sums:
            for name in sorted(self._term_sums):
                mean = self._term_sums[name] / self._term_counts[name]
                logs[f"loss_{name}"] = self.accelerator.reduce(mean, "mean").item()
            logs["shapley_weight"] = self.shapley_weight
            self._term_sums.clear()
            self._term_counts.clear()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, going on only from a checkpoint that was written to its end.

        Args:
            resume_from_checkpoint: path of a checkpoint; True = the newest complete one in `args.output_dir`.
            *args: passed on.
            **kwargs: passed on.

        Returns:
            As `Trainer.train`: the last step, the mean loss and the metrics.

        Raises:
            ValueError: no complete checkpoint there, or one of other labels.
        """
        if resume_from_checkpoint and not self.is_deepspeed_enabled:  # which keeps its optimizer in a form of its own
            resume_from_checkpoint = complete_checkpoint(resume_from_checkpoint, self.args.output_dir)
            check_labels_of_checkpoint(resume_from_checkpoint, self.model.config.id2label)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer` has it; an evaluation, but no prediction, measures the attribution error too if asked to."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.attribution_error_images and description == "Evaluation":
            errors = torch.zeros(3, device=self.args.device)
            if self.is_world_process_zero():
                errors += torch.tensor(self._attribution_error(dataloader), device=errors.device)
            errors = self.accelerator.reduce(errors, "sum").tolist()  # all processes choose the same best model
            for end, error in zip(("", "_low", "_high"), errors, strict=True):
                output.metrics[f"{metric_key_prefix}_{MEASURED}{end}"] = error
        return output

    @torch.no_grad()
    def _attribution_error(self, dataloader: Any) -> tuple[float, float, float]:
        """Error ratio of the predicted labels' attributions on a data set's first images, and its interval.

        With four evaluations for each player, and 256 at least, their noise is small beside that between images.
        """
        dataset, count, size = dataloader.dataset, self.args.attribution_error_images, self.args.eval_batch_size
        count = min(count, len(dataset)) if has_length(dataset) else count
        rows = list(islice(iter(dataset), count))
        model = self.accelerator.unwrap_model(self.model)
        games, attributions = [], []
        with self.compute_loss_context_manager():
            for start in range(0, len(rows), size):
                inputs = self._prepare_inputs(dataloader.collate_fn(rows[start : start + size]))
                options = {"interpolate_pos_encoding": bool(inputs.get("interpolate_pos_encoding"))}
                outputs = model(inputs["pixel_values"], attributed=1, **options)
                attributions.append(outputs.attributions.cpu())  # (B, N, 1)
                for pixels, label in zip(inputs["pixel_values"], outputs.attributed_labels, strict=True):
                    games.append(partial(_values_of, model, pixels, label, options))
            try:
                certificate = attribution_error_certificate(
                    games,
                    torch.cat(attributions),
                    budget=max(256, 4 * attributions[0].shape[1]),
                    generator=torch.Generator().manual_seed(self.args.seed),
                )
            except ValueError as error:  # one image, or a model that says the same whatever it sees
                logger.warning("The attribution error could not be measured: %s", error)
                return (float("nan"),) * 3
        return certificate.error_ratio, *certificate.error_ratio_interval

    def _remove_unused_columns(self, dataset, description=None):
        # Where the stock Trainer makes a data loader of a data set.
        return named_pictures(super()._remove_unused_columns(dataset, description))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Every start comes by here: a second run, one that goes on, another try with smaller batches.
        self._micro_step = NO_STEP
        self._term_sums.clear()
        self._term_counts.clear()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One batch, as `Trainer` takes it; says once if a subclass's `compute_loss` leaves the explanation out."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._micro_step == NO_STEP and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self).__name__}.compute_loss does not call ShapleyTrainer.compute_loss: coalitions and the "
                "Shapley regression are left out, and no explanation is learned. Give a loss of your own to the "
                "trainer as `compute_loss_func`, or add to what `super().compute_loss(...)` returns.",
                stacklevel=2,
            )
        return loss

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        with marked_incomplete(checkpoint) if self.args.should_save else nullcontext():
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)  # what a killed run left of it
            self.accelerator.wait_for_everyone()  # no process writes before
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            discard_surplus_checkpoints(checkpoint.parent, limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # After this the stock Trainer would delete older checkpoints, before the new one counts: a process killed
        # there would leave none. The limit that was given is in training_args.bin by now.
        self.args.save_total_limit = None
        super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, where this is not one of the checkpoints on the way, its card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card(output_dir=output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        output_dir: str | None = None,
    ) -> None:
        """Write a card with the data set, the last evaluation and the recipe; a card that somebody wrote is kept.

        Args:
            language: of the labels, as the Hub writes it.
            license: as the Hub writes it.
            tags: further tags.
            model_name: title; defaults to the repository's or the folder's name.
            finetuned_from: Hub id of the model that training started from; defaults to what the model remembers.
            tasks: further tags.
            dataset_tags: the data set's id on the Hub.
            dataset: the data set's name; defaults to what the data set remembers.
            dataset_args: the data set's configuration.
            output_dir: folder of the README.md; defaults to `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(output_dir or self.args.output_dir)
        model_id = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        card = render_training_card(
            self,
            model_id=model_id,
            model_name=model_name or model_id.split("/")[-1],
            base_model=finetuned_from,
            dataset={"name": dataset, "id": dataset_tags, "config": dataset_args},
            tags=[tags, tasks],
            license=license,
            language=language,
        )
        write_model_card(folder / "README.md", card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Upload model, code, image processor and card as `Trainer` does, keeping a card that somebody wrote there."""
        if private is not None:
            self.args.hub_private_repo = private  # the only way that every supported transformers knows
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self._keep_card_of_hub(token, revision)
        return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            try:
                self._keep_card_of_hub()
            except ConnectionError as error:
                logger.warning("This checkpoint is not pushed: %s", error)
                return
            # The stock Trainer copies weights and configuration only, but the configuration names the code.
            for path in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _keep_card_of_hub(self, token: str | None = None, revision: str | None = None) -> None:
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            revision = revision or self.args.hub_revision
            keep_card_of_hub(self.hub_model_id, folder, token=token or self.args.hub_token, revision=revision)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuse a checkpoint that does not hold this model's weights, where the stock Trainer only warns."""
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {load_result.missing_keys[:3]} and unexpected "
                f"{load_result.unexpected_keys[:3]} weights, among others: resume with the model that wrote it."
            )

    def _classification_loss(
        self, outputs: ShapleyImageClassifierOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Mean over the batch; what a caller's function made a mean over the global batch becomes one too."""
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                processes = self.accelerator.num_processes // self.get_tp_size()
                loss = loss * (processes if self.args.n_gpu <= 1 else self.args.n_gpu)
            return loss * self.current_gradient_accumulation_steps
        if self.label_smoother is not None or self._are_probabilities(labels):
            return torch.nn.functional.cross_entropy(
                outputs.logits, labels, label_smoothing=self.args.label_smoothing_factor
            )
        return outputs.loss

    def _count_micro_step(self) -> int:
        """Number of the batch within its optimizer step."""
        step, seen = self._micro_step
        seen = seen + 1 if step == self.state.global_step else 0
        self._micro_step = (self.state.global_step, seen)
        return seen

    def _draw_coalitions(self, model, inputs: dict[str, Tensor], micro_step: int) -> Tensor:
        """Coalitions (B', R, N) for the first images of this batch, cut from one draw for the whole global batch."""
        pixel_values = inputs["pixel_values"]
        height, width = self.accelerator.unwrap_model(model).grid_size(
            *pixel_values.shape[-2:], bool(inputs.get("interpolate_pos_encoding"))
        )
        generator = torch.Generator(pixel_values.device)
        # The CPU generator reads the low 32 bits of a seed only.
        generator.manual_seed((self.args.seed * 1_000_003 + self.state.global_step) % 2**32)
        # A data loader or collator of the caller's may make other batches than the arguments say.
        rows = max(self._train_batch_size, len(pixel_values))
        place = micro_step * self.args.world_size + self.args.process_index
        places = self.args.world_size * self.current_gradient_accumulation_steps
        draw = sample_coalitions(
            rows * max(places, place + 1),  # a subclass may ask for the loss of a batch more than once
            self.args.num_pairs,
            num_players=height * width,
            sizes=self.args.coalition_sizes,
            generator=generator,
        )
        return draw[place * rows : place * rows + _share(self.args.shapley_fraction, len(pixel_values))]


def _values_of(model, pixels: Tensor, label: Tensor, options: dict[str, Any], coalitions: Tensor) -> Tensor:
    """The game of one image (C, H, W) and label (1), on the CPU: (M, N) -> (M, 1)."""
    return model.game(pixels, label, **options)(coalitions).cpu()


def _share(fraction: float, count: int) -> int:
    """The nearest whole number to a fraction of `count`, at least 1."""
    return max(1, round(fraction * count))
