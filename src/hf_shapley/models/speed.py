"""What makes the forwards cheaper and changes no number but by rounding; each with the benchmark that shows it.

- GELU in place where nothing is learned, `activated`: `benchmarks/explain_latency.py`, a tenth of a ConvNeXt forward.
- The empty coalition's prefix tokens in the same rows as the images', `packed`: the same benchmark, a tenth of a ViT's
  forward of one image, which would read all of the weights a second time.
- The last layer for those tokens alone that are read, and few queries without keys and values of every token, `read`:
  the same benchmark; the head's own last layer costs next to nothing then.
- Coalitions kept apart and put together by functions that are each other's gradient, `Apart` and `Together`, and the
  bias of a depthwise convolution, `DepthwiseConv2d`: `benchmarks/training_cost.py`, a fifth of a ConvNeXt's backward.
"""

from typing import Any

import torch
from torch import Tensor, cat, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .checks import may_be_read


def dtype_of_products(tensor: Tensor) -> torch.dtype:
    """What matrix products and convolutions of a tensor compute in: its own dtype, or autocast's, if not float64."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def is_alone(module: nn.Module) -> bool:
    """Whether the module is nothing but its class's forward: no hook sees what it takes or gives."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks)
    return not (any(hooks) or "forward" in vars(module))


def activated(act: nn.Module, hidden: Tensor, source: nn.Module) -> Tensor:
    """`act(hidden)`, in place where it is GELU and nothing else needs `hidden`, which the linear layer `source` made.

    The hidden tensor is the largest of a layer: to touch new memory of its size takes a CPU longer than GELU does.
    """
    known = getattr(act, "act", None) is nn.functional.gelu and type(source) is nn.Linear
    if hidden.requires_grad or not (may_be_read(hidden) and known and is_alone(act) and is_alone(source)):
        return act(hidden)
    return torch.ops.aten.gelu_(hidden)


def packed(tokens: Tensor, lone: Tensor) -> Tensor:
    """The rows of all images' tokens, and those of few more tokens: (B, T, D), (P, D) -> (B T + P, D)."""
    return cat([tokens.flatten(0, 1), lone])


def unpacked(rows: Tensor, num_images: int, num_lone: int) -> tuple[Tensor, Tensor]:
    """What `packed` put together: (B T + P, D) -> (B, T, D), (P, D)."""
    # One split, whose gradient is put together in one pass, unlike two slices'.
    tokens, lone = rows.split([rows.shape[0] - num_lone, num_lone])
    return tokens.unflatten(0, (num_images, -1)), lone


def are_plain(*modules: nn.Module) -> bool:
    """Whether these are linear layers whose weights say all: no adapter, no quantisation, nothing offloaded."""
    return all(type(module) is nn.Linear and not module.weight.is_meta for module in modules)


def read(queries: Tensor, tokens: Tensor, mask: Tensor | None, key: nn.Linear, value: nn.Linear) -> Tensor:
    """Attention of few queries (B, H, Q, d), scaled, to tokens (B, T, D), without a key and a value of every token.

    A query's score is q . (W_k x + b_k) = (W_k' q) . x + q . b_k, and what it reads is W_v sum_t a_t x_t + b_v:
    the weights meet the few queries in place of all the tokens.

    Args:
        queries: (B, H, Q, d).
        tokens: (B, T, D).
        mask: additive, (B, 1, Q, T), or None.
        key: the layer that would make the keys; both are `are_plain`.
        value: the layer that would make the values.

    Returns:
        (B, Q, H d), not yet projected.
    """
    heads, num_queries, head_dim = queries.shape[1:]
    key_weight, value_weight = (part.weight.unflatten(0, (heads, head_dim)) for part in (key, value))
    seeking = (queries @ key_weight).flatten(1, 2)  # (B, H Q, D)
    scores = (seeking @ tokens.transpose(1, 2)).unflatten(1, (heads, num_queries))  # (B, H, Q, T)
    if key.bias is not None:  # softmax ignores it; left out, the parameter would have no part in a training step
        scores = scores + queries @ key.bias.view(heads, head_dim, 1)
    weights = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)
    found = (weights.flatten(1, 2) @ tokens).unflatten(1, (heads, num_queries))  # (B, H, Q, D)
    attended = found @ value_weight.transpose(1, 2)  # (B, H, Q, d)
    if value.bias is not None:
        attended = attended + value.bias.view(heads, 1, head_dim).to(attended.dtype)
    return attended.transpose(1, 2).flatten(2)


class Apart(torch.autograd.Function):
    """Each coalition's own cells: (B, H, W, C), masks (B, G, H, W, 1) -> (B, G, H, W, C), 0 where others are.

    It and `Together` are each other's gradient, in fewer and smaller passes over memory than those torch derives.
    """

    generate_vmap_rule = True  # for gradients of each image by itself

    @staticmethod
    def forward(cells: Tensor, masks: Tensor) -> Tensor:
        return cells.unsqueeze(1) * masks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Together.apply(gradient, *ctx.saved_tensors), None


class Together(torch.autograd.Function):
    """Each cell as the coalition that holds it has it: (B, G, H, W, C), masks (B, G, H, W, 1) -> (B, H, W, C)."""

    generate_vmap_rule = True  # for gradients of each image by itself

    @staticmethod
    def forward(apart: Tensor, masks: Tensor) -> Tensor:
        (first, *others), (mask, *other_masks) = apart.unbind(1), masks.unbind(1)
        cells = first * mask
        # In place, but where torch is compiling: torch 2.11 would lose the gradient without a word.
        add = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
        for own, mask in zip(others, other_masks, strict=True):
            cells = add(cells, own, mask)  # exact: at each cell one coalition alone is not 0
        return cells

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Apart.apply(gradient, *ctx.saved_tensors), None


def apart(cells: Tensor, masks: Tensor) -> Tensor:
    """`Apart`, applied where there is a gradient: applying a function takes the host longer than its kernel."""
    return Apart.apply(cells, masks) if torch.is_grad_enabled() else Apart.forward(cells, masks)


def together(cells: Tensor, masks: Tensor) -> Tensor:
    """`Together`, likewise."""
    return Together.apply(cells, masks) if torch.is_grad_enabled() else Together.forward(cells, masks)


class LearningBias(torch.autograd.Function):
    """A convolution's output (B, C, H, W) as it is; the bias (C), which is in it already, gets the gradient's sum."""

    generate_vmap_rule = True  # for gradients of each image by itself

    @staticmethod
    def forward(convolved: Tensor, bias: Tensor) -> Tensor:
        return convolved.view_as(convolved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 2, 3)).to(ctx.dtype)


class DepthwiseConv2d(nn.Conv2d):
    """The same convolution, whose bias learns from the sum of the output's gradient.

    On a CPU, oneDNN's own gradient of the bias takes a fifth of the whole backward pass of a depthwise convolution.
    """

    def forward(self, features: Tensor) -> Tensor:
        bias = self.bias
        if bias is None or not (bias.requires_grad and torch.is_grad_enabled()) or features.device.type != "cpu":
            return super().forward(features)
        return LearningBias.apply(self._conv_forward(features, self.weight, bias.detach()), bias)
