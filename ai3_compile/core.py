"""The core library: finding or building it, loading it once, and the few calls that control it."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .backends import abi, gpu
from .errors import Ai3Error, CoreLibraryError

_load_algorithm: Callable[[int], None] | None = None
_epilogue: int | None = None
_lock = threading.Lock()


def on_load_algorithm(function: Callable[[int], None], epilogue: int) -> None:
    """Sets what loads an algorithm by id, and the id of the epilogue; the registry does this when it is imported."""
    global _load_algorithm, _epilogue
    _load_algorithm, _epilogue = function, epilogue


def load() -> ctypes.CDLL:
    """The core library, built first if need be, with its operations registered with PyTorch.

    Raises BuildError where it cannot be compiled, NoCompilerError with neither a compiler nor a prebuilt one.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL:
    from . import ops
    from .backends import builder
    from .passes import sequence

    path = prebuilt() or builder.build_core()
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.ai3_core_register.restype = ctypes.c_char_p
    library.ai3_core_register.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    library.ai3_core_set_epilogue.argtypes, library.ai3_core_set_epilogue.restype = [ctypes.c_int64], None
    library.ai3_core_set_numerics.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.ai3_core_set_numerics.restype = None
    library.ai3_core_refresh_packs.restype = ctypes.c_char_p
    library.ai3_core_refresh_packs.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.ai3_core_drop_packs.argtypes = [ctypes.c_void_p]
    library.ai3_core_drop_packs.restype = None
    library.ai3_core_raise_epoch.restype = None
    library.ai3_core_packs_held.restype = ctypes.c_int64
    library.ai3_core_packs_made.restype = ctypes.c_int64
    library.ai3_core_source_digest.restype = ctypes.c_char_p
    if library.ai3_core_source_digest().decode() != builder.core_digest():
        raise CoreLibraryError(path=path, message="it was built from other sources; remove it")
    _implement_callbacks(library)
    if _epilogue is not None:
        library.ai3_core_set_epilogue(_epilogue)
    ops.register()
    torch.library.register_fake(sequence.OP_NAME, sequence.fake)
    return library


def prebuilt() -> Path | None:
    """The library that setup.py built, if it is of these sources: the digest is a string in the file."""
    from .backends import builder

    digest = builder.core_digest()
    for path in sorted(Path(__file__).parent.glob("_core*.so")):
        if digest.encode() in path.read_bytes():
            return path
    return None


_library: torch.library.Library | None = None


def _implement_callbacks(library: ctypes.CDLL) -> None:
    """Registers the two operations that the core library calls back into Python by."""
    global _library
    addresses: WeakIdKeyDictionary = WeakIdKeyDictionary()
    hooked = False

    def load_algorithm(algorithm: int) -> None:
        assert _load_algorithm is not None
        _load_algorithm(algorithm)

    def watch_weight(weight: torch.Tensor) -> None:
        # An optimizer may change weights without raising their version counters (the fused ones do), so every step
        # counts; the hook is set when the first pack is made, so that programs without one pay nothing.
        nonlocal hooked
        if not hooked:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            register_optimizer_step_post_hook(lambda *_: raise_epoch())
            hooked = True
        address = weight.data_ptr()
        previous = addresses.get(weight)
        if previous == address:
            return
        if previous is not None:
            library.ai3_core_drop_packs(previous)
        addresses[weight] = address
        weakref.finalize(weight, library.ai3_core_drop_packs, address).atexit = False

    _library = torch.library.Library("ai3", "IMPL")
    _library.impl("_load_algorithm", load_algorithm, "CompositeExplicitAutograd")
    _library.impl("_watch_weight", watch_weight, "CPU")
    _library.impl("_watch_weight", watch_weight, "CUDA")
    _library.impl("_fold", _fold, "CUDA")
    _library.impl("_cast", _cast, "CUDA")
    _library.impl("_scale_and_shift", _scale_and_shift, "CUDA")


def _fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    bn_mean: torch.Tensor,
    bn_var: torch.Tensor,
    bn_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution's weight and bias with the batch norm behind it: in double, so that it adds one rounding alone.

    Not as inference tensors, which could not be made anew in place.
    """
    with torch.inference_mode(False), torch.no_grad():
        scale = torch.rsqrt(bn_var.double() + bn_eps)
        scale = scale if bn_weight is None else scale * bn_weight.double()
        shift = (0 if bias is None else bias.double()) - bn_mean.double()
        folded_bias = shift * scale + (0 if bn_bias is None else bn_bias.double())
        folded = weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))
        return folded.to(weight.dtype), folded_bias.to(weight.dtype)


def _cast(parameter: torch.Tensor, dtype: int) -> torch.Tensor:
    """In the half of this number, contiguous, and no inference tensor either."""
    with torch.inference_mode(False), torch.no_grad():
        half = {abi.FLOAT16: torch.float16, abi.BFLOAT16: torch.bfloat16}[dtype]
        return parameter.to(half, memory_format=torch.contiguous_format)


def _scale_and_shift(
    weight: torch.Tensor | None, bias: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> torch.Tensor:
    """A batch norm as scale * x + shift: both [C], one behind the other, in float32 of halves too."""
    with torch.inference_mode(False), torch.no_grad():
        scale = torch.rsqrt(var.double() + eps)
        scale = scale if weight is None else scale * weight.double()
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        return torch.stack([scale, shift]).to(torch.float64 if mean.dtype == torch.float64 else torch.float32)


_numerics: tuple[int, int, int, int] | None = None


def follow_numerics(max_workspace: int | None = None) -> None:
    """Tells the core library PyTorch's settings for operations on GPUs, as they are now."""
    global _numerics
    numerics = (*gpu.numerics(), -1 if max_workspace is None else max_workspace)
    if numerics != _numerics:
        load().ai3_core_set_numerics(*numerics)
        _numerics = numerics


_epoch = 0


def epoch() -> int:
    """Another number after whatever may have changed weights without raising their version counters."""
    return _epoch


def raise_epoch() -> None:
    """What was packed before is not used again."""
    global _epoch
    _epoch += 1
    load().ai3_core_raise_epoch()


def refresh_packs(addresses: Sequence[int], versions: Sequence[int]) -> None:
    """Makes the packs of these weights of GPUs anew, where they lie, unless they are of these versions already."""
    numbers = ctypes.c_int64 * len(addresses)
    failure = load().ai3_core_refresh_packs(numbers(*addresses), numbers(*versions), len(addresses))
    if failure is not None:
        raise Ai3Error(message=f"packing the weights that have changed: {failure.decode()}")


_NO_MEMORY = re.compile(r"PyTorch has no memory for (\d+) bytes on (cuda:\d+)")


def torchs_own(error: RuntimeError) -> RuntimeError:
    """The error that PyTorch raises where the core library got no memory on a GPU; others as they are.

    PyTorch is asked again, as only its own error says what holds the memory, or that the device is lost. It may
    succeed: what the failed call held is free by now.
    """
    if (found := _NO_MEMORY.search(str(error))) is None:
        return error
    try:
        torch.empty(int(found[1]), dtype=torch.uint8, device=found[2])
    except RuntimeError as own:
        return own
    return torch.OutOfMemoryError(f"CUDA out of memory. {error}")


def register_kernel(identity: int, table: int, label: str, device: str) -> str | None:
    """Hands a kernel's table to the core library; returns why it was refused, or None."""
    refusal = load().ai3_core_register(identity, table, label.encode(), device == "cuda")
    return None if refusal is None else refusal.decode()


def invalidate(module: torch.nn.Module | torch.Tensor | None = None) -> None:
    """Forgets what ai3 has packed of a module's weights (or of one tensor, or of everything).

    Needed after writes that PyTorch does not count: through `.data`, `untyped_storage()`, `numpy()` or a raw pointer,
    by a collective of torch.distributed, and those of another process to shared memory. Everything else
    (`load_state_dict`, optimizers, `copy_` under `no_grad`, new parameters) ai3 sees by itself.
    """
    if _load.cache_info().currsize == 0:
        return  # nothing has been packed
    library = load()
    # A layer's weight may be a view of a parameter, at another address: nothing packed before is used again.
    raise_epoch()
    if module is None:
        library.ai3_core_drop_packs(None)
        return
    for tensor in [module] if isinstance(module, torch.Tensor) else module.parameters():
        if tensor.numel() > 0 and not tensor.is_cuda:
            library.ai3_core_drop_packs(tensor.data_ptr())
