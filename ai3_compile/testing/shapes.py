"""The shapes to compare on, as users write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ShapeError
from ..ops.base import equal_paddings
from .calls import Call, make

EXAMPLES = {
    "conv2d": "((1, 64, 56, 56), (64, 64, 3, 3)), the shapes of input and weight, or {'input': (1, 64, 56, 56), "
    "'weight': (64, 64, 3, 3), 'stride': 2, 'padding': 1, 'dilation': 1, 'groups': 1}",
    "linear": "((8, 512), (1000, 512)), the shapes of input and weight, or {'input': (8, 512), 'weight': (1000, 512)}",
    "maxpool2d": "{'input': (1, 64, 112, 112), 'kernel_size': 3, 'stride': 2, 'padding': 1}, where dilation and "
    "ceil_mode may be given too",
    "avgpool2d": "{'input': (1, 64, 112, 112), 'kernel_size': 3, 'stride': 2, 'padding': 1}, where ceil_mode, "
    "count_include_pad and divisor_override may be given too",
    "adaptiveavgpool2d": "((1, 512, 14, 14), (7, 7)), the input's shape and the output's height and width, or "
    "{'input': (1, 512, 14, 14), 'output_size': (7, 7)}",
    "relu": "(1, 64, 56, 56), the input's shape, or {'input': (1, 64, 56, 56)}",
    "flatten": "(1, 512, 7, 7), the input's shape, or {'input': (1, 512, 7, 7), 'start_dim': 1, 'end_dim': -1}",
}
Shape = Sequence[Any] | Mapping[str, Any]


class _Malformed(ValueError):
    """What is wrong with a shape, without the shape."""


def calls_of(operation: str, shapes: Iterable[Shape], dtype: torch.dtype) -> list[Call]:
    """The calls of all shapes; raises ShapeError where one is none, or there are none."""
    calls = [_call_of(operation, shape, dtype) for shape in shapes]
    if not calls:
        raise ShapeError(operation=operation, given=shapes, message="the list is empty", example=EXAMPLES[operation])
    return calls


def _call_of(operation: str, given: Shape, dtype: torch.dtype) -> Call:
    """A call of the operation on random tensors of the shape."""
    try:
        fields = _fields(operation, given)
        input_shape, weight_shape, attributes = _READ[operation](**fields)
        name = _label(input_shape, weight_shape, fields)
        torch.manual_seed(0)
        input = torch.randn(input_shape, dtype=dtype)
        weight = None if weight_shape is None else torch.randn(weight_shape, dtype=dtype)
        call = make(operation, name, attributes, input, weight)
        if call is None or call.spec.output_shape == () or input.numel() == 0:
            raise _Malformed("the sizes do not fit each other, or leave nothing to compute")
    except _Malformed as error:
        raise ShapeError(operation=operation, given=given, message=error, example=EXAMPLES[operation]) from None
    return call


def _fields(operation: str, given: Any) -> Mapping[str, Any]:
    """The shape as keyword arguments of what reads it."""
    known = list(inspect.signature(_READ[operation]).parameters.values())
    names = [parameter.name for parameter in known]
    if isinstance(given, Mapping):
        fields = dict(given)
    elif not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise _Malformed("it is neither a tuple nor a dict; compare takes a list of shapes")
    elif all(isinstance(size, int) for size in given):
        fields = {"input": given}
    elif len(given) > 2:
        raise _Malformed("a tuple of shapes has two of them")
    else:
        fields = dict(zip(names, given))
    if unknown := [name for name in fields if name not in names]:
        raise _Malformed(f"there is no {unknown[0]!r}, only {', '.join(names)}")
    if missing := [p.name for p in known if p.default is p.empty and p.name not in fields]:
        raise _Malformed(f"it has no {missing[0]!r}")
    return fields


def _sizes(name: str, value: Any, rank: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(v, int) and v >= 0 for v in value):
        raise _Malformed(f"{name} is not a tuple of sizes but {value!r}")
    if rank is not None and len(value) != rank:
        raise _Malformed(f"{name} has {len(value)} sizes, not {rank}")
    return tuple(value)


def _pair(name: str, value: Any, least: int = 1) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise _Malformed(f"{name} is {value!r}, not a number or a pair (height, width), {least} or more")
    return pair[0], pair[1]


Read = tuple[tuple[int, ...], "tuple[int, ...] | None", dict[str, Any]]


def _conv2d(input: Any, weight: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1) -> Read:
    shapes = _sizes("input", input, 4), _sizes("weight", weight, 4)
    if not isinstance(groups, int) or groups < 1 or shapes[1][0] % groups:
        raise _Malformed(f"groups is {groups!r}, which does not divide the {shapes[1][0]} filters")
    if shapes[0][1] != shapes[1][1] * groups:
        channels = f"{shapes[0][1]} channels, and the weight is for {shapes[1][1]} in each of {groups} group(s)"
        raise _Malformed(f"the input has {channels}")
    four = isinstance(padding, Sequence) and len(padding) == 4
    return *shapes, {
        "stride": _pair("stride", stride),
        "padding": equal_paddings(_sizes("padding", padding)) if four else _pair("padding", padding, 0),
        "dilation": _pair("dilation", dilation),
        "groups": groups,
    }


def _linear(input: Any, weight: Any) -> Read:
    shapes = _sizes("input", input), _sizes("weight", weight, 2)
    if not shapes[0] or shapes[0][-1] != shapes[1][1]:
        raise _Malformed(f"the input's last size is not the weight's {shapes[1][1]} features")
    return *shapes, {}


def _window(kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any) -> dict[str, Any]:
    kernel = _pair("kernel_size", kernel_size)
    moves = kernel if stride is None else _pair("stride", stride)
    pads = _pair("padding", padding, 0)
    return {"kernel_size": kernel, "stride": moves, "padding": pads, "ceil_mode": bool(ceil_mode)}


def _maxpool2d(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False
) -> Read:
    window = _window(kernel_size, stride, padding, ceil_mode)
    return _sizes("input", input, 4), None, {**window, "dilation": _pair("dilation", dilation), "return_indices": False}


def _avgpool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> Read:
    window = _window(kernel_size, stride, padding, ceil_mode)
    counted = {"count_include_pad": bool(count_include_pad), "divisor_override": divisor_override}
    return _sizes("input", input, 4), None, {**window, **counted}


def _adaptiveavgpool2d(input: Any, output_size: Any) -> Read:
    return _sizes("input", input, 4), None, {"output_size": _pair("output_size", output_size)}


def _relu(input: Any) -> Read:
    return _sizes("input", input), None, {}


def _flatten(input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Read:
    if not isinstance(start_dim, int) or not isinstance(end_dim, int):
        raise _Malformed("start_dim and end_dim are numbers")
    return _sizes("input", input), None, {"start_dim": start_dim, "end_dim": end_dim}


_READ: dict[str, Callable[..., Read]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "maxpool2d": _maxpool2d,
    "avgpool2d": _avgpool2d,
    "adaptiveavgpool2d": _adaptiveavgpool2d,
    "relu": _relu,
    "flatten": _flatten,
}


def _label(input: tuple[int, ...], weight: tuple[int, ...] | None, fields: Mapping[str, Any]) -> str:
    """`1x64x56x56, 64x64x3x3, stride 2`."""
    parts = ["x".join(map(str, shape)) for shape in (input, weight) if shape is not None]
    for name, value in fields.items():
        if name not in ("input", "weight"):
            sizes = "x".join(map(str, value)) if isinstance(value, Sequence) else str(value)
            parts.append(f"{name.removesuffix('_size').replace('_', ' ')} {sizes}")
    return ", ".join(parts)
