"""What setup.py makes: wheels with and without the library, and the source distribution."""

import resource
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from build_helpers import (
    ROOT,
    Child,
    FakeCompiler,
    build,
    copy_of_the_repository,
    environment,
    needs_compiler,
    needs_repository,
)

from hsm_kernels._build import description

pytestmark = needs_repository

#: The real kernels, an operator of theirs called without anything else of the package.
RUN_AN_OPERATOR = """
import torch, hsm_kernels
assert hsm_kernels.build_info().how == "just in time", hsm_kernels.build_info()
print(torch._C._dispatch_has_kernel_for_dispatch_key("hsm_kernels::lstm_forward", "CPU"))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_repository(tmp_path_factory.mktemp("build") / "repository")


@pytest.fixture(scope="module")
def plain_wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheel, done = build("build_wheel", repository, HSM_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    return Path(shutil.copy(wheel, tmp_path_factory.mktemp("wheel")))


def sources_in(names: list[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix) and "." in name}


def real_sources() -> set[str]:
    folder = ROOT / "csrc"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_file_of_csrc_is_part_of_the_description() -> None:
    described = description.describe(ROOT / "csrc", python_module=True)
    assert set(described.files) == real_sources()
    assert described.needs_python_headers
    for_jit = description.describe(ROOT / "csrc", python_module=False)
    assert not for_jit.needs_python_headers
    assert set(described.sources) - set(for_jit.sources) == {"binding/module.cpp"}
    including_python = {name for name in described.files if "<Python.h>" in (ROOT / "csrc" / name).read_text()}
    assert including_python == {"binding/module.cpp"}, "no other file may need Python's headers"


@needs_compiler
@pytest.mark.slow
def test_wheel_with_the_library(repository: Path) -> None:
    wheel, done = build("build_wheel", repository, HSM_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"hsm_kernels-{description.VERSION}-cp310-abi3-linux_")
    assert {"hsm_kernels/_C.abi3.so", "hsm_kernels/_C.abi3.json"} <= set(names)
    assert "hsm_kernels/py.typed" in names
    assert sources_in(names, "hsm_kernels/csrc/") == real_sources()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_without_the_library(plain_wheel: Path) -> None:
    names = zipfile.ZipFile(plain_wheel).namelist()
    assert plain_wheel.name == f"hsm_kernels-{description.VERSION}-py3-none-any.whl"
    assert not [name for name in names if name.endswith(".so") or "_C" in name]
    assert sources_in(names, "hsm_kernels/csrc/") == real_sources()
    assert "hsm_kernels/py.typed" in names


def test_source_distribution(repository: Path, tmp_path: Path) -> None:
    archive, done = build("build_sdist", repository, HSM_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        names = [name.split("/", 1)[-1] for name in tar.getnames()]
        tar.extractall(tmp_path, filter="data")
    assert sources_in(names, "csrc/") == real_sources()
    assert {"setup.py", "LICENSE", "README.md", "Makefile", "tests/test_build.py"} <= set(names)
    # A wheel from it is as complete as one from the repository.
    (unpacked,) = tmp_path.iterdir()
    wheel, done = build("build_wheel", unpacked, HSM_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert sources_in(zipfile.ZipFile(wheel).namelist(), "hsm_kernels/csrc/") == real_sources()


@pytest.mark.parametrize("compiler", ["absent", "failing"])
def test_auto_without_a_compiler(repository: Path, tmp_path: Path, compiler: str) -> None:
    failing = FakeCompiler(tmp_path / "bin", "echo 'error: broken'; exit 1")
    cxx = "/nonexistent" if compiler == "absent" else str(failing.script)
    wheel, done = build("build_wheel", repository, HSM_KERNELS_BUILD="auto", CXX=cxx)
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    said = [line for line in done.stderr.splitlines() if line.startswith("hsm_kernels: ")]
    reason = "/nonexistent" if compiler == "absent" else "error: broken"
    assert len(said) == 1 and "left to the first import" in said[0] and reason in said[0]


def test_cpu_without_a_compiler_fails(repository: Path) -> None:
    _, done = build("build_wheel", repository, HSM_KERNELS_BUILD="cpu", CXX="/nonexistent")
    assert done.returncode != 0
    assert "HSM_KERNELS_BUILD=cpu, but the native library cannot be built" in done.stderr


def test_unknown_build_mode(repository: Path) -> None:
    _, done = build("build_wheel", repository, HSM_KERNELS_BUILD="fast")
    assert done.returncode != 0
    assert "HSM_KERNELS_BUILD must be one of auto, none, cpu, cuda; got 'fast'" in done.stderr


@needs_compiler
def test_failing_source_shows_the_log(repository: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(repository, tmp_path / "repository"))
    for source in (broken / "csrc").rglob("*.cpp"):
        source.write_text("int broken(\n")
    _, done = build("build_wheel", broken, HSM_KERNELS_BUILD="auto")
    assert done.returncode != 0
    assert "HSM_KERNELS_BUILD=none installs without the native library" in done.stderr
    assert "hsm_kernels: the C++ compiler failed: " in done.stderr
    assert "int broken(" in done.stderr, "the log is shown"


@needs_compiler
@pytest.mark.slow
def test_installed_without_a_compiler_compiles_later(plain_wheel: Path, tmp_path: Path) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    zipfile.ZipFile(plain_wheel).extractall(site)
    environ = environment(site, home)
    today = Child({**environ, "CXX": "/nonexistent"})
    assert today.report["how"] == "none"
    assert today.stderr.count("RuntimeWarning") == 1

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    tomorrow = Child(environ)
    processor_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert tomorrow.report["how"] == "just in time"
    assert str(home) in str(tomorrow.library)
    assert Child(environ, RUN_AN_OPERATOR).stdout == "True\n"
    assert Child(environ).stderr == "", "the second import builds nothing"
    # 30 seconds on two processors, however busy they are with something else.
    assert processor_seconds / 2 <= 30
