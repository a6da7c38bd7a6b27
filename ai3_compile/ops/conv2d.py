"""conv2d: aten.convolution over images, with batch norm, a residual and an activation where a pass folds them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..selection import OpSpec
from .base import Operation, empty_image, fill_window, pair, spec_of, tensor_spec

if TYPE_CHECKING:
    from ..backends import abi

aten = torch.ops.aten


class Conv2d(Operation):
    name = "conv2d"
    op_name = "ai3::conv2d"
    default = "guess|torch"
    default_reason = "the cheapest of ai3's algorithms by estimate; torch for dtypes that none of them computes"

    def match(self, node: Node) -> OpSpec | None:
        if node.target is not aten.convolution.default:
            return None
        input, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        if transposed or len(weight.meta["val"].shape) != 4:  # type: ignore[union-attr]
            return None
        constant = all(isinstance(value, int) for value in (*stride, *padding, *dilation))  # type: ignore[misc]
        if not constant:
            stride, padding, dilation = (1, 1), (0, 0), (1, 1)
        weight_spec = tensor_spec(weight)  # type: ignore[arg-type]
        assert weight_spec is not None
        return spec_of(
            self.name,
            node,
            input,  # type: ignore[arg-type]
            {
                "weight": weight_spec,
                "bias": tensor_spec(bias),  # type: ignore[arg-type]
                "stride": pair(stride),  # type: ignore[arg-type]
                "padding": pair(padding),  # type: ignore[arg-type]
                "dilation": pair(dilation),  # type: ignore[arg-type]
                "groups": groups,
                "in_channels": weight_spec.shape[1] * groups,  # type: ignore[operator]
                "out_channels": weight_spec.shape[0],
                "kernel_size": weight_spec.shape[2:],
                "padding_mode": "zeros",
            },
            torch_only=None if constant else "its window changes with the input",
        )

    def emit(self, node: Node, spec: OpSpec, algorithm: int, is_static: Callable[[Node], bool]) -> Node:
        input, weight, bias = node.args[:3]
        (pad_h, pad_w) = spec.padding
        args = (input, weight, bias, *spec.stride, pad_h, pad_h, pad_w, pad_w, *spec.dilation, spec.groups, algorithm)
        return node.graph.call_function(self.overload, args, {"static_weight": is_static(weight)})  # type: ignore[arg-type]

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        from ..backends.cpp import tensor_of

        args.weight = tensor_of(spec.weight.shape)
        args.has_bias = spec.bias is not None
        args.groups = spec.groups
        (pad_h, pad_w) = spec.padding
        fill_window(args, spec.kernel_size, spec.stride, (pad_h, pad_h, pad_w, pad_w), spec.dilation)

    def fake(  # type: ignore[override]
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride_h: int,
        stride_w: int,
        pad_top: int,
        pad_bottom: int,
        pad_left: int,
        pad_right: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        algorithm: int,
        channels_last: bool = False,
        *rest: Any,
        **named: Any,
    ) -> torch.Tensor:
        kernel_h, kernel_w = weight.shape[2:]
        height = (input.shape[-2] + pad_top + pad_bottom - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
        width = (input.shape[-1] + pad_left + pad_right - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
        return empty_image(input, weight.shape[0], height, width, channels_last)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, bias = inputs[:3]
        residual, ctx.activation, bn_weight, bn_bias, mean, var, ctx.eps = inputs[15:22]
        ctx.window = inputs[3:12]
        ctx.has_residual = residual is not None
        ctx.save_for_backward(input, weight, bias, bn_weight, bn_bias, mean, var, output if ctx.activation else None)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, bias, bn_weight, bn_bias, mean, var, output = ctx.saved_tensors
        if ctx.activation:
            grad = aten.threshold_backward(grad, output, 0)
        grad_residual = grad if ctx.has_residual else None

        # The folded batch norm: weight' = weight * scale, bias' = (bias - mean) * scale + bn_bias.
        folded, inverse, scale = weight, None, None
        if mean is not None:
            inverse = torch.rsqrt(var + ctx.eps)
            scale = inverse if bn_weight is None else bn_weight * inverse
            folded = weight * scale.view(-1, 1, 1, 1)
        grad_input, grad_folded, grad_bias = _convolution_backward(grad, input, folded, ctx.window)

        grad_weight = grad_folded
        bn_grads: list[torch.Tensor | None] = [None, None, None, None]
        if mean is not None:
            assert scale is not None and inverse is not None
            shift = -mean if bias is None else bias - mean
            grad_scale = (grad_folded * weight).sum((1, 2, 3)) + grad_bias * shift
            bn_grads = [
                None if bn_weight is None else grad_scale * inverse,
                None if bn_bias is None else grad_bias,
                -grad_bias * scale,
                grad_scale * scale * -0.5 * inverse * inverse,
            ]
            grad_weight = grad_folded * scale.view(-1, 1, 1, 1)
            grad_bias = grad_bias * scale
        nothing = (None,) * 12
        return (
            grad_input,
            grad_weight,
            None if bias is None else grad_bias,
            *nothing,
            grad_residual,
            None,
            *bn_grads,
            None,
        )


def _convolution_backward(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, window: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a convolution with the four paddings of `window`, which ATen knows only in equal pairs."""
    stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w, groups = window
    unbatched = input.dim() == 3
    if unbatched:
        input, grad = input.unsqueeze(0), grad.unsqueeze(0)
    padding, symmetric = [top, left], top == bottom and left == right
    if not symmetric:
        input, padding = torch.nn.functional.pad(input, (left, right, top, bottom)), [0, 0]
    grad_input, grad_weight, grad_bias = aten.convolution_backward(
        grad,
        input,
        weight,
        [weight.shape[0]],
        [stride_h, stride_w],
        padding,
        [dilation_h, dilation_w],
        False,
        [0, 0],
        groups,
        [True, True, True],
    )
    if not symmetric:
        grad_input = torch.nn.functional.pad(grad_input, (-left, -right, -top, -bottom))
    return grad_input.squeeze(0) if unbatched else grad_input, grad_weight, grad_bias
