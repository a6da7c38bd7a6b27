"""One captured graph of a Model: an exported program, ai3's passes over it, and a call."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import core, functional, passes, registry
from .errors import StrictError, UnsupportedCallableError
from .on_gpu import Guarded, is_on_gpu
from .ops import OPERATIONS
from .ops.base import HINTS, module_path
from .options import Policy
from .passes.select import decide
from .report import GraphReport

aten = torch.ops.aten
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# They compute nothing: the copies that restore a layout, and memory that ai3's operations write into.
_MOVES = (
    aten.clone.default,
    aten.permute.default,
    aten.t.default,
    aten._to_copy.default,
    aten.empty_strided.default,
)


def export(network: torch.nn.Module, sample: torch.Tensor, dynamic_batch: bool) -> ExportedProgram:
    """The network's graph of ATen operations for inputs like `sample`, [N, ...] for any N where the batch is dynamic.

    Raises whatever torch.export raises for a network that it cannot capture.
    """
    shapes = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    sample = sample.contiguous()
    if dynamic_batch and sample.shape[0] < 2:
        # A size of 1 would be taken for one that broadcasts.
        sample = torch.cat([sample, sample]) if sample.shape[0] else sample.new_zeros((2, *sample.shape[1:]))
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch of itself
        program = torch.export.export(network, (sample,), dynamic_shapes=shapes, strict=False)
        return program.run_decompositions(_composites())


def same_operations(network: torch.nn.Module, input: torch.Tensor) -> bool:
    """Whether the network runs the same operations on one sample as on two: then it has no branch on a batch of one."""

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def names(count: int) -> list[str] | None:
        sample = input.new_zeros((count, *input.shape[1:]))
        if input.shape[0]:
            sample.copy_(input[:1])
        twin = copy.deepcopy(network)
        with torch.random.fork_rng(devices=()), Record() as record:
            try:
                twin(sample)
            except Exception:  # it takes no such batch: export says more
                return None
        return record.names

    return names(1) == names(2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the pages that torch.export writes of a graph that it cannot capture: the caller says it in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            yield
        sys.stderr.write(written.getvalue())
    finally:
        logging.disable(before)


def why(error: BaseException) -> str:
    """Why an export failed, in a line, with the place in the network's code where it did."""
    text = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    place = next((f for f in reversed(frames) if not f.filename.startswith(ours)), None)
    where = f", at {Path(place.filename).name}:{place.lineno} in {place.name}: {place.line}" if place else ""
    return f"{type(error).__name__}: {text[0] if text else ''}{where}"


def _composites() -> Any:
    """Takes apart what is made of other operations (conv2d, linear), and keeps the rest whole, as eager runs it."""
    table = torch.export.default_decompositions()
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    for op in list(table.keys()):
        if not op.has_kernel_for_dispatch_key(key):
            del table[op]
    table[torch.ops.ai3.run.default] = functional.run_in_graph
    table[aten.linear.default] = _linear
    return table


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One product of matrices: PyTorch's own rule makes a batch of them, each with its copy of the weight, of an image
    of patches that is not contiguous, as attention's is."""
    if input.dim() < 2 or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        product = torch.matmul(input, weight.t())
        return product if bias is None else product + bias
    rows = input.reshape(-1, input.shape[-1])
    product = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product.view(*input.shape[:-1], weight.shape[0])


class Program:
    """An exported program with algorithms chosen for its operations.

    `weights` maps the names of parameters and buffers to tensors, which the program reads at every call. Algorithms are
    chosen for a batch of `batch` images, or for the one that was exported.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        weights: Mapping[str, torch.Tensor],
        policy: Policy,
        *,
        batch: int | None = None,
        strict: bool = False,
    ) -> None:
        if registry.can_choose():
            core.load()
        self.exported, self.batch = exported, batch
        kinds = {spec.kind for spec in exported.graph_signature.output_specs}
        self.writes_input = OutputKind.USER_INPUT_MUTATION in kinds
        self.takes_one = True
        """Whether a dynamic batch may also be 1, which torch.export takes for another thing than many."""
        self.report = GraphReport()
        graph = Graph()
        output = graph.graph_copy(exported.graph, {})
        graph.output(output)
        (copied,) = (node for node in graph.nodes if node.op == "output")
        copied.meta = dict(exported.graph.output_node().meta)
        specs = exported.graph_signature.input_specs
        context = passes.Context(
            policy=policy,
            system=registry.system(),
            report=self.report,
            is_inference=True,
            decompose=False,
            static_inputs=[i for i, spec in enumerate(specs) if spec.kind in _WEIGHTS],
        )
        with _hints(graph, exported, batch):
            left = _left_to_torch(graph, context) if strict else []
            if not left:
                passes.run(graph, context)
                left = _unknown_to_ai3(graph) if strict else []
        if left:
            raise UnsupportedCallableError(
                message="Unsupported callable: strict=True, and ai3 has no algorithm for\n  " + "\n  ".join(left)
            )
        self._inputs = _unused_dropped(graph, exported)
        self._forward = GraphModule(exported.graph_module, graph).forward
        self._bind(weights)
        assert exported.call_spec.out_spec is not None
        self._out_spec = exported.call_spec.out_spec  # `call_spec` makes a new class at every look

    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> Program:
        """The same program over other tensors of the same names and shapes."""
        made = copy.copy(self)
        made._bind(weights)
        return made

    def _bind(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Looks up the graph's inputs but the image: of some hundred, at every call, that would take as long as many a
        layer."""
        self.weights = weights
        constants = self.exported.constants
        self._arguments = [
            None if name is None else weights[name] if name in weights else constants[name] for name in self._inputs
        ]
        self._run: Callable[..., Any] = self._forward
        if is_on_gpu(weights.values()):
            static = [index for index, name in enumerate(self._inputs) if name is not None]
            self._run = Guarded(self._forward, static)  # of these weights alone

    def __call__(self, input: torch.Tensor) -> Any:
        """The network's output, of its own structure, on the input."""
        given, input = input, input.contiguous()  # as the sample was: the graph counts on its strides
        arguments = [input if argument is None else argument for argument in self._arguments]
        outputs: list[Any] = []
        for spec, value in zip(self.exported.graph_signature.output_specs, self._run(*arguments)):
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                given.copy_(value)
            elif spec.target is not None and spec.target in self.weights:
                self.weights[spec.target].copy_(value)
        return pytree.tree_unflatten(outputs, self._out_spec)


def _unused_dropped(graph: Graph, exported: ExportedProgram) -> list[str | None]:
    """Takes the inputs that nothing reads from the graph; the names of the weights it still has, None for the image."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = []
    for node, spec in zip(placeholders, exported.graph_signature.input_specs):
        if not node.users and spec.kind is not InputKind.USER_INPUT:
            graph.erase_node(node)
            continue
        names.append(None if spec.kind is InputKind.USER_INPUT else spec.target)
    return names


@contextlib.contextmanager
def _hints(graph: Graph, exported: ExportedProgram, batch: int | None) -> Iterator[None]:
    """Counts a dynamic batch as this many images."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    (input,) = (node for node, spec in zip(placeholders, specs) if spec.kind is InputKind.USER_INPUT)
    size = input.meta["val"].shape[0] if input.meta["val"].dim() else None
    if batch is None or not isinstance(size, torch.SymInt):
        yield
        return
    token = HINTS.set({size.node.expr: batch})
    try:
        yield
    finally:
        HINTS.reset(token)


def _left_to_torch(graph: Graph, context: passes.Context) -> list[str]:
    """The operations that no algorithm of ai3's can run, which their selectors would leave to torch."""
    left = []
    for name, operation in OPERATIONS.items():
        found = [(n, spec) for n in graph.nodes if n.op == "call_function" and (spec := operation.match(n))]
        registry.prepare((name, spec.device) for _, spec in found)
        for index, (node, spec) in enumerate(found):
            try:
                decide(context, index, spec, node)
            except StrictError as error:
                left.append(str(error))
    return left


def _unknown_to_ai3(graph: Graph) -> list[str]:
    """What the passes have left in the graph and computes something."""
    return [_describe(node) for node in passes.left_to_torch(graph) if node.target not in _MOVES]


def _describe(node: Node) -> str:
    value = node.meta.get("val")
    shape = (
        "x".join(str(s) if isinstance(s, int) else "N" for s in value.shape) if isinstance(value, torch.Tensor) else ""
    )
    return f"{node.target} in {module_path(node) or 'the model'}, giving {shape or 'no tensor'}"
