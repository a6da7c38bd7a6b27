"""Reports kept on disk: on a warm Inductor cache no pass runs, yet what was chosen must still be known."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from .rows import GraphReport

log = logging.getLogger(__name__)


def folder() -> Path:
    from ..backends import builder

    return builder.cache_dir() / "reports"


def key(gm: GraphModule, example_inputs: Sequence[Any], pass_id: str | None) -> str:
    """A digest of what the decisions for a graph depend on: its code, modules, inputs, modes, and the passes."""
    hasher = hashlib.sha256()

    def add(*items: object) -> None:
        hasher.update(repr(items).encode())

    add(pass_id, gm.code, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    for node in gm.graph.nodes:
        add(node.name, [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()])
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            add(value.shape, value.stride(), value.dtype, value.device, value.requires_grad, type(value).__name__)
        else:
            add(value)
    return hasher.hexdigest()[:32]


def save(key: str, report: GraphReport) -> None:
    """Writes a report; where the cache folder takes no writes, says so once in the log and goes on."""
    text = json.dumps(report.to_json())
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder())
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, folder() / f"{key}.json")
    except OSError as error:
        log.info("the report is not kept: %s", error)


def load(key: str) -> GraphReport | None:
    """The report of a graph that was compiled before; None where there is none, or none that can be read."""
    path = folder() / f"{key}.json"
    try:
        return GraphReport.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ignoring the damaged report %s: %s", path, error)
        return None
