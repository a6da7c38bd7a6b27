"""adaptiveavgpool2d: aten._adaptive_avg_pool2d, and the mean over an image that it becomes for one output pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..selection import OpSpec
from .base import Operation, empty_image, shape_of, spec_of

if TYPE_CHECKING:
    from ..backends import abi

aten = torch.ops.aten


class AdaptiveAvgPool2d(Operation):
    name = "adaptiveavgpool2d"
    op_name = "ai3::adaptive_avg_pool2d"
    default = "guess|torch"
    default_reason = "ai3's kernel; torch for dtypes it does not compute"

    def match(self, node: Node) -> OpSpec | None:
        if not (node.target is aten._adaptive_avg_pool2d.default or _is_image_mean(node)):
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        if len(source.meta["val"].shape) != 4 or 0 in shape_of(source)[2:]:
            return None
        symbolic = not all(isinstance(size, int) for size in node.meta["val"].shape[2:])
        return spec_of(
            self.name,
            node,
            source,
            {"output_size": shape_of(node)[2:]},
            torch_only="its output size changes with the input" if symbolic else None,
        )

    def emit(self, node: Node, spec: OpSpec, algorithm: int, is_static: Callable[[Node], bool]) -> Node:
        return node.graph.call_function(self.overload, (node.args[0], *spec.output_size, algorithm))

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        """Input and output sizes say it all."""

    def fake(
        self, input: torch.Tensor, out_h: int, out_w: int, algorithm: int, channels_last: bool = False
    ) -> torch.Tensor:
        return empty_image(input, input.shape[-3], out_h, out_w, channels_last)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        return aten._adaptive_avg_pool2d_backward(grad, input), None, None, None, None


def _is_image_mean(node: Node) -> bool:
    """mean over height and width, kept as dimensions: what adaptive pooling to 1x1 is in ATen."""
    if node.target is not aten.mean.dim or "dtype" in node.kwargs or len(node.args) != 3:
        return False
    source, dims, keepdim = node.args
    assert isinstance(source, Node) and isinstance(dims, (list, tuple))
    return bool(keepdim) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
