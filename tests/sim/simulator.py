"""Builds CUDA sources for the simulator, which runs them on the CPU, and loads them.

A library is made of sources that are compiled as they are, with the simulator's ``device.h`` in place of CUDA, and of
the simulator itself. Objects and libraries are cached by their contents. ctypes loads them: what they export takes
plain pointers and numbers, so that there is nothing for a binding generator to do, and nothing to install.
"""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsm_kernels._build import cache, description, toolchain

ROOT = Path(__file__).parents[2]

#: Half of the time of a test is compilation, so the compiler is not asked for much. It does not know `#pragma unroll`.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers")
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", *WARNINGS, "-DHSM_SIMULATOR")
#: Set where AddressSanitizer was loaded before Python: see `sanitized_environment`.
SANITIZED = os.environ.get("HSM_SIMULATOR_SANITIZE") == "1"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all") if SANITIZED else ()


@dataclass(frozen=True)
class Build:
    """A library of sources, by their names in the repository."""

    sources: tuple[str, ...]
    includes: tuple[str, ...] = ("csrc", "tests")
    flags: tuple[str, ...] = ()
    #: Sources with operators of torch; torch_on_cpu.h says what becomes of these.
    torch_sources: tuple[str, ...] = ()
    #: Names of the repository's files, and what is compiled in their place.
    changed: tuple[tuple[str, str], ...] = ()

    def patched(self, name: str, old: str, new: str, occurrence: int = 0) -> "Build":
        """The same with one occurrence of ``old`` in a file replaced."""
        changed = dict(self.changed)
        parts = changed.get(name, (ROOT / name).read_text()).split(old)
        assert occurrence < len(parts) - 1, f"{name} has no {old!r} number {occurrence}: change this test with it"
        text = old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])
        return replace(self, changed=tuple((changed | {name: text}).items()))

    def load(self) -> "Library":
        """Compile what is not in the cache."""
        sources = (*self.sources, *self.torch_sources, "tests/sim/runtime.cpp")
        with ThreadPoolExecutor(toolchain.job_limit(os.environ)) as pool:
            objects = list(pool.map(self._object, sources))
        libraries = (f"-L{_torch_files().lib}", "-ltorch_cpu") if self.torch_sources else ()
        command = (*_compiler(), "-shared", *SANITIZE, *map(str, objects), *libraries)
        return Library(_made("library.so", "\0".join(command).encode(), command))

    def _object(self, source: str) -> Path:
        """Of all changes only those matter that the source reads: builds with the same ones share the object."""
        read = _read_files(replace(self, changed=()), source) if self.changed else frozenset()
        changed = tuple((name, text) for name, text in self.changed if name in read)
        return _object_of(replace(self, changed=changed), source)

    def _preprocess(self, source: str, overlay: Path) -> tuple[tuple[str, ...], bytes]:
        """The command that compiles a source, and all that the compiler reads: its flags and the preprocessed text."""
        flags = (*FLAGS, *SANITIZE, *self.flags)
        places = [f"-I{root / name}" for name in self.includes for root in (overlay, ROOT)]
        places += [f"-ffile-prefix-map={root}=." for root in (overlay, ROOT)]
        if source in self.torch_sources:
            flags += ("-include", "sim/torch_on_cpu.h", f"-DTORCH_TARGET_VERSION={description.TORCH_TARGET_VERSION}")
            flags += ("-Wno-deprecated-declarations",)
            places += ["-isystem", str(_torch_files().include)]
        if self.changed:  # what a fault leaves unused is no fault
            flags += ("-w",)
        path = (overlay if source in dict(self.changed) else ROOT) / source
        command = (*_compiler(), "-x", "c++", *flags, *places)
        done = subprocess.run([*command, "-E", str(path)], stdout=subprocess.PIPE, check=True)
        text = done.stdout.replace(str(overlay).encode(), b".").replace(str(ROOT).encode(), b".")
        return (*command, "-c", str(path)), "\0".join(flags).encode() + text


class Library:
    """A simulated library: ``library.name(...)`` calls what ``SIM_EXPORT`` exports; tensors go as their addresses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.sim_last_error.restype = ctypes.c_char_p
        weakref.finalize(self, self._library.sim_release_stacks)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        return lambda *arguments: function(*map(_as_c, arguments))

    def text(self, name: str, *arguments: Any) -> str:
        """What a function says."""
        function = self._library[name]
        function.restype = ctypes.c_char_p
        return function(*arguments).decode()

    @property
    def launches(self) -> int:
        """How many kernels were launched so far."""
        return self._library.sim_launches()

    @property
    def last_error(self) -> str:
        """What went wrong in the last launch."""
        return self._library.sim_last_error().decode()

    def set_seed(self, seed: int) -> None:
        """Choose the schedules of the launches that follow."""
        self._library.sim_set_seed(ctypes.c_uint64(seed))


def _as_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_bool(argument) if isinstance(argument, bool) else argument


def sanitized_environment() -> dict[str, str]:
    """What a process needs to load libraries that were built for AddressSanitizer."""
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([*_compiler(), f"-print-file-name={name}"], text=True).strip() for name in names]
    return {
        **os.environ,
        "HSM_SIMULATOR_SANITIZE": "1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@functools.cache
def _object_of(build: Build, source: str) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in build.changed:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        command, contents = build._preprocess(source, Path(folder))
        return _made("object.o", contents, command)


@functools.cache
def _torch_files() -> toolchain.TorchFiles:
    return toolchain.torch_files(Path(torch.__file__).parent)


@functools.cache
def _compiler() -> tuple[str, ...]:
    return toolchain.find_compiler(os.environ).command


@functools.cache
def _cache_directory() -> Path:
    for directory in cache.candidate_directories(os.environ):
        if cache.prepare(directory / "simulator") is None:
            return directory / "simulator"
    return Path(tempfile.mkdtemp(prefix="hsm_kernels-simulator-"))


@functools.cache
def _compiler_version() -> bytes:
    return toolchain.find_compiler(os.environ).version().encode()


_files_read: dict[tuple[Build, str], frozenset[str]] = {}


def _read_files(build: Build, source: str) -> frozenset[str]:
    """The repository's files that the compiler reads for a source."""
    if (build, source) not in _files_read:
        with tempfile.TemporaryDirectory() as folder:
            _, text = build._preprocess(source, Path(folder))
        names = re.findall(r'^# \d+ "\./([^"]+)"', text.decode(errors="replace"), re.MULTILINE)
        _files_read[build, source] = frozenset(names)
    return _files_read[build, source]


def _made(name: str, contents: bytes, command: tuple[str, ...]) -> Path:
    """The file that a command makes from ``contents``, from the cache if it is there."""
    key = hashlib.sha256(_compiler_version() + contents).hexdigest()[:32]
    path = _cache_directory() / f"{key}-{name}"
    if not path.exists():
        with cache.build_folder(_cache_directory()) as folder:
            subprocess.run([*command, "-o", str(folder / name)], check=True)
            with suppress(FileExistsError):
                (folder / name).rename(path)
    return path
