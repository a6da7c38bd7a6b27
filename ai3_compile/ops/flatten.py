"""flatten: a view or reshape that the user wrote as flatten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..backends import abi
from ..selection import OpSpec
from .base import Attributes, Operation, shape_of, spec_of

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MAX_DIMS = 8
_DIMS = ("start_dim", "end_dim")


class Flatten(Operation):
    name = "flatten"
    op_name = "ai3::flatten"
    default = "torch"
    default_reason = "a view costs nothing where the memory allows one"
    modules = (torch.nn.Flatten,)

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

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        source = node.args[0]
        assert isinstance(source, Node)
        return source, None, None

    def attributes_of(self, module: Any) -> Attributes:
        return (("start_dim", module.start_dim), ("end_dim", module.end_dim))

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        rank = len(input)
        start, end = (attributes[name] + rank if attributes[name] < 0 else attributes[name] for name in _DIMS)
        if rank > _MAX_DIMS or not 0 <= start <= end < rank:
            return None
        return (*input[:start], math.prod(input[start : end + 1]), *input[end + 1 :])

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (input, *(attributes[name] for name in _DIMS), algorithm), {}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        return torch.flatten(input, *(attributes[name] for name in _DIMS))

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        return arguments["input"], *(arguments[name] for name in _DIMS)

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        args.output = abi.tensor_of((math.prod(spec.output_shape),))

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
    if str(node.meta.get("torch_fn", ("", ""))[1]).endswith(".flatten"):
        return True  # as torch.export says it
    sources = node.meta.get("source_fn_stack") or node.meta.get("fwd_source_fn_stack") or []
    return any(fn is torch.flatten or fn is torch.nn.Flatten or fn == "flatten" for _, fn in sources[-1:])
