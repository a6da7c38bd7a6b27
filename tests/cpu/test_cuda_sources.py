"""The CUDA sources compile, for the GPU and for the host, and leave no register on the stack: without a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from ai3_compile import registry
from ai3_compile.backends import abi, builder, native
from ai3_compile.ops import OPERATIONS
from ai3_compile.testing import harness

SOURCES = [*(a for a in registry.algorithms() if a.platform == "cuda"), registry.EPILOGUE]
NVCC = shutil.which("nvcc")


def device_code(algorithm: registry.Algorithm) -> str:
    """What the GPU's compiler sees: all of one header for some of them."""
    return algorithm.source.read_text().partition("#ifdef __CUDACC__")[2].partition("#else")[0]


def lines(algorithm: registry.Algorithm) -> set[str]:
    return set(device_code(algorithm).split("\n"))


# Without those that compile nothing but what another does too, as all of a header is.
DISTINCT = [
    algorithm
    for number, algorithm in enumerate(SOURCES)
    if not any(
        lines(algorithm) < lines(other) or (lines(algorithm) == lines(other) and number > SOURCES.index(other))
        for other in SOURCES
        if other is not algorithm
    )
]


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("algorithm", DISTINCT, ids=lambda a: f"{a.operation}-{a.name}")
def test_no_kernel_spills(algorithm, arch, tmp_path):
    command = [NVCC, "-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-include", "cstdint"]
    command += [f"-I{builder.INCLUDE}", "-o", str(tmp_path / "code.cubin"), str(algorithm.source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill", done.stderr, re.S
    )
    assert found, "ptxas reported no kernel"
    assert [kernel for kernel, stack, spilled in found if stack != "0" or spilled != "0"] == []
    # As where registers are short: a kernel then waits for each of its products.
    assert "serialized" not in done.stderr, done.stderr


@pytest.mark.parametrize("algorithm", SOURCES, ids=lambda a: f"{a.operation}-{a.name}")
def test_the_hosts_part_compiles_and_exports_its_table(algorithm):
    """As it is built on a machine with a GPU; the table answers questions without one."""
    request = builder.kernel_request(algorithm.label, (algorithm.source,), link_flags=("-ldl",))
    (path,) = builder.build_many([request])
    library = ctypes.CDLL(str(path))
    table = abi.kernel_table(library)
    assert (table.operation.decode(), table.algorithm.decode()) == (algorithm.operation, algorithm.name)
    assert table.flags & abi.EPILOGUE or algorithm.operation not in ("conv2d", "linear")
    assert hasattr(library, "ai3_set_device_code")


@pytest.mark.parametrize(
    ("operation", "name", "dtype", "tf32", "part"),
    [
        ("linear", "gemm", torch.float16, False, 1),
        ("linear", "gemm", torch.bfloat16, False, 2),
        ("linear", "gemm", torch.float32, True, 3),
        ("linear", "gemm", torch.float32, False, 4),
        ("linear", "gemm", torch.float64, False, 5),
        ("relu", "direct", torch.float16, False, 0),  # of a file whose code is in one
    ],
)
def test_device_code_is_asked_for_at_the_first_launch_as_the_part_that_it_needs(operation, name, dtype, tf32, part):
    """And asked for again by the next, where there is none: what the compiler said is the call's error."""
    algorithm = registry.find(operation, f"{name}@cuda")
    (path,) = builder.build_many([registry.platforms()["cuda"].request(algorithm)])
    library = ctypes.CDLL(str(path))
    weight = (7, 5) if operation == "linear" else None
    spec = OPERATIONS[operation].spec("", (3, 5), weight, False, dtype, "cuda", {})
    args, failures, asked = native.args_of(spec, abi.NCHW), [], []
    args.sm, args.allow_tf32 = 80, tf32
    runtime = harness.runtime(failures, 1)
    args.runtime = ctypes.pointer(runtime)

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)
    def provide(sm, wanted):
        asked.append((sm, wanted))
        library.ai3_set_device_code(sm, wanted, b"", ctypes.c_uint64(0), b"the compiler's words")

    library.ai3_set_device_code_provider(provide)
    for _ in range(2):
        abi.kernel_table(library).run(args)
    library.ai3_set_device_code_provider(None)
    assert asked == [(80, part)] * 2
    assert failures == ["the compiler's words"] * 2


def test_no_kernel_lets_the_next_one_start_before_its_end():
    """Not all of cuDNN's kernels wait for it: the comment in mma.cuh says what they may write into."""
    sources = [*builder.INCLUDE.rglob("*.cuh"), *(algorithm.source for algorithm in SOURCES)]
    assert any("griddepcontrol.wait;" in source.read_text() for source in sources)
    assert [source.name for source in sources if "griddepcontrol.launch_dependents;" in source.read_text()] == []
