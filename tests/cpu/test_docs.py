"""The code in the documentation runs as it stands.

README.md, choosing.md and adding.md: each block alone. The pages in STEPS: all blocks in the order of the page, in one
namespace and one empty working directory, where a C++ block is the file that its first line names. Blocks marked
`no-run` and those of other languages are not run.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch

from ai3_compile import registry, user_algorithms, zoo
from ai3_compile.backends import abi, builder

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("your-own-algorithm", "from-aithree", "eager")
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in STEPS)]
NO_COMPILER = builder.no_compiler_reason()

_FILE = re.compile(r"// (\w[\w./]*\.[ch]pp)\b")


def blocks_of(page: Path) -> list[tuple[str, str, int]]:
    """The language, the code and the line of every block that is run."""
    text = page.read_text()
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M)
    return [(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found if m[1] in ("python", "cpp")]


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        codes = [code for named, code, _ in blocks_of(page) if named == language]
        found.extend(pytest.param(code, id=f"{page.stem}-{number}") for number, code in enumerate(codes))
    return found


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    environment = dict(os.environ)
    monkeypatch.delenv(user_algorithms.ENVIRONMENT, raising=False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    zoo.torchvision_models()  # the pages import torchvision, which here may need help beside a CPU build of torch
    yield
    os.environ.clear()
    os.environ.update(environment)
    for algorithm in registry.users():
        registry.remove(algorithm)
    user_algorithms._from_folder.clear()
    user_algorithms._folder_state = None
    torch._dynamo.reset()


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where pages save files
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("code", blocks("cpp"))
def test_cpp(code, tmp_path):
    source = tmp_path / "plain.cpp"
    source.write_text(code)
    (path,) = builder.build_kernels([("documentation", source)])
    table = abi.kernel_table(ctypes.CDLL(str(path)))
    x = torch.randn(100)
    y = torch.empty(100)
    args = abi.Args(dtype=abi.FLOAT32, input=abi.tensor_of((100,)), output=abi.tensor_of((100,)))
    args.input.data, args.output.data = x.data_ptr(), y.data_ptr()
    assert table.supports(args) is None
    table.run(args)
    assert torch.equal(y, x.relu())


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
@pytest.mark.parametrize("name", STEPS)
def test_steps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / f"{name}.md"
    steps = blocks_of(page)
    assert steps
    if any(".plot(" in code for _, code, _ in steps):
        pytest.importorskip("matplotlib")
    namespace = {"__name__": "documentation"}
    for language, code, line in steps:
        if language == "cpp":
            named = _FILE.match(code)
            assert named, f"{page}:{line}: the first line of a C++ block is the name of its file, `// my_conv.cpp`"
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(code)
        else:
            # As many lines before it as on the page: a failure shows where it is.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_links_between_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_first_screen_shows_the_two_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("make demo" in line for line in first) and any("make test" in line for line in first)
