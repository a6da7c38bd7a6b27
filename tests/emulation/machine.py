"""Builds emulated libraries, and calls their tables as a GPU's would be called."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ai3_compile import registry
from ai3_compile.backends import abi, builder, cache, sources

from . import source

HERE = Path(__file__).parent
INCLUDES = (HERE / "include", builder.INCLUDE)
RUNTIME = tuple(HERE / f"{name}.cpp" for name in ("runtime", "ptx", "hopper", "order", "wgmma"))
FLAGS = ("-std=c++20", "-w", "-O2", "-fPIC", "-fvisibility=hidden")
# Accesses stay what the source says: none of two elements at once.
DEVICE_FLAGS = (
    *FLAGS,
    "-O1",
    "-fsanitize=thread",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    "-fno-store-merging",
)
DEFINES = ("-D__CUDACC__", "-D__CUDA_ARCH__=800")
_HOPPER = ("-D__CUDACC__", "-D__CUDA_ARCH__=900", "-D__CUDA_ARCH_FEAT_SM90_ALL")
ASCENDING, DESCENDING, SHUFFLED = ORDERS = range(3)


def unavailable() -> str | None:
    if not sys.platform.startswith("linux"):
        return "the emulation of CUDA needs Linux"
    reason = builder.no_compiler_reason()
    if reason is None and "clang" in builder.describe_compiler():
        return "the emulation of CUDA needs GCC"
    return reason


@dataclasses.dataclass
class Emulated:
    """A library's table, called with what calls for a GPU have besides."""

    library: ctypes.CDLL
    table: abi.Kernel
    sm: int = 80
    allow_tf32: bool = False
    max_workspace: int = -1

    def __post_init__(self) -> None:
        self.flags, self.fuses = self.table.flags, self.table.fuses
        self.plan_bytes, self.make_plan = self.table.plan_bytes, self.table.make_plan

    def on_gpu(self, args: abi.Args) -> abi.Args:
        args.sm, args.allow_tf32, args.max_workspace = self.sm, self.allow_tf32, self.max_workspace
        return args

    def supports(self, args: abi.Args) -> str | None:
        reason = self.table.supports(self.on_gpu(args))
        return None if reason is None else str(reason.decode())

    def packed_bytes(self, args: abi.Args) -> int:
        return int(self.table.packed_bytes(self.on_gpu(args))) if self.table.packed_bytes else 0

    def pack(self, args: abi.Args, to: int) -> None:
        self.table.pack(self.on_gpu(args), to)

    def workspace_bytes(self, args: abi.Args) -> int:
        return int(self.table.workspace_bytes(self.on_gpu(args))) if self.table.workspace_bytes else 0

    def run(self, args: abi.Args) -> None:
        self.table.run(self.on_gpu(args))

    def set_order(self, order: int, early: bool) -> None:
        """Of the threads, anew at every barrier, and whether copies are done at once or when they are waited for."""
        self.library.ai3_emulation_order(order, early)

    def launches(self) -> dict[str, int]:
        """How often each of its kernels has been launched."""
        kernel = self.library.ai3_emulation_kernel
        kernel.restype, kernel.argtypes = ctypes.c_char_p, [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
        found: dict[str, int] = {}
        times = ctypes.c_int64()
        while name := kernel(len(found), times):
            found[name.decode()] = times.value
        return found


def load(algorithms: Sequence[registry.Algorithm]) -> dict[registry.Algorithm, Emulated]:
    """The emulated algorithms; what is not in ai3's cache is built, several at a time."""
    _at_once(_object, RUNTIME)
    return {a: _opened(path) for a, path in zip(algorithms, _at_once(_library, algorithms))}


def load_hopper(algorithm: registry.Algorithm, part: int) -> Emulated:
    """The same for sm_90a, of one part of its device code (AI3_PART_... of ai3/cuda.h)."""
    _at_once(_object, RUNTIME)
    return dataclasses.replace(_opened(_library(algorithm, of_hopper(part), f"-hopper-{part}")), sm=90)


def of_hopper(part: int) -> tuple[str, ...]:
    return (*_HOPPER, f"-DAI3_PART={part}")


def load_changed(
    changes: Mapping[str, tuple[registry.Algorithm, str, str]], folder: Path, defines: Sequence[str] = DEFINES
) -> dict[str, Emulated]:
    """By a name of each change: an algorithm whose device code has one text replaced by another where it is first."""

    def make(name: str) -> Path:
        algorithm, found, instead = changes[name]

        def change(text: str) -> str:
            assert found in text, f"{found!r} is not there"
            return text.replace(found, instead, 1)

        return _compile(_source(algorithm), name, folder, change, defines)

    return {name: _opened(path) for name, path in zip(changes, _at_once(make, changes))}


def _at_once(make: Callable, items: Iterable) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(make, items))


def _source(algorithm: registry.Algorithm) -> Path:
    assert algorithm.source is not None
    return algorithm.source


def _opened(path: Path) -> Emulated:
    library = ctypes.CDLL(str(path))
    return Emulated(library, abi.kernel_table(library))


def _library(algorithm: registry.Algorithm, defines: Sequence[str] = DEFINES, of: str = "") -> Path:
    file, name = _source(algorithm), f"{builder.file_name(algorithm.label)}-emulated{of}"
    own = [*RUNTIME, Path(source.__file__), Path(__file__)]
    extra = {"emulation": sources.digest_of((path.name, path) for path in own)}
    request = builder.Request(name, (file,), (*DEVICE_FLAGS, *defines), INCLUDES, extra=extra)
    return cache.obtain(builder.key_of(request), lambda folder: _compile(file, name, folder, defines=defines))


def _object(file: Path) -> Path:
    """Of a part of the emulation, or of the host's part of a .cu file."""
    name = f"emulation-{file.parent.name}-{file.stem}"
    key = dataclasses.replace(builder.key_of(builder.Request(name, (file,), FLAGS, INCLUDES)), ending=".o")

    def make(folder: Path) -> Path:
        path = folder / f"{name}.o"
        _run(*_COMPILER, *FLAGS, *_INCLUDE_FLAGS, "-x", "c++", "-c", str(file), "-o", str(path))
        return path

    return cache.obtain(key, make)


def _compile(
    file: Path,
    name: str,
    folder: Path,
    change: Callable[[str], str] = lambda text: text,
    defines: Sequence[str] = DEFINES,
) -> Path:
    path, device, device_object = (folder / f"{name}{ending}" for ending in (".so", ".device.cpp", ".device.o"))
    text = _run(*_COMPILER, "-std=c++20", "-E", "-x", "c++", *defines, *_INCLUDE_FLAGS, str(file))
    device.write_text(source.rewrite(change(text)))
    _run(*_COMPILER, *DEVICE_FLAGS, "-c", str(device), "-o", str(device_object))
    objects = (device_object, _object(file), *map(_object, RUNTIME))
    _run(*_COMPILER, "-shared", "-o", str(path), *map(str, objects), "-ldl")
    return path


_COMPILER = shlex.split(os.environ.get("CXX") or "c++")
_INCLUDE_FLAGS = [f"-I{folder}" for folder in INCLUDES]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-8000:]}"
    return done.stdout
