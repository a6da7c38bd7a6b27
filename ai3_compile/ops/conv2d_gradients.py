"""conv2d.grad_input and conv2d.grad_weight: what aten.convolution_backward computes, each with its own algorithm.

An OpSpec of either has the attributes of the convolution, so that a function written for conv2d reads it as well, and
`image_size`, `grad`, `channels_last`. The input of conv2d.grad_input is the gradient of the convolution's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..backends import abi
from ..selection import OpSpec, TensorSpec
from .base import (
    Attributes,
    Operation,
    empty_image,
    equal_paddings,
    fill_window,
    four_paddings,
    pair,
    shape_of,
    spec_of,
    tensor_spec,
)
from .conv2d import convolution_backward

_WINDOW = ("stride_h", "stride_w", "pad_top", "pad_bottom", "pad_left", "pad_right", "dilation_h", "dilation_w")


class Gradient(Operation):
    """What both have in common. They are found, and put into the graph, by passes/backward.py."""

    output: int
    """Which of the outputs of aten.convolution_backward it is."""
    default = "torch"
    default_reason = "one call of PyTorch's computes all gradients"
    modules = ()

    def match(self, node: Node) -> OpSpec | None:
        return None  # one node of ATen is several of these

    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        raise NotImplementedError("a node of ATen is several gradients, which the pass takes apart")

    def spec_at(self, node: Node, result: Node) -> OpSpec:
        """The gradient that `result` takes from this aten.convolution_backward of a conv2d."""
        grad, input, weight, _, stride, padding, dilation, _, _, groups = node.args[:10]
        assert isinstance(grad, Node) and isinstance(input, Node) and isinstance(weight, Node)
        window = (*stride, *padding, *dilation, groups)  # type: ignore[misc]
        constant = all(isinstance(value, int) for value in window)
        if not constant:
            stride, padding, dilation, groups = (1, 1), (0, 0), (1, 1), 1
        sizes = tensor_spec(weight)
        assert sizes is not None
        window = (pair(stride), pair(padding), pair(dilation), groups)  # type: ignore[arg-type]
        attributes = attributes_of(shape_of(grad), shape_of(input), sizes, *window)  # type: ignore[arg-type]
        source = self.source(grad, input)
        attributes["channels_last"] = is_channels_last(source.meta["val"])
        return spec_of(
            self.name,
            node,
            source,
            attributes,
            output_shape=shape_of(result),
            torch_only=None if constant else "its window changes with the input",
        )

    def source(self, grad: Any, input: Any) -> Any:
        """Its first argument, in the layout of which it is computed."""
        raise NotImplementedError

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.window = inputs[4:13]
        ctx.save_for_backward(*inputs[:2])

    def attributes_of(self, module: Any) -> Attributes:
        raise NotImplementedError("no module of torch.nn is a gradient")

    def described_window(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups as torch.nn.grad has them."""
        sh, sw, top, bottom, left, right, dh, dw = (arguments[name] for name in _WINDOW)
        return (sh, sw), equal_paddings((top, bottom, left, right)), (dh, dw), arguments["groups"]

    def fill_from(self, spec: OpSpec, args: abi.Args) -> None:
        args.groups = spec.groups
        fill_window(args, spec.kernel_size, spec.stride, four_paddings(spec.padding), spec.dilation)


class Conv2dGradInput(Gradient):
    name = "conv2d.grad_input"
    op_name = "ai3::conv2d_grad_input"
    output = 0

    def source(self, grad: Any, input: Any) -> Any:
        return grad

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        return (input[0], attributes["in_channels"], *attributes["image_size"])

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = (input, weight, *attributes["image_size"], *_window(attributes), algorithm)
        return args, {"channels_last": attributes["channels_last"]}

    def operands(self, spec: OpSpec, data: Callable[[tuple[int, ...]], torch.Tensor]) -> tuple[Any, Any, Any]:
        return _laid_out(data(spec.input_shape), spec), _laid_out(data(spec.weight.shape), spec), None

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        assert weight is not None
        height, width = attributes["image_size"]
        channels = weight.shape[1] * attributes["groups"]
        image = empty_image(input, channels, height, width, attributes["channels_last"])  # its sizes are asked for
        return convolution_backward(input, image, weight, _window(attributes), [True, False, False])[0]

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """As torch.nn.grad.conv2d_input has them."""
        grad, weight = arguments["grad"], arguments["weight"]
        channels = weight.shape[1] * arguments["groups"]
        size = (grad.shape[0], channels, arguments["height"], arguments["width"])
        return size, weight, grad, *self.described_window(arguments)

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        self.fill_from(spec, args)
        args.weight = abi.tensor_of(spec.weight.shape)

    def fake(  # type: ignore[override]
        self, grad: torch.Tensor, weight: torch.Tensor, height: int, width: int, *rest: Any, **named: Any
    ) -> torch.Tensor:
        groups, _, channels_last = _last(rest, named)
        return empty_image(grad, weight.shape[1] * groups, height, width, channels_last)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """It is linear in both: G <- conv(G, weight), and the gradient of the weight with G as the image."""
        outer, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_outer = _convolution(grad, weight, ctx.window) if wants[0] else None
        mask = [False, wants[1], False]
        grad_weight = convolution_backward(outer, grad, weight, ctx.window, mask)[1] if wants[1] else None
        return grad_outer, grad_weight, *[None] * 13


class Conv2dGradWeight(Gradient):
    name = "conv2d.grad_weight"
    op_name = "ai3::conv2d_grad_weight"
    output = 1

    def source(self, grad: Any, input: Any) -> Any:
        return input

    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        return attributes["weight"].shape

    def arguments(
        self, input: Any, weight: Any, bias: Any, attributes: Mapping[str, Any], algorithm: int, static_weight: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """In the place of the weight is the gradient of the convolution's output."""
        args = (weight, input, *attributes["kernel_size"], *_window(attributes), algorithm)
        return args, {"channels_last": attributes["channels_last"]}

    def operands(self, spec: OpSpec, data: Callable[[tuple[int, ...]], torch.Tensor]) -> tuple[Any, Any, Any]:
        return _laid_out(data(spec.input_shape), spec), _laid_out(data(spec.grad.shape), spec), None

    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        assert weight is not None
        order = torch.channels_last if attributes["channels_last"] else torch.contiguous_format
        sizes = (weight.shape[1], input.shape[1] // attributes["groups"], *attributes["kernel_size"])
        like = torch.empty(sizes, dtype=input.dtype, device=input.device, memory_format=order)
        return convolution_backward(weight, input, like, _window(attributes), [False, True, False])[1]

    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """As torch.nn.grad.conv2d_weight has them."""
        grad, input = arguments["grad"], arguments["input"]
        channels = input.shape[1] // arguments["groups"]
        size = (grad.shape[1], channels, arguments["kernel_h"], arguments["kernel_w"])
        return input, size, grad, *self.described_window(arguments)

    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        self.fill_from(spec, args)
        image = args.input
        as_pixels = image.stride[3] > 1 or (image.size[1] == 1 and image.stride[1] == 1)
        args.key = abi.tensor_of(spec.grad.shape, as_pixels)

    def fake(  # type: ignore[override]
        self, grad: torch.Tensor, input: torch.Tensor, kernel_h: int, kernel_w: int, *rest: Any, **named: Any
    ) -> torch.Tensor:
        groups, _, channels_last = _last(rest, named)
        order = torch.channels_last if channels_last else torch.contiguous_format
        sizes = (grad.shape[1], input.shape[1] // groups, kernel_h, kernel_w)
        return torch.empty(sizes, dtype=input.dtype, device=input.device, memory_format=order)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """It is linear in both: G <- conv(input, G), and the gradient of the input with G as the weight."""
        outer, input = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_outer = _convolution(input, grad, ctx.window) if wants[0] else None
        mask = [wants[1], False, False]
        grad_input = convolution_backward(outer, input, grad, ctx.window, mask)[0] if wants[1] else None
        return grad_outer, grad_input, *[None] * 13


def attributes_of(
    grad: tuple[int, ...],
    image: tuple[int, ...],
    weight: TensorSpec,
    stride: tuple[int, int],
    padding: Sequence[int],
    dilation: tuple[int, int],
    groups: int,
) -> dict[str, Any]:
    """What an OpSpec of either gradient says, but the layout."""
    return {
        "weight": weight,
        "grad": TensorSpec(grad, weight.dtype),
        "bias": None,
        "image_size": image[2:],
        "stride": stride,
        "padding": tuple(padding),
        "dilation": dilation,
        "groups": groups,
        "in_channels": weight.shape[1] * groups,
        "out_channels": weight.shape[0],
        "kernel_size": weight.shape[2:],
        "padding_mode": "zeros",
    }


def is_channels_last(value: torch.Tensor) -> bool:
    """Whether it lies so, and not also as contiguous."""
    return not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def _window(attributes: Mapping[str, Any]) -> tuple[int, ...]:
    padding = four_paddings(attributes["padding"])
    return (*attributes["stride"], *padding, *attributes["dilation"], attributes["groups"])


def _last(rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int, bool]:
    """groups, algorithm and channels_last of a call's arguments behind the sizes."""
    names = (*_WINDOW, "groups", "algorithm", "channels_last")
    given = {"channels_last": False, **dict(zip(names, rest)), **named}
    return given["groups"], given["algorithm"], given["channels_last"]


def _laid_out(tensor: torch.Tensor, spec: OpSpec) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if spec.channels_last else tensor


def _convolution(input: torch.Tensor, weight: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w, groups = window
    padded = F.pad(input, (left, right, top, bottom))
    return F.conv2d(padded, weight, None, (stride_h, stride_w), 0, (dilation_h, dilation_w), groups)
