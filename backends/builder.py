"""Builds native sources into ai3's cache with torch.utils.cpp_extension, and knows the compiler and the CPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import kernels
from ..errors import BuildError, NoCompilerError
from . import cache, cmake, sources
from .abi import ABI_VERSION
from .cache import cache_clear, cache_dir, cache_entries, cache_state

__all__ = [
    "Request",
    "build",
    "build_core",
    "build_kernels",
    "build_many",
    "cache_clear",
    "cache_dir",
    "cache_entries",
    "cache_state",
    "core_digest",
    "cpu_flags",
    "cpu_isa",
    "describe_compiler",
    "key_of",
    "no_compiler_reason",
]

KERNELS = Path(kernels.__path__[0])
INCLUDE = KERNELS / "include"
KERNEL_FLAGS = (*sources.LANGUAGE, "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_HEADERS = (".h", ".hpp", ".hh", ".cuh", ".inc", ".inl")
_CUDA = ".cu"


@dataclass(frozen=True)
class Request:
    """One shared library to build. `extra` is whatever else it depends on; the files and flags are known already."""

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    include_dirs: tuple[Path, ...] = ()
    link_flags: tuple[str, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    cmake: Path | None = None
    foreign_dirs: tuple[Path, ...] = ()
    """Folders of others' headers: `extra` names their version, which stands for what is in them."""


def build(
    name: str,
    sources: Sequence[Path],
    *,
    flags: Sequence[str],
    include_dirs: Sequence[Path] = (),
    link_flags: Sequence[str] = (),
    key_extra: Mapping[str, str] | None = None,
) -> Path:
    """The shared library of these sources, from the cache or built into it. Raises a BuildError."""
    request = Request(name, tuple(sources), tuple(flags), tuple(include_dirs), tuple(link_flags), key_extra or {})
    return build_many([request])[0]


def build_many(requests: Sequence[Request]) -> list[Path]:
    """`build` for several libraries, as many at a time as there are cores (or MAX_JOBS says).

    Raises a BuildError for the first that fails, when those that had begun have ended.
    """
    if not requests:
        return []
    reason = no_compiler_reason()
    if reason is not None:
        raise NoCompilerError(name=requests[0].name, reason=reason)
    keys = [key_of(request) for request in requests]
    found = {key: cache.find(key) for key in keys}
    missing = {key: request for key, request in zip(keys, requests) if found[key] is None}
    if missing:
        _put_ninja_on_path()
        with ThreadPoolExecutor(min(jobs(), len(missing))) as pool:
            built = pool.map(lambda item: cache.obtain(item[0], functools.partial(_compile, item[1])), missing.items())
            found.update(zip(missing, built))
    return [path for path in (found[key] for key in keys) if path is not None]


def build_kernels(algorithms: Sequence[tuple[str, Path]]) -> list[Path]:
    """The libraries of algorithms for this CPU, from their labels ("ai3::conv2d[smm@cpp]") and source files."""
    return build_many([kernel_request(label, (source,)) for label, source in algorithms])


def kernel_request(
    label: str,
    sources: Sequence[Path],
    *,
    flags: Sequence[str] = (),
    include_dirs: Sequence[Path] = (),
    link_flags: Sequence[str] = (),
    cmake: Path | None = None,
    foreign_dirs: Sequence[Path] = (),
    extra: Mapping[str, str] | None = None,
) -> Request:
    """What builds one algorithm for this CPU: ai3's flags first, and its headers behind those that are given."""
    isa = cpu_isa()
    return Request(
        file_name(label),
        tuple(sources),
        (*KERNEL_FLAGS, *cpu_flags(isa), *flags),
        include_dirs=(*include_dirs, INCLUDE),
        link_flags=tuple(link_flags),
        extra={"isa": isa, **(extra or {})},
        cmake=cmake,
        foreign_dirs=tuple(foreign_dirs),
    )


def build_core() -> Path:
    """The core library. It is built against the headers of the PyTorch that is installed, so its version counts."""
    flags = sources.core_flags(KERNELS)
    extra = {"torch": torch.__version__}
    return build("core", sources.core_sources(KERNELS), flags=flags, include_dirs=[INCLUDE], key_extra=extra)


def core_digest() -> str:
    """The digest of the core library's sources, which a library built from them holds as a string."""
    return sources.core_digest(KERNELS)


def cpu_isa() -> str:
    """The vector instructions kernels are built for: what PyTorch uses (ATEN_CPU_CAPABILITY lowers both)."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")


def cpu_flags(isa: str) -> list[str]:
    """The compiler's flags for these vector instructions."""
    if isa == "avx512":
        return ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mtune=native"]
    if isa == "avx2":
        return ["-march=x86-64-v3", "-mtune=native"]
    return []


def no_compiler_reason() -> str | None:
    """None where native sources can be built here, else what is missing and how to get it."""
    compiler = _compiler()
    # CXX may hold a launcher and flags as well, as in "ccache g++".
    missing = [word for word in shlex.split(compiler)[:1] if shutil.which(word) is None]
    if missing or not compiler.strip():
        origin = "the environment variable CXX names it" if "CXX" in os.environ else "set CXX if it has another name"
        return (
            f"there is no C++ compiler: {compiler!r} is not a program on PATH ({origin}; "
            "to install one: `apt install g++`, `dnf install gcc-c++`, `xcode-select --install`)"
        )
    try:
        describe_compiler()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {compiler!r} does not tell its version: {error}"
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return "the program ninja is missing: `pip install ninja`"
    return None


def describe_compiler() -> str:
    """The compiler's version line and the machine it compiles for; the same wherever the compiler is installed."""
    return _identity(tuple(shlex.split(_compiler())))


def key_of(request: Request) -> cache.Key:
    """What the request's library depends on. Every header of its include folders and beside its sources counts."""
    extra = dict(request.extra)
    if request.cmake is not None:
        extra["cmake"] = cmake.digest(request.cmake)
    return cache.Key(
        name=request.name,
        sources=sources.digest_of((source.name, source) for source in request.sources),
        headers=sources.digest_of(_headers(request)),
        flags=_flags(request),
        link_flags=request.link_flags,
        compiler=describe_compiler(),
        abi=_abi(),
        extra=tuple(sorted(extra.items())),
    )


def device_key_of(request: Request, compiler: str, target: str) -> cache.Key:
    """What device code depends on, which another compiler makes for another machine."""
    return cache.Key(
        name=request.name,
        sources=sources.digest_of((source.name, source) for source in request.sources),
        headers=sources.digest_of(_headers(request)),
        flags=request.flags,
        link_flags=(),
        compiler=compiler,
        abi=target,
        extra=(),
        ending=".cubin",
    )


def digest_of_sources(request: Request) -> str:
    """Of what the user wrote: sources, headers and flags, whatever compiles them."""
    parts = (
        sources.digest_of((source.name, source) for source in request.sources),
        sources.digest_of(_headers(request)),
        cmake.digest(request.cmake) if request.cmake else "",
        request.flags,
        request.link_flags,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _headers(request: Request) -> list[tuple[str, Path]]:
    headers = [
        (path.relative_to(folder).as_posix(), path)
        for folder in request.include_dirs
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    for folder in sorted({source.parent for source in request.sources}):
        headers += [(path.name, path) for path in folder.iterdir() if path.suffix in _HEADERS]
    return headers


def _compile(request: Request, folder: Path) -> Path:
    if request.cmake is not None:
        return cmake.compile(
            request.name,
            request.cmake,
            request.sources,
            request.flags,
            request.include_dirs,
            request.link_flags,
            folder,
        )
    from torch.utils import cpp_extension  # only here: what is in the cache needs none of it

    link_flags = ["-shared", *request.link_flags]
    if sys.platform == "linux":
        link_flags.insert(1, "-Wl,--as-needed")  # kernels use nothing of the libraries that cpp_extension links
    includes = [f"-I{include}" for include in request.include_dirs]
    includes += [f"-isystem{include}" for include in request.foreign_dirs]
    try:
        # A library is what load() would also load, from this folder; loading changes the process's dlopen flags, which
        # threads must not. What it calls standalone it only builds.
        with _without_spaces(_for_host(request.sources, folder)) as source_files:
            path = cpp_extension.load(
                request.name,
                [str(source) for source in source_files],
                extra_cflags=[_quoted(flag) for flag in (*includes, *_flags(request))],
                extra_ldflags=[_quoted(flag) for flag in link_flags],
                build_directory=str(folder),
                is_python_module=False,
                is_standalone=True,
            )
    except (RuntimeError, OSError) as error:
        command, output = _failure(str(error))
        raise BuildError(name=request.name, command=command, output=output) from None
    if not Path(path).is_file():
        raise BuildError(
            name=request.name,
            command="ninja",
            output=f"the compiler {_compiler()!r} reported success, but wrote no {Path(path).name}",
        )
    return Path(path)


def _for_host(files: Sequence[Path], folder: Path) -> list[Path]:
    """The files as the C++ compiler is to see them: of a .cu file the part that is the host's."""
    found = []
    for file in files:
        if file.suffix == _CUDA:
            stub = folder / f"{file.stem}.cpp"
            stub.write_text(f'#include "{file.absolute()}"\n')
            file = stub
        found.append(file)
    return found


@contextlib.contextmanager
def _without_spaces(files: Sequence[Path]) -> Iterator[list[Path]]:
    """The files by names that cpp_extension can write into a ninja file: it escapes none."""
    if not any(" " in str(file) or "$" in str(file) for file in files):
        yield [file.absolute() for file in files]
        return
    with tempfile.TemporaryDirectory(prefix="ai3-") as folder:
        found = []
        for number, file in enumerate(files):
            parent = Path(folder) / str(number)
            parent.symlink_to(file.absolute().parent, target_is_directory=True)
            found.append(parent / file.name)
        if any(" " in file.name for file in files):
            raise BuildError(name=files[0].name, command="ninja", output="a source's name must not hold a space")
        yield found


def _failure(message: str) -> tuple[str, str]:
    """The command that failed and what it printed, out of ninja's output: the lines behind "FAILED:"."""
    _, failed, rest = message.partition("\nFAILED:")
    if not failed:
        return "ninja", message
    _, command, *output = rest.splitlines()
    return command.strip(), "\n".join(line for line in output if not line.startswith("ninja: ")).strip()


def _quoted(flag: str) -> str:
    """For the shell, and for ninja before it."""
    return shlex.quote(flag).replace("$", "$$")


def file_name(label: str) -> str:
    """What the files of an algorithm are called in the cache."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label.removeprefix("ai3::")).strip("-")


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"  # as torch.utils.cpp_extension.get_cxx_compiler


@functools.cache
def _identity(compiler: tuple[str, ...]) -> str:
    def ask(option: str) -> str:
        command = [*compiler, option]
        environment = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    version = ask("--version").strip().splitlines()
    return f"{version[0] if version else 'unknown'}, {ask('-dumpmachine').strip()}"


def _flags(request: Request) -> tuple[str, ...]:
    """The request's flags behind those of this compiler. CMake chooses a compiler of its own."""
    own = () if request.cmake is not None else _register_flags(tuple(shlex.split(_compiler())))
    return (*own, *request.flags)


@functools.cache
def _register_flags(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """What keeps GCC from leaving operands of a hot loop on the stack while registers are free (seen with GCC 12, where
    it halves the speed of a register block of 6 rows and 2 vectors). Other compilers do not know it."""
    flag = "-fira-region=all"
    try:
        subprocess.run([*compiler, flag, "-E", "-x", "c++", os.devnull], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    return (flag,)


@functools.cache
def _abi() -> str:
    """What a library must share with the process that loads it."""
    return "-".join(part for part in (sysconfig.get_platform(), *platform.libc_ver(), f"ai3.{ABI_VERSION}") if part)


def _put_ninja_on_path() -> None:
    """cpp_extension runs whatever ninja is on PATH, and without an activated virtual environment there may be none."""
    if shutil.which("ninja") is None:
        import ninja

        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{ninja.BIN_DIR}"


def jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    return max(1, int(text)) if text.isdigit() else os.cpu_count() or 1
