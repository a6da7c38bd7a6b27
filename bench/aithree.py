"""aithree's own convolutions, as sides of the conv2d bench: what ai3's algorithms of the same names are compared with.

aithree's package has the name of ours, `ai3`, so it lies in a folder of its own: `pip install --no-deps --target FOLDER
aithree`. Only its compiled module is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ai3_compile.testing.calls import Call

from .timing import Side

ALGORITHMS = ("smm", "direct")
INSTALL = "pip install --no-deps --target FOLDER aithree, and --aithree FOLDER"


def load(folder: Path) -> ModuleType:
    """Its compiled module.

    Raises FileNotFoundError where the folder has none for this Python.
    """
    path = next((folder / "ai3").glob(f"_core.{sys.implementation.cache_tag}-*.so"), None)
    if path is None:
        raise FileNotFoundError(f"there is no aithree for this Python in {folder}: {INSTALL}")
    spec = importlib.util.spec_from_file_location("_core", path)  # the name it was compiled for
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sides(core: ModuleType, call: Call) -> dict[str, Side]:
    """Its algorithms on the tensors of a call, contiguous ones: it knows no other layout."""
    return {f"aithree {name}": functools.partial(_run, core, call, name) for name in ALGORITHMS}


def _run(core: ModuleType, call: Call, algorithm: str) -> Any:
    input, weight = call.input, call.weight
    assert weight is not None and input.is_contiguous() and weight.is_contiguous()
    a = call.attributes
    window = (*a["padding"], *a["stride"], *a["dilation"])
    zeros = core.PaddingMode.zeros
    shapes = (tuple(input.shape), core.ScalarType.Float32, weight.data_ptr(), tuple(weight.shape), None)
    return core.conv2d(input.data_ptr(), *shapes, *window, zeros, a["groups"], algorithm)
