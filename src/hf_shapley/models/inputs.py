"""What a Shapley classifier is asked: refused at the door, or as its forward takes it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backbone import Backbone
from .checks import check_count, check_device, check_floats, check_label_ids, describe, known_labels, may_be_read


class InputChecks(Backbone):
    """Pixels, targets and labels, checked against the model's configuration."""

    def _check_pixels(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None, check_values: bool = False
    ) -> tuple[int, int]:
        """Refuse images that the grid of players cannot cover; return the grid (h, w)."""
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4 or pixel_values.shape[0] == 0:
            got = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(
                f"`pixel_values` must be of shape (batch, channels, height, width), batch > 0, got {got}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floating point, got {pixel_values.dtype}: use the image processor."
            )
        if pixel_values.shape[1] != self.config.num_channels:
            channels_last = pixel_values.shape[3] == self.config.num_channels
            fix = "permute(0, 3, 1, 2) puts the channels first" if channels_last else "use the model's image processor"
            raise ValueError(
                f"`pixel_values` must have {self.config.num_channels} channels, (batch, channels, height, width), got "
                f"{pixel_values.shape[1]} in shape {tuple(pixel_values.shape)}: {fix}."
            )
        check_device(pixel_values, "pixel_values", self._input_device)
        height, width = pixel_values.shape[-2:]
        grid = self.grid_size(height, width, bool(interpolate_pos_encoding))
        # Elsewhere than on the CPU the check would make the host wait in every training step.
        checked = (check_values or pixel_values.device.type == "cpu") and may_be_read(pixel_values)
        # NaN is both extremes; asking each pixel takes 20 times as long, which a small model's forward feels.
        if checked and not all(math.isfinite(extreme) for extreme in torch.aminmax(pixel_values.detach())):
            raise ValueError(
                "`pixel_values` must be finite, got NaN or infinity: check the image and its normalisation."
            )
        return grid

    def _check_targets(self, labels: Tensor, pixel_values: Tensor) -> Tensor:
        """Refuse labels that the loss of `config.problem_type` cannot take; integers come back as long."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"`labels` must be a tensor, got {describe(labels)}.")
        batch = len(pixel_values)
        num_labels, problem = self.config.num_labels, self.config.problem_type
        integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        single = problem == "single_label_classification" or (problem is None and num_labels > 1 and integers)
        if not single:
            wanted = (batch,) if num_labels == 1 and labels.ndim == 1 else (batch, num_labels)
            check_floats(labels, "labels", wanted, f"`config.problem_type` is {problem!r}")
        # Elsewhere than on the CPU the check would make the host wait in every training step.
        elif labels.device.type == "cpu" and may_be_read(labels):
            ids = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
            check_label_ids(ids, "labels", batch, num_labels, may_be_unknown=True)
        check_device(labels, "labels", pixel_values.device)
        return labels.long() if single else labels

    def _labels_to_attribute(self, labels: int | Sequence[int | str] | Tensor, batch: int) -> Tensor | int:
        """Label ids (batch, L), or how many of the best; refuse others."""
        if not isinstance(labels, int):
            return self._label_ids(labels, batch)
        if not torch.compiler.is_compiling():
            check_count(labels, "attributed")
            if labels > self.config.num_labels:
                raise ValueError(
                    f"`attributed` must be at most the model's {self.config.num_labels} labels, got {labels}."
                )
        return labels

    def _label_ids(self, labels: Sequence[int | str] | Tensor, batch: int) -> Tensor:
        """Label ids or names to long (batch, L)."""
        device = self._input_device
        num_labels = self.config.num_labels
        if not isinstance(labels, Tensor):
            labels = torch.tensor(known_labels(labels, self.config.id2label))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"`labels` must be integers, got {labels.dtype}: give ids or names.")
        ids = labels.to(device=device, dtype=torch.long)
        if ids.ndim == 1:
            ids = ids.expand(batch, -1)
        if ids.ndim != 2 or len(ids) != batch or ids.numel() == 0:
            raise ValueError(f"`labels` must hold L labels or be of shape ({batch}, L), got {tuple(labels.shape)}.")
        if may_be_read(ids) and (ids.min() < 0 or ids.max() >= num_labels):
            raise ValueError(f"`labels` must lie in [0, {num_labels}), got {ids.min().item()} to {ids.max().item()}.")
        return ids


def check_coalition_ids(ids: Tensor, num_coalitions: int | None, images: Tensor, grid: tuple[int, int]) -> int:
    """Refuse ids that are no coalition structure of the images; return the number of coalitions in each."""
    batch, num_players = len(images), grid[0] * grid[1]
    if not isinstance(ids, Tensor) or ids.dtype != torch.long:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"`coalition_ids` must be a long tensor, got {got}: see `coalitions_to_ids`.")
    if ids.ndim != 3 or not 1 <= len(ids) <= batch or ids.shape[1] == 0 or ids.shape[-1] != num_players:
        raise ValueError(
            f"`coalition_ids` must be of shape (batch <= {batch}, structures, players = {num_players}), "
            f"got {tuple(ids.shape)}."
        )
    check_device(ids, "coalition_ids", images.device)
    if num_coalitions is not None:
        if not torch.compiler.is_compiling():
            check_count(num_coalitions, "num_coalitions")
        return num_coalitions
    lowest, highest = (int(x) for x in torch.aminmax(ids))
    if lowest < 0 or highest >= num_players:
        raise ValueError(f"`coalition_ids` must lie in [0, {num_players}), got {lowest} to {highest}.")
    return highest + 1


def check_no_sums(sums_only: bool) -> None:
    if sums_only:
        raise ValueError("`sums_only` sums over coalitions: give `coalition_ids` too.")


def check_ordinary_options(options: dict[str, Any]) -> None:
    """Refuse what a forward under coalition structures does not give."""
    for name in ("output_hidden_states", "output_attentions", "attributed"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"`{name}` is for the ordinary forward only: drop `coalition_ids`.")


def check_num_with_gradient(count: int | None, images: int) -> int:
    """How many of the images with structures are differentiated through."""
    if count is None:
        return images
    if not torch.compiler.is_compiling():
        check_count(count, "num_with_gradient")
        if count > images:
            raise ValueError(
                f"`num_with_gradient` must be at most {images}, the images of `coalition_ids`, got {count}."
            )
    return count
