"""attention: softmax(scale * query @ key^T + bias + mask) @ value, as PyTorch's function or written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..backends import abi
from ..selection import OpSpec, TensorSpec
from . import attention_graph
from .base import Attributes, Operation, hint, spec_of

if TYPE_CHECKING:
    from ..registry import Algorithm

aten = torch.ops.aten
_TERMS = ("bias", "mask")
_SETTINGS = ("scale", "is_causal", "masked_is_zero")


class Attention(Operation):
    """Where other operations have a weight and a bias, it has (key, value) and (bias, mask)."""

    name = "attention"
    op_name = "ai3::attention"
    default = "direct|torch"
    default_reason = "one pass over the scores, in cache; torch for dtypes that it does not compute, and in training"
    modules = ()

    def match(self, node: Node) -> OpSpec | None:
        found = attention_graph.find(node)
        if found is None:
            return None

        def described(operand: attention_graph.Operand | None) -> TensorSpec | None:
            if operand is None:
                return None
            return TensorSpec(tuple(map(hint, operand.shape)), operand.node.meta["val"].dtype)

        query, key, value = (described(operand) for operand in (found.query, found.key, found.value))
        assert query is not None and key is not None and value is not None
        attributes = {"key": key, "value": value, **dict(zip(_TERMS, map(described, found.terms)))}
        attributes |= {name: getattr(found, name) for name in _SETTINGS}
        return spec_of(
            self.name,
            node,
            found.query.node,
            attributes,
            input_shape=query.shape,
            output_shape=(*query.shape[:-1], value.shape[-1]),
        )

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        raise NotImplementedError("attention is several nodes, which `emit` looks for itself")

    def emit(self, node: Node, spec: OpSpec, algorithm: Algorithm, is_static: Callable[[Node], bool]) -> Node:
        found = attention_graph.find(node)
        assert found is not None
        return attention_graph.emit(found, self.overload_for(algorithm), algorithm.id)

    def attributes_of(self, module: Any) -> Attributes:
        raise NotImplementedError("no module of torch.nn is attention alone")

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        *leading, keys, depth = attributes["key"].shape
        value = attributes["value"].shape
        fits = [*input[:-2], depth] == [*leading, input[-1]] and value[:-1] == (*leading, keys)
        return (*input[:-1], value[-1]) if fits else None

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (input, *weight, *bias, *(attributes[name] for name in _SETTINGS), algorithm), {}

    def operands(self, spec: OpSpec, data: Callable[[tuple[int, ...]], torch.Tensor]) -> tuple[Any, Any, Any]:
        terms = tuple(None if getattr(spec, name) is None else data(getattr(spec, name).shape) for name in _TERMS)
        return data(spec.input_shape), (data(spec.key.shape), data(spec.value.shape)), terms

    def call_torch(self, input: torch.Tensor, weight: Any, bias: Any, attributes: Mapping[str, Any]) -> torch.Tensor:
        settings = (attributes[name] for name in _SETTINGS)
        return _weights(input, weight[0], *bias, *settings) @ weight[1]

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(arguments[name] for name in ("query", "key", "value", *_TERMS, *_SETTINGS))

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        args.key, args.value = abi.tensor_of(spec.key.shape), abi.tensor_of(spec.value.shape)
        args.input, args.output = abi.tensor_of(spec.input_shape), abi.tensor_of(spec.output_shape)
        scores = (*spec.input_shape[:-1], spec.key.shape[-2])
        for name in _TERMS:
            if getattr(spec, name) is not None:
                setattr(args, f"score_{name}", abi.tensor_of(scores))
        args.scale, args.is_causal, args.masked_is_zero = (getattr(spec, name) for name in _SETTINGS)

    def fake(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        *leading, rows, _ = query.shape
        if not leading:
            return query.new_empty((rows, value.shape[-1]))
        *outer, heads = leading
        return query.new_empty((*outer, rows, heads, value.shape[-1])).transpose(-3, -2)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        query, key, value, bias, mask, *ctx.settings, _ = inputs
        ctx.save_for_backward(query, key, value, bias, mask)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias, mask = ctx.saved_tensors
        weights = _weights(query, key, bias, mask, *ctx.settings)
        from_weights = grad @ value.mT
        from_scores = weights * (from_weights - (from_weights * weights).sum(-1, keepdim=True))
        scale = ctx.settings[0]
        terms = (None if term is None else from_scores.sum_to_size(term.shape) for term in (bias, mask))
        return scale * from_scores @ key, scale * from_scores.mT @ query, weights.mT @ grad, *terms, *[None] * 4


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    masked_is_zero: bool,
) -> torch.Tensor:
    """What each value counts for each query, [..., L, S]."""
    scores = query @ key.mT * scale
    for term in (bias, mask):
        scores = scores if term is None else scores + term
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    weights = scores.softmax(-1)
    return weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0) if masked_is_zero else weights
