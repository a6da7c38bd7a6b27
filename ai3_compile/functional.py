"""One operation, called eagerly: the algorithm is decided for the shapes at hand, once, and run.

The swapped modules call this. In a graph of Dynamo or torch.export the call is the operation `ai3::run`, which is made
of others: when AOTAutograd takes it apart the decision is taken, and a compiled graph holds the chosen algorithm alone.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
import torch.fx
from torch.autograd import forward_ad

from . import core, registry, tuning
from .ops import OPERATIONS
from .ops.base import Attributes, allows_tf32, hint, image
from .registry import Algorithm
from .selection import Decision, OpSpec, Use
from .selection import select as decide

# Enough for the layers of a large network at many batch sizes.
_DECISIONS_KEPT = 8192
_IMAGES = ("conv2d", "maxpool2d", "avgpool2d", "adaptiveavgpool2d")

Shape = tuple[int, ...]


def call(
    operation: str,
    selector: str,
    name: str,
    attributes: Attributes,
    static_weight: bool,
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`run`, also where Dynamo or torch.export traces it."""
    if torch.compiler.is_compiling():
        # The state is in the graph so that no cache takes it for one made when other algorithms were registered.
        choice = (registry.state(), operation, selector, name, repr(attributes), static_weight)
        return torch.ops.ai3.run(*choice, input, weight, bias)
    if not isinstance(input, torch.Tensor) or _is_transformed():
        return OPERATIONS[operation].call_torch(input, weight, bias, dict(attributes))
    return run(operation, selector, name, attributes, static_weight, input, weight, bias)


def run(
    operation: str,
    selector: str,
    name: str,
    attributes: Attributes,
    static_weight: bool,
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operation on these tensors, by the algorithm that the selector chooses for their shapes.

    `name` is the module's path, for messages; `static_weight` promises that the weight changes only in ways that
    PyTorch counts, so that what is computed of it may be kept.

    Raises NothingFitsError where the selector names only algorithms that cannot run here.
    """
    op = OPERATIONS[operation]
    device = input.device.type
    dtype = input.dtype
    low = op.autocasts and device != "meta" and torch.is_autocast_enabled(device)
    if low and _is_cast(input):
        dtype = torch.get_autocast_dtype(device)
    algorithm = _algorithm(
        operation,
        selector,
        name,
        attributes,
        _shape(input),
        None if weight is None else _shape(weight),
        bias is not None,
        dtype,
        device,
        (registry.state(), allows_tf32(operation, dtype, device)),
    )
    if algorithm is None:
        return op.call_torch(input, weight, bias, dict(attributes))
    if low:
        to = torch.get_autocast_dtype(device)
        input, weight, bias = (t.to(to) if t is not None and _is_cast(t) else t for t in (input, weight, bias))  # type: ignore[assignment]
    args, kwargs = op.arguments(input, weight, bias, dict(attributes), algorithm.id, static_weight)
    if device == "cuda":
        core.follow_numerics()
    if operation in _IMAGES and _is_channels_last(input):
        kwargs["channels_last"] = True  # as PyTorch's operations, the output has the input's layout
    try:
        return op.overload_for(algorithm)(*args, **kwargs)
    except RuntimeError as error:
        raise core.torchs_own(error) from error.__cause__


def decision(
    operation: str,
    selector: str,
    name: str,
    attributes: Attributes,
    input_shape: Shape,
    weight_shape: Shape | None,
    has_bias: bool,
    dtype: torch.dtype,
    device: str,
    strict: bool = False,
) -> Decision | None:
    """What `run` decides; None where the shapes do not fit each other, which PyTorch is left to say.

    Raises NothingFitsError, UnknownAlgorithmError, BuildError.
    """
    shape = image(input_shape) if operation in _IMAGES else input_shape
    spec = OPERATIONS[operation].spec(name, shape, weight_shape, has_bias, dtype, device, dict(attributes))
    return None if spec is None else decide_for(spec, selector, strict)


def decide_for(spec: OpSpec, selector: str, strict: bool = False) -> Decision:
    """`select` with what this process knows; the operation's algorithms are built first where need be."""
    registry.prepare([(spec.operation, spec.device)])
    decision = decide(
        spec,
        selector,
        registry.known(),
        registry.system(),
        default=registry.default_of(spec.operation),
        strict=strict,
        measured=tuning.times(spec, Use(in_graph=False)) if "auto" in selector.split("|") else None,
    )
    assert isinstance(decision.chosen, Algorithm)
    registry.platforms()[decision.chosen.platform].search([decision.chosen], spec, Use(in_graph=False))
    return decision


@functools.lru_cache(maxsize=_DECISIONS_KEPT)
def _algorithm(*key: Any) -> Algorithm | None:
    *arguments, _state = key
    decided = decision(*arguments)
    if decided is None or decided.chosen.platform == "torch":
        return None
    core.load()
    assert isinstance(decided.chosen, Algorithm)
    return decided.chosen


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which see through PyTorch's operations alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


torch.fx.wrap("call")  # torch.fx traces a swapped module as this one call


def run_in_graph(state: str, operation: str, selector: str, name: str, attributes: str, *rest: Any) -> torch.Tensor:
    """What the operation `ai3::run` is made of."""
    return run(operation, selector, name, ast.literal_eval(attributes), *rest)


_library = torch.library.Library("ai3", "FRAGMENT")
_library.define(
    "run(str state, str operation, str selector, str name, str attributes, bool static_weight, Tensor input, "
    "Tensor? weight, Tensor? bias) -> Tensor"
)
_library.impl("run", run_in_graph, "CompositeImplicitAutograd")


def _shape(tensor: torch.Tensor) -> Shape:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.jit.is_tracing():
        return tensor.shape  # only tensors under trace have symbolic sizes
    return tuple(hint(size) for size in tensor.shape)


def _is_channels_last(input: torch.Tensor) -> bool:
    # Tensors under trace get their layouts from what compiles the graph.
    return (
        type(input) is torch.Tensor
        and input.dim() == 4
        and not input.is_contiguous()
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def _is_cast(tensor: torch.Tensor) -> bool:
    """As autocast has it: float64 keeps its precision."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64
