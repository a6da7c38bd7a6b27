"""The overload `python` of every operation: it calls a user's Python function, on tensors of any device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..errors import AlgorithmError
from . import activations
from .base import Operation

_library: torch.library.Library | None = None


def define(operations: tuple[Operation, ...]) -> None:
    """Gives each operation the overload, of the same schema as what the core library has registered."""
    global _library
    _library = torch.library.Library("ai3", "FRAGMENT")
    for operation in operations:
        schema = operation.overload._schema
        name = operation.op_name.removeprefix("ai3::")
        _library.define(str(schema).replace(f"ai3::{name}(", f"{name}.python("))
        names = tuple(argument.name for argument in schema.arguments)
        defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        _library.impl(f"{name}.python", _implementation(operation, names, defaults), "CompositeExplicitAutograd")


def _implementation(
    operation: Operation, names: tuple[str, ...], defaults: dict[str, Any]
) -> Callable[..., torch.Tensor]:
    @functools.wraps(operation.fake)
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        from .. import registry

        arguments = {**defaults, **dict(zip(names, args)), **kwargs}
        algorithm = registry.by_id(arguments["algorithm"])
        assert algorithm is not None and algorithm.function is not None
        expected = operation.fake(*args, **kwargs)
        try:
            found = algorithm.function(*operation.for_function(arguments))
        except Exception as error:  # the user's own code: whatever it raises is shown as what it is
            raise AlgorithmError(label=algorithm.label, message=f"{type(error).__name__}: {error}") from error
        if not isinstance(found, torch.Tensor):
            raise AlgorithmError(
                label=algorithm.label, message=f"it must return a torch.Tensor, not {type(found).__name__}"
            )
        for what in ("shape", "dtype", "device"):
            is_, ought = getattr(found, what), getattr(expected, what)
            if is_ != ought:
                is_, ought = (tuple(v) if what == "shape" else v for v in (is_, ought))
                raise AlgorithmError(label=algorithm.label, message=f"its result has the {what} {is_}, not {ought}")
        return _finished(found, expected, arguments)

    return run


def _finished(found: torch.Tensor, expected: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The result with what was fused behind the operation, of the strides that were promised, and no one's view."""
    if arguments.get("residual") is not None:
        found = found + arguments["residual"]
    found = activations.apply(found, arguments.get("activation", 0))
    inputs = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, torch.Tensor)}
    if found.stride() == expected.stride() and found.untyped_storage().data_ptr() not in inputs:
        return found
    return expected.copy_(found)
