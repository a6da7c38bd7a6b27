"""A compiled graph as one CUDA graph of ai3's own: captured at its second call, replayed from then on.

Inductor's own CUDA graphs keep track of results that live on from one graph into another, which takes a CPU as long as
a small network takes a GPU, and copy an image by a kernel for many tensors (15 us for 3 MB on an H100). Here inputs
that lie where an earlier call's lay are read there, by a graph captured for that place; others are copied into memory
of the graph's. A call replays, and gives copies of the results, which no later call overwrites.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.fx import Graph

# Bytes of results, above which copying them would cost more than the bookkeeping that it saves.
_MOST_RESULTS = 1 << 20
_KEPT_APART = ("non_alias", "unsafe_view_alias")
# Graphs of one stream that read inputs where they lie, and the last calls among which a place is looked for.
_MOST_IN_PLACE, _REMEMBERED = 4, 8
# Bytes that addresses are a multiple of where no kernel is chosen by them.
_ALIGNED = 16


def obstacle(graph: Graph, metadata: Any) -> str | None:
    """Why a graph in inference is left to Inductor's CUDA graphs; None where it is not. `metadata` is AOTAutograd's."""
    if metadata is None:
        return "nothing is known of its inputs and results"
    if any(info.mutates_data or info.mutates_metadata for info in metadata.input_info):
        return "it writes to its inputs"
    if any(info.output_type.name not in _KEPT_APART for info in metadata.output_info):
        return "its results share memory with others"
    values = [node.meta.get("val") for node in graph.nodes if node.op != "output"]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len({tensor.device for tensor in tensors}) != 1 or not tensors[0].is_cuda:
        return "it is not on one GPU alone"
    if any(isinstance(value, torch.SymInt) for value in values) or any(map(_is_symbolic, tensors)):
        return "its sizes change"
    if get_first_incompatible_cudagraph_node(graph.owning_module) is not None:  # type: ignore[arg-type]
        return "an operation of it cannot be captured"
    if any(0 in t.stride() and t.numel() > 0 for t in (n.meta["val"] for n in graph.find_nodes(op="placeholder"))):
        return "an input of it has elements that share memory"
    results = [node.meta["val"] for node in graph.output_node().all_input_nodes]
    if not all(isinstance(value, torch.Tensor) for value in results):
        return "a result is no tensor"
    if sum(value.numel() * value.element_size() for value in results) > _MOST_RESULTS:
        return "its results are large"
    return None


def _is_symbolic(tensor: torch.Tensor) -> bool:
    return not all(isinstance(size, int) for size in (*tensor.shape, *tensor.stride()))


class _Memory:
    """The memory of the graphs that replay on one stream: one after the other, and nothing lives on in it."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.lock = threading.Lock()


_memories: WeakValueDictionary[tuple[int, int], _Memory] = WeakValueDictionary()
_one_capture = threading.Lock()  # at a time in a process, as PyTorch asks for


def _memory(place: tuple[int, int]) -> _Memory:
    memory = _memories.get(place)
    if memory is None:
        memory = _memories[place] = _Memory()
    return memory


class Captured:
    """What `run` computes, whose inputs of the indices `static` stay where they are until forget() is called.

    CUDA graphs for each stream it is called on. Calls on one stream from several threads wait for each other.
    """

    def __init__(self, run: Callable[..., Sequence[Any]], static: Sequence[int], device: int) -> None:
        self._run, self._static, self._device = run, frozenset(static), device
        self._graphs: dict[int, _Graphs] = {}
        """By stream."""
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        if torch.cuda.current_device() == self._device:
            return self._on_its_device(arguments)
        with torch.cuda.device(self._device):
            return self._on_its_device(arguments)

    def _on_its_device(self, arguments: Sequence[Any]) -> Sequence[Any]:
        if torch.cuda.is_current_stream_capturing():
            return self._run(*arguments)
        stream = torch.cuda.current_stream().cuda_stream
        with self._lock:
            graphs = self._graphs.get(stream)
            if graphs is None:
                # Whatever is loaded or planned at a first call is there at the second.
                self._graphs[stream] = _Graphs(self._run, arguments, self._static, _memory((self._device, stream)))
                return self._run(*arguments)
            replay = graphs.of(arguments)
        return replay(arguments)

    def forget(self) -> None:
        """To be called where an input that stays where it is lies elsewhere."""
        with self._lock:
            self._graphs.clear()


class _Graphs:
    """The graphs of one stream, after a first call with `arguments`: one copies its inputs, but those of the indices
    `static`; and some read them where they lie, for inputs of addresses that were seen before.

    Loops that load a batch while the last one is still there alternate between two such places.
    """

    def __init__(
        self, run: Callable[..., Sequence[Any]], arguments: Sequence[Any], static: frozenset[int], memory: _Memory
    ) -> None:
        self._run, self._memory = run, memory
        self._moving = [i for i, a in enumerate(arguments) if i not in static and isinstance(a, torch.Tensor)]
        self._seen = deque([self._addresses(arguments)], maxlen=_REMEMBERED)
        self._in_place: dict[tuple[int, ...], _Replay] = {}
        self._copying: _Replay | None = None

    def _addresses(self, arguments: Sequence[Any]) -> tuple[int, ...]:
        return tuple([arguments[index].data_ptr() for index in self._moving])

    def of(self, arguments: Sequence[Any]) -> _Replay:
        """The one to replay for these arguments, captured now if it is not there."""
        addresses = self._addresses(arguments)
        found = self._in_place.get(addresses)
        if found is not None:
            return found
        is_aligned = not any(address % _ALIGNED for address in addresses)
        if is_aligned and addresses in self._seen and len(self._in_place) < _MOST_IN_PLACE:
            replay = self._in_place[addresses] = self._capture(arguments, copied=())
            return replay
        self._seen.append(addresses)
        if self._copying is None:
            self._copying = self._capture(arguments, copied=self._moving)
        return self._copying

    def _capture(self, arguments: Sequence[Any], copied: Sequence[int]) -> _Replay:
        with _one_capture:
            return _Replay(self._run, arguments, self._moving, copied, self._memory)


class _Replay:
    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        arguments: Sequence[Any],
        moving: Iterable[int],
        copied: Iterable[int],
        memory: _Memory,
    ) -> None:
        self._memory, self._copies = memory, []
        inputs = list(arguments)
        with torch.inference_mode(False):  # inference tensors could be written to in that mode alone
            for index in copied:
                given = arguments[index]
                copy = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
                inputs[index] = copy.copy_(given)
                self._copies.append((index, copy))
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(self._graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
            self._results = run(*inputs)
        # Held, as the graph reads them; a caller's own is there at each call, and free to go in between.
        callers = frozenset(moving)
        self._held = [given for index, given in enumerate(inputs) if index not in callers]

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        with self._memory.lock:
            for index, copy in self._copies:
                copy.copy_(arguments[index])
            self._graph.replay()
            return [result.clone() if isinstance(result, torch.Tensor) else result for result in self._results]
