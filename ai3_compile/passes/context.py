"""What the passes know besides the graph, and how they put nodes into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..ops.base import hint
from ..options import Policy
from ..report import GraphReport
from ..selection import System

aten = torch.ops.aten


@dataclass
class Context:
    policy: Policy
    system: System
    report: GraphReport
    is_inference: bool
    """No gradient will be asked for: fusing over saved values is safe, and packs may be kept."""
    decompose: bool
    """Whether what compiles the rest expects batch norms and activations in primitive operations (Inductor does)."""
    static_inputs: Sequence[int]
    """Which inputs of the graph are parameters and buffers."""
    algorithms: dict[int, Any] = field(default_factory=dict)
    """The algorithms in the graph by id."""
    swapped: set[Node] = field(default_factory=set)
    """What swapped modules have put into the graph: each keeps the algorithm chosen for it."""


def static_nodes(graph: Graph, context: Context) -> set[Node]:
    """The inputs of a graph that are parameters and buffers."""
    placeholders = graph.find_nodes(op="placeholder")
    return {placeholders[index] for index in context.static_inputs}


def is_made_a_half(parameter: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the core library casts a parameter of one type for an operation on a GPU that computes in the other."""
    return parameter == torch.float32 and dtype in (torch.float16, torch.bfloat16)


# Where a node keeps the fake value, with the strides, that it would have without ai3.
EAGER_VALUE = "ai3_eager_value"


def eager_value(node: Node) -> Any:
    return node.meta.get(EAGER_VALUE, node.meta.get("val"))


def value_of(argument: Any) -> Any:
    """An argument with every node replaced by its fake value."""
    return map_arg(argument, lambda node: node.meta["val"])


def set_value(node: Node) -> None:
    """Computes a node's fake value from its arguments, and tells Inductor the strides the operation counts on."""
    args, kwargs = value_of(node.args), value_of(node.kwargs)
    mode = detect_fake_mode((args, kwargs))
    assert mode is not None and callable(node.target)
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ai3":
        node.meta["eager_input_vals"] = (args, kwargs)


def strides_of(value: Any) -> Any:
    """The strides that matter: those of dimensions of one element do not."""
    if isinstance(value, (tuple, list)):
        return [strides_of(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return None
    return [stride for size, stride in zip(value.shape, value.stride()) if size != 1]


def replace(old: Node, new: Node) -> None:
    """Puts `new`, already in the graph, in the place of `old`."""
    new.meta = {**old.meta, **new.meta, EAGER_VALUE: eager_value(old)}
    set_value(new)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def is_ai3(node: Any, *operations: str) -> bool:
    """Whether a node is one of ai3's operations, of the given names if any (`ai3::conv2d`)."""
    if not isinstance(node, Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name  # without its overload
    return name in operations if operations else name.startswith("ai3::")


def algorithm_of(node: Node) -> int:
    """The algorithm id among the arguments of one of ai3's nodes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [argument.name for argument in node.target._schema.arguments].index("algorithm")
    value = node.args[position]
    assert isinstance(value, int)
    return value


def only_user(node: Node) -> Node | None:
    """The one node that uses this one's value, or None where several do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def restored(node: Node, value: torch.Tensor, user: Node, copy_of: Callable[..., Node]) -> Node:
    """`node` with the strides of `value`, which is dense: its dimensions lie in memory by falling stride."""
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
        return copy_of(node, torch.channels_last, user)
    if value.is_contiguous():
        return copy_of(node, torch.contiguous_format, user)
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: -hint(strides[dim]))
    back = sorted(range(value.dim()), key=order.__getitem__)
    for permutation in (order, back):
        with user.graph.inserting_before(user):
            node = user.graph.call_function(aten.permute.default, (node, permutation))
        set_value(node)
        if permutation is order:
            node = copy_of(node, torch.contiguous_format, user)
    return node
