"""The folder is the list: names, ids and descriptions come from the kernels' paths."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import ai3_compile
from ai3_compile import registry
from ai3_compile.ops import OPERATIONS


def test_every_kernel_file_is_an_algorithm_and_every_algorithm_a_file():
    shared = {"core", "cudnn", "epilogue"}
    sources = [path for path in registry.KERNELS.glob("*/*") if path.suffix in (".cpp", ".cu")]
    assert {path.parent.name for path in sources} - shared == set(OPERATIONS)
    files = {path for operation in OPERATIONS for path in (registry.KERNELS / operation).iterdir()}
    assert files == {a.source for a in registry.algorithms() if a.source is not None}


def names(operation: str, platform: str) -> set[str]:
    return {a.name for a in registry.of_operation(operation) if a.platform == platform}


def test_the_algorithms_of_the_platforms():
    gemms = {"gemm", "implicit gemm", "implicit precomp gemm"}
    assert names("conv2d", "cpp") == gemms | {"direct", "smm", "winograd", "winograd6"}
    assert names("conv2d", "cuda") == {"direct", "smm", "implicit gemm", "winograd"}
    transforms = {"fft", "fft tiling", "winograd", "winograd nonfused"}
    assert names("conv2d", "cudnn") == gemms | transforms | {"guess", "auto"}
    assert names("conv2d", "cublas") == {"gemm"}
    assert names("linear", "cpp") == names("linear", "cublas") == {"gemm"}
    assert names("linear", "cuda") == {"direct", "gemm"}
    for operation in ("maxpool2d", "avgpool2d", "adaptiveavgpool2d", "relu", "flatten"):
        assert names(operation, "cpp") == names(operation, "cuda") == {"direct"}
    assert all(names(operation, "torch") == {"torch"} for operation in OPERATIONS)


def test_ids_are_distinct_fit_a_signed_integer_and_do_not_change():
    ids = [a.id for a in registry.algorithms()]
    assert len(set(ids)) == len(ids) and all(0 <= i < 2**63 for i in ids)
    (winograd,) = [a for a in registry.of_operation("conv2d") if a.qualified == "winograd@cpp"]
    # Compiled graphs on disk hold it: a change of this number needs a change of ai3's version.
    assert winograd.id == 4726262062681012459


@pytest.mark.parametrize("algorithm", registry.algorithms(), ids=lambda a: f"{a.operation}-{a.qualified}")
def test_every_algorithm_describes_itself(algorithm):
    assert len(algorithm.description) > 10 and "#" not in algorithm.description


def test_both_names_are_the_same_package():
    alias = importlib.import_module("ai3")
    assert alias.__all__ == ai3_compile.__all__
    for name in ai3_compile.__all__:
        assert getattr(alias, name) is getattr(ai3_compile, name)


@pytest.mark.parametrize("module", ["ai3", "ai3_compile"])
def test_importing_builds_nothing_and_loads_no_library(module, tmp_path):
    program = f"import {module}, os; print(any('ai3' in l and '.so' in l for l in open('/proc/self/maps')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"AI3_CACHE_DIR": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == "False", done.stderr
    assert not (tmp_path / "cache").exists()
