"""What this machine can compile with: the compiler, torch's files, Python's headers, jobs."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Tried in this order when CXX is not set.
DEFAULT_COMPILERS = ("c++", "g++", "clang++")

#: Memory that one compiler process may take.
_BYTES_PER_JOB = 2 << 30


class Unavailable(RuntimeError):
    """Something that a native library needs is missing; the message says what and where."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the words of its command, the first one a full path."""

    command: tuple[str, ...]

    def version(self) -> str:
        """Version and target, like ``12.2.0 x86_64-linux-gnu``. Starts the compiler twice."""
        # g++ and clang know __VERSION__ and -dumpmachine; -dumpfullversion is g++ only.
        number = self._ask("-E", "-P", "-x", "c++", "-", stdin="__VERSION__\n").split('"')
        if len(number) < 2:
            raise Unavailable(f"{shlex.join(self.command)} does not preprocess C++")
        return f"{number[-2]} {self._ask('-dumpmachine').strip()}"

    def stamp(self) -> str:
        """Changes when the compiler is replaced. Cheap: it looks at the files of the command."""
        return " ".join(file_stamp(path) for word in self.command if (path := shutil.which(word)))

    def _ask(self, *arguments: str, stdin: str = "") -> str:
        try:
            done = subprocess.run([*self.command, *arguments], input=stdin, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"the C++ compiler does not work: {error}") from error
        return done.stdout


@dataclass(frozen=True)
class TorchFiles:
    """Where torch keeps its C++ headers and its libraries."""

    include: Path
    lib: Path


def find_compiler(environ: Mapping[str, str]) -> Compiler:
    """The compiler that CXX names, else the first of ``c++``, ``g++``, ``clang++`` on PATH."""
    if sys.platform != "linux":
        raise Unavailable(f"the native library is for Linux, this is {sys.platform}")
    path = environ.get("PATH", os.defpath)
    words = shlex.split(environ.get("CXX", ""))
    for program in words[:1] or DEFAULT_COMPILERS:
        found = shutil.which(program, path=path)
        if found:
            return Compiler((found, *words[1:]))
    if words:
        raise Unavailable(f"the C++ compiler that CXX names was not found: {words[0]}")
    raise Unavailable(f"no C++ compiler was found on PATH (tried {', '.join(DEFAULT_COMPILERS)})")


def file_stamp(path: str) -> str:
    """Changes when the file is replaced."""
    file = os.stat(path)
    return f"{path}:{file.st_mtime_ns}:{file.st_size}"


def torch_files(root: Path) -> TorchFiles:
    """The headers and libraries of the torch package in ``root``."""
    found = TorchFiles(root / "include", root / "lib")
    header = found.include / "torch" / "csrc" / "stable" / "library.h"
    library = found.lib / "libtorch_cpu.so"
    for path in (header, library):
        if not path.is_file():
            raise Unavailable(f"torch in {root} has no {path.relative_to(root)}")
    return found


def python_include() -> Path:
    """The folder of Python.h."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        raise Unavailable(f"{folder} has no Python.h (it comes with python3-dev or python3-devel)")
    return folder


def job_limit(environ: Mapping[str, str]) -> int:
    """How many compilers may run at once: MAX_JOBS, else what processors and memory allow."""
    wanted = environ.get("MAX_JOBS", "")
    if wanted.isdecimal():
        return max(1, int(wanted))
    return max(1, min(len(os.sched_getaffinity(0)), _available_memory() // _BYTES_PER_JOB))


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return _BYTES_PER_JOB
