"""What `auto` goes by: an algorithm's time for an operation's shapes on this machine, measured once and kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout

from . import core, gpu_timing, registry
from .backends import builder, cache, gpu
from .ops import OPERATIONS
from .ops.activations import apply
from .ops.conv2d import POOLED
from .registry import Algorithm
from .selection import OpSpec, Use
from .version import __version__

log = logging.getLogger(__name__)

_WARM_UP, _ROUNDS = 2, 7
# Of how it is measured on a GPU: times kept from before a change are not read.
_METHOD = 2
# An algorithm this many times slower than the best so far is not measured further.
_HOPELESS = 8.0
# What computes convolutions of float32 without rounding factors, whatever the settings say.
_EXACT = "direct@cuda"
_Call = tuple[Callable[[], Any], list[torch.Tensor]]
_IMAGES = ("conv2d", "maxpool2d", "avgpool2d", "adaptiveavgpool2d")
_known: dict[str, Mapping[str, float]] = {}
_lock = threading.Lock()


def times(spec: OpSpec, use: Use) -> Mapping[str, float]:
    """Seconds by algorithm, `torch` among them, of those that `auto` may choose: from the store, or measured now.

    On a GPU it is measured with what its use makes part of it, which torch runs as kernels of their own.
    """
    candidates = [
        a
        for a in registry.known()
        if a.operation == spec.operation
        and registry.system().platforms[a.platform] is None
        and (a.platform == "torch" or spec.torch_only is None)
        and a.supports(spec) is None
        and a.only_by_name is None
    ]
    if spec.device != "cuda":
        use = Use(use.in_graph)
    key = _key(spec, candidates, use)
    with _lock:
        if key not in _known:
            _known[key] = _measured_once(key, spec, candidates, use)
    return _known[key]


def folder() -> Path:
    return builder.cache_dir() / "tuning"


def _key(spec: OpSpec, candidates: list[Algorithm], use: Use) -> str:
    shapes = (spec.operation, spec.input_shape, spec.output_shape, spec.dtype, spec.device, spec.attributes, use)
    asked = [gpu.CUT] if spec.allow_tf32 and spec.operation == "conv2d" else []
    own = (gpu.identity(), _METHOD, *asked) if spec.device == "cuda" else (builder.cpu_isa(), torch.get_num_threads())
    machine = (own, torch.__version__, __version__)
    algorithms = [(a.qualified, registry.content_digest(a)) for a in candidates]
    return hashlib.sha256(repr((shapes, machine, algorithms)).encode()).hexdigest()[:32]


def _measured_once(key: str, spec: OpSpec, candidates: list[Algorithm], use: Use) -> Mapping[str, float]:
    """From the store, or measured now by one of the processes that come to it at once, as the ranks of a training do:
    the others read what it has measured, and choose the same. A lock and no collective, as not all of them may come."""
    by_platform = {
        name: [a for a in candidates if a.platform == name] for name in sorted({a.platform for a in candidates})
    }
    for name, algorithms in by_platform.items():
        registry.platforms()[name].announce(algorithms, spec)
    for name, algorithms in by_platform.items():
        # In each of them: what it finds is loaded into the process.
        registry.platforms()[name].search(algorithms, spec, use)
    on_gpu = spec.device == "cuda"
    with _locked(key, spec):
        found = _load(key)
        if found is None:
            # A thread of its own has none of the modes of a compilation that may be under way in this one; its device
            # would be the first.
            device = torch.cuda.current_device() if on_gpu else -1  # to leave it as it is
            with ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(device)) as alone:
                found = alone.submit(_measure, spec, candidates, use).result()
            _save(key, spec, found)
    return found


@contextlib.contextmanager
def _locked(key: str, spec: OpSpec) -> Iterator[None]:
    """Holds the key's lock, one of the operating system's, which ends with its process. Goes on without it, and says
    so, where the cache folder takes no writes and where another process keeps it for longer than a build may take."""
    locks = folder().with_name("tuning-locks")
    lock, seconds = FileLock(locks / f"{key}.lock"), cache.timeout()
    try:
        locks.mkdir(parents=True, exist_ok=True)
        # Where no file can be made, some systems let filelock try until its time is over.
        with tempfile.TemporaryFile(dir=locks):
            pass
        lock.acquire(timeout=seconds)
    except Timeout:
        log.warning("measuring %s here too: a process has held %s for %g s", spec, lock.lock_file, seconds)
    except OSError as error:
        log.info("measuring %s for this process alone, others may choose otherwise: %s", spec, error)
    try:
        yield
    finally:
        lock.release()


def _measure(spec: OpSpec, candidates: list[Algorithm], use: Use) -> Mapping[str, float]:
    core.load()
    if spec.device == "cuda":
        core.follow_numerics()
        return _on_gpu(spec, candidates, use)
    # Made outside of inference mode: weights made there are packed at every call.
    calls = {a.qualified: _call(spec, a, use)[0] for a in candidates}
    best, taken = math.inf, {}
    with torch.inference_mode():
        for name, call in calls.items():
            taken[name] = [_seconds(call) for _ in range(_WARM_UP)][-1:]
            best = min(best, *taken[name])
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                if taken[name][0] < _HOPELESS * best:
                    taken[name].append(_seconds(call))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _on_gpu(spec: OpSpec, candidates: list[Algorithm], use: Use) -> Mapping[str, float]:
    """As in a network: what was computed last is in the L2 cache, the weights, which all others came after, are not."""
    made = _rounding(spec, {a.qualified: _call(spec, a, use) for a in candidates})
    evict = gpu_timing.evict(torch.cuda.current_device())

    def before(computed: list[torch.Tensor]) -> None:
        evict()
        for tensor in computed:
            tensor.mul_(1)

    ahead = {name: functools.partial(before, computed) for name, (_, computed) in made.items()}
    return gpu_timing.seconds({name: call for name, (call, _) in made.items()}, before=ahead)


def _rounding(spec: OpSpec, made: dict[str, _Call]) -> dict[str, _Call]:
    """Without convolutions that cut the last bits of TF32's factors off: the error adds up from layer to layer."""
    if not spec.allow_tf32 or spec.operation != "conv2d" or _EXACT not in made:
        return made
    kept = {}
    with torch.inference_mode():
        right = made[_EXACT][0]()
        for name, call in made.items():
            try:
                off = gpu.too_large_by(call[0](), right)
            except RuntimeError:  # it is said where it is timed
                off = 0.0
            if abs(off) > gpu.CUT:
                how = "cuts factors off where TF32 rounds them, and its result is too large by"
                log.warning("%s is left out of what is measured for %s: it %s %g as a whole", name, spec, how, off)
            else:
                kept[name] = call
    return kept


def _call(spec: OpSpec, algorithm: Algorithm, use: Use) -> _Call:
    """What runs the algorithm, and of its operands those that in a network the operations before have computed."""
    operation, attributes = OPERATIONS[spec.operation], dict(spec.attributes)
    generator = torch.Generator(spec.device).manual_seed(0)

    def data(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=spec.device).to(spec.dtype)

    input, weight, bias = operation.operands(spec, data)
    if bias is None and use.has_norm:
        bias = data(weight.shape[:1])
    platform = registry.platforms()[algorithm.platform]
    channels_last = use.in_graph and spec.operation in _IMAGES and platform.prefers_channels_last(algorithm)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    pooling = _pooling(spec) if use.pooled else None

    def finish(result: torch.Tensor) -> torch.Tensor:
        if pooling is not None:
            return torch.ops.ai3.max_pool2d.default(result, *POOLED, pooling.id, True)
        return F.max_pool2d(result, 2) if use.pooled else result

    residual = data(spec.output_shape) if use.residual else None
    if channels_last and residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    computed = [input] if residual is None else [input, residual]
    if isinstance(weight, tuple):  # attention's keys and values
        computed += weight
    if algorithm.platform == "torch":
        attributes = dict(operation.torch_attributes(attributes))

        def by_torch() -> torch.Tensor:
            result = operation.call_torch(input, weight, bias, attributes)
            return finish(apply(result if residual is None else result.add_(residual), use.activation))

        return by_torch, computed
    args, kwargs = operation.arguments(input, weight, bias, attributes, algorithm.id, True)
    kwargs = {**kwargs, "channels_last": True} if channels_last else kwargs
    if residual is not None:
        kwargs["residual"] = residual
    if use.activation:
        kwargs["activation"] = use.activation
    overload = operation.overload_for(algorithm)
    if pooling is not None and platform.pools(algorithm, spec, use.activation):
        number = pooling.id
        kwargs.pop("channels_last", None)
        return lambda: torch.ops.ai3.conv2d_pooled.default(*args, number, **kwargs), computed
    return lambda: finish(overload(*args, **kwargs)), computed


def _pooling(spec: OpSpec) -> Algorithm | None:
    """What pools results of convolutions on the same device; None where PyTorch does."""
    platforms = registry.system().platforms
    own = (a for a in registry.of_operation("maxpool2d") if a.device == spec.device and platforms[a.platform] is None)
    return next(own, None)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _load(key: str) -> Mapping[str, float] | None:
    path = folder() / f"{key}.json"
    try:
        found = json.loads(path.read_text())["seconds"]
        return {str(name): float(seconds) for name, seconds in found.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("measuring again: %s is damaged (%s)", path, error)
        return None


def _save(key: str, spec: OpSpec, seconds: Mapping[str, float]) -> None:
    """Keeps what was measured; where the cache folder takes no writes, says so in the log and goes on."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder())
        with os.fdopen(handle, "w") as file:
            json.dump({"operation": str(spec), "seconds": dict(seconds)}, file, indent=1)
        os.replace(name, folder() / f"{key}.json")
    except OSError as error:
        log.info("what was measured is not kept: %s", error)
