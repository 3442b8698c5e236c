"""Checks at the door: every refusal says which argument is wrong, what was wanted and what came."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any
from unicodedata import category

import torch
from torch import Tensor

UNKNOWN_LABEL = -100  # what torch's losses skip


def describe(value: Any) -> str:
    """What came, in a few words: dtype and shape of a tensor, else type and the start of its text."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} of {value.dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def printable(text: Any) -> str:
    """The text without control and invisible characters, which can turn around or repaint what it says."""
    hidden = {letter for letter in str(text) if category(letter)[0] == "C" and letter != "\n"}
    return str(text).translate({ord(letter): "\N{REPLACEMENT CHARACTER}" for letter in hidden})


def check_count(value: Any, name: str, minimum: int = 1, fix: str = "give a whole number") -> None:
    """Raise unless `value` is an integer of at least `minimum`."""
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer of at least {minimum}, got {describe(value)}: {fix}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}: {fix}.")


def check_number(value: Any, name: str, wanted: str, fits: Callable[[float], bool]) -> None:
    """Raise unless `value` is a real number that `fits`, which `wanted` puts in words. NaN fits no comparison."""
    if not isinstance(value, Real):
        raise TypeError(f"`{name}` must be {wanted}, got {describe(value)}.")
    if not fits(float(value)):
        raise ValueError(f"`{name}` must be {wanted}, got {value}.")


def check_floats(tensor: Any, name: str, shape: Sequence[int | str], fix: str = "reshape it") -> None:
    """Raise unless `tensor` is a floating-point tensor of a shape: numbers for given sizes, words for any above 0."""
    wanted = f"`{name}` must be of shape ({', '.join(map(str, shape))})"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{wanted}, a float tensor, got {describe(tensor)}: {fix}.")
    fits = len(shape) == tensor.ndim and all(
        size == wanted if isinstance(wanted, int) else size > 0
        for size, wanted in zip(tensor.shape, shape, strict=False)
    )
    if not fits:
        raise ValueError(f"{wanted}, got {describe(tensor)}: {fix}.")
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` must be a float tensor, got {describe(tensor)}: convert it with `.float()`.")


def check_data(tensor: Tensor, name: str) -> None:
    """Raise if a tensor is on the meta device, where there are shapes and no numbers."""
    if tensor.device.type == "meta":
        raise ValueError(f"`{name}` is on the meta device, which holds no numbers: make it on a real one.")


def may_be_read(tensor: Tensor) -> bool:
    """Whether a tensor's numbers may be asked for here: not while torch is compiling, nor where torch.func maps it."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def check_device(tensor: Any, name: str, device: torch.device) -> None:
    """Raise if a tensor is not where the others are; what is no tensor is left to other checks."""
    if isinstance(tensor, Tensor) and tensor.device != device:
        raise ValueError(
            f"`{name}` must be on {device} as the others are, got {tensor.device}: move it by `.to({str(device)!r})`."
        )


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise if a tensor holds NaN or infinity."""
    check_data(tensor, name)
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinite entries: drop or repair what they belong to.")


def check_label_ids(
    labels: Any, name: str, images: int, num_labels: int | None = None, *, may_be_unknown: bool = False
) -> Tensor:
    """One label id per image, as a long tensor (images,); raise unless they are integers from 0 to num_labels - 1.

    `num_labels` None means any number of labels; with `may_be_unknown` -100 is taken too.
    """
    last = 2**62 if num_labels is None else num_labels - 1
    span = "on" if num_labels is None else f"to {last}"
    wanted = f"`{name}` must be {images} integers from 0 {span}, one per image, (images,)"
    try:
        ids = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}, got {describe(labels)}.") from error
    check_data(ids, name)
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.shape != (images,) or images == 0 or not integers or not _in_range(ids, last, may_be_unknown):
        raise ValueError(f"{wanted}, got {ids.dtype} of shape {tuple(ids.shape)}: {ids.flatten()[:8].tolist()}.")
    return ids.long()


def known_labels(labels: Any, id2label: Mapping[int, str], name: str = "labels") -> list[int]:
    """Ids of labels given by id or by name; raise on unknown ones and on names that several labels share."""
    matches = []
    for label in check_sequence(labels, name, "ids or names of labels"):
        if isinstance(label, str):
            matches.append([index for index, known in id2label.items() if known == label])
        else:
            matches.append([int(label)] if isinstance(label, Integral) and int(label) in id2label else [])
    unknown = [repr(label) for label, found in zip(labels, matches, strict=True) if not found]
    if unknown or not matches:
        raise ValueError(
            f"Unknown labels in `{name}`: A label must be one of {list(id2label.values())[:20]} or an id, an integer "
            f"below {len(id2label)}, got {', '.join(unknown) or 'none'}."
        )
    for label, found in zip(labels, matches, strict=True):
        if len(found) > 1:
            raise ValueError(f"`{name}`: the labels {found} share the name {label!r}: give the id.")
    return [found[0] for found in matches]


def _in_range(ids: Tensor, last: int, may_be_unknown: bool) -> bool:
    inside = (ids >= 0) & (ids <= last)
    return bool((inside | (ids == UNKNOWN_LABEL) if may_be_unknown else inside).all())


def check_callable(value: Any, name: str, wanted: str) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be {wanted}, got {describe(value)}.")


def check_shapley_model(model: Any, name: str = "`model`") -> None:
    """Raise unless `model` is a Shapley image classifier."""
    if not hasattr(model, "coalition_values"):
        raise TypeError(
            f"{name} must be a Shapley image classifier, got {type(model).__name__}, which does not explain itself: "
            "load the checkpoint with AutoShapleyForImageClassification and "
            "train it with ShapleyTrainer."
        )


def check_generator(generator: Any) -> None:
    """Raise unless `generator` is a torch generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {describe(generator)}: "
            "use `torch.Generator().manual_seed(seed)`."
        )


def check_sequence(values: Any, name: str, wanted: str) -> list:
    """The values as a list; raise unless they are a sequence (no text) or a tensor of at least one dimension."""
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise TypeError(f"`{name}` must be {wanted}, got {describe(values)}.")
    if isinstance(values, dict):
        raise TypeError(f"`{name}` must be {wanted}, got {describe(values)}.")
    if isinstance(values, Tensor) and values.ndim == 0:
        raise ValueError(f"`{name}` must be {wanted}, got a single number.")
    return list(values)


def check_pair(values: Any, name: str, wanted: str) -> tuple[int, int]:
    """Two integers of at least 1."""
    pair = check_sequence(values, name, wanted)
    if len(pair) != 2 or not all(isinstance(size, Integral) and int(size) >= 1 for size in pair):
        raise ValueError(f"`{name}` must be {wanted}, got {describe(values)}.")
    return int(pair[0]), int(pair[1])
