"""The operations, one file each: how one looks in an ATen graph, what ai3's own computes, and its gradient."""

from __future__ import annotations

from . import python
from .adaptiveavgpool2d import AdaptiveAvgPool2d
from .attention import Attention
from .avgpool2d import AvgPool2d
from .base import Operation
from .conv2d import Conv2d
from .conv2d_gradients import Conv2dGradInput, Conv2dGradWeight, Gradient
from .flatten import Flatten
from .linear import Linear
from .maxpool2d import MaxPool2d
from .relu import Relu

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Conv2d(),
        Linear(),
        MaxPool2d(),
        AvgPool2d(),
        AdaptiveAvgPool2d(),
        Relu(),
        Flatten(),
        Attention(),
        Conv2dGradInput(),
        Conv2dGradWeight(),
    )
}

# Those that are modules of torch.nn, which can be swapped.
MODULES = tuple(name for name, operation in OPERATIONS.items() if operation.modules)
# Those of the backward, which only torch.compile sees.
GRADIENTS: dict[str, Gradient] = {name: op for name, op in OPERATIONS.items() if isinstance(op, Gradient)}


def register() -> None:
    """Attaches fakes and gradients to the operations that the core library has registered."""
    python.define(tuple(OPERATIONS.values()))
    for operation in OPERATIONS.values():
        operation.register()


__all__ = ["GRADIENTS", "MODULES", "OPERATIONS", "Operation", "register"]
