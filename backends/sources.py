"""What the core library is made of. setup.py loads this file by its path: it imports only the standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CORE_FOLDER = "core"
# Pinned, since PyTorch's own default differs between releases; kernels and core share it.
LANGUAGE = ("-std=c++20",)
# The core library is built for any CPU of the platform, ahead of time and at first use alike.
CORE_FLAGS = (*LANGUAGE, "-O3", "-g0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def digest_of(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 over (name, file) pairs: of the names and the contents, not of where the files lie."""
    hasher = hashlib.sha256()
    for name, path in sorted(files):
        content = path.read_bytes()
        hasher.update(f"{name}\0{len(content)}\0".encode())
        hasher.update(content)
    return hasher.hexdigest()


def core_sources(kernels: Path) -> list[Path]:
    """The files of the core library that are compiled, given the kernels folder."""
    return sorted((kernels / CORE_FOLDER).glob("*.cpp"))


def core_digest(kernels: Path) -> str:
    """What tells one core library from another: its sources, and the headers that it shares with kernels."""
    files = [path for path in (kernels / CORE_FOLDER).iterdir() if path.suffix in (".cpp", ".h")]
    files += [kernels / "include" / "ai3" / name for name in ("activation.h", "kernel.h", "vec.h")]
    return digest_of((path.relative_to(kernels).as_posix(), path) for path in files)


def core_flags(kernels: Path) -> list[str]:
    """The compiler's flags for the core library, its digest among them."""
    return [*CORE_FLAGS, f'-DAI3_SOURCE_DIGEST="{core_digest(kernels)}"']
