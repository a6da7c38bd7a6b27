"""What each operation computes, in float64 and in PyTorch's own terms, and how far from it an algorithm may be.

Bounds on ||y - ref|| / ||ref|| for unit-variance data. float32 rounds each addition by at most 6e-8 of a partial sum,
and the errors of n independent roundings grow as sqrt(n): 1e-6 holds up to n of some thousands. A Winograd transform
multiplies errors by the size of its matrices' entries: 5e-6 for F(4x4,3x3) (Barabasz et al., arXiv 1803.10986), and
2e-5 for F(6x6,3x3), whose error was measured to be 4 times as large. float64 has 2^29 times the precision; 1e-13
leaves room for the same growth. What only moves or compares numbers is exact.

ai3's own algorithms keep to that by adding in several partial sums. A plain loop over n products does not, and neither
does PyTorch: its partial sums grow as sqrt(k), so it errs by about 6e-8 * sqrt(n / 6). A user's algorithm may err by
6e-8 * sqrt(n) where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.activations import ACTIVATIONS
from ..ops.base import four_paddings

BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13}
WINOGRAD_BOUNDS = {
    "winograd": {torch.float32: 5e-6, torch.float64: 1e-13},
    "winograd6": {torch.float32: 2e-5, torch.float64: 1e-13},
}
HALF_BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""The rounding of the result, 2^-11 or 2^-8 of a value at most: products of halves are exact in float32."""
ROUNDING = 2.0**-24
EXACT = ("maxpool2d", "relu", "flatten")


def bound(operation: str, algorithm: str, dtype: torch.dtype, terms: int = 0) -> float:
    """The relative error an algorithm may have, one that adds up `terms` products in a plain loop if given."""
    if operation in EXACT:
        return 0.0
    if dtype in HALF_BOUNDS:
        return HALF_BOUNDS[dtype]
    least = WINOGRAD_BOUNDS.get(algorithm, BOUNDS)[dtype]
    return max(least, ROUNDING * math.sqrt(terms)) if dtype == torch.float32 else least


def compute(
    operation: str,
    attributes: Mapping[str, Any],
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "identity",
) -> torch.Tensor:
    """activation(op(input) + bias + residual) with PyTorch's operations, in the precision of the input."""
    a = attributes
    if operation == "conv2d":
        assert weight is not None
        top, bottom, left, right = four_paddings(a["padding"])
        padding = (top, left)
        if (top, left) != (bottom, right):
            input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
        out = F.conv2d(input, weight, bias, a["stride"], padding, a["dilation"], a["groups"])
    elif operation == "linear":
        assert weight is not None
        out = F.linear(input, weight, bias)
    elif operation == "maxpool2d":
        out = F.max_pool2d(input, a["kernel_size"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
    elif operation == "avgpool2d":
        counted = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"])
        out = F.avg_pool2d(input, a["kernel_size"], a["stride"], a["padding"], *counted)
    elif operation == "adaptiveavgpool2d":
        out = F.adaptive_avg_pool2d(input, a["output_size"])
    elif operation == "relu":
        out = input.relu()
    else:
        out = input.flatten(a["start_dim"], a["end_dim"])
    out = out if residual is None else out + residual
    return ACTIVATIONS[activation](out)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, in float64, over the elements that are equal to no infinity."""
    found, expected = found.double(), expected.double()
    same_infinity = expected.isinf() & (found == expected)
    found, expected = (t.masked_fill(same_infinity, 0) for t in (found, expected))
    norm = expected.norm().item()
    return (found - expected).norm().item() / (norm if norm > 0 else 1.0)


def judge(found: torch.Tensor, expected: torch.Tensor, limit: float) -> tuple[float, str | None]:
    """The relative error, and what is wrong with the result or None; NaN is right where it is expected."""
    if found.shape != expected.shape:
        return float("nan"), f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    nan = found.isnan() != expected.isnan()
    if bool(nan.any()):
        first = tuple(nan.nonzero()[0].tolist())
        there = "NaN where there is none" if bool(found[first].isnan()) else "no NaN where there is one"
        return float("nan"), f"{there}, in {int(nan.sum())} of {nan.numel()} elements; the first is {list(first)}"
    found, expected = (t.double().nan_to_num(0.0, torch.inf, -torch.inf) for t in (found, expected))
    error = relative_error(found, expected)
    if error <= limit:
        return error, None
    difference = (found - expected).abs().nan_to_num(0.0)
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    where = [int(i) for i in worst]
    return error, (
        f"relative error {error:.1e}, above {limit:.0e}; largest at {where}: {found[worst].item():.6g}, "
        f"not {expected[worst].item():.6g}"
    )
