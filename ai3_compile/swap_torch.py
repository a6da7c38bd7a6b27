"""The modules that swap_operation makes: those of torch.nn, computing by an algorithm of ai3.

A swapped module is the module it was, of another class: parameters, buffers, hooks and names are untouched. A subclass
of the user's own keeps its methods; what it calls of its base is ai3's (the swapped class comes right before the base
in the method resolution order).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from . import functional
from .ops import OPERATIONS


class Swapped:
    """What all swapped modules have: `algorithm`, the selector that names what computes them."""

    operation: str
    algorithm: str
    ai3_name: str
    """The module's path when it was swapped, for messages."""
    _is_fsdp_managed_module = False
    """FSDP sets it on the modules whose weights it frees after use and gathers again."""

    def __init__(self, orig: nn.Module, algorithm: str, target: str = "") -> None:
        """A module that shares `orig`'s parameters and buffers; swap_operation changes a module in place instead."""
        state = orig.__dict__
        self.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in state.items()})
        self.algorithm, self.ai3_name = algorithm, target

    def extra_repr(self) -> str:
        before = super().extra_repr()  # type: ignore[misc]
        return f"{before}, algorithm={self.algorithm!r}" if before else f"algorithm={self.algorithm!r}"

    def _run(
        self, input: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        # In training the weight changes with every step, and a weight that is computed or gathered anew for each call
        # is another one each time: nothing is kept of either.
        kept = isinstance(weight, nn.Parameter) and not self._is_fsdp_managed_module
        static = kept and not torch.is_grad_enabled()
        attributes = OPERATIONS[self.operation].attributes_of(self)
        return functional.call(self.operation, self.algorithm, self.ai3_name, attributes, static, input, weight, bias)


class Conv2D(Swapped, nn.Conv2d):
    """torch.nn.Conv2d by an algorithm of ai3: [N, C, H, W] or [C, H, W] -> [N, K, P, Q] or [K, P, Q]."""

    operation = "conv2d"

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return self._run(input, weight, bias)


class Linear(Swapped, nn.Linear):
    """torch.nn.Linear by an algorithm of ai3: [*, I] -> [*, O]."""

    operation = "linear"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._run(input, self.weight, self.bias)


class MaxPool2D(Swapped, nn.MaxPool2d):
    """torch.nn.MaxPool2d by an algorithm of ai3; with return_indices it is left to PyTorch."""

    operation = "maxpool2d"

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input) if self.return_indices else self._run(input)


class AvgPool2D(Swapped, nn.AvgPool2d):
    """torch.nn.AvgPool2d by an algorithm of ai3."""

    operation = "avgpool2d"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._run(input)


class AdaptiveAvgPool2D(Swapped, nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d by an algorithm of ai3."""

    operation = "adaptiveavgpool2d"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._run(input)


class ReLU(Swapped, nn.ReLU):
    """torch.nn.ReLU by an algorithm of ai3; with inplace=True the result is written over the input as well."""

    operation = "relu"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self._run(input)
        return input.copy_(output) if self.inplace else output


class Flatten(Swapped, nn.Flatten):
    """torch.nn.Flatten by an algorithm of ai3."""

    operation = "flatten"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._run(input)


CLASSES: dict[str, type[Any]] = {
    swapped.operation: swapped for swapped in (Conv2D, Linear, MaxPool2D, AvgPool2D, AdaptiveAvgPool2D, ReLU, Flatten)
}


def torch_class(swapped: type[Any]) -> type[Any]:
    """The class of torch.nn that a swapped class stands for."""
    return swapped.__bases__[1]


def swap(module: nn.Module, algorithm: str, name: str) -> None:
    """Makes a module of torch.nn a swapped one, or gives a swapped one another algorithm."""
    if not isinstance(module, Swapped):
        module.__class__ = _swapped_class(module)
    module.algorithm, module.ai3_name = algorithm, name  # type: ignore[assignment]


def restore(module: nn.Module) -> None:
    """Makes a swapped module what it was."""
    if not isinstance(module, Swapped):
        return
    cls = type(module)
    is_parametrized = parametrize.is_parametrized(module)
    swapped: Any = cls.__bases__[0] if is_parametrized else cls
    original = swapped._ai3_parts[0] if "_ai3_parts" in swapped.__dict__ else torch_class(swapped)
    module.__class__ = _rebased(cls, original) if is_parametrized else original
    del module.algorithm, module.ai3_name


def _swapped_class(module: nn.Module) -> type[Any]:
    cls = type(module)
    if parametrize.is_parametrized(module):
        # torch gives every parametrized module a class of its own, right over the class it had.
        return _rebased(cls, _of_class(cls.__bases__[0]))
    return _of_class(cls)


def _of_class(cls: type[Any]) -> type[Any]:
    (swapped,) = (s for s in CLASSES.values() if issubclass(cls, torch_class(s)))
    return swapped if cls is torch_class(swapped) else _derived((cls, swapped))


@functools.cache
def _derived(parts: tuple[Any, Any]) -> Any:
    """The class of the user's own with ai3's right before the base that torch.nn has for it."""
    return type(f"Swapped{parts[0].__name__}", parts, {"_ai3_parts": parts, "__reduce_ex__": _reduce})


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles as the two classes that make the class: it has no name of its own in any module."""
    return _new, (type(self)._ai3_parts,), self.__dict__


def _new(parts: tuple[Any, Any]) -> Any:
    made = _derived(parts)
    return made.__new__(made)


def _rebased(cls: type[Any], base: type[Any]) -> type[Any]:
    own = {key: value for key, value in cls.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), own)
