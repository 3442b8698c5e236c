"""Bridges to other libraries: attributions for shap and datasets, the model's game for shapiq and captum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.dataset_images import read_pictures, undecoded
from ..data.labels import given_names, ids_by_name
from ..models.checks import check_finite, check_floats, known_labels
from ..models.evaluation_mode import evaluating
from ..models.pipeline_shapley import pixel_values_of

if TYPE_CHECKING:
    from shap import Explanation


def to_shap_explanation(
    maps: Tensor,
    base_values: Tensor,
    *,
    images: Any = None,
    label_names: Sequence[str] | None = None,
) -> "Explanation":
    """Attributions in shap's own type, for `shap.image_plot` and its other tools.

    Args:
        maps: (B, L, h, w), in logits, as `model.explain` gives them; with `upsample=True`, h and w are the image's.
        base_values: (L) or (B, L), in logits: the base values of these L labels.
        images: what plots show, (B, H, W, C) array; `shap.image_plot` needs it. None = none.
        label_names: L names; None = "0" ... "L-1".

    Returns:
        `shap.Explanation` with `values` (B, h, w, 1, L) and `base_values` (B, L): summed over patches, plus
        base values, are the logits.

    Raises:
        ImportError: shap is not installed.
        ValueError: the shapes do not match.
    """
    try:
        from shap import Explanation
    except ImportError as error:
        raise ImportError(
            "`to_shap_explanation` needs shap: install it with `pip install hf_shapley[interop]`."
        ) from error
    check_floats(maps, "maps", ("batch", "labels", "h", "w"), "see `model.explain`")
    batch, labels = maps.shape[:2]
    check_floats(
        base_values,
        "base_values",
        (batch, labels) if getattr(base_values, "ndim", 1) == 2 else (labels,),
        "one value per label",
    )
    for name, tensor in (("maps", maps), ("base_values", base_values)):
        check_finite(tensor, name)
    names = [str(label) for label in range(labels)] if label_names is None else list(label_names)
    if len(names) != labels:
        raise ValueError(f"`label_names` must hold {labels} names, got {len(names)}.")
    if images is not None and len(images) != batch:
        raise ValueError(f"`images` must hold {batch} images, got {len(images)}.")
    return Explanation(
        values=maps.detach().permute(0, 2, 3, 1).unsqueeze(3).cpu().numpy(),
        base_values=base_values.detach().expand(batch, labels).cpu().numpy(),
        data=None if images is None else np.asarray(images),
        output_names=names,
    )


@dataclass(frozen=True)
class ImageGame:
    """The game of one image and label over NumPy arrays, as shapiq and similar libraries call it.

    Args:
        model: a Shapley image classifier.
        pixel_values: (1, C, H, W), on the model's device.
        label: label id.
        batch_size: coalitions in one forward.
    """

    model: PreTrainedModel
    pixel_values: Tensor
    label: int
    batch_size: int = 1024

    @property
    def n_players(self) -> int:
        """Number of patches N, row-major over the grid."""
        height, width = self.model.grid_size(*self.pixel_values.shape[-2:])
        return height * width

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        """v(S): bool (M, N) or (N), True = present -> float64 (M), in logits."""
        present = torch.from_numpy(np.atleast_2d(coalitions).astype(bool))
        game = self.model.game(self.pixel_values[0], [self.label], batch_size=self.batch_size)
        return game(present)[:, 0].double().cpu().numpy()


def as_shapiq_game(
    model: PreTrainedModel, pixel_values: Tensor, label: int | str, *, batch_size: int = 1024
) -> ImageGame:
    """The model's own game for one image and label, where absent patches are dropped, not painted over.

    Example: `shapiq.KernelSHAP(n=game.n_players).approximate(budget=512, game=game)`.

    Args:
        model: a Shapley image classifier.
        pixel_values: (C, H, W) or (1, C, H, W).
        label: id or name.
        batch_size: coalitions in one forward.

    Returns:
        A callable from bool (M, N) to float64 (M) with the attribute `n_players`.
    """
    if isinstance(pixel_values, Tensor) and pixel_values.ndim == 3:
        pixel_values = pixel_values.unsqueeze(0)
    model._check_pixels(pixel_values, None, check_values=True)
    if len(pixel_values) != 1:
        raise ValueError(f"`pixel_values` must hold one image (C, H, W), got {tuple(pixel_values.shape)}.")
    return ImageGame(model, pixel_values, _label_id(model, label), batch_size)


def captum_forward(
    model: PreTrainedModel, pixel_values: Tensor
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """What captum's perturbation methods need to play the model's game, where absent patches are dropped.

    captum perturbs the presence of patches (1 = present, its default baseline 0 = absent) instead of pixels:

    ```python
    forward_func, presence, feature_mask = captum_forward(model, pixel_values)
    maps = ShapleyValueSampling(forward_func).attribute(
        presence, target=label, additional_forward_args=(pixel_values,), feature_mask=feature_mask
    )  # (B, h, w)
    ```

    Gradient methods, which set presence to fractions, do not apply.

    Args:
        model: a Shapley image classifier.
        pixel_values: (B, C, H, W).

    Returns:
        `forward_func(presence, pixel_values)` -> (B, K) in logits, presence (B, h, w) of ones, and the feature mask
        (1, h, w) long that numbers the players.
    """
    height, width = model._check_pixels(pixel_values, None, check_values=True)

    def forward_func(presence: Tensor, pixel_values: Tensor) -> Tensor:
        present = presence.flatten(1) > 0.5
        if not torch.equal(present.to(presence.dtype), presence.flatten(1)):
            raise ValueError("`presence` must be 0 or 1: use one of captum's perturbation methods, baseline 0.")
        return model.coalition_values(pixel_values, present.unsqueeze(1)).squeeze(1)

    presence = torch.ones(len(pixel_values), height, width, device=pixel_values.device)
    feature_mask = torch.arange(height * width, device=pixel_values.device).view(1, height, width)
    return forward_func, presence, feature_mask


def add_attributions(
    dataset: Dataset | IterableDataset,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    batch_size: int = 8,
    skip_unreadable: bool = False,
) -> Dataset | IterableDataset:
    """Explain every image of a data set and keep the result beside it.

    Args:
        dataset: with a column of images; an `IterableDataset` stays lazy.
        model: a Shapley image classifier.
        processor: its image processor.
        image_column: column of images, or of anything that `load_image` reads.
        label_column: column of the labels (ids or names) to explain; None = the predicted label. Classes of a
            `ClassLabel` are the model's labels of the same names, whatever their ids.
        batch_size: images in one forward.
        skip_unreadable: leave out rows whose image cannot be read, each with a warning in the log; False stops at the
            first.

    Returns:
        The data set with four more columns: `attributions` (h rows of w float32, in logits), `attributions_label`
        (`ClassLabel`), `attributions_base_value` and `attributions_logit` (float32): base value + sum = logit.

    Raises:
        TypeError: not one split of a data set.
        ValueError: a column is missing, or is there already; a label is none of the model's; an image cannot be read.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`dataset` must be a Dataset or IterableDataset, got {type(dataset).__name__}: take one split."
        )
    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    added = {
        "attributions": List(List(Value("float32"))),
        "attributions_label": ClassLabel(names=names),
        "attributions_base_value": Value("float32"),
        "attributions_logit": Value("float32"),
    }
    features = dataset.features or dataset._resolve_features().features
    missing = [name for name in (image_column, label_column) if name is not None and name not in features]
    taken = sorted(added.keys() & features.keys())
    if missing or taken:
        raise ValueError(
            f"Columns {missing or taken} are {'missing' if missing else 'there already'}: got {list(features)}."
        )

    ids = _ids_of_classes(model, None if label_column is None else features[label_column])
    mode = getattr(features[image_column], "mode", None)
    # A data set in memory decodes what it stores; a stream gives what the function below gives.
    hands_out_pictures = isinstance(dataset, IterableDataset) and getattr(features[image_column], "decode", False)

    def explain(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        positions, images = read_pictures(
            batch[image_column], rows, processor, mode=mode, skip_unreadable=skip_unreadable
        )
        kept = {name: [values[position] for position in positions] for name, values in batch.items()}
        if hands_out_pictures:
            kept[image_column] = [features[image_column].decode_example(image) for image in kept[image_column]]
        label_ids = None
        if label_column is not None:
            label_ids = torch.tensor([_label_id(model, ids.get(x, x)) for x in kept[label_column]])
        columns = _explain(model, processor, images, label_ids) if images else [[]] * len(added)
        return {**kept, **dict(zip(added, columns, strict=True))}

    return undecoded(dataset, image_column).map(
        explain, with_indices=True, batched=True, batch_size=batch_size, features=Features({**features, **added})
    )


def _explain(
    model: PreTrainedModel, processor: BaseImageProcessor, images: list, label_ids: Tensor | None
) -> list[list]:
    """Maps (B, h, w), label ids, base values and logits (B) of one label per image, as lists."""
    pixel_values = pixel_values_of(images, processor, model.config).to(model.device, model.dtype)
    with torch.no_grad(), evaluating(model):
        outputs = model(pixel_values, attributed=1 if label_ids is None else label_ids.unsqueeze(1))
    model._check_answers(outputs)
    chosen = outputs.attributed_labels  # (B, 1)
    ids = chosen[:, 0]
    columns = outputs.maps[:, 0], ids, outputs.base_values[ids], outputs.logits.gather(1, chosen)[:, 0]
    return [column.tolist() for column in columns]


def _ids_of_classes(model: PreTrainedModel, feature: Any) -> dict[int, int]:
    """The model's id of each of a data set's classes, by name; empty where one of them has no names."""
    names = given_names(model.config.id2label)
    if not names or not isinstance(feature, ClassLabel):
        return {}
    return dict(enumerate(ids_by_name(feature.names, names)))


def _label_id(model: PreTrainedModel, label: int | str) -> int:
    return known_labels([label], model.config.id2label, "label")[0]
