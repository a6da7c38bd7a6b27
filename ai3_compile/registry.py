"""The algorithms there are: read from the files of the kernels folder, whose paths are their descriptions.

`kernels/<operation>/<algorithm>.<platform ending>`, with underscores for the spaces of an algorithm's name. Each
operation also has the algorithm `torch`, which leaves it to PyTorch. What users add (user_algorithms.py) comes last.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import backends, core, kernels
from .backends import Platform, sources
from .errors import AlgorithmError, UnknownAlgorithmError, UnknownOperationError
from .ops import OPERATIONS
from .ops.activations import NUMBERS
from .selection import OpSpec, System
from .version import __version__

PACKAGE = Path(__file__).parent
KERNELS = Path(kernels.__path__[0])


@dataclass(frozen=True)
class Build:
    """How the sources of a user's algorithm become a library, beyond what every kernel is built with."""

    sources: tuple[Path, ...]
    flags: tuple[str, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    link_flags: tuple[str, ...] = ()
    cmake: Path | None = None
    """A custom.cmake that the generated project includes, or the CMakeLists.txt of a project of the user's own."""


@dataclass(frozen=True)
class Algorithm:
    """One way to compute one operation on one platform."""

    operation: str
    name: str
    platform: str
    description: str
    source: Path | None
    """The file that is the algorithm; None for `torch` and for a Python function."""
    build: Build | None = None
    """Of an algorithm that a user added in C++."""
    function: Callable[..., Any] | None = None
    """Of an algorithm that a user added in Python."""
    user_supports: Callable[[OpSpec], str | None] | None = None
    """Narrows what the algorithm says of its own domain."""
    version: str = ""
    """Of an algorithm that a user added: another text is another algorithm, and another `id`."""

    @property
    def qualified(self) -> str:
        return self.name if self.name == self.platform else f"{self.name}@{self.platform}"

    @property
    def device(self) -> str | None:
        """The type of the devices that it computes on; None for any."""
        return platforms()[self.platform].device

    @functools.cached_property
    def id(self) -> int:
        """What a compiled graph names the algorithm by: 63 bits of a hash, the same in every process."""
        digest = hashlib.sha256(f"{self.operation}/{self.qualified}{self.version}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def label(self) -> str:
        """As it appears in a profiler's trace."""
        operation = OPERATIONS.get(self.operation)
        return f"{operation.op_name if operation else f'ai3::{self.operation}'}[{self.qualified}]"

    def supports(self, spec: OpSpec) -> str | None:
        """None where it can run the operation, else the reason.

        Raises AlgorithmError where a function that the user gave fails.
        """
        if self.user_supports is not None:
            try:
                reason = self.user_supports(spec)
            except Exception as error:  # the user's own code: whatever it raises is shown as what it is
                raise AlgorithmError(
                    label=self.label, message=f"its `supports` failed on {spec}: {type(error).__name__}: {error}"
                ) from error
            if reason is not None and not isinstance(reason, str):
                raise AlgorithmError(
                    label=self.label,
                    message=f"its `supports` must return None where it can run, or the reason as a text; "
                    f"it returned {reason!r}",
                )
            if reason is not None:
                return reason
        return platforms()[self.platform].supports(self, spec)

    def cost(self, spec: OpSpec) -> float | None:
        return platforms()[self.platform].cost(self, spec)

    @property
    def only_by_name(self) -> str | None:
        """Why only a user who names it gets it, and no policy chooses it; None where they may."""
        return platforms()[self.platform].only_by_name(self)

    @property
    def fusions(self) -> int:
        """Batch norm and activation ahead of it, parts of images read and written as they lie, residuals in place."""
        platform = platforms()[self.platform]
        return sum(
            (
                platform.applies_prologues(self, NUMBERS["relu"]),
                platform.reads_slices(self),
                platform.writes_slices(self),
                platform.adds_in_place(self),
            )
        )

    def workspace(self, spec: OpSpec) -> int:
        return platforms()[self.platform].workspace(self, spec)


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
def shipped() -> tuple[Algorithm, ...]:
    found = []
    endings = {platform.ending: platform for platform in platforms().values() if platform.ending is not None}
    for operation in OPERATIONS:
        for path in sorted((KERNELS / operation).iterdir()):
            stem, _, ending = path.name.partition(".")
            platform = endings.get(f".{ending}")
            if platform is not None:
                found.append(Algorithm(operation, stem.replace("_", " "), platform.name, description(path), path))
        found.append(Algorithm(operation, "torch", "torch", "leave the operation to PyTorch", None))
    return tuple(found)


EPILOGUE = Algorithm("epilogue", "direct", "cuda", "what algorithms leave to add", KERNELS / "epilogue" / "direct.cu")
"""No operation that a user chooses for: residual and activation behind algorithms on GPUs that apply neither."""

_users: dict[tuple[str, str], Algorithm] = {}
_by_id: dict[int, Algorithm] = {}
_refresh: list[Callable[[], None]] = []
_state = __version__


def known() -> tuple[Algorithm, ...]:
    """The algorithms as they were last listed."""
    return (*shipped(), *_users.values())


def algorithms() -> tuple[Algorithm, ...]:
    """Every algorithm of every platform, whether or not it can run here: ai3's by operation and name, then users'."""
    for refresh in _refresh:
        refresh()
    return known()


def on_list(refresh: Callable[[], None]) -> None:
    """Calls a function before the algorithms are listed: it may add users' algorithms that lie in a folder."""
    _refresh.append(refresh)


def state() -> str:
    """Another text whenever users' algorithms have changed: decisions made before may not hold any more."""
    return _state


def add(algorithm: Algorithm) -> None:
    _users[algorithm.operation, algorithm.name] = algorithm
    _by_id[algorithm.id] = algorithm
    _changed()


def remove(algorithm: Algorithm) -> None:
    del _users[algorithm.operation, algorithm.name]
    _changed()


def _changed() -> None:
    global _state
    _state = "-".join((__version__, *(str(algorithm.id) for algorithm in _users.values())))


def users() -> tuple[Algorithm, ...]:
    return tuple(_users.values())


def of_operation(operation: str) -> tuple[Algorithm, ...]:
    return tuple(a for a in algorithms() if a.operation == operation)


def for_device(operation: str, device: str) -> tuple[Algorithm, ...]:
    """Those algorithms of an operation that compute on this type of device, whether or not this machine has one."""
    return tuple(a for a in of_operation(operation) if platforms()[a.platform].device in (None, device))


def check_operation(operation: object) -> str:
    """Raises UnknownOperationError where this is not the name of an operation."""
    if isinstance(operation, str) and operation in OPERATIONS:
        return operation
    near = difflib.get_close_matches(str(operation), OPERATIONS, 1)
    raise UnknownOperationError(
        name=operation, nearest=f" Did you mean {near[0]!r}?" if near else "", known=", ".join(OPERATIONS)
    )


def find(operation: str, name: str) -> Algorithm:
    """The algorithm `name`, or `name@platform`, of an operation.

    Raises UnknownOperationError or UnknownAlgorithmError, which name what is nearest.
    """
    known = of_operation(check_operation(operation))
    for algorithm in known:
        if name in (algorithm.name, algorithm.qualified):
            return algorithm
    near = difflib.get_close_matches(str(name), [a.name for a in known], 1)
    raise UnknownAlgorithmError(
        operation=operation,
        name=name,
        nearest=f" Did you mean {near[0]!r}?" if near else "",
        known=", ".join(a.name for a in known),
    )


def by_id(identity: int) -> Algorithm | None:
    """The algorithm of an id, also one that has been unregistered since: a compiled graph may name it."""
    if identity not in _by_id:
        _by_id.update((a.id, a) for a in (*algorithms(), EPILOGUE))
    return _by_id.get(identity)


def default_of(operation: str) -> str:
    """The selector that `default` stands for: what a user made the default comes first."""
    chosen = [a.qualified for a in _users.values() if a.operation == operation and is_default(a)]
    return "|".join([*chosen, OPERATIONS[operation].default])


def is_default(algorithm: Algorithm) -> bool:
    return system().platforms[algorithm.platform] is None and platforms()[algorithm.platform].is_default(algorithm)


def system() -> System:
    """The machine this process runs on."""
    return System({name: platform.unavailable() for name, platform in platforms().items()})


def can_choose() -> bool:
    """Whether there is an algorithm besides torch's that can run here."""
    reasons = system().platforms
    return any(reasons[a.platform] is None for a in known() if a.platform != "torch")


def cannot_run(devices: Iterable[str]) -> dict[str, str]:
    """The platforms for these types of devices that cannot run here, and why."""
    wanted = set(devices)
    reasons = system().platforms
    return {name: reason for name, p in platforms().items() if p.device in wanted and (reason := reasons[name])}


def prepare(operations_and_devices: Iterable[tuple[str, str]]) -> None:
    """Builds what is not built yet of the algorithms for these operations and devices, together, and loads them."""
    wanted, known = set(operations_and_devices), algorithms()
    loads: list[Callable[[], None]] = []
    for platform in platforms().values():
        operations = {operation for operation, device in wanted if platform.device in (None, device)}
        if operations and platform.unavailable() is None:
            own = [a for a in known if a.platform == platform.name and a.operation in operations]
            loads.append(functools.partial(platform.load, own))
    if loads:
        # Those of one platform are built together, those of several at the same time.
        with ThreadPoolExecutor(len(loads)) as pool:
            for done in [pool.submit(load) for load in loads]:
                done.result()


_loading = threading.Lock()


def load_by_id(identity: int) -> None:
    """Loads the algorithm a compiled graph names; the core library calls this the first time it meets the id."""
    with _loading:
        algorithm = by_id(identity)
        if algorithm is not None:
            platforms()[algorithm.platform].load([algorithm])


core.on_load_algorithm(load_by_id, EPILOGUE.id)


def digest() -> str:
    """Changes with every kernel and every rule of who is chosen: part of what a compiled graph is cached under."""
    return repr([_shipped_digest(), *((a.id, a.user_supports is not None) for a in algorithms() if a.version)])


@functools.cache
def _shipped_digest() -> str:
    hasher = hashlib.sha256()
    for folder in (KERNELS, *(PACKAGE / name for name in ("ops", "passes", "selection"))):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            hasher.update(path.relative_to(folder.parent).as_posix().encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


def content_digest(algorithm: Algorithm) -> str:
    """Changes when the algorithm may give other numbers, or take another time."""
    if algorithm.version or algorithm.source is None:
        return algorithm.version
    return _source_digest(algorithm.source)


@functools.cache
def _source_digest(source: Path) -> str:
    files = [source, *(path for path in (KERNELS / "include").rglob("*") if path.is_file())]
    return sources.digest_of((path.name, path) for path in files)


def description(path: Path) -> str:
    """The comment that a kernel's source begins with, its first line; empty where it begins otherwise."""
    with path.open(errors="replace") as source:
        line = source.readline()
    return line.lstrip("/").strip() if line.startswith("//") else ""
