"""backward: takes the convolution_backward of ATen apart, where the user has chosen an algorithm for a gradient.

gx, gw, gb = convolution_backward(...)  ->  gx = ai3::conv2d_grad_input(...), and what is left of the three by torch
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch.fx import Graph, Node

from .. import registry
from ..ops import GRADIENTS
from ..ops.conv2d_gradients import Gradient, is_channels_last
from ..options import Policy
from ..selection import OpSpec
from .context import Context, replace, set_value
from .select import decide

log = logging.getLogger(__name__)
aten = torch.ops.aten

_MASK = 10  # the position of output_mask among the arguments
_BIAS = 2  # and of the gradient of the bias among the outputs


def asked_for(policy: Policy) -> list[str]:
    """The gradients that are not left to torch by default: without a choice nothing is built, and nothing changes."""
    return [
        name
        for name, operation in GRADIENTS.items()
        if not policy.is_default(name) or registry.default_of(name) != operation.default
    ]


def run(graph: Graph, context: Context) -> None:
    nodes = [n for n in graph.find_nodes(op="call_function", target=aten.convolution_backward.default) if _is_conv2d(n)]
    found: list[tuple[Node, Node, OpSpec]] = []
    for node in nodes:
        results = {user.args[1]: user for user in node.users}
        for name in asked_for(context.policy):
            if (result := results.get(GRADIENTS[name].output)) is not None:
                found.append((node, result, GRADIENTS[name].spec_at(node, result)))
    registry.prepare({(spec.operation, spec.device) for _, _, spec in found})
    for name in GRADIENTS:
        if specs := [spec for _, _, spec in found if spec.operation == name]:
            context.policy.selectors[name].check_count(specs)
    seen: Counter[str] = Counter()
    taken: list[Node] = []
    for node, result, spec in found:
        decision = decide(context, seen[spec.operation], spec, node)
        seen[spec.operation] += 1
        context.report.add(decision, result)
        log.debug("%s", context.report.rows[-1])
        if decision.chosen.platform != "torch":
            assert isinstance(decision.chosen, registry.Algorithm)
            new = _emit(GRADIENTS[spec.operation], node, result, spec, decision.chosen)
            context.report.rename(result, new)
            context.algorithms[decision.chosen.id] = decision.chosen
            replace(result, new)
            taken.append(node)
    for node in dict.fromkeys(taken):
        _reduce(node)


def _is_conv2d(node: Node) -> bool:
    grad, input, weight, *_ = node.args
    transposed = node.args[7]
    return not transposed and all(value.meta["val"].dim() == 4 for value in (grad, input, weight))  # type: ignore[union-attr]


def _emit(operation: Gradient, node: Node, result: Node, spec: OpSpec, algorithm: registry.Algorithm) -> Node:
    grad, input, weight = node.args[:3]
    assert isinstance(input, Node)
    graph, attributes = node.graph, dict(spec.attributes)
    with graph.inserting_before(node):
        operands = (input, grad)
        if operation.output == 0:
            operands, attributes["image_size"] = (grad, weight), (_size(input, 2), _size(input, 3))  # type: ignore[assignment]
        args, kwargs = operation.arguments(*operands, None, attributes, algorithm.id, False)
        # The result lies as torch's would: what comes after counts on it.
        kwargs["channels_last"] = is_channels_last(result.meta["val"])
        return graph.call_function(operation.overload_for(algorithm), args, kwargs)


def _size(node: Node, dim: int) -> int | Node:
    """A size of a node's value; where it changes with the input, the node that gives it."""
    size = node.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    made = node.graph.call_function(aten.sym_size.int, (node, dim))
    made.meta["val"] = size
    return made


def _reduce(node: Node) -> None:
    """Leaves to torch what nothing else computes."""
    results = {user.args[1]: user for user in node.users}
    bias = results.get(_BIAS)
    if set(results) == {_BIAS} and bias is not None:
        with node.graph.inserting_before(node):
            total = node.graph.call_function(aten.sum.dim_IntList, (node.args[0], [0, 2, 3]))
        replace(bias, total)
    if node.users:
        mask = [output in results for output in range(3)]
        node.args = (*node.args[:_MASK], mask)
        set_value(node)
    else:
        node.graph.erase_node(node)
