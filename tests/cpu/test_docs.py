"""The code in the documentation runs as it stands."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from ai3_compile import zoo
from ai3_compile.backends import abi, builder, cpp

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            found.append(pytest.param(code, id=f"{page.stem}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code):
    torch._dynamo.reset()
    zoo.torchvision_models()  # the pages import torchvision, which here may need help beside a CPU build of torch
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("code", blocks("cpp"))
def test_cpp(code, tmp_path):
    source = tmp_path / "plain.cpp"
    source.write_text(code)
    (path,) = builder.build_kernels([("documentation", source)])
    table = abi.kernel_table(ctypes.CDLL(str(path)))
    x = torch.randn(100)
    y = torch.empty(100)
    args = abi.Args(dtype=abi.FLOAT32, input=cpp.tensor_of((100,)), output=cpp.tensor_of((100,)))
    args.input.data, args.output.data = x.data_ptr(), y.data_ptr()
    assert table.supports(args) is None
    table.run(args)
    assert torch.equal(y, x.relu())


def test_the_first_screen_shows_the_two_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("make demo" in line for line in first) and any("make test" in line for line in first)
