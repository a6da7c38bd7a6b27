"""What platforms of compiled algorithms share: one shared library an algorithm, and its table of the C ABI."""

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
from ..ops.activations import NUMBERS
from . import abi, builder

if TYPE_CHECKING:
    from ..registry import Algorithm
    from ..selection import OpSpec, Use

log = logging.getLogger(__name__)

_DTYPES = {
    torch.float32: abi.FLOAT32,
    torch.float64: abi.FLOAT64,
    torch.float16: abi.FLOAT16,
    torch.bfloat16: abi.BFLOAT16,
}


class NativePlatform:
    """A platform whose algorithms are shared libraries, for one type of device."""

    name: str
    description: str
    ending: str
    device: str
    bytes_per_nanosecond: float
    """Of the nominal machine of ai3_kernel::cost on this platform: what a conversion of layouts is counted at."""
    casts_parameters = False

    def __init__(self) -> None:
        self._tables: dict[Algorithm, abi.Kernel] = {}
        self._libraries: list[ctypes.CDLL] = []  # a table points into its library
        self._lock = threading.Lock()

    def unavailable(self) -> str | None:
        raise NotImplementedError

    def request(self, algorithm: Algorithm) -> builder.Request:
        """What builds the algorithm's library."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Loads what this platform's libraries need before they can be loaded."""

    def opened(self, algorithm: Algorithm, library: ctypes.CDLL) -> None:
        """Hands a library that has just been loaded what it needs besides."""

    def load(self, algorithms: Sequence[Algorithm]) -> None:
        """Raises BuildError where one does not compile and KernelLoadError where its table belies its path."""
        with self._lock:
            missing = [a for a in algorithms if a not in self._tables]
            if missing:
                self.prepare()
            for algorithm, path in zip(missing, builder.build_many([self.request(a) for a in missing])):
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
        self.opened(algorithm, library)
        refusal = core.register_kernel(algorithm.id, ctypes.addressof(table), algorithm.label, self.device)
        if refusal is not None:
            raise KernelLoadError(source=algorithm.source, message=refusal)
        self._libraries.append(library)
        return table

    def table(self, algorithm: Algorithm) -> abi.Kernel:
        """The algorithm's table, loading it first where need be."""
        if algorithm not in self._tables:
            self.load([algorithm])
        return self._tables[algorithm]

    def args(self, algorithm: Algorithm, spec: OpSpec) -> abi.Args:
        """The arguments of one call as far as its shapes tell, in the layout the algorithm prefers."""
        return args_of(spec, self.table(algorithm).flags)

    def supports(self, algorithm: Algorithm, spec: OpSpec) -> str | None:
        if spec.device != self.device:
            return f"runs on {_PLACES.get(self.device, self.device)}, and this operation on {spec.device}"
        reason = self.table(algorithm).supports(self.args(algorithm, spec))
        return None if reason is None else reason.decode()

    def estimate(self, algorithm: Algorithm, spec: OpSpec) -> float | None:
        """What the kernel says of itself, without what its layout costs others; None where it says nothing."""
        table = self.table(algorithm)
        return float(table.cost(self.args(algorithm, spec))) if table.cost else None

    def corrected(self, algorithm: Algorithm, spec: OpSpec, estimate: float) -> float:
        """The estimate as measurements of the algorithm correct it."""
        return estimate

    def cost(self, algorithm: Algorithm, spec: OpSpec) -> float | None:
        cost = self.estimate(algorithm, spec)
        if cost is None:
            return None
        cost = self.corrected(algorithm, spec, cost)
        flags = self.table(algorithm).flags & (abi.NCHW | abi.NHWC)
        if flags and not flags & (abi.NHWC if _is_channels_last(spec) else abi.NCHW):
            # It has its input and output converted.
            elements = math.prod(spec.input_shape) + math.prod(spec.output_shape)
            cost += elements * spec.dtype.itemsize * 2 / self.bytes_per_nanosecond
        return cost

    def only_by_name(self, algorithm: Algorithm) -> str | None:
        reason = self.table(algorithm).only_by_name
        return None if reason is None else reason.decode()

    def workspace(self, algorithm: Algorithm, spec: OpSpec) -> int:
        table = self.table(algorithm)
        if not table.workspace_bytes:
            return 0
        args = self.args(algorithm, spec)
        args.runtime = ctypes.pointer(abi.Runtime(num_threads=torch.get_num_threads()))
        return int(table.workspace_bytes(args))

    def search(self, algorithms: Sequence[Algorithm], spec: OpSpec, use: Use) -> None:
        """Nothing to search: an algorithm has one way."""

    def announce(self, algorithms: Sequence[Algorithm], spec: OpSpec) -> None:
        """Nothing to make ready."""

    def prefers_channels_last(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.NHWC)

    def writes_slices(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.STRIDED_OUTPUT)

    def reads_slices(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.STRIDED_INPUT)

    def applies_prologues(self, algorithm: Algorithm, activation: int) -> bool:
        flags = self.table(algorithm).flags
        if flags & abi.PROLOGUE_RELU and activation > NUMBERS["relu"]:
            return False
        return bool(flags & abi.PROLOGUE)

    def pools(self, algorithm: Algorithm, spec: OpSpec, activation: int) -> bool:
        table = self.table(algorithm)
        if not table.pools or spec.device != self.device:
            return False
        args = self.args(algorithm, spec)
        args.activation, args.pools = activation, 1
        return bool(table.pools(args))

    def adds_in_place(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.RESIDUAL_IN_PLACE)

    def is_default(self, algorithm: Algorithm) -> bool:
        return bool(self.table(algorithm).flags & abi.DEFAULT)


_PLACES = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}


def args_of(spec: OpSpec, flags: int) -> abi.Args:
    """The arguments of one call as far as its shapes tell, in the layout that an algorithm of these flags prefers."""
    args = abi.Args(dtype=_DTYPES.get(spec.dtype, abi.OTHER_DTYPE), groups=1, max_workspace=-1)
    args.allow_tf32 = spec.allow_tf32
    channels_last = bool(flags & abi.NHWC) and not (flags & abi.NCHW and not _is_channels_last(spec))
    args.input = abi.tensor_of(spec.input_shape, channels_last)
    args.output = abi.tensor_of(spec.output_shape, channels_last)
    OPERATIONS[spec.operation].fill(spec, args)
    return args


def _is_channels_last(spec: OpSpec) -> bool:
    """The layout of the images around an operation: between ai3's own they are channels_last, and gradients say how
    the graph has them."""
    return bool(dict(spec.attributes).get("channels_last", True))
