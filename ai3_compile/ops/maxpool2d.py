"""maxpool2d: a max pooling whose indices nobody uses."""

from __future__ import annotations

import operator
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
# As ATen has it, and as Inductor rewrites it before the passes run; both give the values first.
_POOLS = ("aten::max_pool2d_with_indices", "prims::_low_memory_max_pool_with_offsets")


class MaxPool2d(Operation):
    name = "maxpool2d"
    op_name = "ai3::max_pool2d"
    into_name = "ai3::max_pool2d_into"
    default = "guess|torch"
    default_reason = "ai3's kernel; torch for dtypes it does not compute and where the indices are used"
    modules = (torch.nn.MaxPool2d,)

    def match(self, node: Node) -> OpSpec | None:
        """Matches the getitem that takes the values, since that is what ai3's operation replaces."""
        pool = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
        if not isinstance(pool, Node) or not isinstance(pool.target, torch._ops.OpOverload):
            return None
        if pool.target.name() not in _POOLS:
            return None
        source = pool.args[0]
        assert isinstance(source, Node)
        kernel, stride, padding, dilation, ceil_mode = _window(pool)
        uses_indices = any(user.args[1] == 1 and user.users for user in pool.users)
        return spec_of(
            self.name,
            node,
            source,
            {
                "kernel_size": kernel,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "ceil_mode": ceil_mode,
                "return_indices": uses_indices,
            },
            input_shape=image(shape_of(source)),
            output_shape=image(shape_of(node)),
            torch_only="its indices are used, by the model or by the backward pass" if uses_indices else None,
        )

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        pool = node.args[0]
        assert isinstance(pool, Node) and isinstance(pool.args[0], Node)
        return pool.args[0], None, None

    def attributes_of(self, module: Any) -> Attributes:
        pairs = ("kernel_size", "stride", "padding", "dilation")
        return (
            *((name, window_pair(getattr(module, name))) for name in pairs),
            ("ceil_mode", bool(module.ceil_mode)),
            ("return_indices", bool(module.return_indices)),
        )

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        if len(input) != 4 or attributes["return_indices"]:
            return None
        return pooled(input, dilation=attributes["dilation"], **{name: attributes[name] for name in WINDOW})

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        window = (*attributes["kernel_size"], *attributes["stride"], *attributes["padding"], *attributes["dilation"])
        return (input, *window, attributes["ceil_mode"], algorithm), {}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        return F.max_pool2d(input, **attributes)

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        pairs = ("kernel", "stride", "pad", "dilation")
        window = ((arguments[f"{name}_h"], arguments[f"{name}_w"]) for name in pairs)
        return arguments["input"], *window, arguments["ceil_mode"]

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        (pad_h, pad_w) = spec.padding
        fill_window(args, spec.kernel_size, spec.stride, (pad_h, pad_h, pad_w, pad_w), spec.dilation)
        args.ceil_mode = spec.ceil_mode

    def fake(
        self,
        input: torch.Tensor,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        ceil_mode: bool,
        algorithm: int,
        channels_last: bool = False,
    ) -> torch.Tensor:
        height = pool_extent(input.shape[-2], kernel_h, stride_h, pad_h, dilation_h, ceil_mode)
        width = pool_extent(input.shape[-1], kernel_w, stride_w, pad_w, dilation_w, ceil_mode)
        return empty_image(input, input.shape[-3], height, width, channels_last)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode = inputs[1:10]
        ctx.window = [kernel_h, kernel_w], [stride_h, stride_w], [pad_h, pad_w], [dilation_h, dilation_w], ceil_mode

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        _, indices = aten.max_pool2d_with_indices(input, *ctx.window)
        return aten.max_pool2d_with_indices_backward(grad, input, *ctx.window, indices), *(None,) * 11


def _window(pool: Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], bool]:
    """ATen's arguments with its defaults: no stride means the kernel's size."""
    given = dict(zip(("kernel", "stride", "padding", "dilation", "ceil_mode"), pool.args[1:])) | pool.kwargs
    kernel = pair(given["kernel"])  # type: ignore[arg-type]
    stride = given.get("stride")
    return (
        kernel,
        pair(stride) if stride else kernel,  # type: ignore[arg-type]
        pair(given.get("padding", 0)),  # type: ignore[arg-type]
        pair(given.get("dilation", 1)),  # type: ignore[arg-type]
        bool(given.get("ceil_mode", False)),
    )
