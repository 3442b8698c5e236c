"""What explains an image classifier today, gradients, attention, occlusion and samplers, and the games they are of.

In every game the players are the patches. A patch that is absent is dropped, which is the game of the models here, or
its pixels are painted: black, or blurred, with which integrated gradients and occlusion are at home. Methods that
attribute pixels have them summed over each patch.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import shapiq
import torch
from captum.attr import InputXGradient, IntegratedGradients
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_shapley import kernel_shapley, permutation_shapley, refine

OWN, BLACK, BLURRED = GAMES = ("dropped", "black", "blurred")
STEPS = 50
"""Of integrated gradients."""
BLUR = 0.25
"""Standard deviation of the blur, in sides of the image: nothing is left but where it is bright."""
AT_ONCE = 64
"""Coalitions in one forward: on a CPU more of them no longer fit its caches."""


def blurred(pixels: Tensor) -> Tensor:
    """Convolve with a Gaussian whose deviation is `BLUR` sides, edges repeated: (B, C, H, W) -> the same."""
    for axis in (-1, -2):
        size = pixels.shape[axis]
        reach = size - 1
        offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype)
        weights = (-0.5 * (offsets / (BLUR * size)).square()).softmax(0)
        lines = pixels.transpose(axis, -1)
        padded = F.pad(lines.flatten(0, -2).unsqueeze(1), (reach, reach), mode="replicate")
        pixels = F.conv1d(padded, weights.view(1, 1, -1)).view_as(lines).transpose(axis, -1)
    return pixels


class Case:
    """A model, images (B, C, H, W), their predicted labels (B) and the games of each."""

    def __init__(self, model: PreTrainedModel, pixels: Tensor):
        self.model, self.pixels = model, pixels
        with torch.no_grad():
            self.labels = model(pixels).logits.argmax(-1)
        self.grid = model.grid_size(*pixels.shape[-2:])
        self.players = self.grid[0] * self.grid[1]
        self.step = tuple(size // cells for size, cells in zip(pixels.shape[-2:], self.grid, strict=True))
        self.painted = {BLACK: pixels.amin().expand_as(pixels), BLURRED: blurred(pixels)}

    def logits(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits

    def values(self, coalitions: Tensor, name: str = OWN, rows: slice = slice(None)) -> Tensor:
        """A game of some of the images: coalitions (B, M, N) -> values of every label (B, M, K)."""
        pixels = self.pixels[rows]
        if name == OWN:
            return self.model.coalition_values(pixels, coalitions, batch_size=AT_ONCE)
        cells = coalitions.unflatten(-1, self.grid).repeat_interleave(self.step[0], -2)
        present = cells.repeat_interleave(self.step[1], -1).unsqueeze(2)  # (B, M, 1, H, W)
        shown = torch.where(present, pixels.unsqueeze(1), self.painted[name][rows].unsqueeze(1)).flatten(0, 1)
        # All of them present: logits without the attributions that a forward makes.
        everyone = torch.ones(len(shown), 1, self.players, dtype=torch.bool)
        parts = zip(shown.split(AT_ONCE), everyone.split(AT_ONCE), strict=True)
        return torch.cat([self.model.coalition_values(*part)[:, 0] for part in parts]).unflatten(
            0, coalitions.shape[:2]
        )

    def image_game(self, row: int, name: str = OWN) -> Callable[[Tensor], Tensor]:
        """Coalitions (M, N) -> values (M, K)."""
        return lambda coalitions: self.values(coalitions[None], name, slice(row, row + 1))[0]

    def game(self, row: int, name: str = OWN) -> Callable[[Tensor], Tensor]:
        """Coalitions (M, N) -> values (M, 1) of the predicted label."""
        values, label = self.image_game(row, name), self.labels[row]
        return lambda coalitions: values(coalitions)[:, label].double().unsqueeze(-1)

    def pool(self, pixel_attributions: Tensor) -> Tensor:
        """Sum over channels and over each patch's pixels: (B, C, H, W) -> (B, N)."""
        summed = pixel_attributions.detach().sum(1, keepdim=True)
        return F.avg_pool2d(summed, self.step, divisor_override=1).flatten(1)

    def of_predicted(self, values: Tensor) -> Tensor:
        """(B, N, K) -> (B, N)."""
        return values.gather(2, self.labels.view(-1, 1, 1).expand(-1, values.shape[1], 1)).squeeze(2)


def integrated_gradients(case: Case, baseline: str = BLACK) -> Tensor:
    method = IntegratedGradients(case.logits)
    return case.pool(
        method.attribute(case.pixels, baselines=case.painted[baseline], target=case.labels, n_steps=STEPS)
    )


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


def occlusion(case: Case, name: str = BLACK) -> Tensor:
    """v(all) - v(all but i) of the predicted label, in any of the games."""
    one_missing = torch.cat([torch.ones(1, case.players), 1 - torch.eye(case.players)]).bool()
    values = case.values(one_missing.expand(len(case.pixels), -1, -1), name)
    return case.of_predicted(values[:, :1] - values[:, 1:])


def attentions_of(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and each layer's attention (B, heads, queries, keys) that they were computed from."""
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        outputs = case.model(case.pixels, output_attentions=True)
    finally:
        case.model.set_attn_implementation(before)
    return outputs.logits, outputs.attentions


def attention_rollout(case: Case) -> Tensor:
    """Product of (attention + identity) / 2 over layers, CLS row (Abnar and Zuidema, arXiv:2005.00928)."""
    with torch.no_grad():
        _, attentions = attentions_of(case)
    rollout = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixed = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2
        rollout = mixed @ rollout
    return rollout[:, 0, 1:]


def gradient_weighted_rollout(case: Case) -> Tensor:
    """R <- R + A' R over layers, A' = mean over heads of max(0, dv/dA * A), CLS row.

    Chefer, Gur and Wolf, arXiv:2103.15679, eq. 5 and 6 for self-attention; v is the predicted label's logit. It stands
    for their earlier transformer attribution (arXiv:2012.09838), which has relevance by LRP in the place of A.
    """
    logits, attentions = attentions_of(case)
    gradients = torch.autograd.grad(logits.gather(1, case.labels.unsqueeze(1)).sum(), attentions)
    relevance = torch.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (gradient * attention).detach().clamp(min=0).mean(1) @ relevance
    return relevance[:, 0, 1:]


def chance(case: Case) -> Tensor:
    return torch.randn(len(case.pixels), case.players, generator=torch.Generator().manual_seed(0))


Sampler = Callable[[Case, int, str, int], Tensor]
"""Case, row, name of the game, evaluations -> Shapley values of every label (N, K), or of the predicted one (N, 1)."""


def with_shapiq(approximator: Callable[..., shapiq.approximator.Approximator]) -> Sampler:
    """One of shapiq's, whose games are of one label."""

    def sample(case: Case, row: int, name: str, budget: int) -> Tensor:
        game = case.game(row, name)

        def values(coalitions: np.ndarray) -> np.ndarray:
            return game(torch.from_numpy(np.atleast_2d(coalitions).astype(bool)))[:, 0].numpy()

        found = approximator(n=case.players, random_state=row).approximate(budget=budget, game=values)
        return torch.from_numpy(np.asarray(found.get_n_order_values(1))).unsqueeze(-1)

    return sample


def of_ours(estimator: Callable) -> Sampler:
    """One of this library's, which gives every label from the same evaluations."""

    def sample(case: Case, row: int, name: str, budget: int) -> Tensor:
        options = {"num_players": case.players, "budget": budget, "generator": torch.Generator().manual_seed(row)}
        return estimator(case.image_game(row, name), **options).values

    return sample


def refined(case: Case, row: int, name: str, budget: int, start: Tensor | None = None) -> Tensor:
    """`refine`, from a map of every label (N, K), or from nothing."""
    start = torch.zeros(case.players, case.model.config.num_labels) if start is None else start
    generator = torch.Generator().manual_seed(row)
    return refine(case.image_game(row, name), start, budget=budget, generator=generator).values


def samplers(players: int) -> dict[str, tuple[Sampler, int]]:
    """Each with its best known setting, and the fewest evaluations it takes; the first ones are not this library's."""
    paired = {
        "shapiq KernelSHAP, paired": (partial(shapiq.KernelSHAP, pairing_trick=True), 2 * players),
        "shapiq permutations": (shapiq.PermutationSamplingSV, 2 * players),
    }
    return {name: (with_shapiq(approximator), least) for name, (approximator, least) in paired.items()} | {
        "permutations, antithetic": (of_ours(permutation_shapley), 2 + 4 * (players - 1)),
        "KernelSHAP, paired, spread": (of_ours(partial(kernel_shapley, sizes="spread")), 2 + 6 * players),
        "refined from nothing": (refined, 4),
    }
