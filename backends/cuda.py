"""Platform cuda: ai3's own kernels for NVIDIA GPUs, device code by NVRTC and the host's part by the C++ compiler."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int
from pathlib import Path
from typing import TYPE_CHECKING

from . import abi, builder, cache, gpu, nvrtc
from .native_gpu import GpuPlatform

if TYPE_CHECKING:
    from ..registry import Algorithm
    from ..selection import OpSpec


class CudaPlatform(GpuPlatform):
    name = "cuda"
    description = "CUDA kernels of ai3's own, compiled for this machine's GPU"
    ending = ".cu"

    def __init__(self) -> None:
        super().__init__()
        self._libraries_by_algorithm: dict[Algorithm, tuple[ctypes.CDLL, object]] = {}  # with what they call

    def unavailable(self) -> str | None:
        return gpu.unavailable() or nvrtc.unavailable() or builder.no_compiler_reason()

    def request(self, algorithm: Algorithm) -> builder.Request:
        assert algorithm.source is not None
        own = algorithm.build
        return builder.kernel_request(
            algorithm.label,
            (algorithm.source,),
            flags=() if own is None else own.flags,
            include_dirs=() if own is None else own.include_dirs,
            link_flags=("-ldl", *(() if own is None else own.link_flags)),
        )

    def load(self, algorithms: Sequence[Algorithm]) -> None:
        """Raises AlgorithmError for one of a user's that ends the process in which it is tried first, besides."""
        from .. import trial

        for algorithm in algorithms:
            if algorithm.build is not None and algorithm not in self._tables:
                # What does not compile is said before it is tried.
                builder.build_many([self.request(algorithm)])
                for sm in gpu.compute_capabilities():
                    device_code(algorithm, sm)
                trial.ensure(algorithm)
        super().load(algorithms)

    def opened(self, algorithm: Algorithm, library: ctypes.CDLL) -> None:
        library.ai3_set_device_code.argtypes = [c_int, c_int, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_char_p]
        library.ai3_set_device_code.restype = None
        library.ai3_device_code_part.argtypes = [ctypes.POINTER(abi.Args)]
        provider = _PROVIDER(functools.partial(_provide, algorithm, library))
        library.ai3_set_device_code_provider(provider)
        self._libraries_by_algorithm[algorithm] = library, provider

    def announce(self, algorithms: Sequence[Algorithm], spec: OpSpec) -> None:
        """Their device code for the current device is compiled in the background, if need be."""
        for algorithm in algorithms:
            library, _ = self._libraries_by_algorithm[algorithm]
            args = self.args(algorithm, spec)
            _compile_ahead(algorithm, args.sm, library.ai3_device_code_part(args))


_PROVIDER = ctypes.CFUNCTYPE(None, c_int, c_int)


def _provide(algorithm: Algorithm, library: ctypes.CDLL, sm: int, part: int) -> None:
    """Gives a library the device code that it asks for; ctypes would print an exception, and go on."""
    try:
        code = device_code(algorithm, sm, part)
        library.ai3_set_device_code(sm, part, code, len(code), None)
    except Exception as error:
        library.ai3_set_device_code(sm, part, b"", 0, str(error).encode())


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(builder.jobs(), thread_name_prefix="ai3-nvrtc")


@functools.cache
def _compile_ahead(algorithm: Algorithm, sm: int, part: int) -> None:
    """What fails here fails again, and is said, where the code is needed."""
    _background().submit(device_code, algorithm, sm, part)


def device_code(algorithm: Algorithm, sm: int, part: int = 0) -> bytes:
    """The cubin of a part of an algorithm's device code, as AI3_PART of cuda.h says, for a compute capability: from the
    cache or compiled into it."""
    source = algorithm.source
    assert source is not None
    name = "-".join([builder.file_name(algorithm.label), nvrtc.arch(sm), *([str(part)] if part else [])])
    folders = () if algorithm.build is None else algorithm.build.include_dirs
    flags = (*nvrtc.FLAGS, f"-DAI3_PART={part}")
    request = builder.Request(name, (source,), flags, include_dirs=(*folders, builder.INCLUDE))
    key = builder.device_key_of(request, nvrtc.version(), nvrtc.arch(sm))

    def make(folder: Path) -> Path:
        path = folder / f"{name}{key.ending}"
        path.write_bytes(nvrtc.compile(name, source, sm, flags, request.include_dirs))
        return path

    return cache.obtain(key, make).read_bytes()


PLATFORM = CudaPlatform()
