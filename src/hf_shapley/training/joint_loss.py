"""The joint loss of a batch: classes, masked predictions and Shapley regression in one forward."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..models.coalitions import coalitions_to_ids, importance_weights, sample_coalitions
from ..models.heads import is_own_part
from ..models.modeling_shapley import ShapleyImageClassifierOutput
from .losses import coalition_loss, coalition_regression_loss, paired_residual_loss
from .sharing import SharingTrainer

NO_STEP = (-1, 0)  # (optimizer step, batches of it seen) before the first one
# More even than the Shapley kernel's, with weights that make up for it: the same loss with less noise.
SIZES = "spread"


class JointLossTrainer(SharingTrainer):
    """`Trainer` with the joint loss of Shapley image classifiers, and its terms in the log."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._term_sums: dict[str, Tensor] = {}
        self._term_counts: dict[str, int] = defaultdict(int)
        self._micro_step = NO_STEP

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of the classifier learns."""
        named = self.model.named_parameters()
        return not any(parameter.requires_grad for name, parameter in named if not is_own_part(name))

    @property
    def num_pairs(self) -> int:
        """Pairs per image and step: as asked for, else 1, or 4 where the classifier is frozen and they are cheap."""
        return self.args.num_pairs or (4 if self.is_frozen else 1)

    @property
    def shapley_warmup(self) -> float:
        """Fraction of the steps over which the regression's weight ramps up: as asked for, else 0.3; frozen 0."""
        given = self.args.shapley_warmup
        return given if given is not None else 0.3 * (not self.is_frozen)

    @property
    def value_gradient(self) -> float:
        """Share of the regression's gradient through v(S): as asked for, else 0.1, with coalition adapters 0.03."""
        if self.args.value_gradient is not None:
            return self.args.value_gradient
        return 0.03 if self.model.config.coalition_adapter_size else 0.1

    @property
    def attribution_learning_rate(self) -> float:
        """What the attribution head and adapters learn at: as asked for, else eight times the others' rate."""
        given = self.args.attribution_learning_rate
        return 8 * self.args.learning_rate if given is None else given

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
        coalitions = self._draw_coalitions(model, inputs, micro_step)  # (B, R, N)
        learning = max(1, round(self.args.value_gradient_fraction * len(coalitions)))
        structures = {"coalition_ids": coalitions_to_ids(coalitions), "num_coalitions": 2}
        outputs = model(**inputs, **structures, sums_only=True, num_with_gradient=learning)
        importance = importance_weights(coalitions, SIZES)
        terms = self.loss_terms(outputs, coalitions.shape[-1], labels, learning, importance, num_items_in_batch)
        loss = self._weighted(terms)
        return (loss, outputs) if return_outputs else loss

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of a loss's terms, each with its weight; keeps them for the log."""
        weights = {
            "coalition": self.args.coalition_weight,
            "shapley": self.shapley_weight,
            "readout": self.shapley_weight,
        }
        loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        for name, term in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term.detach()
            self._term_counts[name] += 1
        return loss / self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else loss

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
        values = outputs.base_values + gains[:learning]

        def regression(images: int, value_gradient: float, odd_weight: float, even_weight: float) -> Tensor:
            residuals = _learning_less(gains[:images], value_gradient) - outputs.coalition_attributions[:images]
            parts = {"odd_weight": odd_weight, "even_weight": even_weight}
            return paired_residual_loss(residuals, num_players, **parts, weights=importance[:images])

        through_values = self.value_gradient
        odd = regression(len(gains), through_values * len(gains) / learning, 1.0, 0.0)
        # Interactions teach through v(S) alone, and as little of them as of the rest is enough.
        even = regression(learning, through_values, 0.0, through_values)
        return {
            "classification": self._classification_loss(outputs, labels, num_items_in_batch),
            "coalition": self._coalition_term(values, outputs.logits[:learning], importance),
            "shapley": odd + even,
            **self._readout_term(outputs.readout_errors, num_players, importance),
        }

    def _readout_term(self, errors: Tensor, num_players: int, importance: Tensor) -> dict[str, Tensor]:
        """The odd part of the regression on directions of the readout as long as the classifier's, all on average.

        Over random directions v of mean squared length L^2 the mean of (v' r)^2 is L^2 times the mean of r^2.
        """
        model = self.accelerator.unwrap_model(self.model)
        if model.attribution_head.correction is None:
            return {}
        weight = model.classifier_weight(errors).detach().float()
        errors = weight.square().sum(-1).mean().sqrt() * errors
        return {"readout": paired_residual_loss(errors, num_players, even_weight=0.0, weights=importance)}

    def _coalition_term(self, values: Tensor, logits: Tensor, importance: Tensor) -> Tensor:
        """Loss of masked predictions v(S), (B', R, 2, K), of which those of a pair count alike."""
        weights = importance[: len(values)].unsqueeze(-1).expand(values.shape[:-1])
        problem = self.model.config.problem_type
        if problem == "regression" or (problem is None and values.shape[-1] == 1):  # as transformers has it
            return coalition_regression_loss(values, logits, weights=weights)
        return coalition_loss(values, logits, multi_label=problem == "multi_label_classification", weights=weights)

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
        """Coalitions (B, R, N) for the images of this batch, cut from one draw for the whole global batch."""
        pixel_values = inputs["pixel_values"]
        height, width = self.accelerator.unwrap_model(model).grid_size(
            *pixel_values.shape[-2:], bool(inputs.get("interpolate_pos_encoding"))
        )
        total, mine = self._rows_of_draw(len(pixel_values), micro_step)
        generator = self._generator(pixel_values.device)
        draw = sample_coalitions(total, self.num_pairs, num_players=height * width, sizes=SIZES, generator=generator)
        return draw[mine]

    def _generator(self, device: torch.device, stream: int = 0) -> torch.Generator:
        """Source of this step's coalitions, the same in every process."""
        generator = torch.Generator(device)
        # The CPU generator reads the low 32 bits of a seed only.
        return generator.manual_seed((self.args.seed * 1_000_003 + self.state.global_step + 7_919 * stream) % 2**32)

    def _rows_of_draw(self, batch: int, micro_step: int) -> tuple[int, slice]:
        """How many rows a draw for the global batch has, and which of them are this batch's."""
        # A data loader or collator of the caller's may make other batches than the arguments say.
        rows = max(self._train_batch_size, batch)
        place = micro_step * self.args.world_size + self.args.process_index
        places = self.args.world_size * self.current_gradient_accumulation_steps
        # A subclass may ask for the loss of a batch more than once.
        return rows * max(places, place + 1), slice(place * rows, place * rows + batch)


def _learning_less(tensor: Tensor, share: float) -> Tensor:
    """The same, with `share` times its gradient."""
    if share == 1:
        return tensor
    detached = tensor.detach()
    return detached if share == 0 else detached + share * (tensor - detached)
