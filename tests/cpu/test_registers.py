"""What the compiler makes of the hot loops: the operands of a register block are in registers, none on the stack."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai3_compile import registry
from ai3_compile.backends import builder

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing, which binutils brings")

HOT = ("gemm_block", "multiply_rows", "dot_block")
"""The functions whose innermost loops are register blocks."""
_VECTOR, _STACK = re.compile(r"%[xyz]mm"), re.compile(r"\(%r[sb]p")


def loops(library: Path) -> Iterator[tuple[str, list[str]]]:
    """The innermost loops of a library, each as the name of its function and its instructions."""
    command = ["objdump", "-dC", "--no-show-raw-insn", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    function, places, body = "", {}, []
    for line in lines:
        if heading := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function, places, body = heading[1], {}, []
            continue
        if not (instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)", line)):
            continue
        address, text = instruction.groups()
        places[address] = len(body)
        body.append(text)
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        if jump and jump[1] in places:
            inside = body[places[jump[1]] : -1]
            if not any(re.match(r"j\w+\s", other) for other in inside):
                yield function, inside


@pytest.mark.parametrize(
    "algorithm",
    [a for a in registry.algorithms() if a.platform == "cpp" and a.operation in ("conv2d", "linear", "attention")],
    ids=lambda a: a.label,
)
def test_register_blocks_stay_in_registers(algorithm):
    if builder.cpu_isa() == "baseline":
        pytest.skip("needs a CPU with AVX2 or AVX-512: without, blocks are of scalars' width")
    (library,) = builder.build_kernels([(algorithm.label, algorithm.source)])
    blocks = [
        (function, body)
        for function, body in loops(library)
        if any(name in function for name in HOT) and sum("vfmadd" in text for text in body) >= 4
    ]
    if algorithm.name in ("gemm", "implicit gemm", "implicit precomp gemm", "winograd"):
        assert len(blocks) >= 4, "the disassembly was not understood"
    spilled = {
        function: text for function, body in blocks for text in body if _VECTOR.search(text) and _STACK.search(text)
    }
    assert not spilled
