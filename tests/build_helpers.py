"""What the tests of the build share: a tiny package, a bad compiler, fresh processes."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hsm_kernels

PACKAGE = Path(hsm_kernels.__file__).parent

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")

#: C++ names of torch change from version to version.
UNSTABLE = re.compile(r"\b(at|c10|torch|caffe2)::")

ROOT = Path(__file__).parents[1]
needs_repository = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the tests were copied out of the repository"
)


def script(path: Path, text: str) -> Path:
    """A program of the shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path

TINY_SOURCE = """
extern "C" __attribute__((visibility("default"))) int answer() { return 42; }
"""

#: Prints what a child process sees. The real package has more in __init__.py, the load is the same.
REPORT = """
import json, hsm_kernels
info = hsm_kernels.build_info()
library = info.library and str(info.library)
print(json.dumps({"how": info.how, "library": library, "reasons": info.reasons}))
"""


def tiny_sources(root: Path) -> Path:
    """A csrc folder with one source that compiles in no time."""
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / "tiny.cpp").write_text(TINY_SOURCE)
    (root / "cpu" / "tiny.h").write_text("")
    return root


def tiny_package(site: Path) -> Path:
    """hsm_kernels with its real loader and build, and nothing but a tiny source to build."""
    package = site / "hsm_kernels"
    shutil.copytree(PACKAGE / "_build", package / "_build")
    shutil.copy(PACKAGE / "_library.py", package)
    (package / "__init__.py").write_text("from ._library import build_info, load\n\nload()\n")
    tiny_sources(package / "csrc")
    return site


def answer(library: str | Path | None) -> int:
    """What the tiny library says: 42."""
    assert library is not None
    return int(ctypes.CDLL(str(library)).answer())


class FakeCompiler:
    """The real compiler behind a script that counts the sources, and may misbehave first."""

    def __init__(self, folder: Path, before_compiling: str = "") -> None:
        folder.mkdir(parents=True)
        self.script = folder / "c++"
        self._count = folder / "count"
        self._count.touch()
        self.misbehave(before_compiling)

    def misbehave(self, before_compiling: str, before_asking: str = "") -> None:
        """Run these shell commands before a source is compiled, or the version is asked for."""
        self.script.write_text(f"""#!/bin/sh
case " $* " in
*" -c "*) echo x >> {self._count}; {before_compiling or ":"};;
*" -E "*) {before_asking or ":"};;
esac
exec {COMPILER} "$@"
""")
        self.script.chmod(0o755)

    @property
    def compiled(self) -> int:
        """How many sources it was asked to compile."""
        return len(self._count.read_text().split())


def environment(site: Path, home: Path, **changes: str) -> dict[str, str]:
    """The environment of a child that imports from ``site``, with nothing of ours in it."""
    temporary = home.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    ours = ("HSM_KERNELS_", "XDG_CACHE", "TORCH_EXTENSIONS", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONPATH": str(site), "HOME": str(home), "TMPDIR": str(temporary), **changes}


def start(environ: dict[str, str], code: str = REPORT) -> "subprocess.Popen[str]":
    """A child Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environ,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Child:
    """What an import in a fresh process came to."""

    def __init__(self, environ: dict[str, str], code: str = REPORT) -> None:
        process = start(environ, code)
        self.stdout, self.stderr = process.communicate(timeout=300)
        self.status = process.returncode

    @property
    def report(self) -> dict[str, object]:
        """What :data:`REPORT` printed."""
        assert self.status == 0, self.stderr
        report: dict[str, object] = json.loads(self.stdout)
        return report

    @property
    def library(self) -> str | None:
        library = self.report["library"]
        assert library is None or isinstance(library, str)
        return library

    @property
    def reasons(self) -> str:
        reasons = self.report["reasons"]
        assert isinstance(reasons, list)
        return "\n".join(reasons)


def copy_of_the_repository(folder: Path) -> Path:
    """What git would have, so that nothing that was built before gets in."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    unwanted = shutil.ignore_patterns("*.so", "_C*.json", "__pycache__")
    for name in ("csrc", "hsm_kernels", "tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    return folder


def build(what: str, repository: Path, **variables: str) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """Call the build backend as pip does. Returns what was built, and what was printed."""
    output = repository / "out"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{what}('out')"],
        cwd=repository,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    return next(output.iterdir(), output), done


def undefined_symbols(library: Path) -> list[str]:
    """What ``library`` takes from others, C++ names in plain text, without symbol versions."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", "--format=just-symbols"]
    done = subprocess.run([*command, library], capture_output=True, text=True, check=True)
    return [line.split("@")[0] for line in done.stdout.splitlines()]


def needed_libraries(library: Path) -> set[str]:
    """The names of the libraries that ``library`` is linked to, without versions."""
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", done.stdout)}
