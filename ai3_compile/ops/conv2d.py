"""conv2d: aten.convolution over images, with batch norm, a residual and an activation where a pass folds them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..backends import abi
from ..errors import PrologueGradientError
from ..selection import OpSpec, TensorSpec
from . import activations
from .base import (
    Attributes,
    Operation,
    empty_image,
    equal_paddings,
    fill_window,
    four_paddings,
    pair,
    spec_of,
    tensor_spec,
    window_pair,
)

aten = torch.ops.aten
# The pooling of `pooled_name`: kernel, stride, padding and dilation, by height and width, and ceil_mode.
POOLED = (2, 2, 2, 2, 0, 0, 1, 1, False)


class Conv2d(Operation):
    name = "conv2d"
    op_name = "ai3::conv2d"
    into_name = "ai3::conv2d_into"
    pooled_name = "ai3::conv2d_pooled"
    """The PyTorch operation that pools each 2x2 pixels of its result: an image in channels_last."""
    default = "guess|torch"
    default_reason = "the cheapest of ai3's algorithms by estimate; torch for dtypes that none of them computes"
    modules = (torch.nn.Conv2d,)
    autocasts = True
    only_described = ("weight", "bias", "in_channels", "out_channels", "kernel_size", "padding_mode")

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

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        input, weight, bias = node.args[:3]
        return input, weight, bias  # type: ignore[return-value]

    def attributes_of(self, module: Any) -> Attributes:
        dilation = window_pair(module.dilation)
        if module.padding_mode != "zeros" or module.padding == "valid":
            # Other modes than zeros are a padded copy of the image, made before the operation.
            padding = (0, 0, 0, 0)
        elif module.padding == "same":
            totals = [dil * (size - 1) for dil, size in zip(dilation, module.weight.shape[2:])]
            (top, left) = (total // 2 for total in totals)  # what is odd goes behind, as in ATen
            padding = (top, totals[0] - top, left, totals[1] - left)
        else:
            padding = four_paddings(window_pair(module.padding))
        return (
            ("stride", window_pair(module.stride)),
            ("padding", equal_paddings(padding)),
            ("dilation", dilation),
            ("groups", module.groups),
        )

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        assert weight is not None
        if len(input) != 4 or input[1] != weight[1] * attributes["groups"] or 0 in weight:
            return None
        top, bottom, left, right = four_paddings(attributes["padding"])
        extents = []
        for i, pad in enumerate((top + bottom, left + right)):
            reach = attributes["dilation"][i] * (weight[2 + i] - 1)
            extents.append((input[2 + i] + pad - reach - 1) // attributes["stride"][i] + 1)
        return (input[0], weight[0], *extents) if min(extents) > 0 else None

    def described(
        self, weight_shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, attributes: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "weight": TensorSpec(weight_shape, dtype),
            "bias": TensorSpec(weight_shape[:1], dtype) if has_bias else None,
            **attributes,
            "in_channels": weight_shape[1] * attributes["groups"],
            "out_channels": weight_shape[0],
            "kernel_size": weight_shape[2:],
            "padding_mode": "zeros",
        }

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        padding = four_paddings(attributes["padding"])
        window = (*attributes["stride"], *padding, *attributes["dilation"], attributes["groups"])
        return (input, weight, bias, *window, algorithm), {"static_weight": static_weight}

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        assert weight is not None
        padding = attributes["padding"]
        if len(padding) == 4:
            top, bottom, left, right = padding
            input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
        return F.conv2d(
            input, weight, bias, attributes["stride"], padding, attributes["dilation"], attributes["groups"]
        )

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        a = arguments
        input, weight, bias = a["input"], a["weight"], a["bias"]
        if a["prologue_mean"] is not None:
            scale, shift = a["prologue_weight"], a["prologue_bias"]
            input = F.batch_norm(input, a["prologue_mean"], a["prologue_var"], scale, shift, eps=a["prologue_eps"])
            input = activations.apply(input, a["prologue_activation"])
        padding = equal_paddings((a["pad_top"], a["pad_bottom"], a["pad_left"], a["pad_right"]))
        if len(padding) == 4:
            top, bottom, left, right = padding
            input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
        if a["bn_mean"] is not None:
            scale = torch.rsqrt(a["bn_var"] + a["bn_eps"])
            scale = scale if a["bn_weight"] is None else scale * a["bn_weight"]
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = (-a["bn_mean"] if bias is None else bias - a["bn_mean"]) * scale
            bias = bias if a["bn_bias"] is None else bias + a["bn_bias"]
        stride, dilation = (a["stride_h"], a["stride_w"]), (a["dilation_h"], a["dilation_w"])
        return input, weight, bias, stride, padding, dilation, a["groups"]

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        args.weight = abi.tensor_of(spec.weight.shape)
        args.has_bias = spec.bias is not None
        args.groups = spec.groups
        fill_window(args, spec.kernel_size, spec.stride, four_paddings(spec.padding), spec.dilation)

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

    def register(self) -> None:
        super().register()
        torch.library.register_fake(self.pooled_name, self._fake_pooled)

    def _fake_pooled(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        whole = self.fake(input, weight, bias, *rest[:10])
        return empty_image(input, weight.shape[0], whole.shape[-2] // 2, whole.shape[-1] // 2, True)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, bias = inputs[:3]
        residual, ctx.activation, bn_weight, bn_bias, mean, var, ctx.eps, *prologue = inputs[15:]
        if any(isinstance(value, torch.Tensor) for value in prologue):
            raise PrologueGradientError(operation=self.op_name)
        ctx.window = inputs[3:12]
        ctx.has_residual = residual is not None
        ctx.save_for_backward(input, weight, bias, bn_weight, bn_bias, mean, var, output if ctx.activation else None)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, bias, bn_weight, bn_bias, mean, var, output = ctx.saved_tensors
        grad = activations.backward(self.op_name, ctx.activation, grad, output)
        grad_residual = grad if ctx.has_residual else None

        # The folded batch norm: weight' = weight * scale, bias' = (bias - mean) * scale + bn_bias.
        folded, inverse, scale = weight, None, None
        if mean is not None:
            inverse = torch.rsqrt(var + ctx.eps)
            scale = inverse if bn_weight is None else bn_weight * inverse
            folded = weight * scale.view(-1, 1, 1, 1)
        wants = ctx.needs_input_grad
        folds = mean is not None
        mask = [wants[0], wants[1] or folds, wants[2] or folds]
        grad_input, grad_folded, grad_bias = convolution_backward(grad, input, folded, ctx.window, mask)

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
            *(None,) * 7,
        )


def convolution_backward(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, window: tuple[int, ...], mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a convolution with the four paddings of `window`, which ATen knows only in equal pairs.

    `mask` says which of input, weight and bias want one; the others are None.
    """
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
        mask,
    )
    if not symmetric and mask[0]:
        grad_input = torch.nn.functional.pad(grad_input, (-left, -right, -top, -bottom))
    return grad_input.squeeze(0) if unbatched and mask[0] else grad_input, grad_weight, grad_bias
