"""swap_operation: the modules of an operation, in place, computed by algorithms of ai3's from then on."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from . import functional, registry, swap_torch
from .errors import (
    ModuleError,
    NothingFitsError,
    SampleShapeError,
    SelectorCallError,
    SelectorError,
    SelectorLengthError,
    UnsupportedCallableError,
)
from .ops import GRADIENTS, MODULES, OPERATIONS
from .report import GraphReport, Report, history
from .selection import Selector, parse_selector
from .selection.selector import POLICIES, parse_names, takes_shape

log = logging.getLogger(__name__)

AlgorithmicSelector = str | Sequence[str] | Callable[..., str]
"""Chooses the algorithm of every module of an operation: a name (`"direct"`), several in order of preference
(`"winograd|default"`), one for each module in the order of a forward pass, or a function of the module, or of the
module and the shape of its input."""

SwapWith = Callable[[nn.Module, str], nn.Module]


@dataclass
class _Target:
    """One module to be swapped, and where it hangs."""

    module: nn.Module
    paths: list[str] = field(default_factory=list)
    """Every name it has in the model; a shared module has several."""
    input: torch.Tensor | None = None
    """An input of the sample's forward pass, kept for its shape, dtype and device."""
    algorithm: str = ""


def swap_operation(
    op_type: type[nn.Module] | str,
    module: nn.Module,
    algos: AlgorithmicSelector | None = None,
    sample_input_shape: Sequence[int] | None = None,
    *,
    swap_with: SwapWith | None = None,
) -> Report:
    """Swaps the modules of one operation in a model, in place: each is computed by the algorithm chosen for it.

    The model stays the model it was: same parameters, state_dict, hooks; it trains, compiles, copies and pickles.
    Functions (`F.relu` in a forward) are no modules and stay; torch.compile's backend sees those too.

    Args:
        op_type: the modules' class (`torch.nn.Conv2d`, or a subclass: its instances only), or the operation's name:
            conv2d, linear, maxpool2d, avgpool2d, adaptiveavgpool2d, relu, flatten.
        module: the model, or a module of the operation itself.
        algos: an AlgorithmicSelector; `default` without one. A sequence names one algorithm for each module, and
            entries beyond the last module are not used. Modules are ordered as they are first called in a forward pass
            of a sample where `sample_input_shape` is given; else as torch.fx traces them, and those that it does not
            reach (control flow that depends on data) behind them as they appear in `model.modules()`. `torch` makes a
            swapped module what it was.
        sample_input_shape: shape of an input of the model, such as (1, 3, 224, 224). With it every decision is taken
            and checked now, and a selector function may ask for the module's input shape; without it, decisions
            that depend on shapes are taken when a shape first occurs.
        swap_with: a class or function of your own, called as `swap_with(original, algorithm)`; what it returns takes
            the original's place.

    Returns:
        What was chosen for each module and why, also to be had from `ai3.last_report()`.

    Raises:
        UnsupportedCallableError: `op_type` is no operation of ai3's.
        ModuleError: `module` is no module, or is on the meta device.
        SampleShapeError: the model does not run on a sample of this shape.
        SelectorError, UnknownAlgorithmError, NothingFitsError: the selector; nothing has been swapped then.
    """
    operation, cls = _operation(op_type)
    selector = parse_selector(operation, "default" if algos is None else algos, registry.of_operation(operation))
    needs_shape = callable(selector.value) and takes_shape(selector.value)
    if needs_shape and sample_input_shape is None:
        raise SelectorError(
            message=f"{operation}: the selector function takes the input shape as well, so swap_operation needs "
            "sample_input_shape: the shape of an input of the model, such as (1, 3, 224, 224)."
        )
    report = GraphReport(f"swap_operation({operation})")
    targets = _targets(operation, module, cls, report)
    _check(module, targets, swap_with)
    if sample_input_shape is not None:
        targets = _in_order_of_a_sample(module, targets, sample_input_shape)
    elif not isinstance(selector.value, str) and not callable(selector.value):
        targets = _in_order_of_a_trace(module, targets)
    _choose(operation, selector, targets, report, sample_input_shape is not None)
    chosen = [target for target in targets if target.algorithm != "torch"]
    # Made before anything changes: what the user's class raises leaves the model as it was.
    made = [_made_by(swap_with, target) for target in chosen] if swap_with else []
    for target in targets:
        if target.algorithm == "torch":
            swap_torch.restore(target.module)
        elif swap_with is None:
            swap_torch.swap(target.module, target.algorithm, target.paths[0])
    for target, replacement in zip(chosen, made):
        for path in target.paths:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, replacement)
    history.add(report, continues=False)
    return history.last_report()


def _made_by(swap_with: SwapWith, target: _Target) -> nn.Module:
    replacement = swap_with(target.module, target.algorithm)
    if not isinstance(replacement, nn.Module):
        raise ModuleError(message=f"swap_with must return a torch.nn.Module, not {type(replacement).__name__}.")
    return replacement


def swap_conv2d(
    module: nn.Module,
    algos: AlgorithmicSelector | None = None,
    sample_input_shape: Sequence[int] | None = None,
) -> Report:
    """`swap_operation(torch.nn.Conv2d, ...)`."""
    return swap_operation(nn.Conv2d, module, algos, sample_input_shape)


def _operation(op_type: object) -> tuple[str, type[nn.Module]]:
    if isinstance(op_type, str):
        name = op_type.lower()
        if name in MODULES:
            return name, OPERATIONS[name].modules[0]
        if name in OPERATIONS:
            entries = "" if name in GRADIENTS else " and ai3.convert"
            raise UnsupportedCallableError(
                message=f"Unsupported callable: {name} is no module of torch.nn, so there is nothing to swap; "
                f"torch.compile(model, backend='ai3'){entries} find{'' if entries else 's'} it in the whole network."
            )
    elif isinstance(op_type, type):
        for name, operation in OPERATIONS.items():
            if issubclass(op_type, operation.modules):
                return name, swap_torch.torch_class(op_type) if issubclass(op_type, swap_torch.Swapped) else op_type
    given = op_type if isinstance(op_type, str) else getattr(op_type, "__name__", repr(op_type))
    near = difflib.get_close_matches(str(given).lower(), MODULES, 1)
    raise UnsupportedCallableError(
        message=f"Unsupported callable: {given}.{f' Did you mean {near[0]!r}?' if near else ''} ai3 swaps "
        + ", ".join(f"{name} (torch.nn.{OPERATIONS[name].modules[0].__name__})" for name in MODULES)
        + "."
    )


def _targets(operation: str, module: object, cls: type[nn.Module], report: GraphReport) -> list[_Target]:
    check_module(module)
    assert isinstance(module, nn.Module)
    found: dict[int, _Target] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if not isinstance(child, cls):
            continue
        if not _calls_its_base(child, OPERATIONS[operation].modules[0]):
            log.warning("%s stays as it is: %s has a forward of its own", path, type(child).__name__)
            report.add_without_input(operation, path, "torch", f"{type(child).__name__} has a forward of its own")
            continue
        found.setdefault(id(child), _Target(child)).paths.append(path)
    return list(found.values())


def _calls_its_base(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass of the user's own, where it overrides the computation, hands it on to torch's class."""
    for name in ("forward", "_conv_forward"):
        for cls in type(module).__mro__:
            if cls is base or issubclass(cls, swap_torch.Swapped):
                break
            code = getattr(cls.__dict__.get(name), "__code__", None)
            if code is not None and "__class__" not in code.co_freevars:
                if not {"_conv_forward", *(["forward"] if name == "forward" else [])} & set(code.co_names):
                    return False
    return True


def check_module(module: object) -> None:
    """Raises ModuleError for what is no module, and for one without data."""
    from .aithree import check_from_backend

    check_from_backend()
    if not isinstance(module, nn.Module):
        raise ModuleError(message=f"expected a torch.nn.Module, got {type(module).__name__}.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModuleError(message=f"{name} of the model is not initialised yet: call the model once first.")
        if tensor.is_meta:
            raise ModuleError(
                message=f"{name} of the model is on the meta device, without data: load its weights first "
                "(model.to_empty(device='cpu') and load_state_dict, or load_state_dict(..., assign=True))."
            )


def _check(module: nn.Module, targets: Sequence[_Target], swap_with: SwapWith | None) -> None:
    if swap_with is not None and not callable(swap_with):
        raise ModuleError(message=f"swap_with must be a class or a function, got {swap_with!r}.")
    for target in targets:
        if swap_with is not None and "" in target.paths:
            raise ModuleError(
                message="swap_with puts another module in a module's place, and the model itself has none: "
                "pass a model that holds it."
            )


def _in_order_of_a_sample(module: nn.Module, targets: list[_Target], shape: Sequence[int]) -> list[_Target]:
    """The targets as a forward pass calls them, with their inputs; those that it does not call come last."""
    order: dict[int, _Target] = {}
    by_id = {id(target.module): target for target in targets}

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = by_id[id(child)]
        if id(child) not in order and (value := args[0] if args else next(iter(kwargs.values()), None)) is not None:
            target.input = value.detach()
        order.setdefault(id(child), target)

    hooks = [t.module.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for t in targets]
    try:
        run_sample(module, shape)
    finally:
        for hook in hooks:
            hook.remove()
    return [*order.values(), *(target for target in targets if id(target.module) not in order)]


def run_sample(module: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """Runs the model in eval mode on random data, and leaves it as it was; returns the input.

    Raises SampleShapeError with what the model says of an input of this shape.
    """
    first = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    try:
        sizes = tuple(int(size) for size in shape)
        dtype, device = (first.dtype, first.device) if first is not None else (torch.get_default_dtype(), "cpu")
        with torch.random.fork_rng(devices=()):
            sample = torch.randn(sizes, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SampleShapeError(shape=shape, error=error) from error
    training = [(child, child.training) for child in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            module(sample)
    except Exception as error:  # the model's own code: whatever it raises is shown as what it is
        raise SampleShapeError(shape=tuple(shape), error=f"{type(error).__name__}: {error}") from error
    finally:
        for child, was in training:
            child.training = was
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
    return sample


def _in_order_of_a_trace(module: nn.Module, targets: list[_Target]) -> list[_Target]:
    by_path = {path: target for target in targets for path in target.paths}
    tracer = fx.Tracer()
    leaf = tracer.is_leaf_module
    setattr(tracer, "is_leaf_module", lambda m, path: path in by_path or leaf(m, path))
    try:
        nodes: list[Any] = list(tracer.trace(module).nodes)
    except Exception as error:  # a forward that cannot be traced symbolically may raise anything
        log.info("torch.fx cannot trace the model (%s): modules are in the order of model.modules()", error)
        nodes = []
    reached = {id(by_path[n.target]): by_path[n.target] for n in nodes if n.op == "call_module" and n.target in by_path}
    return [*reached.values(), *(target for target in targets if id(target) not in reached)]


def _choose(operation: str, selector: Selector, targets: Sequence[_Target], report: GraphReport, sampled: bool) -> None:
    """Writes each target's algorithm, and checks as much of it as is known."""
    value = selector.value
    if not isinstance(value, str) and not callable(value) and len(value) < len(targets):
        raise SelectorLengthError(
            operation=operation,
            given=len(value),
            found=len(targets),
            operations="\n".join(f"  {i}: {t.paths[0]} {t.module}" for i, t in enumerate(targets)),
        )
    for index, target in enumerate(targets):
        target.algorithm = _text(operation, selector, index, target)
        known = _known(operation, target)
        if known is not None:
            decision = functional.decision(operation, target.algorithm, target.paths[0], *known)
            if decision is not None:
                report.add(decision, None)
                continue
        _check_nominal(operation, target)
        why = "decided for each shape when it first occurs"
        why += ": the forward pass of the sample does not call it" if sampled else ": no input of it is known"
        report.add_without_input(operation, target.paths[0], target.algorithm, why)


def _text(operation: str, selector: Selector, index: int, target: _Target) -> str:
    value = selector.value
    if isinstance(value, str):
        return value
    if not callable(value):
        return value[index]
    arguments: tuple[Any, ...] = (target.module,)
    if takes_shape(value):
        if target.input is None:
            raise SelectorError(
                message=f"{operation} {target.paths[0]}: the selector function asks for its input's shape, but the "
                "forward pass of the sample does not call this module."
            )
        arguments = (target.module, tuple(target.input.shape))
    try:
        answer = value(*arguments)
    except Exception as error:  # the user's own code: whatever it raises is shown as what it is
        raise SelectorCallError(
            operation=operation,
            selector=value,
            spec=target.paths[0] or target.module,
            error=f"{type(error).__name__}: {error}",
        ) from error
    parse_names(operation, answer, selector.known)
    return answer


def _known(operation: str, target: _Target, input: torch.Tensor | None = None) -> tuple[Any, ...] | None:
    """The arguments of `functional.decision` behind the name; None where no input is known."""
    input = target.input if input is None else input
    if not isinstance(input, torch.Tensor):
        return None
    module = target.module
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    attributes = OPERATIONS[operation].attributes_of(module)
    shape = None if weight is None else tuple(weight.shape)
    padded = list(input.shape)
    if operation == "conv2d" and getattr(module, "padding_mode") != "zeros":
        left, right, top, bottom = module._reversed_padding_repeated_twice  # type: ignore[misc]
        padded[-2:] = [padded[-2] + top + bottom, padded[-1] + left + right]
    return attributes, tuple(padded), shape, bias is not None, input.dtype, input.device.type


def _check_nominal(operation: str, target: _Target) -> None:
    """Refuses now what no shape could make fit: ai3's own algorithms do not look at the size of an image.

    Raises NothingFitsError.
    """
    known = registry.of_operation(operation)
    names = parse_names(operation, target.algorithm, known)
    mine = {text for a in registry.shipped() if a.operation == operation for text in (a.name, a.qualified)}
    weight = getattr(target.module, "weight", None)
    if weight is None or any(name in POLICIES or name not in mine for name in names):
        return
    channels = getattr(target.module, "in_channels", None)
    nominal = torch.empty(
        (1, weight.shape[1]) if channels is None else (1, channels, 256, 256), dtype=weight.dtype, device="meta"
    )
    arguments = _known(operation, target, nominal)
    assert arguments is not None
    try:
        functional.decision(operation, target.algorithm, target.paths[0], *(*arguments[:-1], weight.device.type))
    except NothingFitsError as error:
        shape = "x".join(map(str, nominal.shape))
        raise NothingFitsError(
            **{**error.fields, "where": f"{target.paths[0] or '(the model)'}, whatever its input (tried {shape})"}
        ) from None
