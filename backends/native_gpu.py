"""What the platforms of NVIDIA's GPUs share: the device that algorithms are asked about, and how old it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import abi, gpu
from .native import NativePlatform

if TYPE_CHECKING:
    from ..registry import Algorithm
    from ..selection import OpSpec

# 10 * major + minor: instructions for bfloat16 and for copies that need not be waited for.
OLDEST = 80


class GpuPlatform(NativePlatform):
    device = "cuda"
    bytes_per_nanosecond = 4000
    casts_parameters = True

    def load(self, algorithms: Sequence[Algorithm]) -> None:
        if _too_old() is None:
            super().load(algorithms)

    def supports(self, algorithm: Algorithm, spec: OpSpec) -> str | None:
        reason = _too_old() if spec.device == self.device else None
        return reason or super().supports(algorithm, spec)

    def args(self, algorithm: Algorithm, spec: OpSpec) -> abi.Args:
        return gpu.set_device(super().args(algorithm, spec))


def _too_old() -> str | None:
    """None where every device is new enough, else the reason."""
    oldest = min(gpu.compute_capabilities(), default=OLDEST)
    if oldest >= OLDEST:
        return None
    return f"needs compute capability {OLDEST / 10}, and a GPU here has {oldest / 10}"
