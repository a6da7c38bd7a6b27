"""The core library: finding or building it, loading it once, and the few calls that control it."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .errors import CoreLibraryError

_load_algorithm: Callable[[int], None] | None = None
_lock = threading.Lock()


def on_load_algorithm(function: Callable[[int], None]) -> None:
    """Sets what loads an algorithm by id; the registry does this when it is imported."""
    global _load_algorithm
    _load_algorithm = function


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
    library.ai3_core_register.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p]
    library.ai3_core_drop_packs.argtypes = [ctypes.c_void_p]
    library.ai3_core_drop_packs.restype = None
    library.ai3_core_raise_epoch.restype = None
    library.ai3_core_packs_held.restype = ctypes.c_int64
    library.ai3_core_packs_made.restype = ctypes.c_int64
    library.ai3_core_source_digest.restype = ctypes.c_char_p
    if library.ai3_core_source_digest().decode() != builder.core_digest():
        raise CoreLibraryError(path=path, message="it was built from other sources; remove it")
    _implement_callbacks(library)
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

            register_optimizer_step_post_hook(lambda *_: library.ai3_core_raise_epoch())
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


def register_kernel(identity: int, table: int, label: str) -> str | None:
    """Hands a kernel's table to the core library; returns why it was refused, or None."""
    refusal = load().ai3_core_register(identity, table, label.encode())
    return None if refusal is None else refusal.decode()


def invalidate(module: torch.nn.Module | torch.Tensor | None = None) -> None:
    """Forgets what ai3 has packed of a module's weights (or of one tensor, or of everything).

    Needed after writes that PyTorch does not count: through `.data`, `untyped_storage()`, `numpy()` or a raw pointer,
    and those of another process to shared memory. Everything else (`load_state_dict`, optimizers, `copy_` under
    `no_grad`, new parameters) ai3 sees by itself.
    """
    if _load.cache_info().currsize == 0:
        return  # nothing has been packed
    library = load()
    # A layer's weight may be a view of a parameter, at another address: nothing packed before is used again.
    library.ai3_core_raise_epoch()
    if module is None:
        library.ai3_core_drop_packs(None)
        return
    for tensor in [module] if isinstance(module, torch.Tensor) else module.parameters():
        if tensor.numel() > 0:
            library.ai3_core_drop_packs(tensor.data_ptr())
