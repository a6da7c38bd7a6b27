"""The folder of built libraries: one entry a key, verified when used, put there whole, by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from ..errors import Ai3Error, BuildTimeoutError, CacheNotWritableError, OptionError

log = logging.getLogger("ai3_compile.builder")

FORMAT = 1
MANIFEST = "manifest.json"
_BUILDING, _DAMAGED, _LOCK = ".building-", ".damaged-", ".lock"


@dataclass(frozen=True)
class Key:
    """All that an artefact depends on: another value in a field is another entry. No field names a place on disk."""

    name: str
    sources: str
    headers: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    compiler: str
    abi: str
    extra: tuple[tuple[str, str], ...]
    cache_format: int = FORMAT
    ending: str = ".so"

    @property
    def entry(self) -> str:
        return f"{self.name}-{hashlib.sha256(json.dumps(self.readable()).encode()).hexdigest()[:16]}"

    def readable(self) -> dict[str, object]:
        """As it is written to the manifest, in types that JSON gives back unchanged."""
        lists = {"flags": list(self.flags), "link_flags": list(self.link_flags)}
        return {**asdict(self), **lists, "extra": dict(self.extra)}

    def changed_from(self, other: dict[str, object]) -> list[str]:
        mine = self.readable()
        return [field.name for field in fields(self) if mine[field.name] != other.get(field.name)]


@dataclass(frozen=True)
class Entry:
    """One built library in the cache."""

    path: Path
    bytes: int

    def __str__(self) -> str:
        return f"{self.path.name}  {self.bytes / 1024:.0f} KB"


class _Damaged(Exception):
    """An entry that is there but is not what its manifest, or the key, says."""


def cache_dir() -> Path:
    """Where built libraries are kept: AI3_CACHE_DIR, or a folder of the user's caches."""
    given = os.environ.get("AI3_CACHE_DIR")
    return Path(given).expanduser().absolute() if given else Path(platformdirs.user_cache_dir("ai3_compile", False))


def find(key: Key) -> Path | None:
    """The library of this key, if a sound one is there. Takes no lock and writes nothing."""
    with contextlib.suppress(_Damaged):
        return _verified(key)
    return None


def obtain(key: Key, make: Callable[[Path], Path]) -> Path:
    """The library of this key; where there is none, `make(folder)` builds one in an empty folder and returns its path.

    Of several processes that ask at once one builds and the others wait. Raises CacheNotWritableError and
    BuildTimeoutError, and what `make` raises; then nothing is left behind.
    """
    found = find(key)
    if found is not None:
        return found
    with _locked(key):
        try:
            found = _verified(key)
            if found is not None:
                return found
        except _Damaged as damage:
            _set_aside(key, damage)
        _remove_abandoned(held=key.entry)
        log.info("building %s (%s)", key.name, _why(key))
        start = time.monotonic()
        with _writing(key):
            folder = Path(tempfile.mkdtemp(prefix=f"{key.entry}{_BUILDING}", dir=cache_dir()))
        try:
            library = make(folder)
            with _writing(key):
                return _publish(key, library, folder / "entry", time.monotonic() - start)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def cache_entries() -> list[Entry]:
    return [Entry(path, _size(path)) for path in sorted(cache_dir().glob("*")) if _is_entry(path)]


def cache_clear() -> int:
    """Removes the built libraries, and what was set aside; returns how many entries there were."""
    removed = cache_entries()
    try:
        _remove_abandoned()
        for path in [*(entry.path for entry in removed), *cache_dir().glob(f"*{_DAMAGED}*")]:
            shutil.rmtree(path)
    except OSError as error:
        raise Ai3Error(message=f"the cache folder {cache_dir()} cannot be emptied: {error}") from error
    return len(removed)


def cache_state() -> str:
    """Whether the folder takes writes, and what is in it, in a few words."""
    entries = cache_entries()
    held = f"{len(entries)} entries, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB"
    try:
        _check_writable()
        return f"writable, {held}"
    except OSError as error:
        return f"not writable: {error.strerror}, {held}"


def _check_writable() -> None:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache_dir()):
        pass


def _library(key: Key) -> Path:
    return cache_dir() / key.entry / f"{key.name}{key.ending}"


def _verified(key: Key) -> Path | None:
    """The key's library; None without an entry. Raises _Damaged where it is not what the manifest says."""
    library = _library(key)
    if not library.parent.exists():
        return None
    try:
        manifest = json.loads((library.parent / MANIFEST).read_bytes())
        content = library.read_bytes()
        if manifest["key"] != key.readable():
            raise _Damaged(f"{MANIFEST} is of another key")
        if len(content) != manifest["bytes"]:
            raise _Damaged(f"{library.name} has {len(content)} bytes instead of {manifest['bytes']}")
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise _Damaged(f"the contents of {library.name} changed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    return library


def _publish(key: Key, library: Path, entry: Path, seconds: float) -> Path:
    """Makes an entry of a built library, in a folder of its own first: others see all of it or nothing."""
    entry.mkdir()
    content = library.read_bytes()
    os.replace(library, entry / _library(key).name)
    manifest = {
        "key": key.readable(),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "seconds": round(seconds, 3),
    }
    (entry / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(entry, _library(key).parent)
    return _library(key)


def _set_aside(key: Key, damage: _Damaged) -> None:
    path = cache_dir() / key.entry
    aside = path.with_name(f"{path.name}{_DAMAGED}{time.time_ns()}")
    with _writing(key):
        os.replace(path, aside)
    log.warning("the cache entry %s is damaged (%s); it is set aside as %s and built again", path, damage, aside.name)


def _lock_of(entry: str, timeout: float) -> FileLock:
    return FileLock(cache_dir() / f"{entry}{_LOCK}", timeout=timeout)


@contextlib.contextmanager
def _locked(key: Key) -> Iterator[None]:
    """Holds the key's lock. It is one of the operating system's, which ends with its process, however that ends."""
    seconds = timeout()
    lock = _lock_of(key.entry, seconds)
    with _writing(key):
        _check_writable()  # where no file can be made, some systems let filelock try until its time is over
        try:
            lock.acquire()
        except Timeout:
            raise BuildTimeoutError(name=key.name, seconds=seconds, lock=lock.lock_file) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _writing(key: Key) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheNotWritableError(name=key.name, folder=cache_dir(), reason=error.strerror or error) from error


def timeout() -> float:
    """Seconds to wait for another process that builds the same."""
    text = os.environ.get("AI3_BUILD_TIMEOUT", "600")
    try:
        return float(text)
    except ValueError:
        raise OptionError(message=f"AI3_BUILD_TIMEOUT: expected a number of seconds, got {text!r}.") from None


def _remove_abandoned(held: str | None = None) -> None:
    """Removes the folders of killed builders: one at work holds its entry's lock. The caller holds that of `held`."""
    for folder in cache_dir().glob(f"*{_BUILDING}*"):
        entry = folder.name.partition(_BUILDING)[0]
        with contextlib.suppress(Timeout), contextlib.nullcontext() if entry == held else _lock_of(entry, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)


def _why(key: Key) -> str:
    """What differs from the entry of this name that was built last."""
    manifests = [path / MANIFEST for path in cache_dir().glob(f"{key.name}-*") if _is_entry(path)]
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            changed = key.changed_from(json.loads(path.read_bytes())["key"])
            if "name" not in changed:
                return "changed: " + ", ".join(changed)
    return "not in the cache"


def _is_entry(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and _BUILDING not in folder.name and _DAMAGED not in folder.name


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
