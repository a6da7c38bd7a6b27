"""Which casts of parameters are left to the core library: the pass alone, on a graph of its operations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph

from ai3_compile import core, registry
from ai3_compile.passes import casts, fold

core.load()
CONVERT, COPY = torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default


def graph_of(cast, wide=torch.float32, half=torch.float16, **how):
    """A linear of an input, a weight and a bias, which are cast."""
    graph, dtypes = Graph(), (half, wide, wide)
    inputs = [graph.placeholder(name) for name in ("x", "w", "b")]
    for node, dtype, shape in zip(inputs, dtypes, ((2, 4), (3, 4), (3,))):
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    narrow = []
    for node in inputs[1:]:
        made = graph.call_function(cast, (node, half) if cast is CONVERT else (node,), how if cast is COPY else {})
        made.meta["val"] = node.meta["val"].to(half)
        narrow.append(made)
    linear = graph.call_function(torch.ops.ai3.linear.default, (inputs[0], *narrow, 7), {"static_weight": False})
    graph.output(linear)
    return graph, inputs, linear


def left_to_the_core(graph, inputs, linear, platform="cuda", static=(1, 2), is_inference=True) -> list[bool]:
    context = SimpleNamespace(
        is_inference=is_inference, static_inputs=static, algorithms={7: SimpleNamespace(platform=platform)}
    )
    casts.run(graph, context)
    graph.lint()
    taken = [given is node for given, node in zip(linear.args[1:3], inputs[1:])]
    assert linear.kwargs["static_weight"] is taken[0]
    assert len(
        graph.find_nodes(op="call_function", target=CONVERT) + graph.find_nodes(op="call_function", target=COPY)
    ) == (2 - sum(taken))
    return taken


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("cast", "how"), [(CONVERT, {}), (COPY, {"dtype": torch.float16})])
@pytest.mark.parametrize("platform", ["cuda", "cudnn", "cublas"])
def test_parameters_that_autocast_casts(cast, how, half, platform):
    assert left_to_the_core(*graph_of(cast, half=half, **how), platform=platform) == [True, True]


@pytest.mark.parametrize("platform", ["cpp", "python"])
def test_other_platforms_get_what_they_compute_in(platform):
    assert registry.platforms()[platform].casts_parameters is False
    assert left_to_the_core(*graph_of(CONVERT), platform=platform) == [False, False]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"static": ()}, [False, False]),
        ({"static": (2,)}, [False, True]),
        ({"is_inference": False}, [False, False]),
    ],
)
def test_what_changes_from_call_to_call_is_cast_in_the_graph(how, expected):
    assert left_to_the_core(*graph_of(CONVERT), **how) == expected


def test_other_casts_stay():
    assert left_to_the_core(*graph_of(CONVERT, wide=torch.float64)) == [False, False]
    assert left_to_the_core(*graph_of(CONVERT, wide=torch.float16, half=torch.float32)) == [False, False]
    assert left_to_the_core(*graph_of(COPY, dtype=torch.float16, device="cuda")) == [False, False]


@pytest.mark.parametrize(
    ("norm", "own", "platform", "expected"),
    [
        (torch.float32, torch.float32, "cpp", True),
        (torch.float32, torch.float16, "cuda", True),
        (torch.float32, torch.bfloat16, "cudnn", True),
        (torch.float32, torch.float16, "cpp", False),
        (torch.float64, torch.float16, "cuda", False),
        (torch.float32, torch.float64, "cuda", False),
        (torch.float16, torch.float32, "cuda", False),
    ],
)
def test_batch_norms_that_a_convolution_takes(norm, own, platform, expected):
    graph = Graph()
    x, w, mean = (graph.placeholder(name) for name in ("x", "w", "mean"))
    mean.meta["val"] = torch.empty(4, dtype=norm, device="meta")
    window = (1, 1, 0, 0, 0, 0, 1, 1, 1)
    conv = graph.call_function(torch.ops.ai3.conv2d.default, (x, w, None, *window, 7))
    conv.meta["val"] = torch.empty(1, 4, 2, 2, dtype=own, device="meta")
    context = SimpleNamespace(algorithms={7: SimpleNamespace(platform=platform)})
    assert fold._takes(conv, (None, None, mean, mean), context) is expected
