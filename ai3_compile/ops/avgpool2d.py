"""avgpool2d: aten.avg_pool2d."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..selection import OpSpec
from .base import (
    WINDOW,
    Attributes,
    Operation,
    empty_image,
    fill_window,
    image,
    pair,
    pool_extent,
    pooled,
    shape_of,
    spec_of,
    window_pair,
)

if TYPE_CHECKING:
    from ..backends import abi

aten = torch.ops.aten
_ARGUMENTS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


class AvgPool2d(Operation):
    name = "avgpool2d"
    op_name = "ai3::avg_pool2d"
    into_name = "ai3::avg_pool2d_into"
    default = "guess|torch"
    default_reason = "ai3's kernel; torch for dtypes it does not compute"
    modules = (torch.nn.AvgPool2d,)

    def match(self, node: Node) -> OpSpec | None:
        if node.target is not aten.avg_pool2d.default:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        given = dict(zip(_ARGUMENTS, node.args[1:])) | node.kwargs
        kernel = pair(given["kernel_size"])  # type: ignore[arg-type]
        stride = given.get("stride")
        return spec_of(
            self.name,
            node,
            source,
            {
                "kernel_size": kernel,
                "stride": pair(stride) if stride else kernel,  # type: ignore[arg-type]
                "padding": pair(given.get("padding", 0)),  # type: ignore[arg-type]
                "ceil_mode": bool(given.get("ceil_mode", False)),
                "count_include_pad": bool(given.get("count_include_pad", True)),
                "divisor_override": given.get("divisor_override"),
            },
            input_shape=image(shape_of(source)),
            output_shape=image(shape_of(node)),
        )

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        source = node.args[0]
        assert isinstance(source, Node)
        return source, None, None

    def attributes_of(self, module: Any) -> Attributes:
        return (
            *((name, window_pair(getattr(module, name))) for name in ("kernel_size", "stride", "padding")),
            ("ceil_mode", bool(module.ceil_mode)),
            ("count_include_pad", bool(module.count_include_pad)),
            ("divisor_override", module.divisor_override),
        )

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        if len(input) != 4 or attributes["divisor_override"] == 0:
            return None
        return pooled(input, dilation=(1, 1), **{name: attributes[name] for name in WINDOW})

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        window = (*attributes["kernel_size"], *attributes["stride"], *attributes["padding"])
        flags = (attributes["ceil_mode"], attributes["count_include_pad"], attributes["divisor_override"] or 0)
        return (input, *window, *flags, algorithm), {}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        return F.avg_pool2d(input, **attributes)

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        window = ((arguments[f"{name}_h"], arguments[f"{name}_w"]) for name in ("kernel", "stride", "pad"))
        flags = (arguments["ceil_mode"], arguments["count_include_pad"], arguments["divisor_override"] or None)
        return arguments["input"], *window, *flags

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        (pad_h, pad_w) = spec.padding
        fill_window(args, spec.kernel_size, spec.stride, (pad_h, pad_h, pad_w, pad_w))
        args.ceil_mode, args.count_include_pad = spec.ceil_mode, spec.count_include_pad
        args.divisor_override = spec.divisor_override or 0

    def fake(
        self,
        input: torch.Tensor,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int,
        algorithm: int,
        channels_last: bool = False,
    ) -> torch.Tensor:
        height = pool_extent(input.shape[-2], kernel_h, stride_h, pad_h, 1, ceil_mode)
        width = pool_extent(input.shape[-1], kernel_w, stride_w, pad_w, 1, ceil_mode)
        return empty_image(input, input.shape[-3], height, width, channels_last)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, ceil_mode, include_pad, divisor = inputs[1:10]
        pairs = [kernel_h, kernel_w], [stride_h, stride_w], [pad_h, pad_w]
        ctx.window = *pairs, ceil_mode, include_pad, divisor or None

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        return aten.avg_pool2d_backward(grad, input, *ctx.window), *(None,) * 11
