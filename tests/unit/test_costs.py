"""The fitted table of costs: its functions, its fit, and that every algorithm that it names is there."""

import math

import pytest
import torch

from ai3_compile import registry
from ai3_compile.selection import OpSpec, TensorSpec, costs
from bench import fit

HAT = {"pixels": (3, (1.0, 2.0, 0.0))}


@pytest.mark.parametrize(
    "position, value",
    [(3, 1.0), (4, 2.0), (5, 0.0), (3.5, 1.5), (4.25, 1.5), (-7, 1.0), (99, 0.0)],
    ids=["first knot", "knot", "last knot", "between", "between others", "below the grid", "above the grid"],
)
def test_a_function_is_linear_between_its_knots_and_constant_outside(position, value):
    assert costs.evaluate(HAT, {"pixels": position, "width": 2.0}) == pytest.approx(value)


def _spec(input=(1, 64, 56, 56), weight=(64, 64, 3, 3), groups=1, dtype=torch.float32):
    return OpSpec(
        "conv2d",
        "layer",
        input,
        (input[0], weight[0], *input[2:]),
        dtype,
        "cpu",
        (
            ("weight", TensorSpec(weight, dtype)),
            ("stride", (1, 1)),
            ("groups", groups),
            ("in_channels", weight[1] * groups),
        ),
    )


@pytest.mark.parametrize(
    "channels, weight, groups, kind",
    [
        (8, (8, 1, 3, 3), 8, "depthwise"),
        (8, (16, 1, 3, 3), 8, "grouped"),
        (8, (8, 4, 1, 1), 2, "grouped"),
        (4, (8, 4, 1, 1), 1, "first layer"),
        (5, (8, 5, 1, 1), 1, "1x1"),
        (5, (8, 5, 1, 3), 1, "dense"),
    ],
)
def test_kinds(channels, weight, groups, kind):
    assert costs.kind_of(channels, weight, groups) == kind


def test_nothing_is_corrected_that_was_not_measured():
    assert costs.factor("winograd@cpp", "avx512", _spec()) != 1.0
    assert costs.factor("winograd@cpp", "another", _spec()) == 1.0
    assert costs.factor("a user's@cpp", "avx512", _spec()) == 1.0
    assert costs.factor("winograd@cpp", "avx512", _spec(dtype=torch.float64)) == 1.0
    assert costs.factor("winograd@cpp", "avx512", _spec(input=(0, 64, 56, 56))) == 1.0
    assert costs.factor("winograd@cpp", "avx512", _spec(input=(64, 56, 56))) == 1.0


def test_every_entry_of_the_table_is_of_an_algorithm_that_there_is_and_within_reason():
    known = {a.qualified for a in registry.shipped() if a.operation == "conv2d"}
    for fitted in costs.table().values():
        for name, functions in fitted.items():
            assert name.split(", ")[0] in known
            assert all(len(values) >= 2 for _, values in functions.values())
            # The largest correction that a shape can meet: what is further off is a fault of the estimate.
            for extreme in (max, min):
                total = sum(extreme(values) for _, values in functions.values())
                assert abs(total) < math.log(100), name


def _row(pixels, seconds, estimate):
    return {
        "set": "grid",
        "input": [1, 8, 1, pixels],
        "weight": [8, 8, 1, 1],
        "output": [1, 8, 1, pixels],
        "stride": 1,
        "groups": 1,
        "seconds": seconds,
        "kernel's estimate": estimate,
    }


def test_the_fit_finds_which_algorithm_is_faster_where():
    # By their own estimates they are equal; in truth `a` is twice as fast below 256 pixels, and `b` above.
    rows = [
        _row(2**e, {"a": 6e-6 + t * (1 if e < 8 else 2), "b": 6e-6 + t * (2 if e < 8 else 1)}, {"a": t, "b": t})
        for e in range(2, 15)
        for t in (1e-3 * 2**e,) * 5
    ]
    fitted = fit.fit(rows)
    for row in rows:
        estimates = fit._estimates(row, fitted)
        assert min(estimates, key=estimates.get) == min(row["seconds"], key=row["seconds"].get)
    # The factors' geometric mean is 1 in the unit of the estimates.
    logs = [
        math.log(fit._estimates(row, fitted)[name] / row["kernel's estimate"][name]) for row in rows for name in "ab"
    ]
    assert sum(logs) / len(logs) == pytest.approx(0.0, abs=0.05)
