"""Device code compiled by NVRTC, the compiler that comes with PyTorch: no toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

from ..errors import BuildError
from . import gpu

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
FLAGS = ("--std=c++17", "--extra-device-vectorization", "-default-device")
# By all cores: code of the same registers, of the largest file in two thirds of the time on two.
_SPLIT, _SPLITS_SINCE = "-split-compile=0", (13, 0)
_SUCCESS = 0


def unavailable() -> str | None:
    """None where device code can be compiled, else the reason."""
    if _library() is None:
        return f"NVRTC cannot be loaded ({NAMES[0]}): `pip install nvidia-cuda-nvrtc` has it, as has the CUDA toolkit"
    return None


def version() -> str:
    return "NVRTC {}.{}".format(*_numbers())


def _numbers() -> tuple[int, int]:
    major, minor = c_int(), c_int()
    _checked().nvrtcVersion(byref(major), byref(minor))
    return major.value, minor.value


def arch(sm: int) -> str:
    """The target for a compute capability, with the instructions that only it has."""
    return f"sm_{sm}{'a' if sm >= 90 else ''}"


def compile(name: str, source: Path, sm: int, flags: Sequence[str], include_dirs: Sequence[Path]) -> bytes:
    """The cubin of a file. Raises BuildError with what the compiler said."""
    nvrtc = _checked()
    options = [f"-arch={arch(sm)}", *flags, *(f"-I{folder}" for folder in (*include_dirs, source.parent))]
    if _numbers() >= _SPLITS_SINCE:
        options.append(_SPLIT)
    program = c_void_p()
    given = source.read_bytes()
    status = nvrtc.nvrtcCreateProgram(byref(program), given, str(source).encode(), 0, None, None)
    if status != _SUCCESS:
        raise BuildError(name=name, command="NVRTC", output=_text(nvrtc, status))
    try:
        array = (c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        if status != _SUCCESS:
            command = " ".join(["nvrtc", *options, str(source)])
            raise BuildError(name=name, command=command, output=_log(nvrtc, program) or _text(nvrtc, status))
        size = c_size_t()
        _check(nvrtc, name, nvrtc.nvrtcGetCUBINSize(program, byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check(nvrtc, name, nvrtc.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _log(nvrtc: ctypes.CDLL, program: c_void_p) -> str:
    size = c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def _check(nvrtc: ctypes.CDLL, name: str, status: int) -> None:
    if status != _SUCCESS:
        raise BuildError(name=name, command="NVRTC", output=_text(nvrtc, status))


def _text(nvrtc: ctypes.CDLL, status: int) -> str:
    return str(nvrtc.nvrtcGetErrorString(status).decode())


def _checked() -> ctypes.CDLL:
    nvrtc = _library()
    if nvrtc is None:
        raise BuildError(name="device code", command="NVRTC", output=unavailable())
    return nvrtc


@functools.cache
def _library() -> ctypes.CDLL | None:
    nvrtc = gpu.library(*NAMES)
    if nvrtc is None:
        return None
    nvrtc.nvrtcGetErrorString.restype = c_char_p
    nvrtc.nvrtcCreateProgram.argtypes = [POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p]
    nvrtc.nvrtcCompileProgram.argtypes = [c_void_p, c_int, POINTER(c_char_p)]
    nvrtc.nvrtcGetProgramLogSize.argtypes = nvrtc.nvrtcGetCUBINSize.argtypes = [c_void_p, POINTER(c_size_t)]
    nvrtc.nvrtcGetProgramLog.argtypes = nvrtc.nvrtcGetCUBIN.argtypes = [c_void_p, c_char_p]
    nvrtc.nvrtcDestroyProgram.argtypes = [POINTER(c_void_p)]
    return nvrtc
