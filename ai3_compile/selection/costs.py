"""What measurements say about the kernels' own estimates: factors by algorithm and shape, from a fitted table.

`python -m bench cost` measures every algorithm on a grid of shapes and on networks' layers, `python -m bench fit` fits
the table to it (costs.json beside this file). log(factor) is a sum of piecewise linear functions, one for each feature
of a shape: by algorithm, kind of convolution and vector instructions. A shape outside of the grid counts as its border.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .spec import OpSpec

TABLE = Path(__file__).with_name("costs.json")

# Kinds of convolutions: the algorithms have ways of their own for them.
DEPTHWISE, GROUPED, FIRST, POINTWISE, DENSE = "depthwise", "grouped", "first layer", "1x1", "dense"
_FIRST_LAYERS_CHANNELS = 4

# One function: at positions `begin`, `begin` + 1, ..., its values.
Piecewise = tuple[int, tuple[float, ...]]


def kind_of(channels: int, weight: Sequence[int], groups: int) -> str:
    """The kind of a convolution of `channels` input channels with a weight [K, C/groups, R, S]."""
    if groups > 1:
        return DEPTHWISE if groups == channels == weight[0] else GROUPED
    if channels <= _FIRST_LAYERS_CHANNELS:
        return FIRST
    return POINTWISE if tuple(weight[2:]) == (1, 1) else DENSE


def features_of(
    input: Sequence[int], output: Sequence[int], weight: Sequence[int], groups: int, stride: Sequence[int]
) -> dict[str, float]:
    """Base-2 logarithms of what a convolution's time depends on; all sizes at least 1."""
    sizes = {
        "filters": weight[0] // groups,
        "channels": weight[1],
        "depth": math.prod(weight[1:]),
        "taps": math.prod(weight[2:]),
        "row": weight[3],
        "groups": groups,
        "pixels": output[0] * output[2] * output[3],
        "width": output[3],
        "stride": math.prod(stride),
        "input": math.prod(input),
        "output": math.prod(output),
    }
    return {name: math.log2(size) for name, size in sizes.items()}


def evaluate(functions: Mapping[str, Piecewise], features: Mapping[str, float]) -> float:
    """The sum of the functions, each at its feature."""
    return sum(_at(function, features[name]) for name, function in functions.items())


def _at(function: Piecewise, position: float) -> float:
    begin, values = function
    place = min(max(position - begin, 0.0), len(values) - 1.0)
    left = min(int(place), len(values) - 2)
    return values[left] + (place - left) * (values[left + 1] - values[left])


@functools.cache
def table() -> Mapping[str, Mapping[str, Mapping[str, Piecewise]]]:
    """By vector instructions, and by `algorithm@platform, kind`."""
    read = json.loads(TABLE.read_text())
    return {
        isa: {
            name: {feature: (begin, tuple(values)) for feature, (begin, values) in functions.items()}
            for name, functions in fitted.items()
        }
        for isa, fitted in read.items()
    }


def name_of(algorithm: str, kind: str) -> str:
    return f"{algorithm}, {kind}"


def factor(algorithm: str, isa: str, spec: OpSpec) -> float:
    """What to multiply the estimate of `algorithm` (with its platform) by on a CPU of these vector instructions; 1
    where nothing was measured: for other operations, dtypes and instructions, and for algorithms of users."""
    if spec.operation != "conv2d" or spec.dtype != torch.float32 or 0 in (*spec.input_shape, *spec.output_shape):
        return 1.0
    weight: Sequence[int] = spec.weight.shape
    kind = kind_of(spec.in_channels, weight, spec.groups)
    functions = table().get(isa, {}).get(name_of(algorithm, kind))
    if functions is None or len(spec.input_shape) != 4:
        return 1.0
    features = features_of(spec.input_shape, spec.output_shape, weight, spec.groups, spec.stride)
    return math.exp(evaluate(functions, features))
