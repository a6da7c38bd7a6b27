"""Platform cudnn: NVIDIA's convolutions, each by its name, from the cuDNN that PyTorch has loaded."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import KernelLoadError
from ..ops import OPERATIONS
from . import abi, builder, cudnn_search, gpu
from .native_gpu import GpuPlatform

if TYPE_CHECKING:
    from ..registry import Algorithm
    from ..selection import OpSpec, Use

AUTO = "auto"
FOLDER = builder.KERNELS / "cudnn"


class CudnnPlatform(GpuPlatform):
    name = "cudnn"
    description = "NVIDIA's cuDNN, as PyTorch has loaded it"
    ending = ".cudnn.cpp"

    def unavailable(self) -> str | None:
        return gpu.unavailable() or _missing() or builder.no_compiler_reason()

    def prepare(self) -> None:
        support()

    def opened(self, algorithm: Algorithm, library: ctypes.CDLL) -> None:
        library.ai3_set_support.argtypes = [ctypes.c_void_p]
        library.ai3_set_support(support().ai3_cudnn_support())

    def request(self, algorithm: Algorithm) -> builder.Request:
        assert algorithm.source is not None
        # Its headers count: a table's library and the support library share their structs.
        return builder.kernel_request(algorithm.label, (algorithm.source,), include_dirs=(FOLDER,))

    def search(self, algorithms: Sequence[Algorithm], spec: OpSpec, use: Use) -> None:
        """`auto` is measured with the fastest of its plans."""
        for algorithm in algorithms:
            if spec.operation == "conv2d" and algorithm.name == AUTO:
                search([_call(algorithm, spec, use)])


def _call(algorithm: Algorithm, spec: OpSpec, use: Use) -> cudnn_search.Call:
    """The call that a use of the operation makes."""
    shapes: list[list[Any]] = []

    def described(shape: tuple[int, ...], channels_last: bool) -> list[Any]:
        tensor = abi.tensor_of(shape, channels_last)
        strides = list(tensor.stride[: len(shape)])
        return ["like", list(shape), strides, str(spec.dtype).removeprefix("torch.")]

    operation, attributes = OPERATIONS[spec.operation], dict(spec.attributes)
    bias = described(spec.weight.shape[:1], False) if spec.bias is not None or use.has_norm else None
    operands = (described(spec.input_shape, use.in_graph), described(spec.weight.shape, False), bias)
    args, kwargs = operation.arguments(*operands, attributes, algorithm.id, True)
    names = [argument.name for argument in operation.overload._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    given |= {"channels_last": use.in_graph, "activation": use.activation}
    if use.residual:
        given["residual"] = described(spec.output_shape, use.in_graph)
    for name, value in given.items():
        shapes.append([name, *(value if isinstance(value, list) else ["value", value])])
    return operation.op_name.removeprefix("ai3::"), shapes


@functools.cache
def _missing() -> str | None:
    """None where cuDNN and its headers are there, else what is not."""
    if not torch.backends.cudnn.is_available():
        return "PyTorch has no cuDNN"
    if gpu.headers("cudnn.h") is None:
        return "the header cudnn.h is missing: `pip install nvidia-cudnn-cu13` has it (cu12 for CUDA 12)"
    if gpu.headers("cuda_runtime_api.h") is None:
        return "the header cuda_runtime_api.h is missing: `pip install nvidia-cuda-runtime` has it"
    return None


@functools.cache
def support() -> ctypes.CDLL:
    """What all the algorithms of the platform call: handles, plans, and the functions of cuDNN."""
    torch.cuda.init()
    foreign = [folder for name in ("cudnn.h", "cuda_runtime_api.h") if (folder := gpu.headers(name)) is not None]
    request = builder.kernel_request(
        "cudnn",
        sorted(FOLDER.glob("*.cpp")),
        link_flags=("-ldl",),
        foreign_dirs=(*foreign, gpu.SHIM),
        extra={"cudnn": str(torch.backends.cudnn.version()), "cuda": str(torch.version.cuda)},
    )
    (path,) = builder.build_many([request])
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelLoadError(source=FOLDER, message=f"it is built, but cannot be loaded: {error}") from None
    library.ai3_cudnn_support.restype = ctypes.c_void_p
    library.ai3_cudnn_message.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.ai3_cudnn_message.restype = ctypes.c_int64
    library.ai3_cudnn_key.argtypes = [ctypes.POINTER(abi.Args), ctypes.c_char_p, ctypes.c_int64]
    library.ai3_cudnn_key.restype = ctypes.c_int64
    library.ai3_cudnn_search.restype = ctypes.c_int64
    for key, plan in cudnn_search.stored():
        library.ai3_cudnn_set_plan(key.encode(), plan.encode())
    return library


def message() -> str:
    """What cuDNN said last."""
    text = ctypes.create_string_buffer(4096)
    support().ai3_cudnn_message(text, len(text))
    return text.value.decode(errors="replace")


def key_of(args: ctypes.Array[abi.Args] | abi.Args) -> str:
    """What the plan of a call is stored under."""
    text = ctypes.create_string_buffer(4096)
    support().ai3_cudnn_key(args, text, len(text))
    return text.value.decode()


def search(calls: Sequence[cudnn_search.Call], max_workspace: int | None = None) -> None:
    """Finds the fastest plans for these calls of `auto`, which then runs them."""
    settings = [
        torch.cuda.current_device(),
        int(gpu.allows_tf32(convolves=True)),
        int(gpu.is_deterministic()),
        -1 if max_workspace is None else max_workspace,
    ]
    for key, plan in cudnn_search.search(calls, settings):
        support().ai3_cudnn_set_plan(key.encode(), plan.encode())


PLATFORM = CudnnPlatform()
