"""relu: aten.relu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..backends import abi
from ..selection import OpSpec
from .base import Attributes, Operation, spec_of

aten = torch.ops.aten


class Relu(Operation):
    name = "relu"
    op_name = "ai3::relu"
    default = "torch"
    default_reason = "fused into the convolution or linear before it, or into its neighbours by what compiles the rest"
    modules = (torch.nn.ReLU,)

    def match(self, node: Node) -> OpSpec | None:
        if node.target is not aten.relu.default:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        return spec_of(self.name, node, source, {})

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        source = node.args[0]
        assert isinstance(source, Node)
        return source, None, None

    def attributes_of(self, module: Any) -> Attributes:
        return ()

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        return tuple(input)

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (input, algorithm), {}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        return torch.relu(input)

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        return (arguments["input"],)

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        count = 1
        for size in spec.input_shape:
            count *= size
        args.input, args.output = abi.tensor_of((count,)), abi.tensor_of((count,))

    def fake(self, input: torch.Tensor, algorithm: int) -> torch.Tensor:
        return torch.empty_like(input)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return aten.threshold_backward(grad, output, 0), None
