"""Algorithms of the user's own: registered by a call, or found in a folder that the user names."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import custom, registry
from .backends import builder, cpp
from .errors import OptionValueError, RegistrationError
from .registry import Algorithm, Build
from .selection import OpSpec
from .selection.selector import POLICIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT = "AI3_CUSTOM"
HEADERS = Path(custom.__path__[0])
_CXX = (".cpp", ".cc", ".cxx", ".c++")
_CUDA = ".cu"

Supports = Callable[[OpSpec], "str | None"]


def register_algorithm(
    operation: str,
    name: str,
    sources: str | Path | Sequence[str | Path] | Callable[..., Any],
    *,
    flags: Sequence[str] = (),
    include_dirs: Sequence[str | Path] = (),
    libraries: Sequence[str | Path] = (),
    supports: Supports | None = None,
) -> Algorithm:
    """Adds an algorithm to an operation: from now on it can be named in every selector, compared and checked.

    `sources` is one of:

    - C++ files, which export a table as `ai3/kernel.h` describes (docs/your-own-algorithm.md). They are compiled now,
      with `flags`, `include_dirs` and `libraries` (names as for `-l`, or paths) added. A `custom.cmake` beside the
      first of them is included by the CMake project that then builds them;
    - a CUDA file (`.cu`), for NVIDIA GPUs: as ai3's own it is compiled twice, for the GPU by NVRTC and for the host by
      the C++ compiler, which sees what is outside of `#ifdef __CUDACC__` (docs/gpu.md);
    - a `CMakeLists.txt` whose target `ai3_algorithm` is such a library;
    - a Python function, called as the function of the same name in torch.nn.functional is, with positional arguments:
      conv2d(input, weight, bias, stride, padding, dilation, groups), linear(input, weight, bias),
      maxpool2d(input, kernel_size, stride, padding, dilation, ceil_mode),
      avgpool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override),
      adaptiveavgpool2d(input, output_size), relu(input), flatten(input, start_dim, end_dim).
      It may launch Triton kernels. Pairs are (height, width). Gradients are PyTorch's, whatever the function does.

    `supports(op)` may narrow the domain: it gets the OpSpec and returns None, or the reason in a few words.

    Raises RegistrationError for a name that is taken or cannot be one and for sources that are not there, BuildError
    with the compiler's words for sources that do not compile, UnknownOperationError for the operation.
    """
    registry.check_operation(operation)
    _check_name(operation, name)
    taken = next((a for a in registry.of_operation(operation) if a.name == name), None)
    if taken is not None:
        way_out = (
            f"ai3.unregister_algorithm({operation!r}, {name!r}) removes it"
            if taken in registry.users()
            else "take another name: this one is ai3's own"
        )
        raise RegistrationError(
            operation=operation, name=name, message=f"there is one already ({taken.description}); {way_out}"
        )
    if supports is not None and not callable(supports):
        raise RegistrationError(
            operation=operation, name=name, message=f"supports must be a function, not {supports!r}"
        )

    if isinstance(sources, (str, Path)) or not callable(sources):
        build = _build(operation, name, sources, flags, include_dirs, libraries)
        algorithm = _compiled(operation, name, build, supports)
    elif flags or include_dirs or libraries:
        raise RegistrationError(
            operation=operation, name=name, message="flags, include_dirs and libraries are for C++ sources"
        )
    elif type(sources).__module__.partition(".")[0] == "triton":
        raise RegistrationError(
            operation=operation,
            name=name,
            message="a Triton kernel does not say its grid: pass a Python function that allocates the output and "
            "launches the kernel, as kernel[grid](...)",
        )
    else:
        algorithm = Algorithm(
            operation=operation,
            name=name,
            platform="python",
            description=f"Python function {getattr(sources, '__qualname__', sources)}",
            source=None,
            function=sources,
            user_supports=supports,
            version=f"/{_of_this_process()}",
        )
    registry.platforms()[algorithm.platform].load([algorithm])
    registry.add(algorithm)
    return algorithm


def _check_name(operation: str, name: object) -> None:
    if not isinstance(name, str) or not name.strip() or name != name.strip() or set(name) & set("@|\n"):
        raise RegistrationError(
            operation=operation, name=name, message="a name is a text without '@', '|' or spaces around it"
        )
    if name in (*POLICIES, "torch"):
        raise RegistrationError(
            operation=operation, name=name, message="this name has a meaning of its own in selectors"
        )


def _of_this_process() -> str:
    """A function has no identity that outlives the process: nothing compiled with it may be found by another one."""
    return f"{uuid.uuid4().hex[:16]}"


def unregister_algorithm(operation: str, name: str) -> None:
    """Takes an algorithm of the user's own out again; graphs that were compiled with it keep it.

    Raises UnknownAlgorithmError where there is none of this name, RegistrationError where it is one of ai3's.
    """
    algorithm = registry.find(operation, name)
    if algorithm not in registry.users():
        raise RegistrationError(operation=operation, name=name, message="it is ai3's own, and stays")
    registry.remove(algorithm)


def _build(
    operation: str,
    name: str,
    sources: Any,
    flags: Sequence[str],
    include_dirs: Sequence[str | Path],
    libraries: Sequence[str | Path],
) -> Build:
    def refuse(message: str) -> RegistrationError:
        return RegistrationError(operation=operation, name=name, message=message)

    if isinstance(sources, (str, Path)):
        sources = [sources]
    if not isinstance(sources, Sequence) or not sources or not all(isinstance(s, (str, Path)) for s in sources):
        raise refuse(f"sources must be a file, several files or a function, not {sources!r}")
    for option, value in (("flags", flags), ("include_dirs", include_dirs), ("libraries", libraries)):
        if isinstance(value, (str, Path)) or not all(isinstance(v, (str, Path)) for v in value):
            raise refuse(f"{option} must be a sequence of texts, not {value!r}")
    paths = tuple(Path(source).expanduser().resolve() for source in sources)
    for path in paths:
        if not path.is_file():
            raise refuse(f"there is no file {path}")
    cmake = paths[0].with_name("custom.cmake")
    if paths[0].name == "CMakeLists.txt":
        cmake = paths[0]
    elif paths[0].suffix == _CUDA:
        cmake = Path()
        if len(paths) > 1:
            raise refuse("a CUDA algorithm is one .cu file, and the headers that it includes")
        if (reason := registry.platforms()["cuda"].unavailable()) is not None:
            raise refuse(f"{paths[0].name} is for NVIDIA GPUs: {reason}")
    elif wrong := [path for path in paths if path.suffix not in _CXX]:
        raise refuse(f"{wrong[0].name} is not a C++ source ({', '.join(_CXX)}), a CUDA file nor a CMakeLists.txt")
    links = [str(library) if os.sep in str(library) else f"-l{library}" for library in libraries]
    return Build(
        sources=paths,
        flags=tuple(map(str, flags)),
        include_dirs=tuple(Path(folder).expanduser().resolve() for folder in include_dirs),
        link_flags=tuple(links),
        cmake=cmake if cmake.is_file() else None,
    )


def _compiled(operation: str, name: str, build: Build, supports: Supports | None) -> Algorithm:
    source = build.sources[0]
    digest = builder.digest_of_sources(cpp.request_of(f"{operation}-{name}", build))
    if supports is not None:
        digest += _of_this_process()
    return Algorithm(
        operation=operation,
        name=name,
        platform=_platform_of(source),
        description=registry.description(source) or f"C++ source {source.name}",
        source=source,
        build=build,
        user_supports=supports,
        version=f"/{digest}",
    )


def _platform_of(source: Path) -> str:
    return "cuda" if source.suffix == _CUDA else "cpp"


def folder() -> Path | None:
    """The folder of the user's own algorithms: what AI3_CUSTOM names, else `custom` under [tool.ai3] in the nearest
    pyproject.toml above the working directory; None where neither names one.

    Raises OptionValueError where what is named is no folder, or pyproject.toml cannot be read.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        path, origin = Path(named).expanduser(), ENVIRONMENT
    else:
        here = Path.cwd()
        project = next((p for d in (here, *here.parents) if (p := d / "pyproject.toml").is_file()), None)
        if project is None:
            return None
        try:
            setting = tomllib.loads(project.read_text()).get("tool", {}).get("ai3", {}).get("custom")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise OptionValueError(name=str(project), expected="a file in TOML", found=str(error)) from error
        if setting is None:
            return None
        path, origin = project.parent / str(setting), f"[tool.ai3] custom in {project}"
    if not path.is_dir():
        raise OptionValueError(name=origin, expected="a folder", found=f"{str(path)!r}, which is none")
    return path.resolve()


_folder_state: object = None
_from_folder: list[Algorithm] = []


def _read_folder() -> None:
    """Brings the registry up to date with the folder: `<operation>.hpp` is the algorithm `custom` of the operation,
    `<operation>/<algorithm>.cpp` and `.cu` are what such files are in ai3's own kernels folder."""
    global _folder_state
    here = folder()
    files = [] if here is None else sorted(f for f in here.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    state = [(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    if state == _folder_state or (not state and not _from_folder):
        return
    for algorithm in _from_folder:
        registry.remove(algorithm)
    _from_folder.clear()
    _folder_state = None  # an error below is raised again at the next look
    cmake = Path() if here is None else here / "custom.cmake"
    for file in files:
        is_source = file.suffix in (*_CXX, _CUDA)
        operation = file.parent.name if is_source else file.stem
        if here is None or operation not in registry.OPERATIONS or not (is_source or file.suffix == ".hpp"):
            continue
        if file.suffix == ".hpp" and file.parent == here:
            name = "custom"
            adapter = HEADERS / "adapter" / f"{operation}.cpp"
            build = Build((adapter,), include_dirs=(here, HEADERS / "include", HEADERS / "adapter"))
        elif is_source and file.parent.parent == here:
            name, build = file.stem.replace("_", " "), Build((file,), include_dirs=(here,))
        else:
            continue
        _check_name(operation, name)
        if any(a.operation == operation and a.name == name for a in (*registry.shipped(), *registry.users())):
            raise RegistrationError(
                operation=operation, name=name, message=f"the name is taken; give {file} another one"
            )
        if cmake.is_file() and file.suffix != _CUDA:
            build = Build(build.sources, include_dirs=build.include_dirs, cmake=cmake)
        version = f"/{builder.digest_of_sources(cpp.request_of(f'{operation}-{name}', build))}"
        text = (is_source and registry.description(file)) or f"your own, {file.name}"
        algorithm = Algorithm(operation, name, _platform_of(file), text, file, build, version=version)
        registry.add(algorithm)
        _from_folder.append(algorithm)
    _folder_state = state


registry.on_list(_read_folder)
