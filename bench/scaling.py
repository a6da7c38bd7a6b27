"""Whole networks by the size of the batch and the number of threads: the time of an image must not rise with either."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import ai3_compile
from ai3_compile import zoo

from . import models
from .table import Table
from .timing import Side, medians

ROUNDS = 3
NETWORKS = ("mobilenet_v3_large", "resnet50", "vgg16")
BATCHES = (1, 2, 4, 8, 16, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {"side": "ai3.convert, one model for all batches", "milliseconds": "medians of an image's share of a call"}


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each network: every batch with one thread and with PyTorch's number, in turn."""
    threads = torch.get_num_threads()
    try:
        for name in given.models:
            print(f"scaling {name}", file=sys.stderr)
            shape = zoo.default_shape(name)
            model = ai3_compile.convert(zoo.load_model(f"torchvision:{name}"), sample_input_shape=(2, *shape[1:]))
            images = {batch: torch.randn(batch, *shape[1:]) for batch in given.batch}
            sides: dict[str, Side] = {}
            for count in sorted({1, threads}):
                for batch, image in images.items():
                    sides[f"{count} {batch}"] = functools.partial(_run, model, image, count)
            with torch.inference_mode():
                seconds = medians(sides, given.rounds)
            times: dict[str, dict[str, float]] = {}
            for key, value in seconds.items():
                count_, batch_ = key.split()
                times.setdefault(count_, {})[batch_] = value / int(batch_) * 1e3
            yield {"model": name, "milliseconds": times}
    finally:
        torch.set_num_threads(threads)


def _run(model: Any, image: torch.Tensor, threads: int) -> object:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return model(image)


def finish(result: dict[str, Any]) -> None:
    """How many times faster all threads are, and the most that an image takes longer than in a smaller batch."""
    for row in result["rows"]:
        times = row["milliseconds"]
        one, all_ = times["1"], times[str(result["threads"])]
        row["speed-up"] = {batch: one[batch] / all_[batch] for batch in one}
        row["rise"] = max((later / before for before, later in _pairs(list(all_.values()))), default=1.0)


def _pairs(values: list[float]) -> Iterator[tuple[float, float]]:
    return ((before, later) for i, before in enumerate(values) for later in values[i + 1 :])


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    batches = list(rows[0]["speed-up"]) if rows else []
    header = ["", *(f"batch {batch}" for batch in batches)]
    table = Table(f"Milliseconds an image, {result['cpu']} ({result['isa']})", header)
    for row in rows:
        for count, times in row["milliseconds"].items():
            table.rows.append([f"{row['model']}, {count} threads", *(f"{times[b]:.2f}" for b in batches)])
        table.rows.append(["  times faster", *(f"{row['speed-up'][b]:.2f}" for b in batches)])
    table.notes = [f"{row['model']}: at most {row['rise']:.2f} times a smaller batch's time an image" for row in rows]
    return [table]
