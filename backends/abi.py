"""The structs of kernels/include/ai3/kernel.h as ctypes, and a loaded algorithm's table behind Python calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_void_p

ABI_VERSION = 7
MAX_DIMS = 8
FLOAT32, FLOAT64, FLOAT16, BFLOAT16, OTHER_DTYPE = range(5)
NCHW, NHWC, EPILOGUE, DEFAULT, STRIDED_OUTPUT, RESIDUAL_IN_PLACE, STRIDED_INPUT, PROLOGUE, PROLOGUE_RELU = (
    1 << i for i in range(9)
)

RangeFunction = CFUNCTYPE(None, c_void_p, c_int64, c_int64)
ParallelFor = CFUNCTYPE(None, c_int64, RangeFunction, c_void_p)
Fail = CFUNCTYPE(None, c_void_p, c_char_p)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("ndim", c_int32),
        ("size", c_int64 * MAX_DIMS),
        ("stride", c_int64 * MAX_DIMS),
    ]


class Runtime(ctypes.Structure):
    _fields_ = [("num_threads", c_int32), ("parallel_for", ParallelFor), ("fail", Fail)]


class Args(ctypes.Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("input", Tensor),
        ("weight", Tensor),
        ("output", Tensor),
        ("residual", Tensor),
        ("bias", c_void_p),
        ("has_bias", c_int32),
        ("has_residual", c_int32),
        ("activation", c_int32),
        ("kernel_h", c_int64),
        ("kernel_w", c_int64),
        ("stride_h", c_int64),
        ("stride_w", c_int64),
        ("dilation_h", c_int64),
        ("dilation_w", c_int64),
        ("pad_top", c_int64),
        ("pad_bottom", c_int64),
        ("pad_left", c_int64),
        ("pad_right", c_int64),
        ("groups", c_int64),
        ("ceil_mode", c_int32),
        ("count_include_pad", c_int32),
        ("divisor_override", c_int64),
        ("key", Tensor),
        ("value", Tensor),
        ("score_bias", Tensor),
        ("score_mask", Tensor),
        ("scale", c_double),
        ("is_causal", c_int32),
        ("masked_is_zero", c_int32),
        ("packed", c_void_p),
        ("plan", c_void_p),
        ("workspace", c_void_p),
        ("runtime", POINTER(Runtime)),
        ("stream", c_void_p),
        ("prologue_scale", c_void_p),
        ("prologue_shift", c_void_p),
        ("has_prologue", c_int32),
        ("prologue_activation", c_int32),
        ("device", c_int32),
        ("sm", c_int32),
        ("allow_tf32", c_int32),
        ("deterministic", c_int32),
        ("max_workspace", c_int64),
        ("pools", c_int32),
    ]


_SIZE = CFUNCTYPE(c_size_t, POINTER(Args))
_FILL = CFUNCTYPE(None, POINTER(Args), c_void_p)


class Kernel(ctypes.Structure):
    _fields_ = [
        ("abi_version", c_uint32),
        ("operation", c_char_p),
        ("algorithm", c_char_p),
        ("version", c_uint32),
        ("flags", c_uint32),
        ("supports", CFUNCTYPE(c_char_p, POINTER(Args))),
        ("cost", CFUNCTYPE(c_double, POINTER(Args))),
        ("only_by_name", c_char_p),
        ("workspace_bytes", _SIZE),
        ("packed_bytes", _SIZE),
        ("pack", _FILL),
        ("pack_variant", CFUNCTYPE(c_int64, POINTER(Args))),
        ("plan_bytes", _SIZE),
        ("make_plan", _FILL),
        ("fuses", CFUNCTYPE(c_int32, POINTER(Args))),
        ("pools", CFUNCTYPE(c_int32, POINTER(Args))),
        ("run", CFUNCTYPE(None, POINTER(Args))),
    ]


def kernel_table(library: ctypes.CDLL) -> Kernel:
    """The table a loaded module exports; raises AttributeError where it exports none."""
    get = library.ai3_get_kernel
    get.restype, get.argtypes = POINTER(Kernel), []
    return get().contents


def tensor_of(shape: Sequence[int], channels_last: bool = False) -> Tensor:
    """A tensor of this shape without data, contiguous or channels_last."""
    tensor = Tensor(ndim=len(shape))
    order = list(range(len(shape)))
    if channels_last and len(shape) == 4:
        order = [0, 2, 3, 1]
    stride = 1
    for dim in reversed(order):
        tensor.size[dim], tensor.stride[dim] = shape[dim], stride
        stride *= max(shape[dim], 1)
    return tensor
