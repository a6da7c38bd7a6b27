"""Attention in ATen graphs: PyTorch's fused operations, and the products and softmax that it is written out as.

Written out it is bmm(softmax(scale * bmm(q, k^T) + terms), v), with views and copies between any two of these, and
scales on q, k or their product.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default

# Fused: by operation, whether the result is the first of several.
FUSED = {
    aten.scaled_dot_product_attention.default: False,
    aten._scaled_dot_product_flash_attention_for_cpu.default: True,
    # On GPUs; those with a bias differ in what a row without a finite score gives.
    aten._scaled_dot_product_flash_attention.default: True,
    aten._scaled_dot_product_efficient_attention.default: True,
    aten._scaled_dot_product_cudnn_attention.default: True,
}
# What changes neither the values nor the last two dimensions, where it leaves their sizes as they are.
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_NEUTRAL = (*_RESHAPES, aten.clone.default, aten.expand.default, aten.alias.default)
_MAX_TERMS = 2


@dataclass
class Operand:
    """A tensor of the pattern, and the shape that attention takes it in."""

    node: Node
    shape: tuple[Any, ...]
    swapped: bool = False
    """Whether the node has its last two dimensions the other way round."""


@dataclass
class Found:
    """An attention in a graph; `root` is the node whose value it is."""

    root: Node
    query: Operand
    key: Operand
    value: Operand
    terms: tuple[Operand | None, Operand | None]
    """Bias and mask: what is added to the scores."""
    scale: float
    is_causal: bool
    masked_is_zero: bool
    """Whether a row without a finite score gives zeros, as PyTorch's fused operations do, or NaN, as softmax does."""


def find(node: Node) -> Found | None:
    """The attention that ends at this node, or None; one whose inner values are used elsewhere is none."""
    found = _fused(node) or _written_out(node)
    if found is None:
        return None
    values = [operand.node.meta["val"] for operand in (found.query, found.key, found.value, *found.terms) if operand]
    if any(value.dtype != values[0].dtype or value.device != values[0].device for value in values):
        return None
    return found if all(_can_reshape(before, after) for before, after in _shapes_around(found)) else None


def _shapes_around(found: Found) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """What `emit` reshapes, and to what."""
    for operand in (found.query, found.key, found.value, *found.terms):
        if operand is not None:
            shape = _shape(operand.node)
            yield _swapped(shape, -2, -1) if operand.swapped else shape, operand.shape
    yield (*found.query.shape[:-1], found.value.shape[-1]), _shape(_before_copy(found.root))


def _can_reshape(before: Sequence[Any], after: Sequence[Any]) -> bool:
    # The graph has no nodes for sizes that come of others here.
    return _same_shape(before, after) or all(isinstance(size, int) for size in after)


def emit(found: Found, overload: torch._ops.OpOverload, algorithm: int) -> Node:
    """Inserts ai3's operation before the root, and what gives its value the root's shape and strides."""
    from ..passes.context import set_value

    graph, root = found.root.graph, found.root

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        set_value(node)
        return node

    def exchanged(node: Node, first: int, second: int) -> Node:
        # As a permutation: Inductor lowers no transpose.
        return call(aten.permute.default, node, _swapped(range(node.meta["val"].dim()), first, second))

    def taken(operand: Operand | None) -> Node | None:
        if operand is None:
            return None
        node = operand.node
        if operand.swapped:
            node = exchanged(node, -2, -1)
        return node if _same_shape(_shape(node), operand.shape) else call(aten.reshape.default, node, operand.shape)

    with graph.inserting_before(root):
        tensors = [taken(operand) for operand in (found.query, found.key, found.value, *found.terms)]
        node = call(overload, *tensors, found.scale, found.is_causal, found.masked_is_zero, algorithm)
        wanted = root.meta["val"]
        if root.target is aten.clone.default:
            # The copy that brought the heads of a query together: the operation's own memory has them so.
            node = _of_shape(node, _swapped(wanted.shape, -3, -2), call)
            node = exchanged(node, -3, -2)
        else:
            node = _of_shape(node, wanted.shape, call)
        if _strides(node.meta["val"]) != _strides(wanted):
            # What follows may view its memory as it would have been.
            order = sorted(range(wanted.dim()), key=lambda d: _assumed(wanted.stride(d)), reverse=True)
            node = call(aten.permute.default, node, order)
            node = call(aten.clone.default, node, memory_format=torch.contiguous_format)
            node = call(aten.permute.default, node, [order.index(d) for d in range(wanted.dim())])
    return node


def _strides(value: torch.Tensor) -> list[int]:
    """Those that matter: not of dimensions that always have one element."""
    return [_assumed(stride) for stride, size in zip(value.stride(), value.shape) if _assumed(size) != 1]


def _assumed(size: int | torch.SymInt) -> int:
    """A size, with some number above 1 for each that is not known."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: 64 for symbol in expression.free_symbols}))


def is_impure(node: Node) -> bool:
    """Whether a node must run although nothing reads it.

    Unlike `Node.is_impure`, not PyTorch's attention: it counts as random for its dropout, and would run beside ai3's.
    """
    return node.is_impure() and node.target not in FUSED


def _of_shape(node: Node, shape: Sequence[Any], call: Any) -> Node:
    return node if _same_shape(_shape(node), shape) else call(aten.reshape.default, node, tuple(shape))


def _fused(node: Node) -> Found | None:
    source = node
    if node.target is operator.getitem:
        source, index = node.args  # type: ignore[assignment]
        if index != 0 or any(user is not node and user.users for user in source.users):
            return None
    if source.target not in FUSED or FUSED[source.target] != (source is not node):
        return None
    names = [argument.name for argument in source.target._schema.arguments]
    given = {**dict(zip(names, source.args)), **source.kwargs}
    query, key, value = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    if given.get("attn_bias") is not None or given.get("return_debug_mask"):
        return None
    if given.get("dropout_p") or given.get("enable_gqa") or not all(isinstance(n, Node) for n in (query, key, value)):
        return None
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    shapes = [_shape(n) for n in (query, key, value)]
    leading, depth, keys = shapes[0][:-2], shapes[0][-1], shapes[1][-2]
    if not all(_same_shape(shape[:-2], leading) for shape in shapes):
        return None
    term = None
    if mask is not None:
        assert isinstance(mask, Node)
        shape = _shape(mask)
        if not shape or len(shape) > len(shapes[0]) or not _same(shape[-1], keys):
            return None
        term = Operand(mask, shape)
    scale = given.get("scale")
    if scale is None and not isinstance(depth, int):
        return None
    return Found(
        root=node,
        query=Operand(query, shapes[0]),
        key=Operand(key, shapes[1]),
        value=Operand(value, shapes[2]),
        terms=(None, term),
        scale=1 / math.sqrt(depth) if scale is None else float(scale),  # type: ignore[arg-type]
        is_causal=bool(given.get("is_causal")),
        masked_is_zero=True,
    )


def _written_out(root: Node) -> Found | None:
    product = _product_before(root)
    if product is None or _root_of(product) is not root:
        return None
    weights, value = product.args
    assert isinstance(weights, Node) and isinstance(value, Node)
    inside = set(_from_product(root, product))
    node = _skip_neutral(weights, inside)
    softmax = _softmax(node)
    if softmax is None:
        return None
    scores, nodes = softmax
    inside |= nodes
    path = _scores(scores)
    if path is None:
        return None
    inside |= path.nodes | {root}
    if any(user not in inside for node in inside - {root} for user in node.users):
        return None
    query, key = path.product.args
    assert isinstance(query, Node) and isinstance(key, Node)
    q, q_scale = _operand(query)
    k, k_scale = _operand(key)
    v, _ = _operand(value, scales=False)
    if _swaps_last(k):
        assert isinstance(k.args[0], Node)
        k, more = _operand(k.args[0])
        k_scale *= more
        swapped = False
    else:
        swapped = True
    shapes = [_shape(q), _swapped(_shape(k), -2, -1) if swapped else _shape(k), _shape(v)]
    leads = [shape[:-2] for _, shape in path.terms]
    shape = _shape(_before_copy(root))
    lead = max([shape[:-2], *leads], key=len)
    operands = [_refined(shape, shape[:-2], lead) for shape in shapes]
    terms = [_refined(_padded(_shape(t), len(at)), at[:-2], lead) for t, at in path.terms]
    if None in operands or None in terms or len(terms) > _MAX_TERMS:
        return None
    keys = shapes[1][-2]
    if any(not _same(_shape(t)[-1], keys) for t, _ in path.terms):
        return None
    added: list[Operand | None] = [
        Operand(t, _shape(t) if shape is None or len(lead) == len(at) - 2 else shape)
        for (t, at), shape in zip(path.terms, terms)
    ]
    added += [None] * (_MAX_TERMS - len(added))
    taken = [shape for shape in operands if shape is not None]
    return Found(
        root=root,
        query=Operand(q, taken[0]),
        key=Operand(k, taken[1], swapped),
        value=Operand(v, taken[2]),
        terms=(added[0], added[1]),
        scale=path.scale * q_scale * k_scale,
        is_causal=False,
        masked_is_zero=False,
    )


def _product_before(root: Node) -> Node | None:
    """The product with the values that may have this root."""
    steps: list[Any] = {aten.clone.default: [_swaps_heads, _reshapes]}.get(root.target, [])  # type: ignore[call-overload]
    node: Any = root
    if steps:
        for step in steps:
            node = node.args[0]
            if not isinstance(node, Node) or not step(node):
                return None
        node = node.args[0]
    elif _reshapes(root):
        node = root.args[0]
    return node if isinstance(node, Node) and node.target is aten.bmm.default else None


def _root_of(product: Node) -> Node:
    """The last node of what follows the product and does no more than to lay its values out."""
    reshaped = _only_user(product)
    if reshaped is None or not _reshapes(reshaped) or not _same_shape(_shape(reshaped)[-2:], _shape(product)[-2:]):
        return product
    swapped = _only_user(reshaped)
    copied = None if swapped is None or not _swaps_heads(swapped) else _only_user(swapped)
    if copied is None or copied.target is not aten.clone.default or not copied.meta["val"].is_contiguous():
        return reshaped
    return copied


def _from_product(root: Node, product: Node) -> Iterator[Node]:
    """The root and the nodes before it, up to the product."""
    node = root
    while node is not product:
        yield node
        node = node.args[0]  # type: ignore[assignment]
    yield product


def _before_copy(root: Node) -> Node:
    """The root in the order of dimensions of the product."""
    if root.target is not aten.clone.default:
        return root
    swapped = root.args[0]
    assert isinstance(swapped, Node) and isinstance(swapped.args[0], Node)
    return swapped.args[0]


def _softmax(node: Node) -> tuple[Node, set[Node]] | None:
    """What the softmax over the last dimension is of, and its nodes, whole or as Inductor takes it apart: of halves in
    float32."""
    if not _is(node, _CONVERT):
        return _softmax_of_its_type(node)
    widened = node.args[0]
    found = _softmax_of_its_type(widened) if isinstance(widened, Node) else None
    if found is None or not _is(found[0], _CONVERT) or found[0].meta["val"].dtype != torch.float32:
        return None
    source = found[0].args[0]
    assert isinstance(source, Node)
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return source, found[1] | {node, found[0]}


def _softmax_of_its_type(node: Node) -> tuple[Node, set[Node]] | None:
    if node.target is aten._softmax.default:
        source, dim, to_float = node.args
        assert isinstance(source, Node)
        return (source, {node}) if _is_last(dim, source) and not to_float else None
    if node.target is not aten.div.Tensor or node.kwargs:
        return None
    power, total = node.args
    if not (_is(power, aten.exp.default) and _is(total, aten.sum.dim_IntList)):
        return None
    shifted = power.args[0]
    if total.args[0] is not power or not _reduces_last(total) or not _is(shifted, aten.sub.Tensor) or shifted.kwargs:
        return None
    source, largest = shifted.args
    if not _is(largest, aten.amax.default) or largest.args[0] is not source or not _reduces_last(largest):
        return None
    assert isinstance(source, Node)
    return source, {node, power, total, shifted, largest}


def _is(node: Any, target: Any) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.target is target


def _is_last(dim: Any, source: Node) -> bool:
    return dim in (-1, source.meta["val"].dim() - 1)


def _reduces_last(node: Node) -> bool:
    dims, keeps = (*node.args[1:], False)[:2]
    return (
        not node.kwargs
        and isinstance(dims, (list, tuple))
        and len(dims) == 1
        and _is_last(dims[0], node)
        and keeps is True
    )


@dataclass
class _Path:
    """scale * product + terms; each term with the shape of what it was added to."""

    product: Node
    scale: float = 1.0
    terms: list[tuple[Node, tuple[Any, ...]]] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)


def _scores(node: Any) -> _Path | None:
    if not isinstance(node, Node):
        return None
    path = None
    if node.target is aten.bmm.default:
        path = _Path(node)
    elif _is_neutral(node):
        path = _scores(node.args[0])
    elif (number := _number(node)) is not None:
        path = _scores(node.args[0])
        if path is not None and path.terms:
            return None
        if path is not None:
            path.scale *= number
    elif node.target is aten.add.Tensor and not node.kwargs:
        for scores, term in (node.args, reversed(node.args)):
            path = _scores(scores)
            if path is not None and isinstance(term, Node) and _same_shape(_shape(scores), _shape(node)):  # type: ignore[arg-type]
                path.terms.append((term, _shape(node)))
                break
            path = None
    if path is not None:
        path.nodes.add(node)
    return path


def _number(node: Node) -> float | None:
    """What the node multiplies its first argument by, where it is one number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) or node.kwargs:
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or number == 0:
        return None
    return float(number) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / number


def _operand(node: Node, scales: bool = True) -> tuple[Node, float]:
    """The tensor behind views, copies and, if wanted, scales, and the product of the scales."""
    scale = 1.0
    while True:
        number = _number(node) if scales else None
        if number is None and not _is_neutral(node):
            return node, scale
        scale *= 1.0 if number is None else number
        node = node.args[0]  # type: ignore[assignment]


def _skip_neutral(node: Node, passed: set[Node]) -> Node:
    while _is_neutral(node):
        passed.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_neutral(node: Node) -> bool:
    if node.target not in _NEUTRAL or not isinstance(node.args[0], Node):
        return False
    before, after = _shape(node.args[0]), _shape(node)
    if node.target is aten.expand.default:
        return _same_shape(before, after)
    return len(before) > 2 and len(after) > 2 and _same_shape(before[-2:], after[-2:])


def _reshapes(node: Node) -> bool:
    return node.target in _RESHAPES


def _swaps(node: Node, first: int, second: int) -> bool:
    """Whether the node exchanges these two dimensions, counted from the last, and no others."""
    rank = node.meta["val"].dim()
    if rank < -min(first, second):
        return False
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]] == order  # type: ignore[union-attr]
    if node.target is aten.transpose.int:
        return {dim % rank for dim in node.args[1:]} == {first % rank, second % rank}
    return False


def _swaps_last(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and _swaps(node, -2, -1)


def _swaps_heads(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and _swaps(node, -3, -2)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _swapped(shape: Sequence[Any], first: int, second: int) -> tuple[Any, ...]:
    sizes = list(shape)
    sizes[first], sizes[second] = sizes[second], sizes[first]
    return tuple(sizes)


def _padded(shape: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    return (*[1] * (rank - len(shape)), *shape)


def _same(a: Any, b: Any) -> bool:
    return a is b or statically_known_true(a == b)


def _same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _refined(shape: tuple[Any, ...], of: Sequence[Any], lead: Sequence[Any]) -> tuple[Any, ...] | None:
    """A shape that broadcasts over the leading sizes `of`, as one that does over `lead`, which split them further.

    None where they do not, or where sizes that are not known would have to be split.
    """
    *leading, rows, columns = shape
    if _same_shape(of, lead):
        return shape
    if not all(isinstance(size, int) for size in (*leading, *of, *lead)):
        return None
    rest: list[Any] = list(lead)
    sizes: list[Any] = []
    for size, whole in zip(leading, of):
        group = rest[:1]
        while math.prod(group) < whole and len(group) < len(rest):
            group = rest[: len(group) + 1]
        if not group or math.prod(group) != whole:
            return None
        sizes += group if size == whole else [1] * len(group)
        rest = rest[len(group) :]
    return None if rest else (*sizes, rows, columns)
