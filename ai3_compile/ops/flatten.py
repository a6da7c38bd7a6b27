"""flatten: a view or reshape that the user wrote as flatten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..selection import OpSpec
from .base import Operation, shape_of, spec_of

if TYPE_CHECKING:
    from ..backends import abi

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MAX_DIMS = 8


class Flatten(Operation):
    name = "flatten"
    op_name = "ai3::flatten"
    default = "torch"
    default_reason = "a view costs nothing where the memory allows one"

    def match(self, node: Node) -> OpSpec | None:
        if node.target not in _RESHAPES or not _written_as_flatten(node):
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = shape_of(source), shape_of(node)
        merged = len(before) - len(after)
        if merged < 1 or len(before) > _MAX_DIMS:
            return None
        # The first place where merging that many dimensions gives the output's shape.
        for start in range(len(after)):
            end = start + merged
            if before[:start] == after[:start] and before[end + 1 :] == after[start + 1 :]:
                if math.prod(before[start : end + 1]) == after[start]:
                    return spec_of(self.name, node, source, {"start_dim": start, "end_dim": end})
        return None

    def emit(self, node: Node, spec: OpSpec, algorithm: int, is_static: Callable[[Node], bool]) -> Node:
        return node.graph.call_function(self.overload, (node.args[0], spec.start_dim, spec.end_dim, algorithm))

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        from ..backends.cpp import tensor_of

        args.output = tensor_of((math.prod(spec.output_shape),))

    def fake(self, input: torch.Tensor, start_dim: int, end_dim: int, algorithm: int) -> torch.Tensor:
        start, end = start_dim % input.dim(), end_dim % input.dim()
        shape = [*input.shape[:start], math.prod(input.shape[start : end + 1]), *input.shape[end + 1 :]]
        return input.new_empty(shape)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.shape = inputs[0].shape

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.reshape(ctx.shape), None, None, None


def _written_as_flatten(node: Node) -> bool:
    """Whether the user's call was flatten: other code reshapes too, and keeps its view."""
    sources = node.meta.get("source_fn_stack") or node.meta.get("fwd_source_fn_stack") or []
    return any(fn is torch.flatten or fn is torch.nn.Flatten or fn == "flatten" for _, fn in sources[-1:])
