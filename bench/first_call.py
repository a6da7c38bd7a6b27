"""What compiling costs: a network's first call with empty caches and with filled ones, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ai3_compile import core, zoo

from . import gpu, gpu_models
from .table import Table

ROUNDS = 3
KERNELS, GRAPHS = "AI3_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"
TEMPORARY = "TMPDIR"
"""Where Inductor keeps its precompiled headers, whatever its cache folder is."""
COLD, BUILT, WARM = "cold", "kernels built", "warm"
"""Empty caches; ai3's kernels are there, and neither what it measured nor Inductor's code; all is."""
AUTO = "ai3, auto"
# A side, the state of its caches, and which of the folders they are.
_CALLS = {
    "cpu": (
        ("ai3", COLD, "kernels", "ai3"),
        ("ai3", BUILT, "kernels", "ai3-anew"),
        ("ai3", WARM, "kernels", "ai3"),
        ("inductor", COLD, "kernels", "inductor"),
        ("inductor", WARM, "kernels", "inductor"),
    ),
    "cuda": (
        ("ai3", COLD, "kernels", "ai3"),
        ("ai3", WARM, "kernels", "ai3"),
        (AUTO, BUILT, "kernels", "ai3-auto"),
        (AUTO, WARM, "kernels", "ai3-auto"),
        ("inductor", COLD, "kernels", "inductor"),
        ("inductor", WARM, "kernels", "inductor"),
    ),
}
_BATCH = 10  # on a GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def describe(given: argparse.Namespace) -> dict[str, object]:
    how = "batch 1" if given.device == "cpu" else f"batch {_BATCH} in float16, mode='reduce-overhead', channels_last"
    return {
        "model": given.model,
        "timed": f"the first call of torch.compile's result at {how}; not importing, not making the model",
        "core library": "built ahead of time" if core.prebuilt() else "built at the first use",
        **({**gpu.describe(), "device": "cuda"} if given.device == "cuda" else {}),
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each side and state of the caches: seconds of the first call, median of all rounds."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(given.rounds):
        print(f"compile {given.model}, round {number + 1}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            for side, state, kernels, graphs in _CALLS[given.device]:
                (Path(folder) / graphs).mkdir(exist_ok=True)
                code = str(Path(folder) / graphs)
                caches = {KERNELS: str(Path(folder) / kernels), GRAPHS: code, TEMPORARY: code}
                seconds.setdefault((side, state), []).append(_in_a_process(side, given.model, given.device, caches))
    for (side, state), found in seconds.items():
        yield {"side": side, "caches": state, "seconds": statistics.median(found), "all": found}


def _in_a_process(side: str, model: str, device: str, caches: Mapping[str, str]) -> float:
    command = [sys.executable, "-m", "bench.first_call", side, model, device]
    done = subprocess.run(
        command, env={**os.environ, **caches}, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def first_call(side: str, model: str, device: str) -> float:
    """Seconds, in this process."""
    network, image = zoo.load_model(f"torchvision:{model}"), torch.randn(zoo.default_shape(model))
    backend, options = ("ai3", gpu_models.AUTO_OPTIONS) if side == AUTO else (side, {})
    how: dict[str, Any] = {"backend": backend, **({"options": options} if options else {})}
    if device == "cuda":
        network, image = network.cuda().half(), image.expand(_BATCH, -1, -1, -1).cuda().half()
        image = image.contiguous(memory_format=torch.channels_last)
        mode = "reduce-overhead"
        how = {"mode": mode} if side == "inductor" else {"backend": backend, "options": {"mode": mode, **options}}
    with torch.inference_mode():
        network(image)  # threads and oneDNN, or the CUDA context, start here
        compiled = torch.compile(network, **how)
        _synchronize(device)
        start = time.perf_counter()
        compiled(image)
        _synchronize(device)
        return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def finish(result: dict[str, Any]) -> None:
    pass


def tables(result: Mapping[str, Any]) -> list[Table]:
    where = f"{result['threads']} threads of {result['cpu']}"
    if result.get("device") == "cuda":
        where = f"{gpu.where(result)}, {where}"
    title = f"Seconds of the first call of {result['model']}, {where}"
    table = Table(title, ["side", "caches", "seconds"])
    table.rows = [[row["side"], row["caches"], f"{row['seconds']:.1f}"] for row in result["rows"]]
    return [table]


if __name__ == "__main__":
    print(json.dumps(first_call(*sys.argv[1:])))
