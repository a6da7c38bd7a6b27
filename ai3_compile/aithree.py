"""The names of aithree, ai3's predecessor, that have no other place: code written for it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from . import registry
from .errors import OptionValueError
from .model import convert
from .ops import GRADIENTS, OPERATIONS
from .selection.selector import POLICIES

_FORWARD = tuple(operation for operation in OPERATIONS if operation not in GRADIENTS)  # aithree did not train

FROM_BACKEND: str | None = None
"""The framework of the networks that are swapped and converted; None: that of the network at hand."""

SUPPORTED_FROM_BACKENDS: Sequence[str] = ("torch",)

DEFAULT_ALGOS: Mapping[str, str] = {operation: "default" for operation in _FORWARD}
"""The selector of an operation for which none is given."""


class _SupportedAlgorithms(Mapping[str, Sequence[str]]):
    """Read when asked: algorithms can be registered at any time."""

    def __getitem__(self, operation: str) -> Sequence[str]:
        if operation not in _FORWARD:
            raise KeyError(operation)
        return [*dict.fromkeys(a.name for a in registry.of_operation(operation)), *POLICIES]

    def __iter__(self) -> Iterator[str]:
        return iter(_FORWARD)

    def __len__(self) -> int:
        return len(_FORWARD)

    def __repr__(self) -> str:
        return repr(dict(self))


SUPPORTED_ALGORITHMS: Mapping[str, Sequence[str]] = _SupportedAlgorithms()
"""The names that a selector may give, by operation."""

swap_backend = convert  # as aithree 0.1 calls it


def check_from_backend() -> None:
    """Raises OptionValueError where FROM_BACKEND names a framework that is not supported."""
    named = getattr(sys.modules[__package__ or ""], "FROM_BACKEND", None)
    if named is not None and named not in SUPPORTED_FROM_BACKENDS:
        raise OptionValueError(
            name="FROM_BACKEND", expected=f"None or one of {list(SUPPORTED_FROM_BACKENDS)}", found=repr(named)
        )


def using_sycl() -> bool:
    """Whether algorithms of the platform `sycl` can run here."""
    return _can_run("sycl")


def using_cudnn() -> bool:
    """Whether algorithms of the platform `cudnn` can run here."""
    return _can_run("cudnn")


def using_cublas() -> bool:
    """Whether algorithms of the platform `cublas` can run here."""
    return _can_run("cublas")


def using_mps_and_metal() -> bool:
    """Whether algorithms of the platforms `mps` and `metal` can run here."""
    return _can_run("mps") and _can_run("metal")


def _can_run(platform: str) -> bool:
    platforms = registry.platforms()
    return platform in platforms and platforms[platform].unavailable() is None
