"""What every operation answers, and the helpers their files share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from ..selection import OpSpec, TensorSpec

if TYPE_CHECKING:
    from ..backends import abi


class Operation(ABC):
    """One of the operations a user can choose the algorithm of."""

    name: ClassVar[str]
    """As in options and in the kernels folder."""
    op_name: ClassVar[str]
    """The PyTorch operation that runs the native algorithms."""
    default: ClassVar[str]
    """The selector that `default` stands for."""
    default_reason: ClassVar[str]

    @abstractmethod
    def match(self, node: Node) -> OpSpec | None:
        """The operation at this node of an ATen graph, or None where the node is another."""

    @abstractmethod
    def emit(self, node: Node, spec: OpSpec, algorithm: int, is_static: Callable[[Node], bool]) -> Node:
        """Inserts ai3's operation before `node` and returns it; it computes what `node` computes."""

    @abstractmethod
    def fill(self, spec: OpSpec, args: abi.Args) -> None:
        """Writes weight and attributes into the arguments of the C ABI; input and output are there already."""

    @abstractmethod
    def fake(self, *args: Any) -> torch.Tensor:
        """The output without its data, of exactly the strides that the core library gives it."""

    @abstractmethod
    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Saves what `backward` needs."""

    @abstractmethod
    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient for each input, through ATen."""

    def register(self) -> None:
        torch.library.register_fake(self.op_name, self.fake)
        torch.library.register_autograd(self.op_name, self.backward, setup_context=self.setup_context)

    @property
    def overload(self) -> torch._ops.OpOverload:
        namespace, name = self.op_name.split("::")
        return getattr(getattr(torch.ops, namespace), name).default


def hint(size: int | torch.SymInt) -> int:
    """A size as captured; reading it adds no guard. An unbacked size counts as 1."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    return 1 if value is None else int(value)


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(hint(size) for size in node.meta["val"].shape)


def unbatched(source: Node) -> str | None:
    """Why a pool over this image stays with torch: graphs hold unbatched images for pools only."""
    return "an unbatched image" if len(source.meta["val"].shape) == 3 else None


def tensor_spec(node: Node | None) -> TensorSpec | None:
    return None if node is None else TensorSpec(shape_of(node), node.meta["val"].dtype)


def spec_of(operation: str, node: Node, source: Node, attributes: dict[str, Any], **fields: Any) -> OpSpec:
    """The OpSpec of `node`, whose image, matrix or tensor input is `source`."""
    value = source.meta["val"]
    return OpSpec(
        operation=operation,
        name=module_path(node),
        input_shape=shape_of(source),
        output_shape=fields.pop("output_shape", None) or shape_of(node),
        dtype=value.dtype,
        device=value.device.type,
        attributes=tuple(attributes.items()),
        **fields,
    )


def module_path(node: Node) -> str:
    """The path of the module that called the operation, as in `model.get_submodule(path)`."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    # Dynamo writes L['self']._modules['layer1']._modules['0'] or L['self'].layer1[0]; users write layer1.0.
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part and part != "_modules"]
    return ".".join(parts[2:] if parts[:1] == ["L"] else parts)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an attribute that ATen also takes as one number for both."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def empty_image(input: torch.Tensor, channels: Any, height: Any, width: Any, channels_last: bool) -> torch.Tensor:
    """An image like `input` of another size; a 3-d input is an image of batch 1, and always contiguous."""
    if input.dim() == 3:
        return input.new_empty((channels, height, width))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (input.shape[0], channels, height, width), dtype=input.dtype, device=input.device, memory_format=memory_format
    )


def pool_extent(size: Any, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> Any:
    """Output size of a pooling window, as ATen's pooling_output_shape."""
    out = (size + 2 * pad - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out -= 1
    return out


def fill_window(
    args: abi.Args,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> None:
    """Writes a window; `padding` is top, bottom, left, right."""
    args.kernel_h, args.kernel_w = kernel
    args.stride_h, args.stride_w = stride
    args.dilation_h, args.dilation_w = dilation
    args.pad_top, args.pad_bottom, args.pad_left, args.pad_right = padding
