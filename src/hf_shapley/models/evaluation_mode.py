"""Evaluation mode while threads explain with one model."""

import threading
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import nn

_MODES = threading.Lock()
# How many blocks of all threads hold a model in evaluation mode, and which modules were in it before the first one.
_HELD: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


class evaluating:
    """Evaluation mode within a block; the last of the blocks that overlap puts back every module's mode.

    So threads explain with one model at a time. One that trains it meanwhile would train in evaluation mode.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        with nullcontext() if torch.compiler.is_compiling() else _MODES:  # the compiler knows no locks
            count, evaluated = _HELD.get(self.model, (0, []))
            self.is_held = count > 0 or self.model.training
            if self.model.training:
                evaluated = [module for module in self.model.modules() if not module.training]
                self.model.eval()
            if self.is_held:
                _HELD[self.model] = count + 1, evaluated

    def __exit__(self, *_: object) -> None:
        if not self.is_held:
            return
        with nullcontext() if torch.compiler.is_compiling() else _MODES:
            count, evaluated = _HELD.pop(self.model)
            if count > 1:
                _HELD[self.model] = count - 1, evaluated
                return
            self.model.train()
            for module in evaluated:
                module.training = False
