"""The library needs only the stable interface of torch, so that one binary serves all versions."""

import os
import subprocess
from pathlib import Path

import pytest
from build_helpers import (
    COMPILER,
    ROOT,
    UNSTABLE,
    needed_libraries,
    needs_compiler,
    needs_nm,
    needs_repository,
    undefined_symbols,
)

import hsm_kernels
from hsm_kernels._build import description


@pytest.fixture
def library() -> Path:
    path = hsm_kernels.build_info().library
    assert path is not None
    return path


@pytest.mark.skipif(os.environ.get("HSM_KERNELS_JIT") != "0", reason="a library may be missing")
def test_installed_library_serves_this_torch() -> None:
    """`make test-versions` runs this in several versions of torch."""
    info = hsm_kernels.build_info()
    assert info.how == "ahead of time", info
    print(info)


@needs_nm
@pytest.mark.requires_library
def test_no_cpp_symbol_of_torch_is_needed(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert [name for name in symbols if UNSTABLE.search(name)] == []
    assert any(name.startswith("aoti_torch_") for name in symbols), "nm sees torch's C interface"


@needs_nm
@pytest.mark.requires_library
def test_python_is_needed_by_nothing_but_the_entry_point(library: Path) -> None:
    python = {name for name in undefined_symbols(library) if name.startswith(("Py", "_Py"))}
    assert python <= {"PyModule_Create2"}


@needs_nm
@pytest.mark.requires_library
def test_only_libtorch_cpu_of_torch_is_linked(library: Path) -> None:
    system = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
    system |= {"librt", "libdl", "libpthread"}  # for the CUDA runtime, where the C library does not have them
    assert needed_libraries(library) - system == {"libtorch_cpu"}


@needs_nm
@needs_compiler
def test_the_check_sees_unstable_symbols(tmp_path: Path) -> None:
    source, library = tmp_path / "unstable.cpp", tmp_path / "unstable.so"
    source.write_text("""
        namespace c10 { struct Error {}; }
        namespace at { void by_namespace(); }
        namespace torch { void in_torch(); }
        void by_argument(c10::Error);
        extern "C" void stable();
        void all() { at::by_namespace(); torch::in_torch(); by_argument({}); stable(); }
    """)
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", library], check=True)
    unstable = {name for name in undefined_symbols(library) if UNSTABLE.search(name)}
    assert unstable == {"at::by_namespace()", "by_argument(c10::Error)", "torch::in_torch()"}


def test_the_library_is_built_for_the_oldest_torch() -> None:
    """Raise it together with the requirement in pyproject.toml."""
    assert description.TORCH_TARGET_VERSION == "0x020b000000000000"
    assert '"torch>=2.11"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


@needs_repository
def test_sources_take_nothing_newer_from_torch() -> None:
    """They must compile with the oldest torch, too, which CI has not: `make test-versions` does that."""
    newer = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # without the prefix all have it
    sources = [path for pattern in description.FILE_PATTERNS for path in (ROOT / "csrc").rglob(pattern)]
    assert len(sources) > 20
    assert [(path.name, name) for path in sources for name in newer if name in path.read_text()] == []
