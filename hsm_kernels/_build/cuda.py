"""What of CUDA a native library gets on this machine: the toolkit that compiles the kernels, and the GPUs that they are for."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import toolchain
from .description import OLDEST_GPU

#: A100, H100 and H200, B200; GPUs between and after them run the code of an older one, or PTX.
DEFAULT_ARCHS = ("80", "90a", "100")


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` chose: a toolkit and architectures, or why there is none."""

    toolkit: "Toolkit | None"
    archs: tuple[str, ...] = ()
    reason: str = ""  #: empty with a toolkit


def choose(environ: Mapping[str, str], torch_root: Path, *, ahead: bool) -> Choice:
    """Whether a library is compiled with CUDA kernels, with what, and for which GPUs.

    HSM_KERNELS_BUILD decides: ``cpu`` without, ``cuda`` with them or not at all, ``auto`` with them where torch has CUDA,
    there is a toolkit and, just in time, a GPU. HSM_KERNELS_CUDA_ARCHS names the architectures; without it they are those
    of the GPUs in the machine, just in time, and :data:`DEFAULT_ARCHS` where there are none or for a library built
    ``ahead`` of time.

    Raises:
        toolchain.Unavailable: with HSM_KERNELS_BUILD=cuda.
    """
    mode = environ.get("HSM_KERNELS_BUILD", "auto")
    if mode == "cpu":
        return Choice(None, reason="HSM_KERNELS_BUILD=cpu is set")
    try:
        if mode != "cuda" and not torch_has_cuda(torch_root):
            raise toolchain.Unavailable("this torch has no CUDA")
        gpus = [] if ahead else visible_gpus()
        if mode != "cuda" and not ahead and not gpus:
            raise toolchain.Unavailable("there is no NVIDIA GPU")
        toolkit = find_toolkit(environ, torch_root)
        named = environ.get("HSM_KERNELS_CUDA_ARCHS", "")
        archs = parse_archs(named) if named.strip() else archs_of(gpus) or toolkit.default_archs()
    except (toolchain.Unavailable, ValueError) as error:
        if mode == "cuda":
            raise toolchain.Unavailable(f"HSM_KERNELS_BUILD=cuda is set, but {error}") from error
        return Choice(None, reason=str(error))
    return Choice(toolkit, archs)


def torch_has_cuda(torch_root: Path) -> bool:
    """Whether the torch in ``torch_root`` was built with CUDA; it is not imported."""
    try:
        text = (torch_root / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b.*= *['\"]\d", text, re.MULTILINE) is not None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: where its compiler, headers and libraries are."""

    nvcc: Path
    lib: Path  #: with the static runtime

    def command(self, compiler: toolchain.Compiler) -> tuple[str, ...]:
        """The words that call nvcc, with ``compiler`` for the host's code."""
        # A launcher such as ccache is no compiler.
        host = ("-ccbin", compiler.command[0]) if len(compiler.command) == 1 else ()
        return (str(self.nvcc), *host)

    def version(self) -> str:
        """Like ``13.0.88``. Starts nvcc."""
        found = re.search(r"\bV(\d+(?:\.\d+)+)", _output_of([str(self.nvcc), "--version"]))
        if found is None:
            raise toolchain.Unavailable(f"{self.nvcc} --version says no version")
        return found[1]

    def stamp(self) -> str:
        """Changes when the compiler is replaced."""
        return toolchain.file_stamp(str(self.nvcc))

    def default_archs(self) -> tuple[str, ...]:
        """Those of :data:`DEFAULT_ARCHS` that this nvcc knows, the last one with PTX for GPUs to come."""
        known = _output_of([str(self.nvcc), "--list-gpu-code"]).split()
        archs = [arch for arch in DEFAULT_ARCHS if f"sm_{arch.rstrip('a')}" in known]
        if not archs:
            raise toolchain.Unavailable(f"{self.nvcc} knows none of sm_{', sm_'.join(DEFAULT_ARCHS)}")
        portable = [arch for arch in archs if not arch.endswith("a")]
        return tuple(f"{arch}+PTX" if arch == portable[-1] else arch for arch in archs)


def find_toolkit(environ: Mapping[str, str], torch_root: Path) -> Toolkit:
    """The CUDA toolkit that CUDA_HOME names, else that of the nvcc on PATH, in /usr/local/cuda, or in pip's packages."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        found = _toolkit_in(Path(named))
        if found is None:
            raise toolchain.Unavailable(
                f"CUDA_HOME names {named}, which has no bin/nvcc, include/cuda_runtime.h and libcudart_static.a"
            )
        return found
    nvcc = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    roots = [Path("/usr/local/cuda"), *sorted(torch_root.parent.glob("nvidia/cu[0-9]*"), reverse=True)]
    if nvcc:
        roots = [Path(nvcc).resolve().parents[1], *_root_that_nvcc_names(nvcc), *roots]
    for root in roots:
        found = _toolkit_in(root)
        if found is not None:
            return found
    if nvcc:
        raise toolchain.Unavailable(f"the CUDA toolkit of {nvcc} was not found; set CUDA_HOME to it")
    raise toolchain.Unavailable("no CUDA toolkit was found: there is no nvcc on PATH, and CUDA_HOME is not set")


def _toolkit_in(root: Path) -> Toolkit | None:
    nvcc = root / "bin" / "nvcc"
    if not (nvcc.is_file() and (root / "include" / "cuda_runtime.h").is_file()):
        return None
    for lib in (root / "lib64", root / "lib", *root.glob("targets/*/lib")):
        if (lib / "libcudart_static.a").is_file():
            return Toolkit(nvcc, lib)
    return None


def _root_that_nvcc_names(nvcc: str) -> Iterator[Path]:
    """``nvcc`` may be a script that calls the compiler somewhere else."""
    with contextlib.suppress(toolchain.Unavailable):
        found = re.search(
            r"^#\$ _HERE_=(.+)$", _output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]), re.MULTILINE
        )
        if found:
            yield Path(found[1].strip()).parent


def _output_of(command: list[str]) -> str:
    """What a program of the CUDA toolkit prints."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise toolchain.Unavailable(f"nvcc does not work: {error}") from error
    return done.stdout + done.stderr


def visible_gpus() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs in this machine.

    By NVML, which leaves CUDA uninitialised; by CUDA where there is no NVML, as in containers that were given no more.
    """
    with contextlib.suppress(OSError):
        return _gpus_by_nvml(ctypes.CDLL("libnvidia-ml.so.1"))
    with contextlib.suppress(OSError):
        return _gpus_by_cuda(ctypes.CDLL("libcuda.so.1"))
    return []


def _gpus_by_nvml(nvml: ctypes.CDLL) -> list[tuple[int, int]]:
    if nvml.nvmlInit_v2():
        return []
    found = []
    count, device = ctypes.c_uint(), ctypes.c_void_p()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            continue
        if not nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
            found.append((major.value, minor.value))
    nvml.nvmlShutdown()
    return found


#: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_CAPABILITY = (75, 76)


def _gpus_by_cuda(driver: ctypes.CDLL) -> list[tuple[int, int]]:
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        numbers = []
        driver.cuDeviceGet(ctypes.byref(device), index)
        for attribute in _CAPABILITY:
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        found.append((numbers[0], numbers[1]))
    return found


def archs_of(gpus: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """The architectures to compile for these GPUs; none for those that are too old."""
    archs = {(major, minor): f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in gpus if (major, minor) >= OLDEST_GPU}
    return tuple(archs[capability] for capability in sorted(archs))


def parse_archs(text: str) -> tuple[str, ...]:
    """Architectures as users write them (``8.0 9.0a``, ``80;90a``, ``sm_80,sm_100+PTX``) -> ``("80", "90a", "100+PTX")``.

    Raises ValueError.
    """
    archs = []
    for word in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word, re.IGNORECASE)
        if match is None:
            raise ValueError(f"HSM_KERNELS_CUDA_ARCHS must name architectures like '80 90a 100+PTX', got {word!r}")
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_GPU:
            oldest = "{}{}".format(*OLDEST_GPU)
            raise ValueError(f"HSM_KERNELS_CUDA_ARCHS: the oldest supported architecture is sm_{oldest}, got {word!r}")
        arch = f"{major}{minor}{suffix.lower()}{'+PTX' if ptx else ''}"
        if arch not in archs:
            archs.append(arch)
    return tuple(archs)
