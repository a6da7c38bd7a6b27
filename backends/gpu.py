"""What the platforms of NVIDIA's GPUs know of the device, of its libraries, and of PyTorch's settings for it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from . import abi

_TF32 = "tf32"


@functools.cache
def unavailable() -> str | None:
    """None where PyTorch has a CUDA device, else the reason. Makes no CUDA context."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if torch.cuda.device_count() == 0:
        return "PyTorch sees no CUDA device (is the driver there? is CUDA_VISIBLE_DEVICES empty?)"
    return None


@functools.cache
def compute_capability(device: int) -> int:
    """10 * major + minor, as ai3_args::sm."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compute_capabilities() -> list[int]:
    """Of all the devices, each once."""
    return sorted({compute_capability(device) for device in range(torch.cuda.device_count())})


def names() -> list[str]:
    """Of all the devices."""
    return [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]


def identity() -> tuple[object, ...]:
    """The devices, libraries and settings that decisions for GPUs depend on."""
    if unavailable() is not None:
        return ()
    return names(), torch.version.cuda, torch.backends.cudnn.version(), numerics()


def is_deterministic() -> bool:
    """Whether PyTorch's settings ask for the same bits at every call."""
    return torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic


def allows_tf32(convolves: bool) -> bool:
    """Whether PyTorch's settings let products of float32 be rounded to TF32: those of cuDNN in convolutions, those of
    cuBLAS in others."""
    return numerics()[0 if convolves else 1]


def numerics() -> tuple[bool, bool, bool]:
    """Of convolutions and of other products whether they may be rounded to TF32, and whether bits must repeat."""
    convolutions, products = _settings()
    return convolutions.fp32_precision == _TF32, products.fp32_precision == _TF32, is_deterministic()


# Above this a result is not of factors rounded to TF32: to cut the last bits of one off makes it too small by 3.4e-4.
CUT = 2e-4


def too_large_by(found: torch.Tensor, right: torch.Tensor) -> float:
    """How much larger or, below 0, smaller a result is as a whole than what is right, of that."""
    found, right = found.double(), right.double()
    return ((found * right).sum() / right.square().sum() - 1).item()


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Until it ends, products of float32 are rounded to TF32, or none of them are."""
    before = [s.fp32_precision for s in _settings()]
    try:
        for s in _settings():
            s.fp32_precision = _TF32 if tf32 else "ieee"
        yield
    finally:
        for s, value in zip(_settings(), before):
            s.fp32_precision = value


@functools.cache
def _settings() -> tuple[Any, Any]:
    """Of cuDNN's convolutions and of cuBLAS's products; the first has no stub."""
    return torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]


def set_device(args: abi.Args) -> abi.Args:
    """Writes what a call on the current device is told of it."""
    args.device = torch.cuda.current_device()
    args.sm = compute_capability(args.device)
    args.deterministic = is_deterministic()
    return args


def library(*names: str) -> ctypes.CDLL | None:
    """The first of these shared libraries that can be loaded: PyTorch has loaded its own, or they lie in its wheels."""
    for name in names:
        for path in (name, *(str(found) for folder in _wheels("lib") if (found := folder / name).exists())):
            try:
                return ctypes.CDLL(path)
            except OSError:
                continue
    return None


SHIM = Path(kernels.__path__[0]) / "cudnn" / "shim"
"""Stands for the headers that the wheels leave out."""


def headers(name: str) -> Path | None:
    """The folder that holds a header of CUDA's or cuDNN's: in the wheels that PyTorch depends on, or the toolkit."""
    for folder in _wheels("include"):
        if (folder / name).exists():
            return folder
    from torch.utils.cpp_extension import CUDA_HOME  # only here: it imports setuptools

    toolkit = Path(CUDA_HOME) / "include" if CUDA_HOME else None
    return toolkit if toolkit is not None and (toolkit / name).exists() else None


def _wheels(folder: str) -> list[Path]:
    """Folders of this name in NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return [path for place in places for path in sorted(place.glob(f"*/{folder}"))]
