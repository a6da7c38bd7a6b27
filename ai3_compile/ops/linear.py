"""linear: x @ weight.T + bias, which ATen writes as addmm or mm with a transposed weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..backends import abi
from ..selection import OpSpec, TensorSpec
from . import activations
from .base import Attributes, Operation, spec_of, tensor_spec

aten = torch.ops.aten


class Linear(Operation):
    name = "linear"
    op_name = "ai3::linear"
    default = "guess|torch"
    default_reason = "the cheapest of ai3's algorithms by estimate; torch for dtypes that none of them computes"
    modules = (torch.nn.Linear,)
    autocasts = True
    only_described = ("weight", "bias", "in_features", "out_features")

    def match(self, node: Node) -> OpSpec | None:
        parts = _parts(node)
        if parts is None:
            return None
        input, weight, bias = parts
        weight_spec = tensor_spec(weight)
        assert weight_spec is not None
        out_features, in_features = weight_spec.shape
        attributes = {
            "weight": weight_spec,
            "bias": tensor_spec(bias),
            "in_features": in_features,
            "out_features": out_features,
        }
        return spec_of(self.name, node, input, attributes)

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        parts = _parts(node)
        assert parts is not None
        return parts

    def attributes_of(self, module: Any) -> Attributes:
        return ()

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        assert weight is not None
        return (*input[:-1], weight[0]) if len(input) > 0 and input[-1] == weight[1] and 0 not in weight else None

    def described(
        self, weight_shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, attributes: Mapping[str, Any]
    ) -> dict[str, Any]:
        out_features, in_features = weight_shape
        return {
            "weight": TensorSpec(weight_shape, dtype),
            "bias": TensorSpec((out_features,), dtype) if has_bias else None,
            "in_features": in_features,
            "out_features": out_features,
        }

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (input, weight, bias, algorithm), {"static_weight": static_weight}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        assert weight is not None
        return F.linear(input, weight, bias)

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        return arguments["input"], arguments["weight"], arguments["bias"]

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        args.weight = abi.tensor_of(spec.weight.shape)
        args.has_bias = spec.bias is not None

    def fake(self, input: torch.Tensor, weight: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:  # type: ignore[override]
        return input.new_empty((*input.shape[:-1], weight.shape[0]))

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, bias, _, _, residual, ctx.activation = inputs
        ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
        ctx.save_for_backward(input, weight, output if ctx.activation else None)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        grad = activations.backward(self.op_name, ctx.activation, grad, output)
        rows = grad.reshape(-1, grad.shape[-1])
        wants = ctx.needs_input_grad
        grad_weight = rows.t() @ input.reshape(-1, input.shape[-1]) if wants[1] else None
        grad_bias = rows.sum(0) if ctx.has_bias and wants[2] else None
        return (
            grad @ weight if wants[0] else None,
            grad_weight,
            grad_bias,
            None,
            None,
            grad if ctx.has_residual else None,
            None,
        )


def _parts(node: Node) -> tuple[Node, Node, Node | None] | None:
    """(input, weight, bias) where the node is a linear layer."""
    if node.target is aten.addmm.default and not node.kwargs:
        bias, input, transposed = node.args
    elif node.target is aten.mm.default:
        bias, (input, transposed) = None, node.args
    else:
        return None
    assert isinstance(transposed, Node) and isinstance(input, Node)
    is_transpose = (
        transposed.target is aten.t.default
        or (transposed.target is aten.permute.default and list(transposed.args[1]) == [1, 0])  # type: ignore[arg-type]
        or (transposed.target is aten.transpose.int and {d % 2 for d in transposed.args[1:]} == {0, 1})  # type: ignore[operator]
    )
    weight = transposed.args[0]
    if not is_transpose or not isinstance(weight, Node) or 0 in weight.meta["val"].shape:
        return None
    assert bias is None or isinstance(bias, Node)
    if bias is not None and bias.meta["val"].shape != weight.meta["val"].shape[:1]:
        return None  # an addition that broadcasts
    return input, weight, bias
