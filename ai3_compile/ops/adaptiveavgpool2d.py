"""adaptiveavgpool2d: aten._adaptive_avg_pool2d, and the mean over an image that it becomes for one output pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..selection import OpSpec
from .base import Attributes, Operation, empty_image, image, shape_of, spec_of

if TYPE_CHECKING:
    from ..backends import abi

aten = torch.ops.aten


class AdaptiveAvgPool2d(Operation):
    name = "adaptiveavgpool2d"
    op_name = "ai3::adaptive_avg_pool2d"
    default = "guess|torch"
    default_reason = "ai3's kernel; torch for dtypes it does not compute"
    modules = (torch.nn.AdaptiveAvgPool2d,)

    def match(self, node: Node) -> OpSpec | None:
        if not (node.target is aten._adaptive_avg_pool2d.default or _is_image_mean(node)):
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        if 0 in shape_of(source)[-2:]:
            return None
        symbolic = not all(isinstance(size, int) for size in node.meta["val"].shape[-2:])
        return spec_of(
            self.name,
            node,
            source,
            {"output_size": shape_of(node)[-2:]},
            input_shape=image(shape_of(source)),
            output_shape=image(shape_of(node)),
            torch_only="its output size changes with the input" if symbolic else None,
        )

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        source = node.args[0]
        assert isinstance(source, Node)
        return source, None, None

    def attributes_of(self, module: Any) -> Attributes:
        size = module.output_size
        return (("output_size", tuple(size) if isinstance(size, Sequence) else (size, size)),)

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        if len(input) != 4 or 0 in input[-2:]:
            return None
        return (*input[:2], *_size(input, attributes))

    def spec(
        self,
        name: str,
        input_shape: Sequence[int],
        weight_shape: Sequence[int] | None,
        has_bias: bool,
        dtype: torch.dtype,
        device: str,
        attributes: Mapping[str, Any],
    ) -> OpSpec | None:
        if len(input_shape) != 4 or len(attributes["output_size"]) != 2 or 0 in input_shape[1:]:
            return None
        size = {"output_size": _size(input_shape, attributes)}
        return super().spec(name, input_shape, weight_shape, has_bias, dtype, device, size)

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = input.meta["val"].shape if isinstance(input, Node) else input.shape
        return (input, *_size(shape, attributes), algorithm), {}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        return F.adaptive_avg_pool2d(input, attributes["output_size"])

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        return arguments["input"], (arguments["out_h"], arguments["out_w"])

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


def _size(input: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[Any, Any]:
    """The output's (height, width); None stands for the input's."""
    height, width = attributes["output_size"]
    return input[-2] if height is None else height, input[-1] if width is None else width


def _is_image_mean(node: Node) -> bool:
    """mean over height and width, kept as dimensions: what adaptive pooling to 1x1 is in ATen."""
    if node.target is not aten.mean.dim or "dtype" in node.kwargs or len(node.args) != 3:
        return False
    source, dims, keepdim = node.args
    assert isinstance(source, Node) and isinstance(dims, (list, tuple))
    rank = len(source.meta["val"].shape)
    return (
        rank in (3, 4)
        and bool(keepdim)
        and sorted(d % rank for d in dims if isinstance(d, int)) == [rank - 2, rank - 1]
    )
