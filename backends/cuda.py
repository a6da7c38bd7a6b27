"""Platform cuda: ai3's own kernels for NVIDIA GPUs, device code by NVRTC and the host's part by the C++ compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import builder, cache, gpu, nvrtc
from .native_gpu import GpuPlatform

if TYPE_CHECKING:
    from ..registry import Algorithm


class CudaPlatform(GpuPlatform):
    name = "cuda"
    description = "CUDA kernels of ai3's own, compiled for this machine's GPU"
    ending = ".cu"

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
        set_code = library.ai3_set_device_code
        set_code.argtypes, set_code.restype = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint64], None
        for sm in gpu.compute_capabilities():
            code = device_code(algorithm, sm)
            set_code(sm, code, len(code))


def device_code(algorithm: Algorithm, sm: int) -> bytes:
    """The cubin of an algorithm for a compute capability, from the cache or compiled into it."""
    source = algorithm.source
    assert source is not None
    name = f"{builder.file_name(algorithm.label)}-{nvrtc.arch(sm)}"
    folders = () if algorithm.build is None else algorithm.build.include_dirs
    request = builder.Request(name, (source,), nvrtc.FLAGS, include_dirs=(*folders, builder.INCLUDE))
    key = builder.device_key_of(request, nvrtc.version(), nvrtc.arch(sm))

    def make(folder: Path) -> Path:
        path = folder / f"{name}{key.ending}"
        path.write_bytes(nvrtc.compile(name, source, sm, request.include_dirs))
        return path

    return cache.obtain(key, make).read_bytes()


PLATFORM = CudaPlatform()
