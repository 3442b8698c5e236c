"""Trainer that learns classification and Shapley values jointly."""

import logging
import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from ..data.labels import check_labels_of_checkpoint
from ..data.picture_rows import named_pictures
from ..faithfulness.certificate import attribution_error_certificate
from ..models.checks import check_shapley_model
from ..models.heads import is_own_part
from .arguments import MEASURED, ShapleyTrainingArguments
from .checkpoints import complete_checkpoint, discard_surplus_checkpoints, marked_incomplete
from .joint_loss import NO_STEP, JointLossTrainer

logger = logging.getLogger(__name__)


def collate(rows: list[Any]) -> dict[str, Any]:
    """A batch as transformers' default collator makes it, which leaves text out: labels that are text are refused."""
    first = rows[0] if isinstance(rows[0], Mapping) else {}
    for name in ("label", "labels", "label_ids"):
        if isinstance(first.get(name), str):
            raise ValueError(
                f"`{name}` must hold ids of labels, got the text {first[name]!r}: number them in the order of the "
                f"model's `config.label2id`, as `dataset.cast_column({name!r}, ClassLabel(names=names))` does."
            )
    return default_data_collator(rows)


class ShapleyTrainer(JointLossTrainer):
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
            self._check_model(model)
        kwargs["data_collator"] = kwargs.get("data_collator") or collate
        super().__init__(model, args, **kwargs)
        if args.attribution_error_images and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "`attribution_error_images` needs the whole model in one process, but FSDP and DeepSpeed ZeRO-3 "
                "divide it: set it to 0, and measure the saved model with `attribution_error_certificate`."
            )
        self._has_warned = False
        if self.compute_loss_func is not None:
            self.loss_is_scaled_for_ga = True

    def _check_model(self, model: Any) -> None:
        """Refuse a model that this trainer cannot train."""
        check_shapley_model(model)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The stock optimizer, with parameter groups of the attribution head, which has its own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        head = {id(parameter) for name, parameter in named if is_own_part(name)}
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in head]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            if mine:
                optimizer.add_param_group({**group, "params": mine, "lr": self.attribution_learning_rate})
        return optimizer

    @property
    def shapley_weight(self) -> float:
        """Weight of the Shapley regression at the current step, warm-up included."""
        ramp = self.shapley_warmup * self.state.max_steps
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

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuse a checkpoint that does not hold this model's weights, where the stock Trainer only warns."""
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {load_result.missing_keys[:3]} and unexpected "
                f"{load_result.unexpected_keys[:3]} weights, among others: resume with the model that wrote it."
            )


def _values_of(model, pixels: Tensor, label: Tensor, options: dict[str, Any], coalitions: Tensor) -> Tensor:
    """The game of one image (C, H, W) and label (1), on the CPU: (M, N) -> (M, 1)."""
    return model.game(pixels, label, **options)(coalitions).cpu()
