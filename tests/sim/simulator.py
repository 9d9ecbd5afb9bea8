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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hsm_kernels._build import cache, toolchain

ROOT = Path(__file__).parents[2]

#: Half of the time of a test is compilation, so the compiler is not asked for much. It does not know `#pragma unroll`.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
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
    libraries: tuple[str, ...] = ()
    #: What is compiled in place of the repository's files, by their names.
    changed: dict[str, str] = field(default_factory=dict)

    def patched(self, name: str, old: str, new: str, occurrence: int = 0) -> "Build":
        """The same with one occurrence of ``old`` in a file replaced."""
        parts = self.changed.get(name, (ROOT / name).read_text()).split(old)
        assert occurrence < len(parts) - 1, (
            f"{name} has no occurrence {occurrence} of {old!r}: change this test with it"
        )
        text = old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])
        return replace(self, changed={**self.changed, name: text})

    def load(self) -> "Library":
        """Compile what is not in the cache."""
        with ThreadPoolExecutor(toolchain.job_limit(os.environ)) as pool:
            objects = list(pool.map(self._object, (*self.sources, "tests/sim/runtime.cpp")))
        command = (*_compiler(), "-shared", *SANITIZE, *map(str, objects), *self.libraries)
        return Library(_made("library.so", "\0".join(command).encode(), command))

    def _object(self, source: str) -> Path:
        original = replace(self, changed={})
        if self.changed and not self.changed.keys() & _read_files(original, source):
            return original._object(source)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.changed.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            command, text = self._preprocess(source, Path(folder))
            return _made("object.o", text, command)

    def _preprocess(self, source: str, overlay: Path) -> tuple[tuple[str, ...], bytes]:
        """The command that compiles a source, and all that the compiler reads: its flags and the preprocessed text."""
        flags = (*FLAGS, *SANITIZE, *self.flags)
        places = [f"-I{root / name}" for name in self.includes for root in (overlay, ROOT)]
        places += [f"-ffile-prefix-map={root}=." for root in (overlay, ROOT)]
        path = overlay / source if source in self.changed else ROOT / source
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

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        return lambda *arguments: function(*map(_as_c, arguments))

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


@functools.cache
def _files_read(
    sources: tuple[str, ...], includes: tuple[str, ...], flags: tuple[str, ...], source: str
) -> frozenset[str]:
    build = Build(sources, includes, flags)
    with tempfile.TemporaryDirectory() as folder:
        _, text = build._preprocess(source, Path(folder))
    return frozenset(re.findall(r'^# \d+ "\./([^"]+)"', text.decode(errors="replace"), re.MULTILINE))


def _read_files(build: Build, source: str) -> frozenset[str]:
    """The repository's files that the compiler reads for a source."""
    return _files_read(build.sources, build.includes, build.flags, source)


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
