"""What the native library is made of: the one list for setup.py and the just-in-time build."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

#: The version of the package; pyproject.toml takes it from here.
VERSION = "0.1.0"

#: Raised when the meaning of a cache entry changes, so that old entries are left alone.
SCHEMA = 1

#: The oldest torch that may load the library: 2.11. By the stable ABI every later one may, too.
TORCH_TARGET_VERSION = "0x020b000000000000"

#: What belongs to the library in csrc; wheels carry exactly these files.
FILE_PATTERNS = ("*.cpp", "*.cu", "*.cuh", "*.h", "*.inl")

#: In the order of compilation: the sources that take longest come first.
SOURCE_DIRECTORIES = ("cuda", "cpu", "binding")

#: What only a library with CUDA kernels needs.
CUDA_DIRECTORIES = ("cuda/", "binding/cuda/")

#: Only this file includes Python.h. It makes the library an importable module, which the
#: just-in-time build does not need.
PYTHON_MODULE_SOURCE = "binding/module.cpp"

#: No -march and no OpenMP: instruction sets are chosen at run time, threads come from torch.
COMPILE_FLAGS = (
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
)
LINK_FLAGS = ("-shared", "-Wl,--as-needed")
LIBRARIES = ("torch_cpu",)

#: By its compute capability.
OLDEST_GPU = (7, 0)

#: The define tells the binding. The runtime is linked statically: torch's may be another version, or not there.
CUDA_DEFINE = "-DHSM_CUDA"
CUDA_COMPILE_FLAGS = (
    "-O3",
    "-std=c++17",
    "--compiler-options=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden",
    "-Xfatbin=-compress-all",
)
CUDA_LIBRARIES = ("cudart_static", "rt", "dl", "pthread")


@dataclass(frozen=True)
class OptionalKernels:
    """Kernels whose instructions some compilers, or their assemblers, do not know."""

    name: str
    source: str
    probe: str  #: what such a compiler fails at
    without: str  #: the flag that leaves them out


OPTIONAL_KERNELS = (
    OptionalKernels(
        "amx_bf16",
        "cpu/kernels_amx_bf16.cpp",
        """
        #ifdef __x86_64__
        __attribute__((target("amx-tile,amx-bf16"))) void probe() {
          __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(0L), "r"(0L));
          __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
        }
        #endif
        """,
        "-DHSM_WITHOUT_AMX",
    ),
)


@dataclass(frozen=True)
class Description:
    """One native library: its files, relative to ``root``, and its flags."""

    root: Path
    sources: tuple[str, ...]
    files: tuple[str, ...]  #: all of csrc
    compile_flags: tuple[str, ...] = COMPILE_FLAGS
    link_flags: tuple[str, ...] = LINK_FLAGS
    libraries: tuple[str, ...] = LIBRARIES
    #: Why some of the kernels are left out.
    left_out: tuple[str, ...] = ()
    cuda_archs: tuple[str, ...] = ()  #: what cuda.parse_archs gives; none: no CUDA kernels
    cuda_compile_flags: tuple[str, ...] = ()

    @property
    def needs_python_headers(self) -> bool:
        """Whether one of the sources includes Python.h."""
        return PYTHON_MODULE_SOURCE in self.sources

    @property
    def flags(self) -> tuple[str, ...]:
        """Everything that is passed to the compilers and the linker, but for paths."""
        libraries = (f"-l{name}" for name in self.libraries)
        return (*self.compile_flags, *self.cuda_compile_flags, *self.link_flags, *libraries)

    def digest(self) -> str:
        """Equal digests give equal libraries from the same compilers, wherever the files lie."""
        state = hashlib.sha256()
        for text in (str(SCHEMA), VERSION, *sorted(self.flags)):
            state.update(text.encode() + b"\0")
        for name in self.files:
            if self.cuda_archs or not name.startswith(CUDA_DIRECTORIES):
                content = (self.root / name).read_bytes()
                state.update(f"{name}\0{len(content)}\0".encode() + content)
        return state.hexdigest()


def describe(root: Path, *, python_module: bool, cuda_archs: tuple[str, ...] = ()) -> Description:
    """The library whose sources lie in ``root``, a csrc folder.

    With ``python_module`` it has an entry point for ``import`` and needs the Python headers;
    without, it can only be loaded by ``torch.ops.load_library``. With ``cuda_archs`` it has CUDA kernels for them.
    """
    files = sorted(path.relative_to(root).as_posix() for pattern in FILE_PATTERNS for path in root.rglob(pattern))
    sources = [
        name
        for directory in SOURCE_DIRECTORIES
        for name in files
        if name.startswith(f"{directory}/")
        and name.endswith((".cpp", ".cu"))
        and (python_module or name != PYTHON_MODULE_SOURCE)
        and (cuda_archs or not name.startswith(CUDA_DIRECTORIES))
    ]
    plain = Description(root, tuple(sources), tuple(files))
    if not cuda_archs:
        return plain
    return replace(
        plain,
        compile_flags=(*COMPILE_FLAGS, CUDA_DEFINE),
        libraries=(*LIBRARIES, *CUDA_LIBRARIES),
        cuda_archs=cuda_archs,
        cuda_compile_flags=(*CUDA_COMPILE_FLAGS, *(flag for arch in cuda_archs for flag in _gencode(arch))),
    )


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs`` runs on a GPU: made for it or an older one of its generation, or PTX for an older one."""
    for arch in archs:
        number, _, ptx = arch.partition("+")
        exact = number[-1:] in ("a", "f")
        built = divmod(int(number.rstrip("af")), 10)
        if built == capability:
            return True
        if not exact and built <= capability and (ptx or built[0] == capability[0]):
            return True
    return False


def _gencode(arch: str) -> Iterator[str]:
    number, _, ptx = arch.partition("+")
    yield f"-gencode=arch=compute_{number},code=sm_{number}"
    if ptx:
        yield f"-gencode=arch=compute_{number},code=compute_{number}"
