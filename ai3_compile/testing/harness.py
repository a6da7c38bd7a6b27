"""Runs one algorithm through the C ABI alone: guard bytes around every buffer, ranges in an unfriendly order."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from .. import registry
from ..backends import abi, gpu, native
from ..errors import KernelMemoryError
from ..selection import OpSpec

GUARD = 256
ALIGNMENT = 256
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERN = 0xA5
# As an element of any float: a NaN that no arithmetic makes.
UNWRITTEN = 0xFF


class Guarded:
    """Unwritten bytes on an aligned boundary between guards; `check` fails where something was written around them."""

    def __init__(self, name: str, size: int, device: torch.device | str = "cpu") -> None:
        self.name, self.size = name, size
        self.bytes = torch.full((size + 2 * GUARD + ALIGNMENT,), PATTERN, dtype=torch.uint8, device=device)
        self.start = GUARD + (-(self.bytes.data_ptr() + GUARD)) % ALIGNMENT
        self.address = self.bytes.data_ptr() + self.start
        self.bytes[self.start : self.start + size] = UNWRITTEN

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        return self.bytes[self.start : self.start + self.size].view(dtype)

    def check(self) -> None:
        before, after = self.bytes[: self.start], self.bytes[self.start + self.size :]
        if not bool((before == PATTERN).all()):
            raise KernelMemoryError(buffer=self.name, what="written before its start")
        if not bool((after == PATTERN).all()):
            raise KernelMemoryError(buffer=self.name, what="written behind its end")

    def check_written(self, dtype: torch.dtype, row: int, part: slice) -> None:
        """Of every `row` elements those of `part` have been written and no other: the rest is still as it was made."""
        rows = self.view(_BITS[dtype.itemsize]).reshape(-1, row)
        if not bool((rows[:, : part.start] == -1).all() and (rows[:, part.stop :] == -1).all()):
            raise KernelMemoryError(buffer=self.name, what="written between its pixels")
        bits = rows[:, part].flatten()
        left = int((bits == -1).sum())
        if left:
            first = int((bits == -1).nonzero()[0])
            what = f"{left} of {bits.numel()} elements not written, or copied from scratch memory that was not"
            raise KernelMemoryError(buffer=self.name, what=f"{what}; the first is element {first}")


@abi.ParallelFor
def _ranges_backwards(count: int, body: Callable[[int, int, int], None], argument: int) -> None:
    """Three ranges, the last one first: an algorithm may count on neither the order nor the number of ranges."""
    cuts = [count * i // 3 for i in range(4)]
    for begin, end in reversed(list(zip(cuts, cuts[1:]))):
        if begin < end:
            body(argument, begin, end)


def runtime(failures: list[str], threads: int) -> abi.Runtime:
    """What a kernel runs on; what it reports through `fail` is added to `failures`."""
    report = abi.Fail(lambda _, message: failures.append(message.decode(errors="replace")))
    return abi.Runtime(num_threads=threads, parallel_for=_ranges_backwards, fail=report)


def algorithms(operation: str) -> list[registry.Algorithm]:
    """The algorithms of an operation that run through the C ABI on this machine."""
    return [a for a in registry.of_operation(operation) if a.platform == "cpp"]


def native_platform(algorithm: registry.Algorithm) -> native.NativePlatform:
    platform = registry.platforms()[algorithm.platform]
    assert isinstance(platform, native.NativePlatform)
    return platform


def table_of(algorithm: registry.Algorithm) -> abi.Kernel:
    return native_platform(algorithm).table(algorithm)


def fuses(table: abi.Kernel, spec: OpSpec, has_residual: bool, activation: int) -> bool:
    """Whether the algorithm itself applies this residual and this activation."""
    if not table.flags & abi.EPILOGUE or not table.fuses:
        return bool(table.flags & abi.EPILOGUE)
    args = native.args_of(spec, table.flags)
    args.has_residual, args.activation = has_residual, activation
    return bool(table.fuses(gpu.set_device(args) if spec.device == "cuda" else args))


def pools(table: abi.Kernel, spec: OpSpec, activation: int) -> bool:
    """Whether a convolution takes in a max pooling of 2x2 pixels behind it."""
    if not table.pools or min(spec.output_shape[2:]) < 2:
        return False
    args = native.args_of(spec, abi.NHWC)
    args.activation, args.pools = activation, 1
    return bool(table.pools(gpu.set_device(args) if spec.device == "cuda" else args))


def run_kernel(
    table: abi.Kernel,
    spec: OpSpec,
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    layout: int | None = None,
    beside: tuple[int, int] = (0, 0),
    within: tuple[int, int] = (0, 0),
    prologue: tuple[torch.Tensor, torch.Tensor, int] | None = None,
    in_place: bool = False,
    threads: int = 3,
    allow_tf32: bool = False,
    key: torch.Tensor | None = None,
    pools: bool = False,
) -> torch.Tensor:
    """The output of one call, computed with the algorithm's own pack, plan and workspace between guards.

    `layout` is the one of the table's to use, where it has both; the preferred one if not given. `beside` are channels
    before and behind the output's own, where it is a slice of a larger image; `within` are those of the input, all NaN;
    `prologue` is a scale and a shift [C] and the number of an activation; with `in_place` the residual lies where the
    output is written; `threads` is how many the algorithm is told that there are. On a GPU the tensors are on it, and
    the residual and the activation are those that the algorithm `fuses`; `key` is the gradient that
    conv2d.grad_weight takes; with `pools` a convolution writes the largest of each 2x2 pixels. Raises
    KernelMemoryError where memory is written that is not the algorithm's to write, or left unwritten, RuntimeError with
    the message that the algorithm fails with.
    """
    flags = table.flags if layout is None else layout
    channels_last = bool(flags & abi.NHWC) and input.dim() == 4
    args = native.args_of(spec, flags)
    if input.is_cuda:
        gpu.set_device(args).stream = torch.cuda.current_stream().cuda_stream
        args.allow_tf32 = allow_tf32
    size = input.element_size()
    buffers: list[Guarded] = []
    failures: list[str] = []
    runs_on = runtime(failures, threads)

    def guarded(name: str, size_in_bytes: int, data: torch.Tensor | None = None) -> Guarded:
        buffer = Guarded(name, size_in_bytes, "cpu" if name == "plan" else input.device)
        if data is not None:
            flat = data.permute(0, 2, 3, 1) if data.dim() == 4 and name != "weight" and channels_last else data
            buffer.view(data.dtype).copy_(flat.reshape(-1))
        buffers.append(buffer)
        return buffer

    if any(within):
        n, c, h, w = input.shape
        held = guarded("input", n * h * w * (c + sum(within)) * size)
        pixels_of = held.view(input.dtype).reshape(n, h, w, c + sum(within))
        pixels_of[..., within[0] : within[0] + c] = input.permute(0, 2, 3, 1)
        args.input.data = held.address + within[0] * size
        args.input.stride[:4] = abi.tensor_of((n, c + sum(within), h, w), channels_last).stride[:4]
    else:
        args.input.data = guarded("input", input.numel() * size, input).address
    if prologue is not None:
        scale, shift, args.prologue_activation = prologue
        args.prologue_scale = guarded("prologue_scale", scale.numel() * scale.element_size(), scale).address
        args.prologue_shift = guarded("prologue_shift", shift.numel() * shift.element_size(), shift).address
        args.has_prologue = 1
    shape = (*spec.output_shape[:2], *(size // 2 for size in spec.output_shape[2:])) if pools else spec.output_shape
    args.pools = pools
    channels = shape[1] if channels_last else 1
    pixels, width = math.prod(shape) // channels, channels + sum(beside)
    output = guarded("output", pixels * width * size, residual if in_place else None)
    args.output.data = output.address + beside[0] * size
    if any(beside):
        n, _, h, w = spec.output_shape
        args.output.stride[:4] = abi.tensor_of((n, width, h, w), channels_last).stride[:4]
    args.activation = activation
    args.runtime = ctypes.pointer(runs_on)
    if weight is not None:
        args.weight.data = guarded("weight", weight.numel() * size, weight).address
    if key is not None:
        args.key.data = guarded("key", key.numel() * size, key).address
    if bias is not None:
        args.bias, args.has_bias = guarded("bias", bias.numel() * size, bias).address, 1
    if residual is not None:
        args.residual = abi.tensor_of(spec.output_shape, channels_last)
        args.residual.data = args.output.data
        if not in_place:
            args.residual.data = guarded("residual", residual.numel() * size, residual).address
        args.has_residual = 1
    if table.packed_bytes and (packed := table.packed_bytes(args)):
        args.packed = guarded("packed", packed).address
        table.pack(args, args.packed)
        # Packed weights are all an algorithm may read of them afterwards.
        args.weight.data = None
    if table.plan_bytes and (plan := table.plan_bytes(args)):
        args.plan = guarded("plan", plan).address
        table.make_plan(args, args.plan)
    if table.workspace_bytes and (workspace := table.workspace_bytes(args)):
        args.workspace = guarded("workspace", workspace).address
    scratch = ("output", "packed", "plan", "workspace")
    inputs = {b.name: b.bytes.clone() for b in buffers if b.name not in scratch}
    table.run(args)
    if input.is_cuda:
        torch.cuda.synchronize()
    for buffer in buffers:
        buffer.check()
        if buffer.name in inputs and not torch.equal(buffer.bytes, inputs[buffer.name]):
            raise KernelMemoryError(buffer=buffer.name, what="written, and it is an input")
    if failures:
        raise RuntimeError(failures[0])
    own = slice(beside[0], beside[0] + channels)
    output.check_written(input.dtype, width, own)
    flat = output.view(input.dtype).reshape(pixels, width)[:, own]
    if channels_last:
        n, c, h, w = shape
        return flat.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return flat.reshape(shape).clone()
