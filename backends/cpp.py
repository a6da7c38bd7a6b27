"""Platform cpp: plain C++ for the CPU it is built on, one shared library an algorithm."""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import core
from ..errors import KernelLoadError
from ..ops import OPERATIONS
from ..selection import costs
from . import abi, builder

if TYPE_CHECKING:
    from ..registry import Algorithm, Build
    from ..selection import OpSpec

log = logging.getLogger(__name__)

# Of the nominal core of ai3_kernel::cost.
BYTES_PER_NANOSECOND = 20
_DTYPES = {
    torch.float32: abi.FLOAT32,
    torch.float64: abi.FLOAT64,
    torch.float16: abi.FLOAT16,
    torch.bfloat16: abi.BFLOAT16,
}


class CppPlatform:
    name = "cpp"
    description = "C++ compiled for this machine's CPU"
    ending = ".cpp"

    def __init__(self) -> None:
        self._tables: dict[Algorithm, abi.Kernel] = {}
        self._libraries: list[ctypes.CDLL] = []  # a table points into its library
        self._lock = threading.Lock()

    def unavailable(self) -> str | None:
        return builder.no_compiler_reason()

    def load(self, algorithms: Sequence[Algorithm]) -> None:
        """Raises BuildError where one does not compile and KernelLoadError where its table belies its path."""
        with self._lock:
            missing = [a for a in algorithms if a not in self._tables]
            for algorithm, path in zip(missing, builder.build_many([_request(a) for a in missing])):
                self._tables[algorithm] = self._load(algorithm, path)
                log.debug("loaded %s from %s", algorithm.label, path)

    def _load(self, algorithm: Algorithm, path: Path) -> abi.Kernel:
        try:
            library = ctypes.CDLL(str(path))
            table = abi.kernel_table(library)
        except (OSError, AttributeError) as error:  # a symbol or a library that it needs is not there
            raise KernelLoadError(
                source=algorithm.source, message=f"it is built, but cannot be loaded: {error}"
            ) from None
        except ValueError:
            raise KernelLoadError(source=algorithm.source, message="ai3_get_kernel returned null") from None
        if table.abi_version != abi.ABI_VERSION:
            raise KernelLoadError(source=algorithm.source, message="it was built for another version of ai3/kernel.h")
        named = tuple((name or b"").decode(errors="replace") for name in (table.operation, table.algorithm))
        # The name of a user's algorithm is the one it is registered under.
        if named[0] != algorithm.operation or (algorithm.build is None and named[1] != algorithm.name):
            raise KernelLoadError(
                source=algorithm.source,
                message=f"its table says it is {named[1]!r} of {named[0]!r}, and it is used as {algorithm.name!r} of "
                f"{algorithm.operation!r}",
            )
        refusal = core.register_kernel(algorithm.id, ctypes.addressof(table), algorithm.label)
        if refusal is not None:
            raise KernelLoadError(source=algorithm.source, message=refusal)
        self._libraries.append(library)
        return table

    def table(self, algorithm: Algorithm) -> abi.Kernel:
        """The algorithm's table, loading it first where need be."""
        if algorithm not in self._tables:
            self.load([algorithm])
        return self._tables[algorithm]

    def supports(self, algorithm: Algorithm, spec: OpSpec) -> str | None:
        if spec.device != "cpu":
            return f"runs on the CPU, and this operation on {spec.device}"
        table = self.table(algorithm)
        reason = table.supports(args_of(spec, table.flags))
        return None if reason is None else reason.decode()

    def estimate(self, algorithm: Algorithm, spec: OpSpec) -> float | None:
        """What the kernel says of itself, without what its layout costs others; None where it says nothing."""
        table = self.table(algorithm)
        return float(table.cost(args_of(spec, table.flags))) if table.cost else None

    def cost(self, algorithm: Algorithm, spec: OpSpec) -> float | None:
        cost = self.estimate(algorithm, spec)
        if cost is None:
            return None
        if algorithm.build is None:
            cost *= costs.factor(algorithm.qualified, builder.cpu_isa(), spec)
        if self.table(algorithm).flags & (abi.NCHW | abi.NHWC) == abi.NCHW:
            # Images are channels_last between ai3's operations: this one has its input and output converted.
            elements = math.prod(spec.input_shape) + math.prod(spec.output_shape)
            cost += elements * spec.dtype.itemsize * 2 / BYTES_PER_NANOSECOND
        return cost

    def only_by_name(self, algorithm: Algorithm) -> str | None:
        reason = self.table(algorithm).only_by_name
        return None if reason is None else reason.decode()

    def workspace(self, algorithm: Algorithm, spec: OpSpec) -> int:
        table = self.table(algorithm)
        if not table.workspace_bytes:
            return 0
        args = args_of(spec, table.flags)
        args.runtime = ctypes.pointer(abi.Runtime(num_threads=torch.get_num_threads()))
        return int(table.workspace_bytes(args))

    def prefers_channels_last(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.NHWC)

    def writes_slices(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.STRIDED_OUTPUT)

    def reads_slices(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.STRIDED_INPUT)

    def applies_prologues(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.PROLOGUE)

    def adds_in_place(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.RESIDUAL_IN_PLACE)

    def is_default(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.DEFAULT)


def _request(algorithm: Algorithm) -> builder.Request:
    if algorithm.build is None:
        assert algorithm.source is not None
        return builder.kernel_request(algorithm.label, (algorithm.source,))
    return request_of(algorithm.label, algorithm.build)


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


def args_of(spec: OpSpec, flags: int) -> abi.Args:
    """The arguments of one call as far as its shapes tell, in the layout the algorithm prefers."""
    args = abi.Args(dtype=_DTYPES.get(spec.dtype, abi.OTHER_DTYPE), groups=1)
    channels_last = bool(flags & abi.NHWC)
    args.input = tensor_of(spec.input_shape, channels_last)
    args.output = tensor_of(spec.output_shape, channels_last)
    OPERATIONS[spec.operation].fill(spec, args)
    return args


def tensor_of(shape: Sequence[int], channels_last: bool = False) -> abi.Tensor:
    """A tensor of this shape without data, contiguous or channels_last."""
    tensor = abi.Tensor(ndim=len(shape))
    order = list(range(len(shape)))
    if channels_last and len(shape) == 4:
        order = [0, 2, 3, 1]
    stride = 1
    for dim in reversed(order):
        tensor.size[dim], tensor.stride[dim] = shape[dim], stride
        stride *= max(shape[dim], 1)
    return tensor


PLATFORM = CppPlatform()
