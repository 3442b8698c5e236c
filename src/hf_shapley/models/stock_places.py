"""Where in a stock image classifier its features and the input of its last linear layer are, found by trying it out.

The trial is on the meta device: shapes alone, no numbers and no memory.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST_PREFIX_TOKENS = 16
"""CLS, registers and the like; with more, what has some width and some length is no row of grid cells."""
POOLINGS = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
)


class Features(NamedTuple):
    """The last features on a grid, and how a module gives them."""

    module: str  # name of the module that gives them
    layout: str  # "channels first" (B, D, h, w), "channels last" (B, h, w, D) or "tokens" (B, P + h w, D)
    grid: tuple[int, int]  # (h, w)
    width: int  # D

    def cells(self, output: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the module gave as one token per player of a grid that is no finer, (B, N, D)."""
        if self.layout == "tokens":
            output = (
                output[:, output.shape[1] - self.grid[0] * self.grid[1] :].transpose(1, 2).unflatten(-1, self.grid)
            )
        elif self.layout == "channels last":
            output = output.permute(0, 3, 1, 2)
        if grid != self.grid:
            output = nn.functional.adaptive_avg_pool2d(output, grid)
        return output.flatten(2).transpose(1, 2)


class Places(NamedTuple):
    """What is to be listened to in a stock classifier."""

    features: Features
    classifiers: tuple[str, ...]  # names of the linear layers whose mean is the logits
    readout_size: int  # D', width of what they read, all together


class _Seen(NamedTuple):
    name: str
    module: nn.Module
    output: Tensor


def find_places(model: nn.Module, num_channels: int, size: Sequence[int], **options: Any) -> Places:
    """Try out a stock classifier on the meta device.

    Args:
        model: with its weights there.
        num_channels: of an image.
        size: (height, width) of an image.
        **options: of its forward.

    Raises:
        ValueError: it takes more than pixels, has no features on a grid, or its logits are no linear layer's.
    """
    name = type(model).__name__
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    pixels = torch.zeros(1, num_channels, *size, device="meta", dtype=dtype)
    seen: list[_Seen] = []
    try:
        logits = _tried(model, pixels, options, seen)
    except Exception as error:  # whatever a model may raise that wants something else
        raise ValueError(
            f"`{name}` cannot be explained: on the meta device it does not answer to pixel values of shape "
            f"{tuple(pixels.shape)} alone ({type(error).__name__}: {error})."
        ) from error
    classifiers = _classifiers(model, logits, seen, lambda replaced: _tried(model, pixels, options, [], replaced))
    features = _features(seen, (size[0], size[1]))
    if not classifiers or features is None:
        missing = "no linear layer, nor the mean of some, whose output its logits are" if features else ""
        missing = missing or "no features on a grid that could tell players apart"
        raise ValueError(f"`{name}` cannot be explained: it has {missing}.")
    layers: list[Any] = [model.get_submodule(layer) for layer in classifiers]
    return Places(features, classifiers, sum(layer.in_features for layer in layers))


@torch.no_grad()
def _tried(
    model: nn.Module,
    pixels: Tensor,
    options: dict[str, Any],
    seen: list[_Seen],
    replaced: dict[str, Tensor] | None = None,
) -> Tensor:
    """Logits; note what modules gave, in order, and let some give something else."""

    def noting(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            if isinstance(output, Tensor):
                seen.append(_Seen(name, module, output))
            return (replaced or {}).get(name)

        return note

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(noting(name)).remove)
        return model(pixels, **options)[0]  # the logits come first, by whatever name


def _classifiers(model: nn.Module, logits: Tensor, seen: list[_Seen], ask: Any) -> tuple[str, ...]:
    """Names of the linear layers whose output, or the mean of whose outputs, the logits are; empty without such."""
    linear = [found for found in seen if isinstance(found.module, nn.Linear) and found.output.shape == logits.shape]
    if linear and linear[-1].output is logits:
        return (linear[-1].name,)
    # With a classifier and a distilled one: numbers in place of what they give tell what is made of them.
    names = tuple(found.name for found in linear[-2:])
    numbers = torch.arange(1.0, 1 + logits.numel(), device="cpu").view(logits.shape)
    given = {name: numbers * 3**place for place, name in enumerate(names)}
    try:
        is_mean = len(names) > 1 and torch.equal(ask(given), sum(given.values()) / len(given))
    except (RuntimeError, NotImplementedError):  # what follows needs more than these
        is_mean = False
    return names if is_mean else ()


def _features(seen: list[_Seen], size: tuple[int, int]) -> Features | None:
    """The last output of a module that lies on a grid, for images of that height and width."""
    shapes = [found.output.shape for found in seen if isinstance(found.module, nn.Conv2d)]
    convolved = [(shape[-2], shape[-1]) for shape in shapes]
    for found in reversed(seen):
        if isinstance(found.module, POOLINGS):
            continue
        layout, grid, width = _on_grid(found.output.shape, size, convolved)
        if grid[0] * grid[1] > 1 and width > 1:
            return Features(found.name, layout, grid, width)
    return None


def _on_grid(
    shape: torch.Size, size: tuple[int, int], convolved: list[tuple[int, int]]
) -> tuple[str, tuple[int, int], int]:
    """Layout, grid and width of an output; a grid of nothing where it lies on none."""
    if len(shape) == 4:
        first, last = (shape[2], shape[3]), (shape[1], shape[2])
        if _skew(first, size) <= _skew(last, size):
            return "channels first", first, shape[1]
        return "channels last", last, shape[3]
    if len(shape) != 3:
        return "", (0, 0), 0
    # As a convolution left them, which tells registers from cells; else as the image's shape has them.
    shared = math.gcd(*size)
    scale = math.isqrt(shape[1] * shared**2 // (size[0] * size[1]))
    in_shape = (size[0] // shared * scale, size[1] // shared * scale)
    grids = [grid for grid in (*convolved, in_shape) if 0 <= shape[1] - grid[0] * grid[1] <= MOST_PREFIX_TOKENS]
    known = [grid for grid in grids if grid in convolved] or grids
    return "tokens", max(known, key=math.prod, default=(0, 0)), shape[2]


def _skew(grid: tuple[int, int], size: tuple[int, int]) -> float:
    """How far a grid's shape is from the image's."""
    return abs(math.log(grid[0] / grid[1]) - math.log(size[0] / size[1]))


@contextmanager
def listening(model: nn.Module, places: Places) -> Iterator[dict[str, Tensor]]:
    """Note what the features' module gives, and what the classifiers are given, in a forward of this thread."""
    heard: dict[str, Tensor] = {}
    thread = _thread()  # others may run the same modules meanwhile

    def note_features(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if _thread() == thread:
            heard[""] = output

    def noting_readout(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if _thread() == thread:
                heard[name] = inputs[0]

        return note

    with ExitStack() as hooks:
        features = model.get_submodule(places.features.module)
        hooks.callback(features.register_forward_hook(note_features).remove)
        for name in places.classifiers:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(noting_readout(name)).remove)
        yield heard


def _thread() -> int:
    """Which thread this is; the compiler, which traces one, knows none."""
    return 0 if torch.compiler.is_compiling() else get_ident()
