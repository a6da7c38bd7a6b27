"""OpSpec: one operation of a network as a selector and the algorithms see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a weight or bias; the data is not there."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OpSpec:
    """One operation of a captured network.

    `attributes` holds what the matching `torch.nn` module calls by the same name, and reads as attributes of the spec:
    conv2d has `weight`, `bias`, `stride`, `padding`, `dilation`, `groups`, `in_channels`, `out_channels`,
    `kernel_size`, `padding_mode`. So a function written for `torch.nn.Conv2d` reads an OpSpec as well.
    """

    operation: str
    name: str
    """Module path in the user's model, such as `layer1.0.conv1`; empty for a call outside a module."""
    input_shape: tuple[int, ...]
    """N, C, H, W for images; a dynamic size is the one the graph was captured with."""
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    attributes: tuple[tuple[str, Any], ...] = field(default=())
    allow_tf32: bool = False
    """Whether products of float32 may be rounded to TF32: on GPUs, as PyTorch's settings say."""
    torch_only: str | None = None
    """Why no native algorithm can take this occurrence, whatever its shapes (its indices are used, say)."""

    def __getattr__(self, name: str) -> Any:
        for key, value in self.__dict__.get("attributes", ()):
            if key == name:
                return value
        raise AttributeError(f"{self.__dict__.get('operation', 'OpSpec')} has no attribute {name!r}")

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        return f"{self.operation} {self.name or '(no module)'} on {shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Use:
    """How an operation is called, as far as an algorithm's time depends on it."""

    in_graph: bool
    """Images are channels_last where the algorithm prefers them so; else they are contiguous."""
    has_norm: bool = False
    """A batch norm behind becomes part of it: it has a bias, whether or not the OpSpec has one."""
    residual: bool = False
    """A tensor like the output is added to it."""
    activation: int = 0
    """The number of the activation that ends it."""
    pooled: bool = False
    """The largest of each 2x2 pixels is all that is read of it."""
