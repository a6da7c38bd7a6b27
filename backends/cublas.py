"""Platform cublas: NVIDIA's products of matrices, from the cuBLASLt that PyTorch has loaded."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from . import builder, gpu
from .native_gpu import GpuPlatform

if TYPE_CHECKING:
    from ..registry import Algorithm

_LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")


class CublasPlatform(GpuPlatform):
    name = "cublas"
    description = "NVIDIA's cuBLASLt, as PyTorch has loaded it"
    ending = ".cublas.cpp"

    def unavailable(self) -> str | None:
        return gpu.unavailable() or _missing() or builder.no_compiler_reason()

    def request(self, algorithm: Algorithm) -> builder.Request:
        assert algorithm.source is not None
        return builder.kernel_request(
            algorithm.label,
            (algorithm.source,),
            link_flags=("-ldl",),
            extra={"cuda": str(torch.version.cuda)},
        )


@functools.cache
def _missing() -> str | None:
    """None where cuBLASLt can be loaded, else the reason."""
    if gpu.library(*_LIBRARIES) is None:
        return f"cuBLASLt cannot be loaded ({_LIBRARIES[0]}): `pip install nvidia-cublas` has it"
    return None


PLATFORM = CublasPlatform()
