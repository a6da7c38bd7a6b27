"""Paths through views and copies: what is emitted for one has its values, and is a view where it is said to be one."""

from __future__ import annotations

import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ai3_compile.passes import axes

aten = torch.ops.aten


def steps(x: torch.Tensor, choose: random.Random):
    """A few views and copies, each of the sizes that there are by then."""
    for _ in range(choose.randint(1, 7)):
        kind, rank = (
            choose.choice(("view", "view", "permute", "transpose", "copy", "unsqueeze", "squeeze", "select")),
            x.dim(),
        )
        if kind == "view":
            x = x.reshape(shape_of(x.numel(), choose))
        elif kind == "permute":
            x = x.permute(choose.sample(range(rank), rank))
        elif kind == "transpose" and rank > 1:
            x = x.transpose(choose.randrange(rank), -1)
        elif kind == "copy":
            x = x.clone(memory_format=torch.contiguous_format)
        elif kind == "unsqueeze":
            x = x.unsqueeze(choose.randint(-rank - 1, rank))
        elif kind == "squeeze" and rank > 0:
            x = x.squeeze(choose.randrange(rank))
        elif kind == "select" and rank > 1:
            at = choose.randrange(rank)
            x = x.select(at - choose.choice((0, rank)), choose.randrange(x.shape[at]))
    return x


def shape_of(count: int, choose: random.Random) -> list[int]:
    shape = []
    while count > 1:
        size = choose.choice([n for n in range(2, count + 1) if count % n == 0])
        shape.append(size)
        count //= size
    shape.insert(choose.randint(0, len(shape)), 1)
    choose.shuffle(shape)
    return shape


@pytest.mark.parametrize("seed", range(200))
def test_a_path(seed):
    choose = random.Random(seed)
    x = torch.arange(2 * 3 * 4 * 5).float()
    x = x.view(choose.choice([(6, 20), (2, 3, 4, 5), (120,), (5, 24)]))
    if choose.random() < 0.3:
        x = x.permute(choose.sample(range(x.dim()), x.dim()))
    traced = make_fx(lambda x: steps(x * 1, random.Random(seed + 1)), tracing_mode="fake")(x)
    graph = traced.graph
    (result,) = graph.output_node().all_input_nodes
    path = axes.path_to(result)
    right = steps(x, random.Random(seed + 1))
    if path is None:  # a select of joined axes, or a split across them
        assert any(node.target is aten.select.int or node.target in axes.VIEWS for node in graph.nodes)
        return
    assert path.copies == any(node.target in axes.COPIES for node in graph.nodes)
    with graph.inserting_before(graph.output_node()):
        emitted = axes.emit(path, path.dims)
    graph.output_node().replace_input_with(result, emitted)
    graph.eliminate_dead_code()
    assert not any(node.target in axes.COPIES for node in graph.nodes)
    traced.recompile()
    found = traced(x)
    assert torch.equal(found, right) and tuple(found.shape) == tuple(right.shape)
    # A reshape that copies gives dense memory of its own; the strides of a view are those of its axes.
    if axes.is_view(path.dims):
        strides = [dim[-1].stride for dim in path.dims if dim]
        assert [stride for size, stride in zip(found.shape, found.stride()) if size != 1] == strides


def test_most_paths_are_found():
    found = 0
    for seed in range(200):
        x = torch.arange(120.0).view(2, 3, 4, 5)
        traced = make_fx(lambda x: steps(x * 1, random.Random(seed)), tracing_mode="fake")(x)  # noqa: B023
        found += axes.path_to(traced.graph.output_node().all_input_nodes[0]) is not None
    assert found > 80
