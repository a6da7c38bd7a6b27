"""Calls of conv2d's gradients, from the cases of conv2d, and what they are in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import registry
from ..backends import abi
from ..ops import GRADIENTS
from ..ops.base import equal_paddings
from ..ops.conv2d_gradients import attributes_of
from ..selection import OpSpec, TensorSpec
from . import cases, harness


@dataclass(frozen=True, eq=False)
class GradientCall:
    """One gradient of one convolution."""

    spec: OpSpec
    grad: torch.Tensor
    image: torch.Tensor
    weight: torch.Tensor

    def expected(self) -> torch.Tensor:
        """In float64, by PyTorch, on the CPU."""
        grad, image, weight = (t.detach().cpu().double() for t in (self.grad, self.image, self.weight))
        image.requires_grad_(), weight.requires_grad_()
        spec = self.spec
        top, bottom, left, right = spec.padding if len(spec.padding) == 4 else [p for p in spec.padding for _ in (0, 1)]
        padded = F.pad(image, (left, right, top, bottom))
        out = F.conv2d(padded, weight, None, spec.stride, 0, spec.dilation, spec.groups)
        (found,) = torch.autograd.grad(out, image if spec.operation == "conv2d.grad_input" else weight, grad)
        return found

    def in_layout(self, channels_last: bool) -> GradientCall:
        """The same with images, and the result, in this layout."""
        order = torch.channels_last if channels_last else torch.contiguous_format
        grad, image = (t.contiguous(memory_format=order) for t in (self.grad, self.image))
        attributes = tuple({**dict(self.spec.attributes), "channels_last": channels_last}.items())
        return GradientCall(dataclasses.replace(self.spec, attributes=attributes), grad, image, self.weight)

    def through_abi(self, table: abi.Kernel, layout: int, threads: int = 3, allow_tf32: bool = False) -> torch.Tensor:
        """The result between guards."""
        given = {"layout": layout, "threads": threads, "allow_tf32": allow_tf32}
        if self.spec.operation == "conv2d.grad_input":
            return harness.run_kernel(table, self.spec, self.grad, self.weight, **given)  # type: ignore[arg-type]
        return harness.run_kernel(table, self.spec, self.image, key=self.grad, **given)  # type: ignore[arg-type]

    def through_torch(self, algorithm: registry.Algorithm) -> torch.Tensor:
        """The result of the PyTorch operation that a compiled graph calls; of torch's own for `torch`."""
        operation, attributes = GRADIENTS[self.spec.operation], dict(self.spec.attributes)
        operands = (self.grad, self.weight) if operation.output == 0 else (self.image, self.grad)
        if algorithm.platform == "torch":
            return operation.call_torch(*operands, None, attributes)
        args, named = operation.arguments(*operands, None, attributes, algorithm.id, False)
        return operation.overload_for(algorithm)(*args, **named)


def make(
    operation: str,
    case: cases.Conv,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    channels_last: bool = True,
    allow_tf32: bool = False,
) -> GradientCall:
    """The gradient of a convolution of random tensors."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels, *case.size)
    image = torch.randn(shape).to(device, dtype)
    weight = torch.randn(case.out, case.channels // case.groups, *case.kernel).to(device, dtype)
    grad = torch.randn(case.output_shape()).to(device, dtype)
    sizes = TensorSpec(tuple(weight.shape), dtype)
    attributes = attributes_of(
        tuple(grad.shape), shape, sizes, case.stride, equal_paddings(case.padding), case.dilation, case.groups
    )
    attributes["channels_last"] = channels_last
    of_input = operation == "conv2d.grad_input"
    spec = OpSpec(
        operation,
        case.id,
        tuple(grad.shape) if of_input else shape,
        shape if of_input else tuple(weight.shape),
        dtype,
        device,
        tuple(attributes.items()),
        allow_tf32,
    )
    return GradientCall(spec, grad, image, weight).in_layout(channels_last)
