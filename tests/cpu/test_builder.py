"""Building with the machine's own compiler: what it is given, what it says, and several processes at once."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ai3_compile import errors
from ai3_compile.backends import builder

pytestmark = pytest.mark.skipif(builder.no_compiler_reason() is not None, reason=str(builder.no_compiler_reason()))


def source(folder: Path, text: str, name: str = "answer.cpp") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def answering(folder: Path, answer: int) -> Path:
    return source(folder, f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {answer}; }}\n')


def answer_of(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def request(path: Path) -> builder.Request:
    return builder.Request(path.parent.name, (path,), builder.KERNEL_FLAGS)


def contents(cache: Path) -> list[str]:
    """What is in the cache folder, lock files aside."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def wrapper(folder: Path, before_compiling: str) -> Path:
    """A compiler that runs a line of shell before it compiles; it tells the version of the real one: one identity."""
    folder.mkdir()
    path = folder / "c++"
    real = shutil.which(os.environ.get("CXX", "c++"))
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {before_compiling};; esac\nexec {real} "$@"\n')
    path.chmod(0o755)
    return path


BUILDER = """
# Builds the source named last, once both marks are there.
import sys, time
from pathlib import Path
from ai3_compile.backends import builder
mark, other, source = map(Path, sys.argv[1:])
mark.touch()
while not other.exists():
    time.sleep(0.005)
print(builder.build_many([builder.Request(source.parent.name, (source,), builder.KERNEL_FLAGS)])[0])
"""


def test_build(empty_cache: Path, tmp_path: Path) -> None:
    """Sources with headers, several files, flags and folders with awkward characters become one library."""
    folder = tmp_path / "a folder"
    text = 'extern "C" const char* text() { return TEXT; }\n'
    first = source(folder, f"#include <part.h>\n{text}int answer() {{ return part(); }}\n")
    second = source(folder, "#include <part.h>\nint part() { return 42; }\n", "part.cpp")
    header = source(folder / "include", 'int part();\nextern "C" int answer();\n', "part.h")
    path = builder.build(
        "several", [first, second], flags=["-DTEXT=\"a $b 'c'\"", "-DUNUSED=1"], include_dirs=[header.parent]
    )
    library = ctypes.CDLL(str(path))
    library.text.restype = ctypes.c_char_p
    assert (library.answer(), library.text()) == (42, b"a $b 'c'")
    assert contents(empty_cache) == [path.parent.name]


def test_warm_process(empty_cache: Path, tmp_path: Path) -> None:
    """A process that finds its library in the cache neither builds nor imports what builds."""
    path = builder.build_many([request(answering(tmp_path / "k", 7))])[0]
    before = path.stat()
    code = f"{BUILDER}\nassert 'torch.utils.cpp_extension' not in sys.modules"
    mark = str(tmp_path / "mark")
    command = [sys.executable, "-c", code, mark, mark, str(tmp_path / "k" / "answer.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(path)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_many(empty_cache: Path, tmp_path: Path) -> None:
    """Libraries come in the order of their requests; equal requests share one."""
    requests = [request(answering(tmp_path / f"k{i}", i)) for i in range(4)]
    paths = builder.build_many([*requests, requests[0]])
    assert [answer_of(path) for path in paths] == [0, 1, 2, 3, 0]
    assert len(contents(empty_cache)) == 4


def test_threads_leave_dlopen_flags(empty_cache: Path, tmp_path: Path) -> None:
    """Building from threads changes nothing of how the process loads libraries afterwards, and loads none itself."""
    flags = sys.getdlopenflags()
    paths = builder.build_many([request(answering(tmp_path / f"k{i}", i)) for i in range(4)])
    assert sys.getdlopenflags() == flags
    if sys.platform == "linux":
        assert str(empty_cache) not in Path("/proc/self/maps").read_text()
        assert answer_of(paths[0]) == 0
        assert str(empty_cache) in Path("/proc/self/maps").read_text()


def test_source_change_is_another_library(empty_cache: Path, tmp_path: Path) -> None:
    """Within one process, too, a changed source is built, and the old library stays."""
    old = builder.build_many([request(answering(tmp_path / "k", 1))])[0]
    new = builder.build_many([request(answering(tmp_path / "k", 2))])[0]
    assert (answer_of(old), answer_of(new)) == (1, 2)


def test_compiler_error(empty_cache: Path, tmp_path: Path) -> None:
    """The error shows the command and the compiler's words with file and line; other libraries are built."""
    bad = source(tmp_path / "bad", "int fine;\nint answer() { return undeclared; }\n")
    good = answering(tmp_path / "good", 3)
    with pytest.raises(errors.BuildError) as caught:
        builder.build_many([request(good), request(bad)])
    message = str(caught.value)
    assert f"{bad}:2:" in message and "undeclared" in message
    command = message.partition("The command was:\n")[2]
    assert str(bad) in command and " -c " in command and "-fno-math-errno" in command and "\n" not in command
    assert "ninja: " not in message and "Traceback" not in message
    (entry,) = contents(empty_cache)
    assert entry.startswith("good-")


@pytest.mark.skipif(sys.platform != "linux", reason="a linker flag of Linux")
def test_linker_error(empty_cache: Path, tmp_path: Path) -> None:
    """A library that does not link is an error with the linker's words, and link flags reach it."""
    path = source(tmp_path / "k", 'extern "C" int missing();\nextern "C" int answer() { return missing(); }\n')
    with pytest.raises(errors.BuildError, match="missing") as caught:
        builder.build("k", [path], flags=[], link_flags=["-Wl,-z,defs"])
    assert "answer.o" in str(caught.value)
    assert contents(empty_cache) == []


def test_compiler_that_cannot_run(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails without a word is an error all the same."""
    monkeypatch.setenv("CXX", str(wrapper(tmp_path / "bin", "exit 3")))
    with pytest.raises(errors.BuildError, match="answer.cpp"):
        builder.build_many([request(answering(tmp_path / "k", 3))])
    assert contents(empty_cache) == []


def test_truncated_library(empty_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A truncated library is not loaded but built again, which the log says."""
    one = request(answering(tmp_path / "k", 5))
    path = builder.build_many([one])[0]
    os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, logger="ai3_compile.builder"):
        assert answer_of(builder.build_many([one])[0]) == 5
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_ninja_from_its_package(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ninja is found where only its Python package is installed, as in a virtual environment that is not activated."""
    pytest.importorskip("ninja")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "as", "ld"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    assert builder.no_compiler_reason() is None
    assert answer_of(builder.build_many([request(answering(tmp_path / "k", 6))])[0]) == 6


def start_builder(mark: Path, other: Path, path: Path, compiler: Path) -> subprocess.Popen[str]:
    """A process that builds once the file `other` is there, too."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(mark), str(other), str(path)],
        env={**os.environ, "CXX": str(compiler)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_processes(empty_cache: Path, tmp_path: Path) -> None:
    """Two processes that need the same library at the same time: one builds it, and both load it."""
    path = answering(tmp_path / "k", 8)
    compiler = wrapper(tmp_path / "bin", f"echo compiled >> {tmp_path}/compiled; sleep 1")
    marks = [tmp_path / "a", tmp_path / "b"]
    builders = [start_builder(mark, other, path, compiler) for mark, other in (marks, marks[::-1])]
    outputs = [process.communicate(timeout=120) for process in builders]
    assert [process.returncode for process in builders] == [0, 0], outputs
    assert (tmp_path / "compiled").read_text() == "compiled\n"
    (library,) = {Path(out.strip()) for out, _ in outputs}
    assert answer_of(library) == 8
    assert contents(empty_cache) == [library.parent.name]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_builder(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that is killed half way blocks nobody: the next one builds, and clears up what it left."""
    path = answering(tmp_path / "k", 9)
    hanging = wrapper(tmp_path / "hanging", f"touch {tmp_path}/started; sleep 300")
    mark = tmp_path / "mark"
    victim = start_builder(mark, mark, path, hanging)
    try:
        wait_for((tmp_path / "started").exists)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(timeout=30)
        (left,) = contents(empty_cache)
        assert ".building-" in left
        # The dead builder's compiler still sleeps, and must not hold the lock either.
        monkeypatch.setenv("AI3_BUILD_TIMEOUT", "20")
        library = builder.build_many([request(path)])[0]
        assert left.startswith(library.parent.name), "the two would not have met"
        assert answer_of(library) == 9
        assert contents(empty_cache) == [library.parent.name]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()


CORE = """
import ctypes, torch
from ai3_compile import core
from ai3_compile.backends import builder
core.prebuilt = lambda: None
library = core.load()
assert library._name.startswith(str(builder.cache_dir())), library._name
assert ctypes.CDLL(library._name)._handle == library._handle
print(torch.ops.ai3.conv2d.default._schema.name)
"""


def test_core_at_first_use(empty_cache: Path) -> None:
    """Without a prebuilt core library it is built into the cache, and its operations are registered."""
    done = subprocess.run([sys.executable, "-c", CORE], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "ai3::conv2d"), done.stderr
    (entry,) = contents(empty_cache)
    assert entry.startswith("core-")
