"""What every operation answers, and the helpers their files share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from ..backends import gpu
from ..selection import OpSpec, TensorSpec

if TYPE_CHECKING:
    from ..backends import abi
    from ..registry import Algorithm

# (name, value) pairs, hashable.
Attributes = tuple[tuple[str, Any], ...]


class Operation(ABC):
    """One of the operations a user can choose the algorithm of."""

    name: ClassVar[str]
    """As in options and in the kernels folder."""
    op_name: ClassVar[str]
    """The PyTorch operation that runs the native algorithms."""
    into_name: ClassVar[str | None] = None
    """The PyTorch operation that writes its result into some channels of a channels_last image, where there is one.

    It takes the image and the first of the channels, then the arguments of `op_name` but `channels_last` and
    `residual`.
    """
    default: ClassVar[str]
    """The selector that `default` stands for."""
    default_reason: ClassVar[str]
    modules: ClassVar[tuple[type[torch.nn.Module], ...]]
    """The modules of torch.nn that do nothing but this operation; none where it is a function alone."""
    only_described: ClassVar[tuple[str, ...]] = ()
    """Attributes of an OpSpec that say what the tensors' shapes say already."""
    autocasts: ClassVar[bool] = False
    """Whether autocast runs it in a lower precision."""

    @abstractmethod
    def match(self, node: Node) -> OpSpec | None:
        """The operation at this node of an ATen graph, or None where the node is another."""

    @abstractmethod
    def tensors(self, node: Node) -> tuple[Node, Node | None, Node | None]:
        """The input, weight and bias of a node that `match` has recognised."""

    def emit(self, node: Node, spec: OpSpec, algorithm: Algorithm, is_static: Callable[[Node], bool]) -> Node:
        """Inserts ai3's operation before `node` and returns it; it computes what `node` computes."""
        input, weight, bias = self.tensors(node)
        static = weight is not None and is_static(weight)
        args, kwargs = self.arguments(input, weight, bias, dict(spec.attributes), algorithm.id, static)
        return node.graph.call_function(self.overload_for(algorithm), args, kwargs)

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

    @abstractmethod
    def attributes_of(self, module: Any) -> Attributes:
        """What a call of the module says besides its tensors, as OpSpec.attributes have it."""

    @abstractmethod
    def output_shape(
        self, input: Sequence[int], weight: Sequence[int] | None, attributes: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        """The output's shape, of an image with its batch; None where the shapes do not fit each other."""

    @abstractmethod
    def arguments(
        self,
        input: Any,
        weight: Any,
        bias: Any,
        attributes: Mapping[str, Any],
        algorithm: int,
        static_weight: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ai3's operation for a call on these tensors, or nodes."""

    def operands(self, spec: OpSpec, data: Callable[[tuple[int, ...]], torch.Tensor]) -> tuple[Any, Any, Any]:
        """Input, weight and bias for `arguments`, as `spec` has them, each made by `data` of its shape."""
        attributes = dict(spec.attributes)
        weight, bias = (None if (t := attributes.get(name)) is None else data(t.shape) for name in ("weight", "bias"))
        return data(spec.input_shape), weight, bias

    @abstractmethod
    def call_torch(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        attributes: Mapping[str, Any],
    ) -> torch.Tensor:
        """The same call, left to PyTorch."""

    def torch_attributes(self, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of an OpSpec's attributes those that `call_torch` takes."""
        return {name: value for name, value in attributes.items() if name not in self.only_described}

    @abstractmethod
    def for_function(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """ai3's arguments, by their names in the schema, as torch.nn.functional has them."""

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
        """The OpSpec of a module's call; None where the shapes do not fit each other."""
        shape = tuple(input_shape)
        output_shape = self.output_shape(shape, weight_shape, attributes)
        if output_shape is None:
            return None
        described = self.described(tuple(weight_shape or ()), has_bias, dtype, attributes)
        tf32 = allows_tf32(self.name, dtype, device)
        return OpSpec(self.name, name, shape, output_shape, dtype, device, tuple(described.items()), tf32)

    def described(
        self, weight_shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, attributes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The attributes as a user reads them from an OpSpec."""
        return dict(attributes)

    def register(self) -> None:
        for overload in (self.op_name, f"{self.op_name}.python"):
            torch.library.register_fake(overload, self.fake)
            torch.library.register_autograd(overload, self.backward, setup_context=self.setup_context)
        if self.into_name is not None:
            torch.library.register_fake(self.into_name, _returns_nothing)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return self._packet.default

    def overload_for(self, algorithm: Algorithm) -> torch._ops.OpOverload:
        """What runs the algorithm: the core library, or for a Python function an overload that calls it."""
        return self._packet.python if algorithm.platform == "python" else self._packet.default

    @property
    def _packet(self) -> Any:
        namespace, name = self.op_name.split("::")
        return getattr(getattr(torch.ops, namespace), name)


def _returns_nothing(*args: Any, **kwargs: Any) -> None:
    """The fake of an operation that only writes into its first argument."""


# Sizes to count with instead of those that a graph was captured with: values of the symbols they are made of.
HINTS: ContextVar[Mapping[Any, int]] = ContextVar("ai3_hints", default={})


def hint(size: int | torch.SymInt) -> int:
    """A size as captured; reading it adds no guard. An unbacked size counts as 1."""
    if not isinstance(size, torch.SymInt):
        return int(size)  # torch.jit.trace has tensors of one element
    value = size.node.expr.xreplace(HINTS.get()) if HINTS.get() else size.node.hint
    if getattr(value, "is_number", True):
        return 1 if value is None else int(value)
    return 1 if size.node.hint is None else int(size.node.hint)


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(hint(size) for size in node.meta["val"].shape)


def image(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an image with its batch: an unbatched one is a batch of one."""
    return (1, *shape) if len(shape) == 3 else tuple(shape)


def tensor_spec(node: Node | None) -> TensorSpec | None:
    return None if node is None else TensorSpec(shape_of(node), node.meta["val"].dtype)


def spec_of(operation: str, node: Node, source: Node, attributes: dict[str, Any], **fields: Any) -> OpSpec:
    """The OpSpec of `node`, whose image, matrix or tensor input is `source`."""
    value = source.meta["val"]
    return OpSpec(
        operation=operation,
        name=module_path(node),
        input_shape=fields.pop("input_shape", None) or shape_of(source),
        output_shape=fields.pop("output_shape", None) or shape_of(node),
        dtype=value.dtype,
        device=value.device.type,
        attributes=tuple(attributes.items()),
        allow_tf32=allows_tf32(operation, value.dtype, value.device.type),
        **fields,
    )


def allows_tf32(operation: str, dtype: torch.dtype, device: str) -> bool:
    """Whether PyTorch's settings let an operation round products of float32 to TF32."""
    if device != "cuda" or dtype != torch.float32:
        return False
    return gpu.allows_tf32(convolves=operation.startswith("conv2d"))


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


def window_pair(value: Any) -> Any:
    """(height, width) of a module's attribute; what is no pair stays as it is, for PyTorch to refuse."""
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    return values * 2 if len(values) == 1 else values


def equal_paddings(padding: Sequence[int]) -> tuple[int, ...]:
    """(height, width) of the paddings top, bottom, left, right where both sides are padded alike; else the four."""
    top, bottom, left, right = padding
    return (top, left) if top == bottom and left == right else (top, bottom, left, right)


def four_paddings(padding: Sequence[int]) -> tuple[int, int, int, int]:
    """top, bottom, left, right of what `equal_paddings` gave."""
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    top, bottom, left, right = padding
    return top, bottom, left, right


def pool_extent(size: Any, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> Any:
    """Output size of a pooling window, as ATen's pooling_output_shape."""
    out = (size + 2 * pad - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out -= 1
    return out


# What every pooling window has, besides its dilation.
WINDOW = ("kernel_size", "stride", "padding", "ceil_mode")


def pooled(
    image: Sequence[int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    dilation: tuple[int, int],
) -> tuple[int, ...] | None:
    """The shape of a pooled image; None where PyTorch refuses the window."""
    pairs = (kernel_size, stride, padding, dilation)
    if any(len(pair) != 2 for pair in pairs) or 0 in (*kernel_size, *stride, *image[1:]):
        return None
    window = zip(image[2:], kernel_size, stride, padding, dilation)
    extents = [pool_extent(size, kernel, by, pad, dil, ceil_mode) for size, kernel, by, pad, dil in window]
    pads = zip(padding, kernel_size, dilation)
    if min(extents) <= 0 or any(pad > ((kernel - 1) * dil + 1) // 2 for pad, kernel, dil in pads):
        return None
    return (*image[:2], *extents)


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
