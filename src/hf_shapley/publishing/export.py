"""Models as graphs that run without Python code: `torch.export` programs and ONNX files."""

import copy
import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..files import whole_file
from ..models.checks import check_pair
from ..models.evaluation_mode import evaluating

OUTPUTS = ("logits", "attributions")


class _Explainer(nn.Module):
    """Pixels in, logits and attribution maps out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values)
        grid = self.model.grid_size(*pixel_values.shape[-2:])
        return output.logits, output.attributions.transpose(1, 2).unflatten(-1, grid)


def export_program(model: Any, *, image_size: int | Sequence[int] | None = None) -> ExportedProgram:
    """The model as a `torch.export` program: `torch.export.save` writes it, `torch.export.load` needs no hf_shapley.

    Args:
        model: a Shapley image classifier.
        image_size: height and width in pixels, or both in one; None takes the config's.

    Returns:
        Program from pixel values (batch, channels, height, width), any batch size, to logits (batch, labels) and
        attributions (batch, labels, h, w) in logits: the sum of a map is the logit less the label's base value.

    Raises:
        TypeError: `model` is no Shapley image classifier.
        ValueError: the patches do not tile such images.
    """
    with torch.no_grad(), evaluating(_checked(model)):
        example, dynamic_shapes = _example(model, image_size)
        return torch.export.export(_Explainer(model).eval(), (example,), dynamic_shapes=dynamic_shapes)


def export_onnx(model: Any, path: str | os.PathLike, *, image_size: int | Sequence[int] | None = None) -> Path:
    """Write the model as an ONNX file: input `pixel_values`, outputs `logits` and `attributions`, any batch size.

    Shapes as in `export_program`. The file's metadata hold, as JSON, `labels` (names in order), `base_values` (one
    per label), `grid` ([h, w]) and `image_size` ([height, width]). The graph computes in float32, whatever the model
    does: runtimes lack operations in half precision. The file appears under its name when it is whole; weights beyond
    2 GB lie in `<path>.data`.

    Args:
        model: a Shapley image classifier.
        path: file to write, ending in ".onnx".
        image_size: height and width in pixels, or both in one; None takes the config's.

    Returns:
        `path`.

    Raises:
        ImportError: the packages of the extra "onnx" are missing.
        TypeError: `model` is no Shapley image classifier.
        ValueError: the patches do not tile such images, or `path` does not end in ".onnx".
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install hf_shapley[onnx]")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f'`path` must end in ".onnx", got {str(path)!r}.')
    model = _in_float32(_checked(model))
    with torch.no_grad(), evaluating(model):
        example, dynamic_shapes = _example(model, image_size)
        program: Any = torch.onnx.export(
            _Explainer(model).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=["pixel_values"],
            output_names=OUTPUTS,
            verbose=False,
        )
    size = list(example.shape[-2:])
    metadata = {
        "labels": [model.config.id2label[i] for i in range(model.config.num_labels)],
        "base_values": model.base_values.tolist(),
        "grid": list(model.grid_size(*size)),
        "image_size": size,
    }
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    with whole_file(path) as draft:
        program.save(draft)  # weights beyond 2 GB beside it
    return path


def _checked(model: Any) -> Any:
    if not hasattr(model, "coalition_values"):
        raise TypeError(f"`model` must be a Shapley image classifier, got {type(model).__name__}.")
    return model


def _in_float32(model: Any) -> Any:
    """The model, or a copy of it where it has floating-point weights of another dtype."""
    is_other = (weight.is_floating_point() and weight.dtype != torch.float32 for weight in model.parameters())
    return copy.deepcopy(model).float() if any(is_other) else model


def _example(model: Any, image_size: int | Sequence[int] | None) -> tuple[Tensor, tuple[dict[int, Any]]]:
    """Pixels to trace the model with, and which of their dimensions may vary."""
    size = model.config.image_size if image_size is None else image_size
    height, width = check_pair((size, size) if isinstance(size, int) else size, "image_size", "a height and a width")
    model.grid_size(height, width)
    weight = next(model.classifier.parameters())
    # Two images: with one, the batch dimension would be taken for a constant.
    example = torch.zeros(2, model.config.num_channels, height, width, dtype=weight.dtype, device=weight.device)
    return example, ({0: Dim("batch", min=1)},)
