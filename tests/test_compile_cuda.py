"""The CUDA sources compile for every generation, without spills or torch; the library loads where there is no GPU."""

import functools
import os
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build_helpers import (
    ROOT,
    UNSTABLE,
    Child,
    build,
    copy_of_the_repository,
    environment,
    needed_libraries,
    needs_compiler,
    needs_nm,
    needs_repository,
    undefined_symbols,
)

from hsm_kernels._build import cuda, description, toolchain

TORCH = Path(torch.__file__).parent


def toolkit_or_reason() -> cuda.Toolkit | str:
    try:
        return cuda.find_toolkit(os.environ, TORCH)
    except toolchain.Unavailable as error:
        return str(error)


TOOLKIT = toolkit_or_reason()
pytestmark = [
    needs_compiler,
    pytest.mark.skipif(isinstance(TOOLKIT, str), reason=f"nothing compiles CUDA here: {TOOLKIT}"),
    needs_repository,
]

SOURCES = sorted(path.relative_to(ROOT / "csrc").as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90a", "100")


def compile_one(source: str, arch: str, output: Path, *flags: str) -> str:
    """What nvcc and ptxas say."""
    assert isinstance(TOOLKIT, cuda.Toolkit)
    described = description.describe(ROOT / "csrc", python_module=False, cuda_archs=(arch,))
    command = [*TOOLKIT.command(toolchain.find_compiler(os.environ)), *described.cuda_compile_flags, *flags]
    command += ["-I", str(ROOT / "csrc"), "-c", str(ROOT / "csrc" / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[str, Path]]:
    """What nvcc and ptxas say of a source, and the object, for an architecture."""

    @functools.cache
    def compile_once(source: str, arch: str) -> tuple[str, Path]:
        output = tmp_path_factory.mktemp("compiled") / "object.o"
        return compile_one(source, arch, output, "-Xptxas", "-v"), output

    return compile_once


def spills(log: str) -> dict[str, int]:
    """The bytes that each kernel spills, by name, of those that spill any."""
    found = re.findall(r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+)", log)
    return {name: int(stores) + int(loads) for name, stores, loads in found if int(stores) + int(loads)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_without_spills(
    compiled: Callable[[str, str], tuple[str, Path]], source: str, arch: str
) -> None:
    log, _ = compiled(source, arch)
    kernels = len(re.findall(r"Compiling entry function", log))
    assert kernels == len(re.findall(r"bytes spill stores", log)), log
    assert (kernels > 0) == ("HSM_KERNEL" in (ROOT / "csrc" / source).read_text())
    assert spills(log) == {}
    # All shared memory is asked for at the launch, where the plan counts it.
    assert not re.search(r"\d+ bytes smem", log)


def test_spills_are_seen(tmp_path: Path) -> None:
    """A kernel that may have too few registers."""
    source = tmp_path / "spills.cu"
    source.write_text("""
        __global__ void kernel(float* x) {
          float values[64];
          for (int i = 0; i < 64; ++i) values[i] = x[i * 32 + threadIdx.x];
          __syncthreads();
          float sum = 0;
          for (int round = 0; round < 3; ++round)
            for (int i = 0; i < 64; ++i) values[i] = values[i] * values[(i + 1) % 64] + sum, sum += values[i];
          for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = values[i];
        }
    """)
    log = compile_one(str(source), "80", tmp_path / "object.o", "-Xptxas", "-v", "-maxrregcount=24")
    assert list(spills(log)) == ["_Z6kernelPf"]


@needs_nm
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_know_nothing_of_torch(compiled: Callable[[str, str], tuple[str, Path]], source: str) -> None:
    _, output = compiled(source, "80")
    command = ["nm", "--undefined-only", "--demangle", "--format=just-symbols", output]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(name.startswith("cuda") for name in symbols), "nm sees the CUDA runtime"
    assert [name for name in symbols if UNSTABLE.search(name) or name.startswith(("torch", "aoti"))] == []
    included = re.findall(r'#include [<"](.*)[>"]', (ROOT / "csrc" / source).read_text())
    assert [name for name in included if "torch" in name or "binding" in name] == []


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_repository(tmp_path_factory.mktemp("build") / "repository")


#: Calls an operator on the CPU, and says which devices the library has operators for.
RUN = """
import torch, hsm_kernels
info = hsm_kernels.build_info()
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
keys = [key for key in ("CPU", "CUDA") if has_kernel("hsm_kernels::gru_backward", key)]
hsm_kernels.LSTM(3, 4)(torch.zeros(5, 2, 3))
print(info.how, *keys, *info.cuda_archs)
"""


@needs_nm
@pytest.mark.slow
def test_wheel_with_cuda_kernels(repository: Path, tmp_path: Path) -> None:
    """Built, linked and loaded with a torch that need not have CUDA."""
    wheel, done = build("build_wheel", repository, HSM_KERNELS_BUILD="cuda", HSM_KERNELS_CUDA_ARCHS="8.0;90a")
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    library = tmp_path / "site" / "hsm_kernels" / "_C.abi3.so"
    assert [name for name in undefined_symbols(library) if UNSTABLE.search(name)] == []
    assert [name for name in needed_libraries(library) if "cuda" in name or "cublas" in name] == []
    (tmp_path / "home").mkdir()
    child = Child(environment(tmp_path / "site", tmp_path / "home"), RUN)
    assert child.status == 0, child.stderr
    assert child.stdout.split() == ["ahead", "of", "time", "CPU", "CUDA", "80", "90a"]


@pytest.mark.slow
def test_just_in_time_with_cuda_kernels(repository: Path, tmp_path: Path) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    wheel, done = build("build_wheel", repository, HSM_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(wheel).extractall(site)
    environ = environment(site, home, HSM_KERNELS_BUILD="cuda", HSM_KERNELS_CUDA_ARCHS="90")
    first = Child(environ, RUN)
    assert first.stdout.split() == ["just", "in", "time", "CPU", "CUDA", "90"], first.stderr
    assert "compiling the native library with CUDA kernels" in first.stderr
    assert Child(environ, RUN).stderr == "", "the second import compiles nothing"
