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

from .table import Table

ROUNDS = 3
KERNELS, GRAPHS = "AI3_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"
TEMPORARY = "TMPDIR"
"""Where Inductor keeps its precompiled headers, whatever its cache folder is."""
COLD, BUILT, WARM = "cold", "kernels built", "warm"
"""Empty caches; ai3's kernels are there, and Inductor's code is not; both are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50")


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {
        "model": given.model,
        "timed": "the first call of torch.compile's result at batch 1; not importing, not making the model",
        "core library": "built ahead of time" if core.prebuilt() else "built at the first use",
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each side and state of the caches: seconds of the first call, median of all rounds."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(given.rounds):
        print(f"compile {given.model}, round {number + 1}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            for side, state, kernels, graphs in (
                ("ai3", COLD, "kernels", "ai3"),
                ("ai3", BUILT, "kernels", "ai3-anew"),
                ("ai3", WARM, "kernels", "ai3"),
                ("inductor", COLD, "kernels", "inductor"),
                ("inductor", WARM, "kernels", "inductor"),
            ):
                (Path(folder) / graphs).mkdir(exist_ok=True)
                code = str(Path(folder) / graphs)
                caches = {KERNELS: str(Path(folder) / kernels), GRAPHS: code, TEMPORARY: code}
                seconds.setdefault((side, state), []).append(_in_a_process(side, given.model, caches))
    for (side, state), found in seconds.items():
        yield {"side": side, "caches": state, "seconds": statistics.median(found), "all": found}


def _in_a_process(side: str, model: str, caches: Mapping[str, str]) -> float:
    command = [sys.executable, "-m", "bench.first_call", side, model]
    done = subprocess.run(
        command, env={**os.environ, **caches}, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def first_call(side: str, model: str) -> float:
    """Seconds, in this process."""
    network, image = zoo.load_model(f"torchvision:{model}"), torch.randn(zoo.default_shape(model))
    with torch.inference_mode():
        network(image)  # threads and oneDNN start here
        compiled = torch.compile(network, backend=side)
        start = time.perf_counter()
        compiled(image)
        return time.perf_counter() - start


def finish(result: dict[str, Any]) -> None:
    pass


def tables(result: Mapping[str, Any]) -> list[Table]:
    title = f"Seconds of the first call of {result['model']}, {result['threads']} threads of {result['cpu']}"
    table = Table(title, ["side", "caches", "seconds"])
    table.rows = [[row["side"], row["caches"], f"{row['seconds']:.1f}"] for row in result["rows"]]
    return [table]


if __name__ == "__main__":
    print(json.dumps(first_call(*sys.argv[1:])))
