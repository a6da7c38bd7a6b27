"""The activations that may end a convolution or linear: ai3_activation of kernel.h, in its order."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import ActivationGradientError

aten = torch.ops.aten

# By name in reports.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda value: value,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
NAMES = tuple(ACTIVATIONS)
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def apply(value: torch.Tensor, activation: int) -> torch.Tensor:
    """The activation of this number by PyTorch."""
    return ACTIVATIONS[NAMES[activation]](value)


def backward(operation: str, activation: int, grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The gradient before the activation, from the one behind it and its output.

    Raises ActivationGradientError for those whose gradient the output does not tell.
    """
    name = NAMES[activation]
    if name == "identity":
        return grad
    if name != "relu":
        raise ActivationGradientError(operation=operation, activation=name)
    found = aten.threshold_backward(grad, output, 0)
    assert isinstance(found, torch.Tensor)
    return found
