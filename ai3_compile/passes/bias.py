"""bias: what is added to a product of matrices behind a view of it becomes its bias.

mm(x, w) -> view -> add(bias)   =>   addmm(bias, x, w) -> view

So writes PyTorch a linear of rows that do not lie in order, as in nn.MultiheadAttention.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .axes import VIEWS
from .context import Context, only_user, set_value

aten = torch.ops.aten


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        view = only_user(product)
        added = only_user(view) if view is not None and view.target in VIEWS else None
        if view is None or added is None or added.target is not aten.add.Tensor or added.kwargs:
            continue
        others = [argument for argument in added.args if argument is not view]
        if len(others) == 1 and isinstance(others[0], Node) and _is_bias(others[0], product, view, added):
            _give(product, view, added, others[0])


def _is_bias(bias: Node, product: Node, view: Node, added: Node) -> bool:
    given, made, seen = bias.meta["val"], product.meta["val"], view.meta["val"]
    if not isinstance(given, torch.Tensor) or given.shape != made.shape[1:] or seen.shape[-1:] != made.shape[1:]:
        return False
    same = given.dtype == made.dtype and given.device == made.device
    return same and added.meta["val"].stride() == seen.stride()


def _give(product: Node, view: Node, added: Node, bias: Node) -> None:
    graph = product.graph
    with graph.inserting_before(added):  # the bias may be computed behind the product
        new = graph.call_function(aten.addmm.default, (bias, *product.args))
        new.meta = dict(product.meta)
        set_value(new)
        added.prepend(view)
    product.replace_all_uses_with(new)
    added.replace_all_uses_with(view)
    graph.erase_node(added)
    graph.erase_node(product)
