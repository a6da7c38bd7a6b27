"""The algorithms there are: read from the files of the kernels folder, whose paths are their descriptions.

`kernels/<operation>/<algorithm>.<platform ending>`, with underscores for the spaces of an algorithm's name. Each
operation also has the algorithm `torch`, which leaves it to PyTorch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import pkgutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import backends, core, kernels
from .backends import Platform
from .ops import OPERATIONS
from .selection import OpSpec, System

PACKAGE = Path(__file__).parent
KERNELS = Path(kernels.__path__[0])


@dataclass(frozen=True)
class Algorithm:
    """One way to compute one operation on one platform."""

    operation: str
    name: str
    platform: str
    description: str
    source: Path | None
    """The file that is the algorithm; None for `torch`."""

    @property
    def qualified(self) -> str:
        return self.name if self.name == self.platform else f"{self.name}@{self.platform}"

    @property
    def id(self) -> int:
        """What a compiled graph names the algorithm by: 63 bits of a hash, the same in every process."""
        digest = hashlib.sha256(f"{self.operation}/{self.qualified}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def label(self) -> str:
        """As it appears in a profiler's trace."""
        return f"{OPERATIONS[self.operation].op_name}[{self.qualified}]"

    def supports(self, spec: OpSpec) -> str | None:
        return platforms()[self.platform].supports(self, spec)

    def cost(self, spec: OpSpec) -> float | None:
        return platforms()[self.platform].cost(self, spec)


@functools.cache
def platforms() -> dict[str, Platform]:
    """The platforms by name: every module of the backends folder that defines one as PLATFORM."""
    found = {}
    for module in pkgutil.iter_modules(backends.__path__):
        platform = getattr(importlib.import_module(f"{backends.__name__}.{module.name}"), "PLATFORM", None)
        if platform is not None:
            found[platform.name] = platform
    return found


@functools.cache
def algorithms() -> tuple[Algorithm, ...]:
    """Every algorithm of every platform, whether or not it can run here, ordered by operation, name and platform."""
    found = []
    endings = {platform.ending: platform for platform in platforms().values() if platform.ending is not None}
    for operation in OPERATIONS:
        for path in sorted((KERNELS / operation).iterdir()):
            stem, _, ending = path.name.partition(".")
            platform = endings.get(f".{ending}")
            if platform is not None:
                found.append(Algorithm(operation, stem.replace("_", " "), platform.name, _description(path), path))
        found.append(Algorithm(operation, "torch", "torch", "leave the operation to PyTorch", None))
    return tuple(found)


def of_operation(operation: str) -> tuple[Algorithm, ...]:
    return tuple(a for a in algorithms() if a.operation == operation)


def system() -> System:
    """The machine this process runs on."""
    return System({name: platform.unavailable() for name, platform in platforms().items()})


def prepare(operations: Iterable[str]) -> None:
    """Builds what is not built yet of the given operations' algorithms, together, and loads them."""
    wanted = set(operations)
    for platform in platforms().values():
        if platform.unavailable() is None:
            platform.load([a for a in algorithms() if a.platform == platform.name and a.operation in wanted])


_loading = threading.Lock()


def load_by_id(identity: int) -> None:
    """Loads the algorithm a compiled graph names; the core library calls this the first time it meets the id."""
    with _loading:
        for algorithm in algorithms():
            if algorithm.id == identity:
                platforms()[algorithm.platform].load([algorithm])
                return


core.on_load_algorithm(load_by_id)


@functools.cache
def digest() -> str:
    """Changes with every kernel and every rule of who is chosen: part of what a compiled graph is cached under."""
    hasher = hashlib.sha256()
    for folder in (KERNELS, *(PACKAGE / name for name in ("ops", "passes", "selection"))):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            hasher.update(path.relative_to(folder.parent).as_posix().encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _description(path: Path) -> str:
    """The first comment line of a kernel's source."""
    with path.open() as source:
        return source.readline().lstrip("/# ").strip()
