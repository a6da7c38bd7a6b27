"""sequence: neighbouring operations of ai3 become one call, as Python and the dispatcher take as long as a small layer.

    y = conv2d(x, v); z = relu(y)  ->  z, = sequence("conv2d 2 t0 t1 ...;relu 3 t2 ...;return 3", [x, v])

Runs last. kernels/core/sequence.cpp says what the program looks like, and runs it; `fake` here finds the shapes.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import registry
from ..ops import GRADIENTS, OPERATIONS
from ..ops.conv2d import Conv2d
from .context import Context, algorithm_of, is_ai3, set_value

aten = torch.ops.aten
OP_NAME = "ai3::sequence"
_INTO = {operation.into_name for operation in OPERATIONS.values() if operation.into_name}
_NAMES = {operation.op_name for name, operation in OPERATIONS.items() if name not in GRADIENTS} | _INTO
_NAMES.add(Conv2d.pooled_name)
# Operations of torch's that stand between ai3's, as in squeeze and excitation.
_TORCH = {aten.mul.Tensor: "mul", aten.view.default: "view"}


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    images = {node for node in graph.find_nodes(op="call_function", target=aten.empty_strided.default) if _image(node)}
    while True:
        runs = list(_runs(graph, images))
        # A sequence writes into none of its inputs: an image belongs to where all is that writes into it.
        parted = {image for image in images if not any(_is_whole(image, set(nodes)) for nodes in runs)}
        if not parted:
            break
        images -= parted
    for nodes in runs:
        if sum(is_ai3(node) for node in nodes) > 1:
            _join(graph, nodes, context)


def _runs(graph: Graph, images: set[Node]) -> Iterator[list[Node]]:
    """The nodes that a sequence can have, in runs that no other node must come between."""
    nodes: list[Node] = []
    for node in list(graph.nodes):
        if _fits(node, set(nodes), images):
            nodes.append(node)
        elif _is_pure(node) and not set(nodes) & set(node.all_input_nodes):
            if nodes:
                nodes[0].prepend(node)
        else:
            if nodes:
                yield nodes
            nodes = []
    if nodes:
        yield nodes


def _fits(node: Node, before: set[Node], images: set[Node]) -> bool:
    if node in images:
        return True
    if node.target is aten.slice.Tensor:
        from_image = node.args[0] in before and node.args[0] in images
        return from_image and bool(node.users) and all(is_ai3(user, *_NAMES) for user in node.users)
    if node.target is aten.sym_size.int:
        return bool(node.users) and set(node.users) <= images
    if node.target in _TORCH:
        return _joins(node, before)
    if node.target is aten.clone.default:
        return _lays_out(node)
    if not is_ai3(node, *_NAMES) or node.target._overloadname != "default":  # type: ignore[union-attr]
        return False
    if is_ai3(node, *_INTO) and not (node.args[0] in before and node.args[0] in images):
        return False
    return all(
        isinstance(value, (int, float, bool, type(None)))
        or (isinstance(value, Node) and isinstance(value.meta["val"], torch.Tensor))
        for _, value in _arguments(node)
    )


def _joins(node: Node, before: set[Node]) -> bool:
    """Whether an operation of torch's has only operations of ai3's, or such as itself, on both sides."""
    inputs = [value for value in node.args if isinstance(value, Node)]
    if node.kwargs or not before.issuperset(inputs):
        return False
    if not all(is_ai3(user, *_NAMES) or user.target is aten.view.default for user in node.users):
        return False
    if node.target is aten.view.default:
        # No two of the results may share memory, and one size at most is left to be found.
        sizes: Any = node.args[1]
        unknown = sum(not isinstance(size, int) or size == -1 for size in sizes)
        return len(inputs[0].users) == 1 and unknown <= 1
    return len(inputs) == 2 and len({value.meta["val"].dtype for value in inputs}) == 1


def _lays_out(node: Node) -> bool:
    """Whether this is the copy of an image that an operation of ai3's wants in channels_last."""
    value = node.all_input_nodes[0].meta["val"]
    return (
        node.kwargs.get("memory_format") is torch.channels_last
        and value.dim() == 4
        and bool(node.users)
        and all(is_ai3(user, *_NAMES) for user in node.users)
    )


def _is_pure(node: Node) -> bool:
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable


def _image(node: Node) -> tuple[Node, int, tuple[int, ...]] | None:
    """What to make an empty channels_last image from: a tensor of the same batch, the batch where it is fixed (else
    -1), and channels, height and width. None where the node makes something else."""
    value, order = node.meta["val"], list(node.graph.nodes)
    writers = [user for user in node.users if is_ai3(user, *_INTO) and user.args[0] is node]
    if not writers or value.dim() != 4 or not value.is_contiguous(memory_format=torch.channels_last):
        return None
    like = min(writers, key=order.index).args[2]
    assert isinstance(like, Node) and isinstance(node.args[0], Sequence)
    batch, *given = node.args[0]
    rest = tuple(size for size in given if isinstance(size, int))
    if len(rest) < 3:
        return None
    if isinstance(batch, int):
        return like, batch, rest
    return (like, -1, rest) if isinstance(batch, Node) and batch.args == (like, 0) else None


def _is_whole(image: Node, nodes: set[Node]) -> bool:
    """Whether a sequence has all that it needs to make the image, and none of its slices is wanted outside."""
    slices = {node for node in image.users if node.target is aten.slice.Tensor} & nodes
    return _needed_by(image) <= nodes and all(nodes.issuperset(node.users) for node in slices)


def _needed_by(image: Node) -> set[Node]:
    """What must be in a sequence together: the image, its size, and whatever writes into it."""
    writers = {user for user in image.users if is_ai3(user, *_INTO) and user.args[0] is image}
    views = {user for user in image.users if user.target is aten.slice.Tensor}
    copies = {user for view in views for user in view.users if user.target is aten.copy_.default}
    return {image, *writers, *copies, *(size for size in image.all_input_nodes)}


def _arguments(node: Node, operation: Any = None, **others: Any) -> Iterator[tuple[Any, Any]]:
    """Every argument of an operation with its type in the schema, defaults too; or of another operation whose
    arguments are those of the node and `others`."""
    own: Any = node.target
    names = (argument.name for argument in own._schema.arguments)
    given = {**dict(zip(names, node.args)), **node.kwargs, **others}
    for argument in (operation or own)._schema.arguments:
        yield argument.type, given.get(argument.name, argument.default_value)


def _overwritten(node: Node, nodes: Sequence[Node], context: Context) -> Node | None:
    """The residual of a convolution where the result can take its place: computed in the sequence, and read by nothing
    else from here on. A second image of its size would not stay in the caches."""
    residual = node.kwargs.get("residual")
    if not (is_ai3(node, "ai3::conv2d") and isinstance(residual, Node) and node.kwargs.get("channels_last")):
        return None
    algorithm = context.algorithms[algorithm_of(node)]
    old, new = residual.meta["val"], node.meta["val"]
    so_far = nodes[: nodes.index(node) + 1]
    fits = (
        registry.platforms()[algorithm.platform].adds_in_place(algorithm)
        and residual in so_far
        and node.kwargs.get("prologue_mean") is None  # conv2d_into has none
        and (is_ai3(residual) or residual.target is aten.mul.Tensor)
        and not any(is_ai3(user, *_INTO) and user.args[0] is residual for user in residual.users)
        and all(user in so_far and user.target is not aten.view.default for user in residual.users)
        and list(_tensors(node)).count(residual) == 1
        and old.dim() == 4
        and old.is_contiguous(memory_format=torch.channels_last)
        and old.shape == new.shape
        and old.stride() == new.stride()
    )
    return residual if fits else None


def _tensors(node: Node) -> Iterator[Node]:
    return (value for _, value in _arguments(node) if isinstance(value, Node))


def _join(graph: Graph, nodes: list[Node], context: Context) -> None:
    """Puts one call in the place of the nodes."""
    inside = set(nodes)
    reads = (node for node in nodes if is_ai3(node) or node.target is aten.clone.default)
    inputs = list(dict.fromkeys(n for node in reads for n in node.all_input_nodes if n not in inside))
    numbers = {node: index for index, node in enumerate(inputs)}
    lines = []
    for node in nodes:
        if node.target is aten.sym_size.int:
            continue
        operation: Any = node.target
        if operation is aten.empty_strided.default:
            image = _image(node)
            assert image is not None
            like, batch, rest = image
            name, words = "image", [f"t{numbers[like]}", *(f"i{size}" for size in (batch, *rest))]
        elif node.target is aten.slice.Tensor:
            source, _, begin, end = node.args
            assert isinstance(source, Node)
            name, words = "part", [f"t{numbers[source]}", f"i{begin}", f"i{end}"]
        elif operation is aten.view.default:
            base, sizes = node.args
            unknown = (size if isinstance(size, int) else -1 for size in sizes)  # type: ignore[union-attr]
            name, words = "view", [f"t{numbers[base]}", *(f"i{size}" for size in unknown)]  # type: ignore[index]
        elif operation is aten.clone.default:
            name, words = "channels_last", [f"t{numbers[node.all_input_nodes[0]]}"]
        elif residual := _overwritten(node, nodes, context):
            name, numbers[node] = "conv2d_into", numbers[residual]
            given = _arguments(node, torch.ops.ai3.conv2d_into.default, output=residual, channel=0, adds=True)
            words = [_word(kind, value, numbers) for kind, value in given]
        else:
            name = _TORCH.get(operation) or operation._schema.name.removeprefix("ai3::")
            words = [_word(kind, value, numbers) for kind, value in _arguments(node)]
        result = "-"
        if not name.endswith("_into"):
            result = str(numbers.setdefault(node, len(numbers)))
        lines.append(" ".join([name, result, *words]))
    results = [node for node in nodes if node in numbers and not inside.issuperset(node.users)]
    lines.append(" ".join(["return", *(str(numbers[node]) for node in results)]))
    with graph.inserting_after(nodes[-1]):
        call = graph.call_function(torch.ops.ai3.sequence.default, (";".join(lines), inputs))
    set_value(call)
    last = call
    for index, node in enumerate(results):
        with graph.inserting_after(last):
            last = item = graph.call_function(operator.getitem, (call, index))
        item.meta = dict(node.meta)
        set_value(item)
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)


def _word(kind: Any, value: Any, numbers: dict[Node, int]) -> str:
    name = str(kind)
    if isinstance(value, Node):
        return f"{'o' if name.startswith('Optional') else 't'}{numbers[value]}"
    if value is None:
        return "n"
    if name == "bool":
        return f"b{int(value)}"
    if name == "float":
        return f"d{struct.unpack('=Q', struct.pack('=d', value))[0]}"  # its bits: nothing is lost
    assert name == "int", name
    return f"i{int(value)}"


def _read(word: str, values: dict[int, torch.Tensor]) -> Any:
    """What `_word` wrote."""
    kind, rest = word[0], word[1:]
    if kind in "to":
        return values[int(rest)]
    if kind == "d":
        return struct.unpack("=d", struct.pack("=Q", int(rest)))[0]
    return {"n": lambda: None, "b": lambda: rest == "1", "i": lambda: int(rest)}[kind]()


def fake(program: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a sequence without their data."""
    values = dict(enumerate(tensors))
    *lines, last = program.split(";")
    for line in lines:
        name, result, *words = line.split(" ")
        arguments = [_read(word, values) for word in words]
        made = _MADE[name](*arguments) if name in _MADE else getattr(torch.ops.ai3, name).default(*arguments)
        if result != "-":
            values[int(result)] = made
    return [values[int(number)] for number in last.split(" ")[1:]]


def _empty(like: torch.Tensor, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    sizes = (like.shape[0] if batch < 0 else batch, channels, height, width)
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


_MADE: dict[str, Callable[..., torch.Tensor]] = {
    "image": _empty,
    "part": lambda image, begin, end: image[:, begin:end],
    "mul": torch.mul,
    "channels_last": lambda image: image.clone(memory_format=torch.channels_last),
    "view": lambda base, *sizes: base.view(sizes),
}
