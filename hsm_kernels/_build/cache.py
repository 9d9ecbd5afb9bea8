"""The cache of libraries that were built just in time.

A cache directory holds, per library:

- ``<key>/_C.so`` and ``<key>/record.json``. The folder appears complete, by a rename, and is never
  written again. The record has the checksum of the library, so damage to it shows.
- ``<key>.lock``, held while the library is built. It is never deleted: the kernel frees the lock of
  a process that dies.
- ``<key>.failed.json`` and ``<key>.log`` when the compiler failed.

``build-*`` are the private folders of running (or killed) builds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LIBRARY = "_C.so"
_RECORD = "record.json"
_COMPILERS = "compilers.json"
_BUILD_PREFIX = "build-"

#: No build takes this long, so an older private folder is one of a killed build.
_ABANDONED_AFTER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """A complete library in the cache."""

    library: Path
    record: dict[str, Any]


def candidate_directories(environ: Mapping[str, str]) -> Iterator[Path]:
    """Where the cache may be, best first. Nothing is created."""
    if environ.get("HSM_KERNELS_CACHE_DIR"):
        yield Path(environ["HSM_KERNELS_CACHE_DIR"]).absolute()
    for variable in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        if environ.get(variable):
            yield Path(environ[variable]).absolute() / "hsm_kernels"
    home = Path(os.path.expanduser("~"))
    if home.is_absolute():
        yield home / ".cache" / "hsm_kernels"
    # Without a usable home the library is at least kept until the machine restarts.
    yield Path(tempfile.gettempdir()) / f"hsm_kernels-{os.getuid()}"


def refusal(directory: Path) -> str | None:
    """Why nothing may be loaded from ``directory``: others can write there. None = it may."""
    try:
        status = directory.stat()
    except OSError as error:
        return f"cache directory {directory}: {error.strerror}"
    if not directory.is_dir():
        return f"cache directory {directory}: not a directory"
    if status.st_uid != os.geteuid():
        return f"cache directory {directory}: belongs to another user (uid {status.st_uid})"
    if status.st_mode & 0o022:
        return f"cache directory {directory}: other users can write to it; use chmod go-w"
    return None


def prepare(directory: Path) -> str | None:
    """Create ``directory`` where it is missing. Returns why it cannot be used, None when it can."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(directory / "probe.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # some network file systems have no locks
    except OSError as error:
        return f"cache directory {directory}: {error.strerror}"
    return refusal(directory)


def read_entry(directory: Path, key: str) -> Entry | None:
    """The library ``key``, or None where it is missing or damaged."""
    library = directory / key / _LIBRARY
    record = _read_json(directory / key / _RECORD)
    try:
        content = library.read_bytes()
    except OSError:
        return None
    if record.get("sha256") != hashlib.sha256(content).hexdigest():
        return None
    return Entry(library, record)


def keys(directory: Path, prefix: str) -> list[str]:
    """The keys in ``directory`` that begin with ``prefix``, damaged ones too."""
    return sorted(path.name for path in directory.glob(f"{prefix}*") if path.is_dir())


@contextlib.contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """Hold the lock of ``key``; wait for the process that has it."""
    # Not the filelock package: where the file system has no locks it falls back to a file whose
    # existence is the lock, and such a lock outlives its owner.
    with open(directory / f"{key}.lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"hsm_kernels: waiting for another process that compiles into {directory}\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def build_folder(directory: Path) -> Iterator[Path]:
    """A private folder for one build, deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=_BUILD_PREFIX, dir=directory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def library_in(folder: Path) -> Path:
    """Where the library of a build belongs in the folder that will be published."""
    return folder / _LIBRARY


def publish(directory: Path, key: str, folder: Path, record: Mapping[str, Any]) -> Entry:
    """Make the library in ``folder`` the library ``key``, in one step, while holding the lock."""
    content = library_in(folder).read_bytes()
    full = {**record, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / _RECORD).write_text(json.dumps(full, indent=1))
    target = directory / key
    if target.exists():
        # Damaged, or replaced on request. Processes that have it loaded keep their mapping.
        with build_folder(directory) as old:
            target.rename(old / "replaced")
            folder.rename(target)
    else:
        folder.rename(target)
    return Entry(library_in(target), full)


def sweep(directory: Path) -> None:
    """Delete the private folders of builds that were killed long ago."""
    for folder in directory.glob(f"{_BUILD_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(folder)


def write_failure(directory: Path, key: str, log: str, record: Mapping[str, Any]) -> Path:
    """Remember that the compiler failed. Returns the path of the log."""
    path = directory / f"{key}.log"
    path.write_text(log)
    _write_json(directory / f"{key}.failed.json", {**record, "time": time.time()})
    return path


def read_failure(directory: Path, key: str) -> dict[str, Any] | None:
    """What :func:`write_failure` remembered in the last day, else None."""
    record = _read_json(directory / f"{key}.failed.json")
    # Not for ever: the disk or the memory may have been full.
    recent = time.time() - record.get("time", 0) < _ABANDONED_AFTER_SECONDS
    return {**record, "log": str(directory / f"{key}.log")} if record and recent else None


def forget_failure(directory: Path, key: str) -> None:
    """Undo :func:`write_failure`."""
    for name in (f"{key}.failed.json", f"{key}.log"):
        (directory / name).unlink(missing_ok=True)


def read_compiler_version(directory: Path, stamp: str) -> str | None:
    """The version remembered for this stamp, because to ask the compiler takes a process."""
    version = _read_json(directory / _COMPILERS).get(stamp)
    return version if isinstance(version, str) else None


def write_compiler_version(directory: Path, stamp: str, version: str) -> None:
    """Remember the version of a compiler, where the directory can be written."""
    with contextlib.suppress(OSError):
        _write_json(directory / _COMPILERS, {**_read_json(directory / _COMPILERS), stamp: version})


def say(text: str) -> None:
    """Print to stderr at once."""
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with build_folder(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(content, indent=1))
        (folder / path.name).replace(path)
