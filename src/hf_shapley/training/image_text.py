"""Training models of image and text to be explained: contrast, masked images and texts, Shapley regression."""

from typing import Any

import torch
from torch import Tensor

from ..models.coalitions import importance_weights, shapley_kernel_size_probabilities, sum_over_coalitions
from ..models.image_text import ImageTextMixin, ShapleyImageTextOutput
from .joint_loss import SIZES
from .losses import coalition_loss, paired_residual_loss
from .trainer import ShapleyTrainer


class ShapleyImageTextTrainer(ShapleyTrainer):
    """`ShapleyTrainer` for models of image and text: rows hold `pixel_values`, `input_ids` and what goes with those.

    Each batch is contrasted within its process, as the stock loss has it. Masked images and masked texts follow the
    full similarities; the regression of both sides' attributions is over the batch's embeddings of the other side and
    over random directions. The terms are logged: `loss_contrastive`, `loss_coalition`, `loss_shapley`, `loss_readout`.
    Rows with `word_ids` need one length, such as `padding="max_length"` gives, or a collator of your own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("compute_loss_func", "label_smoother"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for losses of labels, which texts are not: leave it out.")
        if self.args.attribution_error_images:
            raise ValueError(
                "`attribution_error_images` is for classifiers, got "
                f"{self.args.attribution_error_images}: set it to 0, and compare with `exact_shapley` of the games."
            )
        self.can_return_loss = True

    def _check_model(self, model: Any) -> None:
        if not hasattr(model, "explain_pair"):
            raise TypeError(
                f"`model` must be a model of image and text, such as ShapleyCLIPModel, got {type(model).__name__}."
            )

    @property
    def value_gradient(self) -> float:
        """Share of the regression's gradient through the coalitions' embeddings: as asked for, else 0.1."""
        return 0.1 if self.args.value_gradient is None else self.args.value_gradient

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Joint loss of one batch while training; the stock contrastive loss while evaluating."""
        if not model.training:
            outputs = model(**{**inputs, "return_loss": True})
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        missing = [name for name in ("pixel_values", "input_ids") if name not in inputs]
        if missing or len(inputs["pixel_values"]) != len(inputs["input_ids"]):
            raise ValueError(
                f"Training needs as many `pixel_values` as `input_ids` in each batch, got {sorted(inputs)}: check the "
                "data set's columns, the data collator and `remove_unused_columns`."
            )
        micro_step = self._count_micro_step()
        patches = self._draw_coalitions(model, inputs, micro_step)  # (B, R, N)
        words, importance, counts = self._draw_words(model, inputs, micro_step)  # (B, R, M), (B, R), (B)
        learning = max(1, round(self.args.value_gradient_fraction * len(patches)))
        played = {"image_coalitions": patches, "text_coalitions": words, "num_with_gradient": learning}
        outputs = model(**{**inputs, "return_loss": True}, **played)
        whole = self.accelerator.unwrap_model(model)
        bias = getattr(whole, "logit_bias", None)  # SigLIP's, of texts that do not exclude each other
        terms = image_text_terms(
            outputs,
            patches,
            words,
            importance=(importance_weights(patches, SIZES), importance),
            num_words=counts,
            scale=whole.logit_scale.detach().exp(),
            bias=None if bias is None else bias.detach(),
            value_gradient=self.value_gradient,
            num_with_gradient=learning,
        )
        loss = self._weighted(terms)
        return (loss, outputs) if return_outputs else loss

    def _draw_words(self, model: Any, inputs: dict[str, Tensor], micro_step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Coalitions of each text's words, their weights, and the numbers of words; cut from one draw for all."""
        whole: ImageTextMixin = self.accelerator.unwrap_model(model)
        counts = whole.word_counts(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("word_ids"))
        total, mine = self._rows_of_draw(len(counts), micro_step)
        most = whole.text_model.config.max_position_embeddings
        device, generator = counts.device, self._generator(counts.device, stream=1)
        uniform = torch.rand(total, self.num_pairs, generator=generator, device=device, dtype=torch.float64)
        keys = torch.rand(total, self.num_pairs, most, generator=generator, device=device)
        return *word_coalitions(uniform[mine], keys[mine], counts), counts

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None is written: the library's cards are of classifiers. What is there stays."""


def word_coalitions(uniform: Tensor, keys: Tensor, num_words: Tensor) -> tuple[Tensor, Tensor]:
    """Coalitions of texts of different lengths, as `sample_coalitions(sizes="spread")` draws them, and their weights.

    Args:
        uniform: numbers in [0, 1) that the sizes are made of, (B, R).
        keys: random numbers by which members are chosen, (B, R, at least M).
        num_words: long (B), M at most.

    Returns:
        bool (B, R, M), and what makes a mean over them one over the Shapley kernel, (B, R). A text of one word has no
        game to learn: its weights are 0.
    """
    most, device = int(num_words.max()), uniform.device
    cumulative = torch.full((most + 1, most), 2.0, dtype=torch.float64, device=device)
    ratios = torch.zeros(most + 1, most + 1, device=device)
    for count in range(2, most + 1):
        kernel = shapley_kernel_size_probabilities(count, device)
        spread = kernel.sqrt() / kernel.sqrt().sum()
        cumulative[count, : count - 1] = spread.cumsum(0)
        ratios[count, 1:count] = (kernel / spread).float()
    sizes = (uniform.unsqueeze(-1) >= cumulative[num_words].unsqueeze(1)).sum(-1) + 1  # (B, R)
    sizes = torch.minimum(sizes, (num_words - 1).clamp(min=1).unsqueeze(1))  # rounding may leave the last below 1
    beyond = torch.arange(most, device=device) >= num_words[:, None, None]
    ranks = keys[..., :most].masked_fill(beyond, torch.inf).argsort(-1).argsort(-1)
    return ranks < sizes.unsqueeze(-1), ratios[num_words.unsqueeze(1), sizes]


def image_text_terms(
    outputs: ShapleyImageTextOutput,
    image_coalitions: Tensor,
    text_coalitions: Tensor,
    *,
    importance: tuple[Tensor, Tensor],
    num_words: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    value_gradient: float = 0.1,
    num_with_gradient: int | None = None,
) -> dict[str, Tensor]:
    """The unweighted terms of the joint loss of B pairs of image and text; a side's are averaged with the other's.

    Args:
        outputs: of a forward with both coalitions and `return_loss`.
        image_coalitions: bool (B, R, N).
        text_coalitions: bool (B, R, M).
        importance: weights of both, (B, R) each.
        num_words: long (B).
        scale: of the logits.
        bias: of the logits, where texts do not exclude each other; their loss is then that of independent labels.
        value_gradient: share of the regression's gradient through coalitions' embeddings, and weight of its even part.
        num_with_gradient: of so many pairs, the first ones, coalitions' embeddings learn.

    Returns:
        "contrastive", "coalition", "shapley" and "readout", scalars.
    """
    found: Any = outputs
    words_per_player = num_words.unsqueeze(1) / text_coalitions.shape[-1]  # of N in front of the regression
    sides = (
        (found.image_coalition_embeds, found.image_base_embeds, found.image_attributions, image_coalitions),
        (
            found.text_coalition_embeds,
            found.text_base_embeds[:, None, None],
            found.text_attributions,
            text_coalitions,
        ),
    )
    others, logits = (found.text_embeds, found.image_embeds), (found.logits_per_image, found.logits_per_text)
    factors = (importance[0], importance[1] * words_per_player)
    totals = {"contrastive": found.loss}
    for side, other, full, weights, factor in zip(sides, others, logits, importance, factors, strict=True):
        embeds, base, attributions, coalitions = side
        learning = len(embeds) if num_with_gradient is None else num_with_gradient
        values = scale * embeds[:learning] @ other.T  # (B', R, 2, K)
        values = values if bias is None else values + bias
        each = weights[:learning].unsqueeze(-1).expand(values.shape[:-1])
        terms = {
            "coalition": coalition_loss(values, full[:learning], multi_label=bias is not None, weights=each),
            **_regression(embeds - base, attributions, coalitions, scale, other, factor, value_gradient, learning),
        }
        for name, term in terms.items():
            totals[name] = totals.get(name, 0) + term / 2
    return totals


def _regression(
    gains: Tensor,
    attributions: Tensor,
    coalitions: Tensor,
    scale: Tensor,
    others: Tensor,
    weights: Tensor,
    value_gradient: float,
    learning: int,
) -> dict[str, Tensor]:
    """One side's regression through the others' embeddings (K, D) and on random directions, as long as those.

    Args:
        gains: e_S - e_empty, and of the complement, (B, R, 2, D).
        attributions: (B, N, D).
        coalitions: bool (B, R, N).
        scale: of the logits.
        others: (K, D), which the regression does not teach.
        weights: of pairs, (B, R).
        value_gradient: as `image_text_terms` has it.
        learning: of so many rows the gains have a gradient.
    """
    num_players = coalitions.shape[-1]
    sums = torch.stack([sum_over_coalitions(part, attributions) for part in (coalitions, ~coalitions)], dim=2)
    directions = scale * others.detach().T

    def residuals(share: float) -> Tensor:
        held = gains.detach()
        return held + share * (gains - held) - sums

    through = residuals(value_gradient * len(gains) / learning) @ directions
    odd = paired_residual_loss(through, num_players, even_weight=0.0, weights=weights)
    # Interactions teach through the values alone, and as little of them as of the rest is enough.
    even = paired_residual_loss(
        (residuals(value_gradient) @ directions)[:learning],
        num_players,
        odd_weight=0.0,
        even_weight=value_gradient,
        weights=weights[:learning],
    )
    # Over random directions v of length s the mean of (v' r)^2 is s^2 times the mean of r^2 over its D entries.
    readout = paired_residual_loss(scale * residuals(0.0), num_players, even_weight=0.0, weights=weights)
    return {"shapley": odd + even, "readout": readout}
