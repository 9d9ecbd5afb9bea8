"""Which backend runs a call: chosen per process or per call, and explained on request."""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

from . import _library
from ._build.description import OLDEST_GPU, covers

#: "auto" takes the best kernel there is, and the reference where there is none.
BACKENDS = ("auto", "cuda", "cpu", "reference")

_NO_LIBRARY = "no native library is loaded; hsm_kernels.build_info() says why"

_warned: set[str] = set()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant_result(function: _Function) -> _Function:
    """What torch.compiler.assume_constant_result does, which takes a second more to import all of torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"hsm_kernels: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_current = _checked(os.environ.get("HSM_KERNELS_BACKEND", "auto"))


def check_cuda_variant(text: str) -> None:
    """Raises ValueError for what HSM_KERNELS_CUDA_VARIANT cannot be; the native library reads it at every call."""
    if text and re.fullmatch(r"step|cluster(:(1|2|4|8|16))?|grid(:[1-9]\d{0,2})?", text) is None:
        raise ValueError(
            "hsm_kernels: HSM_KERNELS_CUDA_VARIANT must be step, cluster or grid, or name a number of blocks too as in "
            f"cluster:8 (1, 2, 4, 8 or 16) or grid:64, got {text!r}"
        )


check_cuda_variant(os.environ.get("HSM_KERNELS_CUDA_VARIANT", ""))


def set_backend(name: str) -> None:
    """Choose the backend of this process: ``"auto"`` (default), ``"cuda"``, ``"cpu"`` or ``"reference"``.

    ``"cuda"`` and ``"cpu"`` raise RuntimeError at a call that they cannot run; ``"auto"`` runs it with the reference
    after one warning. The environment variable ``HSM_KERNELS_BACKEND`` sets the value at import. Raises ValueError for
    another name.

    >>> import hsm_kernels as hsm
    >>> hsm.set_backend("reference")
    >>> hsm.get_backend()
    'reference'
    >>> hsm.set_backend("auto")
    """
    global _current
    _current = _checked(name)


def get_backend() -> str:
    """The backend that :func:`set_backend` chose."""
    return _current


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block; it holds for all threads of the process, as :func:`set_backend` does.

    >>> import hsm_kernels as hsm
    >>> with hsm.use_backend("reference"):
    ...     output, state = hsm.GRU(3, 4)(torch.zeros(5, 2, 3))
    """
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


class Plan(NamedTuple):
    """Which backend runs a call, and why."""

    backend: str  #: "cuda", "cpu" or "reference"
    variant: str  #: the kernel's name, or "python" for the reference
    reason: str
    fallback: bool = False  #: the reference stands in for a kernel that is missing

    def __str__(self) -> str:
        return f"{self.backend} ({self.variant}): {self.reason}"


def plan(requested: str | None, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan of a call; RuntimeError if a backend was asked for by name and cannot run it."""
    name = _current if requested is None else _checked(requested)
    if name == "reference":
        return Plan("reference", "python", "the reference was asked for")
    missing = _missing_kernel(device, dtype)
    if missing is None and name in ("auto", device.type):
        variant = "step" if device.type == "cuda" else "native"
        return Plan(device.type, variant, f"the native library has a kernel for {device.type}")
    if name == "auto":
        return Plan("reference", "python", str(missing), fallback=True)
    reason = missing or f"the input is on {device}"
    raise RuntimeError(f"hsm_kernels: backend {name!r} was asked for and cannot run this call: {reason}")


def _missing_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    if nested_forward_mode():
        return "the kernels have no rule for forward-mode differentiation inside forward-mode differentiation"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"there are kernels for float64, float32, bfloat16 and float16, the input is {dtype}"
    if device.type == "cuda":
        missing: str | None = _missing_cuda_kernel(device.index)
        return missing
    if device.type != "cpu":
        return f"there is no kernel for device type {device.type!r}"
    if not _library.build_info().loaded:
        return _NO_LIBRARY
    return None


# torch.compile need not see how the library and the GPU are looked at.
@assume_constant_result
def _missing_cuda_kernel(index: int | None) -> str | None:
    info = _library.build_info()
    if not info.loaded:
        return _NO_LIBRARY
    if torch.version.hip:
        return "there are no kernels for AMD GPUs"
    if not info.cuda_archs:
        return (
            "the native library was built without CUDA kernels; hsm_kernels.build_info() says why, and "
            "HSM_KERNELS_BUILD=cuda pip install asks for them"
        )
    # Else there is no GPU, and the tensors hold nothing.
    exists = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return _unsupported_gpu(index) if exists else None


@assume_constant_result
def _has_cuda_kernels() -> bool:
    return bool(_library.build_info().cuda_archs)


@functools.cache
def _unsupported_gpu(index: int | None) -> str | None:
    """Why a GPU cannot run the library's kernels, None if it can."""
    capability = torch.cuda.get_device_capability(index)
    archs = _library.build_info().cuda_archs
    if covers(archs, capability):
        return None
    name, number = torch.cuda.get_device_name(index), "{}.{}".format(*capability)
    if capability < OLDEST_GPU:
        oldest = "{}.{}".format(*OLDEST_GPU)
        return f"{name} has compute capability {number}, the kernels need {oldest} or later"
    listed = ", ".join(f"sm_{arch}" for arch in archs)
    return (
        f"the native library was built for {listed}, {name} has compute capability {number}; build it again with "
        f"HSM_KERNELS_CUDA_ARCHS={number}"
    )


def has_cpu_kernels(device: torch.device) -> bool:
    """Whether the operators run kernels of the native library on ``device``, and it is the CPU."""
    return device.type == "cpu" and _library_is_loaded()


@assume_constant_result
def _library_is_loaded() -> bool:
    return _library.build_info().loaded


def nested_forward_mode() -> bool:
    """Whether torch.func.jvp, jacfwd or linearize is active inside another one."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def allows_tf32(input: torch.Tensor) -> bool:
    """Whether products of a call on a GPU may take TF32: torch's setting for its own RNNs decides."""
    return input.is_cuda and input.dtype == torch.float32 and _rnn_precision() == "tf32"


# A compiled call keeps the setting with which it was traced.
@assume_constant_result
def _rnn_precision() -> str:
    return str(torch.backends.cudnn.rnn.fp32_precision)  # type: ignore[attr-defined]


def always_takes_cpu_kernels() -> bool:
    """Whether every call on the CPU that has a kernel takes it: no other backend was chosen, no transform is active."""
    return (
        _current in ("auto", "cpu")
        and _library.build_info().loaded
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def chooses_reference(requested: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call runs :mod:`hsm_kernels.reference` by choice.

    Otherwise it runs the operators, which fall back to the reference where there is no kernel: not where the library
    has kernels for a GPU that cannot run them. Why the reference runs is said once per reason; that no library is
    loaded was said at import.
    """
    nested = nested_forward_mode()
    if requested is None and _current == "auto" and device.type in ("cpu", "meta") and not nested:
        return False
    chosen = plan(requested, device, dtype)
    if chosen.fallback and (device.type != "cpu" or nested) and chosen.reason not in _warned:
        _warned.add(chosen.reason)
        warnings.warn(f"hsm_kernels runs the plain PyTorch reference: {chosen.reason}", RuntimeWarning, stacklevel=5)
    kernels_cannot_run = nested or (device.type == "cuda" and _has_cuda_kernels())
    return chosen.backend == "reference" and (kernels_cannot_run or not chosen.fallback)
