"""Decides whether the native library is built now; hsm_kernels/_build says of what and how.

HSM_KERNELS_BUILD=auto   build what this machine can (default): with CUDA kernels where torch has CUDA and there is a
                         toolkit; without a C++ compiler, leave it to the first import
HSM_KERNELS_BUILD=cpu    build it without CUDA kernels, or fail
HSM_KERNELS_BUILD=cuda   build it with CUDA kernels, or fail; torch need not have CUDA
HSM_KERNELS_BUILD=none   leave it to the first import

HSM_KERNELS_CUDA_ARCHS   the GPUs that the CUDA kernels are for, like "80 90a 100+PTX"
"""

import importlib
import importlib.util
import json
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_MODES = ("auto", "none", "cpu", "cuda")


def load_by_path(name: str) -> ModuleType:
    """A module of hsm_kernels/_build, without importing hsm_kernels, which needs torch."""
    package = "hsm_kernels_build"
    if package not in sys.modules:
        folder = ROOT / "hsm_kernels" / "_build"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{name}")


compilation = load_by_path("compilation")
cuda = load_by_path("cuda")
description = load_by_path("description")
toolchain = load_by_path("toolchain")


def torch_root() -> Path:
    """Where torch is installed. Only its files are needed, so it is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    # An isolated build does not see torch, but the Python that asked for the build may have it.
    # Whichever version that is, the ABI is stable.
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    if installed.is_dir():
        return installed
    raise toolchain.Unavailable("torch is not installed here; install it first, or use --no-build-isolation if it is")


#: A source that needs what the kernels need of a toolkit.
CUDA_PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__global__ void kernel(float* x) { *x = __bfloat162float(__float2bfloat16_rn(*x)); }
void run(float* x) { kernel<<<1, 1>>>(x); }
"""


def build(
    sources: description.Description, toolkit: cuda.Toolkit | None, work: Path, output: Path
) -> tuple[toolchain.Compiler, description.Description]:
    """Compile with what this machine has. Returns the compiler that was used, and what it built."""
    compiler = toolchain.find_compiler(os.environ)
    torch = toolchain.torch_files(torch_root())
    built = compilation.build_library(sources, compiler, torch, toolkit, work=work, output=output, environ=os.environ)
    return compiler, built


def why_not(choice: cuda.Choice) -> str | None:
    """Why nothing can be built here, None if it can: tried on the smallest library."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        probes = {description.PYTHON_MODULE_SOURCE: "#include <Python.h>\n#include <torch/csrc/stable/library.h>\n"}
        if choice.toolkit:
            probes["cuda/probe.cu"] = CUDA_PROBE
        for name, text in probes.items():
            (root / name).parent.mkdir()
            (root / name).write_text(text)
        try:
            probe = description.describe(root, python_module=True, cuda_archs=choice.archs)
            build(probe, choice.toolkit, root, root / "probe.so")
        except (toolchain.Unavailable, compilation.CompileError) as error:
            return str(error)
    return None


def choose() -> cuda.Choice | None:
    """What HSM_KERNELS_BUILD and this machine decide; None: nothing is built."""
    mode = os.environ.get("HSM_KERNELS_BUILD", "auto")
    if mode not in BUILD_MODES:
        sys.exit(f"HSM_KERNELS_BUILD must be one of {', '.join(BUILD_MODES)}; got {mode!r}")
    if mode == "none":
        return None
    try:
        choice = cuda.choose(os.environ, torch_root(), ahead=True)
        reason = why_not(choice)
        if reason and choice.toolkit and mode == "auto":
            choice = cuda.Choice(None, reason=reason)
            reason = why_not(choice)
    except toolchain.Unavailable as error:
        reason = str(error)
    if reason is None:
        if not choice.toolkit and mode == "auto":
            print(f"hsm_kernels: no CUDA kernels are built: {choice.reason}", file=sys.stderr)
        return choice
    if mode != "auto":
        sys.exit(f"HSM_KERNELS_BUILD={mode}, but the native library cannot be built: {reason}")
    print(f"hsm_kernels: the native library is left to the first import: {reason}", file=sys.stderr)
    return None


class BuildLibrary(build_ext):
    """Compiles as the just-in-time build does, and writes a record of it beside the library."""

    def build_extension(self, ext: Extension) -> None:
        """One extension: the native library."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        for folder in (output.parent, work):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            compiler, built = build(sources, choice.toolkit, work, output)
        except compilation.CompileError as error:
            hint = "HSM_KERNELS_BUILD=none installs without the native library"
            sys.exit(f"{error.log}\nhsm_kernels: the C++ compiler failed: {error}\n{hint}")
        record = {
            "digest": sources.digest(),
            "flags": built.flags,
            "left_out": built.left_out,
            "compiler": f"{Path(compiler.command[0]).name} {compilation.versions(compiler, choice.toolkit)}",
            "cuda_archs": sources.cuda_archs,
        }
        output.with_suffix(".json").write_text(json.dumps(record, indent=1))

    def copy_extensions_to_source(self) -> None:
        """Editable installs."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "hsm_kernels"
        for record in built.glob("_C*.json"):
            self.copy_file(str(record), str(ROOT / "hsm_kernels" / record.name))


choice = choose()
sources = description.describe(ROOT / "csrc", python_module=True, cuda_archs=choice.archs if choice else ())
extension = Extension("hsm_kernels._C", list(sources.sources), py_limited_api=True)
setup(
    version=description.VERSION,
    packages=["hsm_kernels", "hsm_kernels._build", "hsm_kernels.csrc"],
    package_dir={"hsm_kernels.csrc": "csrc"},
    package_data={"hsm_kernels": ["py.typed"], "hsm_kernels.csrc": list(sources.files)},
    include_package_data=False,
    ext_modules=[extension] if choice else [],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if choice else {},
)
