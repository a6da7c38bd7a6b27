"""Platform cpp: plain C++ for the CPU it is built on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..selection import costs
from . import builder
from .native import NativePlatform

if TYPE_CHECKING:
    from ..registry import Algorithm, Build
    from ..selection import OpSpec


class CppPlatform(NativePlatform):
    name = "cpp"
    description = "C++ compiled for this machine's CPU"
    ending = ".cpp"
    device = "cpu"
    bytes_per_nanosecond = 20

    def unavailable(self) -> str | None:
        return builder.no_compiler_reason()

    def request(self, algorithm: Algorithm) -> builder.Request:
        if algorithm.build is None:
            assert algorithm.source is not None
            return builder.kernel_request(algorithm.label, (algorithm.source,))
        return request_of(algorithm.label, algorithm.build)

    def corrected(self, algorithm: Algorithm, spec: OpSpec, estimate: float) -> float:
        if algorithm.build is not None:
            return estimate
        return estimate * costs.factor(algorithm.qualified, builder.cpu_isa(), spec)


def request_of(label: str, build: Build) -> builder.Request:
    """What builds an algorithm that a user added."""
    return builder.kernel_request(
        label,
        build.sources,
        flags=build.flags,
        include_dirs=build.include_dirs,
        link_flags=build.link_flags,
        cmake=build.cmake,
    )


PLATFORM = CppPlatform()
