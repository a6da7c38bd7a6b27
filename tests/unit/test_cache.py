"""The cache of built libraries and its keys. Libraries are bytes here: no compiler is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from ai3_compile import errors
from ai3_compile.backends import builder, cache, sources

KEY = cache.Key(
    name="thing",
    sources="s",
    headers="h",
    flags=("-O3",),
    link_flags=(),
    compiler="c++ 12, x86_64",
    abi="linux",
    extra=(("isa", "avx2"),),
)


class Maker:
    """Stands in for the compiler: writes a file and counts how often it is called."""

    def __init__(self, content: bytes = b"library") -> None:
        self.content = content
        self.calls = 0

    def __call__(self, folder: Path) -> Path:
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "thing.o").write_bytes(b"object")
        (folder / "built").write_bytes(self.content)
        return folder / "built"


def never(folder: Path) -> Path:
    raise AssertionError("built what is in the cache")


def names(folder: Path) -> set[str]:
    """What is in the cache folder, lock files aside."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# Entries


def test_builds_once(empty_cache: Path) -> None:
    """A library is built the first time, in a folder that goes away, and found from then on."""
    assert cache.find(KEY) is None
    make = Maker()
    path = cache.obtain(KEY, make)
    assert path == empty_cache / KEY.entry / "thing.so"
    assert path.read_bytes() == b"library"
    assert names(empty_cache) == {KEY.entry}
    assert {p.name for p in path.parent.iterdir()} == {"thing.so", "manifest.json"}
    assert cache.find(KEY) == path
    assert cache.obtain(KEY, never) == path
    assert make.calls == 1


def test_manifest_is_readable(empty_cache: Path) -> None:
    """The key stands in the manifest field by field."""
    manifest = json.loads((cache.obtain(KEY, Maker()).parent / "manifest.json").read_text())
    assert manifest["key"]["flags"] == ["-O3"]
    assert manifest["key"]["extra"] == {"isa": "avx2"}
    assert set(manifest["key"]) == {field.name for field in dataclasses.fields(cache.Key)}
    assert manifest["bytes"] == len(b"library")


def _truncate(entry: Path) -> None:
    os.truncate(entry / "thing.so", 3)


def _flip(entry: Path) -> None:
    (entry / "thing.so").write_bytes(b"librarz")


def _remove_library(entry: Path) -> None:
    (entry / "thing.so").unlink()


def _break_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"key": {')


def _empty_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("[]")


def _remove_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def _other_key(entry: Path) -> None:
    path = entry / "manifest.json"
    path.write_text(path.read_text().replace("-O3", "-O0"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(_truncate, "has 3 bytes instead of 7", id="truncated"),
        pytest.param(_flip, "contents", id="flipped"),
        pytest.param(_remove_library, "FileNotFoundError", id="no library"),
        pytest.param(_break_manifest, "JSONDecodeError", id="broken manifest"),
        pytest.param(_empty_manifest, "TypeError", id="empty manifest"),
        pytest.param(_remove_manifest, "FileNotFoundError", id="no manifest"),
        pytest.param(_other_key, "another key", id="other key"),
    ],
)
def test_damaged_entry(
    empty_cache: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    """A damaged entry is never used: it is set aside, said once, and built again."""
    entry = cache.obtain(KEY, Maker()).parent
    damage(entry)
    damaged = {path.name: path.read_bytes() for path in entry.iterdir()}
    assert cache.find(KEY) is None
    make = Maker()
    with caplog.at_level(logging.WARNING, logger="ai3_compile.builder"):
        path = cache.obtain(KEY, make)
        cache.obtain(KEY, never)
    assert make.calls == 1
    assert path.read_bytes() == b"library"
    (aside,) = empty_cache.glob(f"{KEY.entry}.damaged-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == damaged
    (record,) = caplog.records
    for part in (str(entry), aside.name, reason):
        assert part in record.getMessage()
    assert [e.path for e in cache.cache_entries()] == [entry]


def test_failed_build_leaves_nothing(empty_cache: Path) -> None:
    """The error of a build comes through, and the next one begins afresh."""

    def fail(folder: Path) -> Path:
        (folder / "half.o").write_bytes(b"half")
        raise errors.BuildError(name="thing", command="c++", output="no")

    with pytest.raises(errors.BuildError):
        cache.obtain(KEY, fail)
    assert names(empty_cache) == set()
    assert cache.obtain(KEY, Maker()).is_file()


def test_says_what_changed(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A miss names the fields that differ from the entry built before."""
    with caplog.at_level(logging.INFO, logger="ai3_compile.builder"):
        cache.obtain(KEY, Maker())
        cache.obtain(dataclasses.replace(KEY, headers="other", flags=("-O2",)), Maker())
    assert [record.getMessage() for record in caplog.records] == [
        "building thing (not in the cache)",
        "building thing (changed: headers, flags)",
    ]


def test_clear(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Clearing removes entries, also damaged and abandoned ones, and nothing that is not a build."""
    os.truncate(cache.obtain(KEY, Maker()), 0)
    cache.obtain(KEY, Maker())
    cache.obtain(dataclasses.replace(KEY, name="other"), Maker())
    (empty_cache / f"{KEY.entry}.building-x").mkdir()
    (empty_cache / "reports").mkdir()
    assert [entry.path.name.rpartition("-")[0] for entry in cache.cache_entries()] == ["other", "thing"]
    assert cache.cache_clear() == 2
    assert names(empty_cache) == {"reports"}
    assert cache.cache_entries() == []
    assert cache.cache_clear() == 0


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """AI3_CACHE_DIR counts; without it, or with an empty one, it is a folder of the user's caches."""
    monkeypatch.setenv("AI3_CACHE_DIR", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for unset in (lambda: monkeypatch.setenv("AI3_CACHE_DIR", ""), lambda: monkeypatch.delenv("AI3_CACHE_DIR")):
        unset()
        assert cache.cache_dir().name == "ai3_compile"
        assert cache.cache_dir() != tmp_path
    if sys.platform == "linux":
        assert cache.cache_dir() == tmp_path / "xdg" / "ai3_compile"


# Folders that take no writes


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Takes the right to write to a folder away; from root, who ignores modes, by being another user for a while."""
    os.chmod(folder, 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (folder / "write").touch()
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chmod(folder, 0o755)


@pytest.fixture
def open_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder that any user can read, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    monkeypatch.setenv("AI3_CACHE_DIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_read_only_folder_with_the_entry(open_cache: Path) -> None:
    """What is in the cache is used from a folder that takes no writes."""
    path = cache.obtain(KEY, Maker())
    with read_only(open_cache):
        assert cache.obtain(KEY, never) == path


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_read_only_folder_without_the_entry(open_cache: Path) -> None:
    """What is not in the cache of such a folder is an error that names the folder and the way out."""
    with read_only(open_cache), pytest.raises(errors.CacheNotWritableError) as error:
        cache.obtain(KEY, never)
    assert str(open_cache) in str(error.value) and "AI3_CACHE_DIR" in str(error.value)
    assert list(open_cache.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_read_only_folder_with_a_damaged_entry(open_cache: Path) -> None:
    """A damaged entry that cannot be replaced is an error, not a library."""
    os.truncate(cache.obtain(KEY, Maker()), 3)
    with read_only(open_cache), pytest.raises(errors.CacheNotWritableError):
        cache.obtain(KEY, never)


def test_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder below a file can be neither read nor made."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("AI3_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.CacheNotWritableError, match="AI3_CACHE_DIR"):
        cache.obtain(KEY, never)
    assert cache.cache_state().startswith("not writable")
    assert cache.cache_entries() == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_folder_where_files_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once where a folder exists but no file can be made in it, also for root."""
    monkeypatch.setenv("AI3_CACHE_DIR", "/proc")
    with pytest.raises(errors.CacheNotWritableError, match="/proc"):
        cache.obtain(KEY, never)


# Several builders


def test_threads_build_once(empty_cache: Path) -> None:
    """Threads that ask for the same library at once share one build."""
    make, start = Maker(), threading.Barrier(8)

    def ask(_: int) -> Path:
        start.wait()
        return cache.obtain(KEY, make)

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(ask, range(8)))
    assert make.calls == 1
    assert paths == {empty_cache / KEY.entry / "thing.so"}


def test_time_out(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for another builder ends after AI3_BUILD_TIMEOUT, and the error names the lock."""
    empty_cache.mkdir()
    lock = empty_cache / f"{KEY.entry}.lock"
    monkeypatch.setenv("AI3_BUILD_TIMEOUT", "0.2")
    with FileLock(lock), pytest.raises(errors.BuildTimeoutError) as error:
        cache.obtain(KEY, never)
    assert str(lock) in str(error.value) and "AI3_BUILD_TIMEOUT" in str(error.value)
    assert cache.obtain(KEY, Maker()).is_file()


def test_time_out_must_be_a_number(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A malformed time-out is refused, naming the variable."""
    monkeypatch.setenv("AI3_BUILD_TIMEOUT", "soon")
    with pytest.raises(errors.OptionError, match="AI3_BUILD_TIMEOUT.*'soon'"):
        cache.obtain(KEY, never)


def test_abandoned_folders(empty_cache: Path) -> None:
    """Folders of builders that died are removed by the next build; those of builders at work are not."""
    busy = dataclasses.replace(KEY, sources="busy").entry
    dead = dataclasses.replace(KEY, sources="dead").entry
    for entry in (KEY.entry, busy, dead):
        (empty_cache / f"{entry}.building-x" / "deep").mkdir(parents=True)
    with FileLock(empty_cache / f"{busy}.lock"):
        cache.obtain(KEY, Maker())
        assert names(empty_cache) == {KEY.entry, f"{busy}.building-x"}


# Keys


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(cache.Key)])
def test_every_field_counts(field: str) -> None:
    """Another value of any field is another entry."""
    values: dict[str, Any] = {"flags": ("-g",), "link_flags": ("-lm",), "extra": (("isa", "x"),), "cache_format": 2}
    other = dataclasses.replace(KEY, **{field: values.get(field, "other")})
    assert other.entry != KEY.entry
    assert other.changed_from(KEY.readable()) == [field]


def test_key_survives_json() -> None:
    """The key compares equal to itself after it was written and read."""
    assert json.loads(json.dumps(KEY.readable())) == KEY.readable()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source with a header beside it, and two include folders; the compiler's identity is made up."""
    monkeypatch.setattr(builder, "describe_compiler", lambda: "c++ 12, x86_64")
    folder = tmp_path / "project"
    for name in ("src/k.cpp", "src/beside.h", "include/ai3/kernel.h", "include/ai3/vec.h", "more/x.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"// {name}\n")
    return folder


def request(folder: Path, flags: tuple[str, ...] = ("-O3",), isa: str = "avx2") -> builder.Request:
    include = (folder / "include", folder / "more")
    return builder.Request("k", (folder / "src" / "k.cpp",), flags, include, extra={"isa": isa})


def test_key_does_not_depend_on_the_place(project: Path) -> None:
    """The same files elsewhere make the same key."""
    before = builder.key_of(request(project))
    moved = project.rename(project.with_name("moved elsewhere"))
    assert builder.key_of(request(moved)) == before
    assert str(project.parent) not in json.dumps(before.readable())


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("src/k.cpp", "sources"),
        ("src/beside.h", "headers"),
        ("include/ai3/vec.h", "headers"),
        ("more/x.h", "headers"),
    ],
)
def test_key_follows_contents(project: Path, name: str, field: str) -> None:
    """A change in the source, in a header beside it, or in any include folder makes another key."""
    before = builder.key_of(request(project))
    file = project / name
    file.write_text(file.read_text() + "//\n")
    assert builder.key_of(request(project)).changed_from(before.readable()) == [field]


def test_key_follows_header_names(project: Path) -> None:
    """A header that is renamed, or added, makes another key, though no content changed."""
    before = builder.key_of(request(project))
    (project / "more" / "x.h").rename(project / "more" / "y.h")
    renamed = builder.key_of(request(project))
    assert renamed.changed_from(before.readable()) == ["headers"]
    (project / "include" / "empty.h").touch()
    assert builder.key_of(request(project)).changed_from(renamed.readable()) == ["headers"]


def test_key_follows_flags_compiler_and_isa(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, the compiler's identity and the instructions built for are part of the key."""
    before = builder.key_of(request(project))
    assert builder.key_of(request(project, flags=("-O3", "-g"))).changed_from(before.readable()) == ["flags"]
    assert builder.key_of(request(project, isa="avx512")).changed_from(before.readable()) == ["extra"]
    monkeypatch.setattr(builder, "describe_compiler", lambda: "clang 19, x86_64")
    assert builder.key_of(request(project)).changed_from(before.readable()) == ["compiler"]


@pytest.mark.parametrize(
    ("capability", "isa", "march"),
    [("AVX512", "avx512", "x86-64-v4"), ("AVX2", "avx2", "x86-64-v3"), ("DEFAULT", "baseline", None)],
)
def test_cpu_flags(monkeypatch: pytest.MonkeyPatch, capability: str, isa: str, march: str | None) -> None:
    """Kernels are built for the instructions that PyTorch uses; for none beyond the platform's where it names none."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert builder.cpu_isa() == isa
    marches = [flag.removeprefix("-march=") for flag in builder.cpu_flags(isa) if flag.startswith("-march=")]
    assert marches == ([] if march is None else [march])


# Without a compiler


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    """CXX that names nothing: the reason names it and what to install, and building raises it."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    reason = builder.no_compiler_reason()
    assert reason is not None and "/nowhere/c++" in reason and "CXX" in reason and "install" in reason
    with pytest.raises(errors.NoCompilerError, match="/nowhere/c"):
        builder.build_many([request(project)])
    assert not empty_cache.exists()


def test_compiler_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is no compiler is not taken for one."""
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    assert "does not tell its version" in (builder.no_compiler_reason() or "")


# The core library's digest


def test_core_digest(tmp_path: Path) -> None:
    """The digest follows the core's sources and the ABI header, and neither its place nor other headers."""
    kernels = tmp_path / "kernels"
    shutil.copytree(builder.KERNELS / "core", kernels / "core")
    shutil.copytree(builder.INCLUDE, kernels / "include")
    digest = sources.core_digest(kernels)
    assert digest == builder.core_digest()
    (kernels / "include" / "ai3" / "other.h").touch()
    assert sources.core_digest(kernels) == digest
    headers = [kernels / "include" / "ai3" / "kernel.h", kernels / "core" / "core.h"]
    for path in [*headers, *sources.core_sources(kernels)]:
        path.write_text(path.read_text() + "\n")
        changed = sources.core_digest(kernels)
        assert changed != digest, path
        digest = changed


def test_setup_needs_only_the_standard_library() -> None:
    """setup.py loads sources.py where nothing is installed."""
    path = Path(builder.__file__).with_name("sources.py")
    code = f"import runpy; print(runpy.run_path({str(path)!r})['core_digest'].__name__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "core_digest"), done.stderr
