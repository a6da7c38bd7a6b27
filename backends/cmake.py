"""Builds a user's algorithm with CMake, where it needs libraries that find_package finds."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .. import custom
from ..errors import BuildError, NoCompilerError
from . import sources

TARGET = "ai3_algorithm"
PROJECT = "CMakeLists.txt"
_GENERATED = Path(custom.__path__[0]) / PROJECT


def digest(cmake: Path) -> str:
    """Of all that a CMake build may read: a project of the user's own with its whole folder, or one custom.cmake."""
    files = (
        [path for path in cmake.parent.rglob("*") if path.is_file()] if cmake.name == PROJECT else [cmake, _GENERATED]
    )
    return sources.digest_of((path.name, path) for path in files)


def compile(
    name: str,
    cmake: Path,
    source_files: Sequence[Path],
    flags: Sequence[str],
    include_dirs: Sequence[Path],
    link_flags: Sequence[str],
    folder: Path,
) -> Path:
    """The library of the target `ai3_algorithm`, built in `folder`. Raises BuildError with CMake's own words."""
    program = shutil.which("cmake")
    if program is None:
        raise NoCompilerError(name=name, reason=f"{cmake.name} needs the program cmake: `pip install cmake`")
    project = cmake.parent if cmake.name == PROJECT else _GENERATED.parent
    output = folder / "out"
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
        "AI3_SOURCES": ";".join(map(str, source_files)),
        "AI3_INCLUDE_DIRS": ";".join(map(str, include_dirs)),
        "AI3_FLAGS": ";".join(flags),
        "AI3_CUSTOM_CMAKE": str(cmake),
        "CMAKE_CXX_STANDARD_LIBRARIES": " ".join(link_flags),
    }
    configure = [program, "-S", str(project), "-B", str(folder / "cmake")]
    configure += [f"-D{key}={value}" for key, value in definitions.items()]
    for command in (configure, [program, "--build", str(folder / "cmake"), "--target", TARGET]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            raise BuildError(name=name, command=" ".join(command), output=f"{ran.stdout}{ran.stderr}".strip())
    built = sorted(path for path in output.rglob(f"*{TARGET}*") if path.is_file())
    if not built:
        raise BuildError(
            name=name,
            command=" ".join(command),
            output=f"the project built no library of the target {TARGET}: add_library({TARGET} MODULE ...)",
        )
    return built[0]
