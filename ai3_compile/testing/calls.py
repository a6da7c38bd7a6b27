"""The calls an algorithm is proven on: every case of its operation in both precisions and all memory layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UnsupportedCallableError
from ..ops import GRADIENTS, OPERATIONS, activations
from ..ops.base import allows_tf32, four_paddings, image
from ..selection import OpSpec, TensorSpec
from . import cases, references

DTYPES = (torch.float32, torch.float64)
IMAGES = ("conv2d", "maxpool2d", "avgpool2d", "adaptiveavgpool2d")
PLAIN, BIAS, EPILOGUE = "", "bias", "bias, residual, relu"
# The activation at the end of each variant that has all there is to add.
EPILOGUES = {f"bias, residual, {name}": name for name in activations.NAMES if name != "identity"}
BATCH_0, UNBATCHED, STRIDED, CHANNELS_LAST = "batch 0", "unbatched", "non-contiguous", "channels_last"
_LAYOUTS = {operation: (BATCH_0, UNBATCHED, STRIDED, CHANNELS_LAST) for operation in IMAGES} | {
    "linear": (BATCH_0, UNBATCHED, STRIDED),
    "relu": (BATCH_0, STRIDED, CHANNELS_LAST),
    "flatten": (BATCH_0, STRIDED, CHANNELS_LAST),
}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation, and what an algorithm is asked about it."""

    spec: OpSpec
    attributes: Mapping[str, Any]
    input: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "identity"
    variant: str = PLAIN

    @property
    def is_layout(self) -> bool:
        """Whether it is about how PyTorch hands tensors over, which the C ABI knows nothing of."""
        return self.variant not in (PLAIN, BIAS, *EPILOGUES)

    @property
    def terms(self) -> int:
        """How many products are added up for one element of the output."""
        return 0 if self.weight is None else self.weight[0].numel()

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.input, self.weight, self.bias, self.residual

    def compute(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The result of PyTorch, in another precision if given."""
        input, *rest = (t if t is None or dtype is None else t.to(dtype) for t in self.tensors)
        assert input is not None
        weight, bias, residual = rest
        return references.compute(self.spec.operation, self.attributes, input, weight, bias, residual, self.activation)

    def properties(self) -> list[str]:
        """What is particular about it, as the domain of an algorithm is told."""
        found = [str(self.spec.dtype).removeprefix("torch."), *_PARTICULAR.get(self.spec.operation, _nothing)(self)]
        if self.spec.operation in IMAGES and self.spec.input_shape[0] > 1:
            found.append("batch above 1")
        return [*found, self.variant] if self.variant else found


def in_dtype(call: Call, dtype: torch.dtype, device: str) -> Call:
    """The same call in another precision and place; PyTorch's settings there say what products may be rounded."""

    def moved(t: torch.Tensor | None) -> torch.Tensor | None:
        # On the device: the CPU makes a bfloat16 NaN of all ones, which is what unwritten memory holds here.
        return None if t is None else t.to(device).to(dtype)

    input, weight, bias, residual = map(moved, call.tensors)
    assert input is not None
    attributes = tuple(
        (n, replace(v, dtype=dtype) if isinstance(v, TensorSpec) else v) for n, v in call.spec.attributes
    )
    tf32 = allows_tf32(call.spec.operation, dtype, device)
    spec = replace(call.spec, device=device, dtype=dtype, allow_tf32=tf32, attributes=attributes)
    return replace(call, spec=spec, input=input, weight=weight, bias=bias, residual=residual)


def make(
    operation: str,
    name: str,
    attributes: Mapping[str, Any],
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    variant: str = PLAIN,
) -> Call | None:
    """The call on these tensors, with the residual and activation of its variant; None where they do not fit."""
    shape = tuple(input.shape)
    if operation in IMAGES:
        shape = image(shape)
    elif operation == "linear":
        shape = (input.numel() // max(shape[-1], 1), shape[-1])
    weight_shape = None if weight is None else tuple(weight.shape)
    has_bias = bias is not None
    spec = OPERATIONS[operation].spec(name, shape, weight_shape, has_bias, input.dtype, input.device.type, attributes)
    if spec is None:
        return None
    residual = torch.randn(spec.output_shape).to(input) if variant in EPILOGUES else None
    return Call(spec, attributes, input, weight, bias, residual, EPILOGUES.get(variant, "identity"), variant)


def _made(*args: Any, **named: Any) -> Call:
    call = make(*args, **named)
    assert call is not None, "a case of the operation's own fits"
    return call


def conv2d(case: cases.Conv, dtype: torch.dtype, variant: str = PLAIN) -> Call:
    torch.manual_seed(0)
    input = torch.randn(case.batch, case.channels, *case.size, dtype=dtype)
    weight = torch.randn(case.out, case.channels // case.groups, *case.kernel, dtype=dtype)
    bias = None if variant == PLAIN else torch.randn(case.out, dtype=dtype)
    return _made("conv2d", case.id, case.attributes(), input, weight, bias, variant)


def linear(shape: tuple[int, int, int], dtype: torch.dtype, variant: str = PLAIN) -> Call:
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    input, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    bias = None if variant == PLAIN else torch.randn(outputs, dtype=dtype)
    return _made("linear", "x".join(map(str, shape)), {}, input, weight, bias, variant)


def pool(operation: str, case: cases.Pool, dtype: torch.dtype) -> Call:
    torch.manual_seed(0)
    input = torch.randn(case.batch, case.channels, *case.size, dtype=dtype)
    if operation == "maxpool2d":
        input[-1, 0, :3, :3] = -torch.inf  # windows without one finite value
        input[0, -1, 3, 3] = torch.nan
    return _made(operation, case.id, case.attributes(operation), input)


def adaptive(shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> Call:
    torch.manual_seed(0)
    name = f"{'x'.join(map(str, shape))} to {size[0]}x{size[1]}"
    return _made("adaptiveavgpool2d", name, {"output_size": size}, torch.randn(shape, dtype=dtype))


def relu(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    torch.manual_seed(0)
    input = torch.randn(shape, dtype=dtype)
    input.view(-1)[0] = torch.nan
    return _made("relu", "x".join(map(str, shape)), {}, input)


def flatten(shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    torch.manual_seed(0)
    attributes = {"start_dim": 0, "end_dim": len(shape) - 1}
    return _made("flatten", "x".join(map(str, shape)), attributes, torch.randn(shape, dtype=dtype))


def require_cases(operation: str) -> None:
    """Raises UnsupportedCallableError where there are no cases of an operation."""
    if operation in GRADIENTS:
        raise UnsupportedCallableError(
            message=f"{operation} is a gradient: neither check_algorithm nor compare has cases of it"
        )
    if operation == "attention":
        raise UnsupportedCallableError(
            message="attention takes tensors beyond an input, a weight and a bias: neither check_algorithm nor compare "
            "has cases of it"
        )


def plain_calls(operation: str, dtype: torch.dtype, variant: str = PLAIN) -> Iterator[Call]:
    """Every case of the operation once."""
    if operation == "conv2d":
        yield from (conv2d(case, dtype, variant) for case in cases.CONVS)
    elif operation == "linear":
        yield from (linear(shape, dtype, variant) for shape in cases.LINEARS)
    elif operation in ("maxpool2d", "avgpool2d"):
        pools = cases.MAX_POOLS if operation == "maxpool2d" else cases.AVG_POOLS
        yield from (pool(operation, case, dtype) for case in pools)
    elif operation == "adaptiveavgpool2d":
        yield from (adaptive(shape, size, dtype) for shape, size in cases.ADAPTIVE)
    elif operation == "relu":
        yield from (relu(shape, dtype) for shape in cases.RELUS)
    else:
        yield from (flatten(shape, dtype) for shape in cases.FLATTENS)


def few_calls(operation: str, dtype: torch.dtype, variant: str) -> Iterator[Call]:
    """Cases that end within a vector, one for each way that convolutions and linears write their outputs."""
    if operation == "conv2d":
        yield from (conv2d(case, dtype, variant) for case in cases.CONVS if case.id in cases.FEW_CONVS)
    elif operation == "linear":
        yield from (linear(shape, dtype, variant) for shape in cases.FEW_LINEARS)


def all_calls(operation: str, device: str = "cpu") -> Iterator[Call]:
    """Every case in both precisions, on a GPU in the halves too, with and without what is added to the result, then in
    other layouts."""

    def there(calls: Iterable[Call], dtype: torch.dtype) -> Iterator[Call]:
        return (call if device == "cpu" else in_dtype(call, dtype, device) for call in calls)

    dtypes = DTYPES if device == "cpu" else (*DTYPES, torch.float16, torch.bfloat16)
    for variant in (PLAIN, BIAS, EPILOGUE) if operation in ("conv2d", "linear") else (PLAIN,):
        for dtype in dtypes:
            yield from there(plain_calls(operation, _made_in(dtype), variant), dtype)
    for variant in [variant for variant in EPILOGUES if variant != EPILOGUE]:
        for dtype in dtypes:
            yield from there(few_calls(operation, _made_in(dtype), variant), dtype)
    for layout in _LAYOUTS[operation]:
        for call in there(plain_calls(operation, torch.float32), torch.float32):
            varied = _vary(call, layout)
            if varied is not None:
                yield varied


def _made_in(dtype: torch.dtype) -> torch.dtype:
    """Halves are rounded from float32."""
    return dtype if dtype in DTYPES else torch.float32


def _vary(call: Call, layout: str) -> Call | None:
    """The same call with its tensors in another layout; None where its input has no such layout."""
    input, weight = call.input, call.weight
    if layout == BATCH_0:
        input = input[:0]
    elif layout == UNBATCHED:
        input = input[0]
    elif layout == STRIDED:
        input = _strided(input)
        weight = None if weight is None else _strided(weight)
    elif input.dim() != 4:
        return None
    else:
        input = input.contiguous(memory_format=torch.channels_last)
    name, operation = call.spec.name, call.spec.operation
    varied = make(operation, name, call.attributes, input, weight, call.bias)
    return None if varied is None else replace(varied, variant=layout)


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with others between them in memory."""
    return torch.stack((tensor, torch.full_like(tensor, 7.0)), -1)[..., 0]


def _conv2d_properties(call: Call) -> Iterator[str]:
    spec = call.spec
    kernel = tuple(spec.weight.shape[2:])
    yield f"{kernel[0]}x{kernel[1]} kernel" if kernel in ((1, 1), (3, 3)) else "other kernels"
    if spec.groups > 1:
        yield "depthwise" if spec.weight.shape[1] == 1 else "groups"
    yield from _window(spec.stride, spec.dilation, spec.padding)


def _pool_properties(call: Call) -> Iterator[str]:
    a = call.attributes
    yield from _window(a["stride"], a.get("dilation", (1, 1)), a["padding"])
    if a["ceil_mode"]:
        yield "ceil_mode"
    if not a.get("count_include_pad", True):
        yield "count_include_pad=False"
    if a.get("divisor_override"):
        yield "divisor_override"


def _window(stride: tuple[int, ...], dilation: tuple[int, ...], padding: tuple[int, ...]) -> Iterator[str]:
    for name, found in (("stride", max(stride) > 1), ("dilation", max(dilation) > 1), ("padding", any(padding))):
        if found:
            yield name
    top, bottom, left, right = four_paddings(padding)
    if (top, left) != (bottom, right):
        yield "asymmetric padding"


def _adaptive_properties(call: Call) -> Iterator[str]:
    pairs = list(zip(call.spec.input_shape[2:], call.spec.output_shape[2:]))
    if all(to == 1 for _, to in pairs):
        yield "to one pixel"
    if any(size % to for size, to in pairs):
        yield "uneven windows"


def _linear_properties(call: Call) -> Iterator[str]:
    if call.spec.input_shape[0] == 1:
        yield "one row"


def _nothing(call: Call) -> Iterator[str]:
    yield from ()


_PARTICULAR = {
    "conv2d": _conv2d_properties,
    "maxpool2d": _pool_properties,
    "avgpool2d": _pool_properties,
    "adaptiveavgpool2d": _adaptive_properties,
    "linear": _linear_properties,
}
