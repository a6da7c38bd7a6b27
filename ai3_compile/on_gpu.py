"""Graphs on GPUs: what happens before each call of one, and once before the first.

A CUDA graph replays kernels on the memory it was captured with. So packed weights are made before it is captured,
outside of its memory, with everything else that is loaded or planned at a first call; and where weights have changed
since the last call, they are packed anew where they lie.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from . import core
from .ops.base import hint

# One operation of a graph: its name, and its arguments: ("input", index of the graph's), ("like", shape, strides,
# dtype) of a tensor between operations, ("value", v). In types that JSON gives back unchanged.
Call = tuple[str, list[list[Any]]]


def is_on_gpu(values: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)


def device_of(values: Iterable[Any]) -> torch.device:
    """The GPU that tensors are on, of which one is."""
    return next(value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda)


def calls_of(graph: Graph, static: Sequence[int]) -> list[Call]:
    """ai3's operations in a graph that read GPU memory, each as a call on its weights, which `static` numbers among
    the graph's inputs, and on tensors like the others as they were captured."""
    placeholders = graph.find_nodes(op="placeholder")
    inputs = {placeholders[index]: index for index in static}
    found: list[Call] = []
    for node in graph.nodes:
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target.namespace == "ai3"):
            continue
        if target._overloadname != "default" or not is_on_gpu(n.meta["val"] for n in node.all_input_nodes):
            continue
        found.append(call_of(node, inputs))
    return found


def call_of(node: Node, inputs: Mapping[Node, int]) -> Call:
    """One of ai3's operations as a call; of `inputs` the graph's own tensors are taken, by their indices."""

    def described(value: Any) -> list[Any]:
        if not isinstance(value, Node):
            return ["value", value]
        if value in inputs:
            return ["input", inputs[value]]
        tensor = value.meta["val"]
        sizes, strides = ([hint(size) for size in given] for given in (tensor.shape, tensor.stride()))
        return ["like", sizes, strides, str(tensor.dtype).removeprefix("torch.")]

    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    given = {**dict(zip((a.name for a in schema.arguments), node.args)), **node.kwargs}
    arguments = [[a.name, *described(given[a.name])] for a in schema.arguments if a.name in given]
    return schema.name.removeprefix("ai3::"), arguments


def _run(call: Call, inputs: Sequence[Any], device: torch.device) -> None:
    """The operation once, on memory that says nothing, but its weights."""
    name, arguments = call

    def value(kind: str, given: Any, *rest: Any) -> Any:
        if kind == "like":
            strides, dtype = rest
            return torch.empty_strided(given, strides, dtype=getattr(torch, dtype), device=device)
        return inputs[given] if kind == "input" else given

    getattr(torch.ops.ai3, name).default(**{argument: value(*described) for argument, *described in arguments})


def _counts_beside(weights: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Of each weight that is a statistic of a batch norm the `num_batches_tracked` beside it; None of others. A graph
    is not told its modules."""
    counts: dict[int, torch.Tensor] = {}
    # Every object of the process is compared with each of them: 0.3 s for all weights of ResNet-50.
    statistics = [weight for weight in weights if weight.dim() == 1 and not isinstance(weight, torch.nn.Parameter)]
    for holder in gc.get_referrers(*statistics) if statistics else ():
        if type(holder) is dict and isinstance(count := holder.get("num_batches_tracked"), torch.Tensor):
            counts.update((id(buffer), count) for buffer in holder.values())
    return [counts.get(id(weight)) for weight in weights]


_ADDRESS, _VERSION = torch.Tensor.data_ptr, operator.attrgetter("_version")


def _versions(weights: Sequence[torch.Tensor]) -> list[int]:
    """-1 of an inference tensor, which has none."""
    try:
        return list(map(_VERSION, weights))
    except RuntimeError:
        return [-1 if weight.is_inference() else weight._version for weight in weights]


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the items of these indices."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda inputs: tuple(inputs[index] for index in indices)


class Guarded:
    """A compiled graph on a GPU, behind what must happen before each of its calls.

    Batch norms in training change their statistics without raising their versions, but for that of the count of
    batches beside them: it is looked at too.

    `constants` are tensors that come before the arguments in the graph's own inputs, `static` says which of these are
    weights; `calls` are its operations, run once before the first call and whenever a weight lies elsewhere; without
    them the packs are made by the operations themselves. `moved` is called where a weight lies elsewhere than before.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        static: Sequence[int],
        *,
        constants: Sequence[torch.Tensor] = (),
        calls: Sequence[Call] = (),
        moved: Callable[[], None] | None = None,
        max_workspace: int | None = None,
    ) -> None:
        self._moved = moved
        self._run, self._constants, self._calls = run, tuple(constants), calls
        self._max_workspace = max_workspace
        self._static = static
        self._pick: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]] | None = None
        self._addresses: list[int] | None = None
        self._versions: list[int] = []
        self._counts: list[torch.Tensor | None] = []
        self._norms: tuple[torch.Tensor, ...] = ()
        self._epoch = -1

    def __call__(self, *arguments: Any) -> Any:
        core.follow_numerics(self._max_workspace)
        self._refresh((*self._constants, *arguments) if self._constants else arguments)
        try:
            return self._run(*arguments)
        except RuntimeError as error:
            raise core.torchs_own(error) from error.__cause__

    def _refresh(self, inputs: Sequence[Any]) -> None:
        """A small network waits for the CPU: where nothing has changed little is asked of each weight."""
        if self._pick is None:
            self._pick = _picker([i for i in self._static if i < len(inputs)])
        weights = self._pick(inputs)
        addresses, epoch = list(map(_ADDRESS, weights)), core.epoch()
        is_elsewhere = addresses != self._addresses
        if is_elsewhere and self._addresses is not None and self._moved is not None:
            self._moved()
        if is_elsewhere:
            self._counts = _counts_beside(weights)
            self._norms = tuple({id(count): count for count in self._counts if count is not None}.values())
        versions = _versions(weights + self._norms)
        if not is_elsewhere and versions == self._versions and epoch == self._epoch:
            return
        # At the first call too: another graph may have packed these weights.
        counted = dict(zip(map(id, self._norms), versions[len(weights) :]))
        core.refresh_packs(addresses, [v + counted.get(id(c), 0) for v, c in zip(versions, self._counts)])
        if self._calls and is_elsewhere and inputs:
            device = device_of(inputs)
            with torch.no_grad():
                for call in self._calls:
                    _run(call, inputs, device)
        self._addresses, self._versions, self._epoch = addresses, versions, epoch
