"""relu: aten.relu."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..selection import OpSpec
from .base import Operation, spec_of

if TYPE_CHECKING:
    from ..backends import abi

aten = torch.ops.aten


class Relu(Operation):
    name = "relu"
    op_name = "ai3::relu"
    default = "torch"
    default_reason = "fused into the convolution or linear before it, or into its neighbours by what compiles the rest"

    def match(self, node: Node) -> OpSpec | None:
        if node.target is not aten.relu.default:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        return spec_of(self.name, node, source, {})

    def emit(self, node: Node, spec: OpSpec, algorithm: int, is_static: Callable[[Node], bool]) -> Node:
        return node.graph.call_function(self.overload, (node.args[0], algorithm))

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        from ..backends.cpp import tensor_of

        count = 1
        for size in spec.input_shape:
            count *= size
        args.input, args.output = tensor_of((count,)), tensor_of((count,))

    def fake(self, input: torch.Tensor, algorithm: int) -> torch.Tensor:
        dense = input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
        return torch.empty_like(input if dense else input.contiguous())

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return aten.threshold_backward(grad, output, 0), None
