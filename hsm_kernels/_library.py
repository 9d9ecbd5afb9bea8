"""Loads the native library: built ahead of time, or just in time, or none."""

import functools
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ._build import description

if TYPE_CHECKING:
    from ._build import cuda

_PACKAGE = Path(__file__).parent
_AHEAD_OF_TIME = _PACKAGE / "_C.abi3.so"
_JIT_MODES = ("auto", "0", "1", "force")


@dataclass(frozen=True)
class BuildInfo:
    """Which native library is loaded, and why others are not. See :func:`build_info`."""

    version: str  #: of hsm_kernels
    torch_version: str
    how: Literal["ahead of time", "just in time", "none"]  #: how the library was built
    library: Path | None  #: the loaded file
    compiler: str | None  #: what compiled it, with version and target
    flags: tuple[str, ...]  #: what it was compiled and linked with
    cuda_archs: tuple[str, ...]  #: the GPU architectures that its CUDA kernels are for; none: it has none
    cache_directory: Path | None  #: where the just-in-time library lies
    reasons: tuple[str, ...]  #: why something was not used, in the order in which it was tried

    @property
    def loaded(self) -> bool:
        """Whether a native library is loaded."""
        return self.library is not None

    def __str__(self) -> str:
        """One line per fact, for people and bug reports."""
        rows = {
            "hsm_kernels": self.version,
            "torch": self.torch_version,
            "native library": f"{self.library} (built {self.how})" if self.loaded else "none",
            "compiler": self.compiler,
            "flags": " ".join(self.flags),
            "CUDA kernels": ", ".join(f"sm_{arch}" for arch in self.cuda_archs) or ("none" if self.loaded else None),
            "cache": self.cache_directory,
        }
        lines = [f"{name + ':':<16}{value}" for name, value in rows.items() if value]
        return "\n".join(lines + [f"{'not used:':<16}{reason}" for reason in self.reasons])


def build_info() -> BuildInfo:
    """Say which native library is loaded, how it was built, and why what is missing is missing.

    >>> import hsm_kernels
    >>> info = hsm_kernels.build_info()
    >>> info.how in ("ahead of time", "just in time", "none")
    True
    >>> info.loaded == (info.library is not None)
    True

    ``print(info)`` shows everything.
    """
    return load()


@functools.cache
def load() -> BuildInfo:
    """Load the native library into torch, once. Without one, warn and say why.

    It tries the library that was installed, then one in the cache, then it compiles one. The
    variable ``HSM_KERNELS_JIT`` decides about the latter two: ``auto`` (default), ``0`` never,
    ``1`` raise instead of going on without a library, ``force`` compile now, whatever is there.
    ``HSM_KERNELS_BUILD=none`` loads nothing; ``cpu`` compiles no CUDA kernels, ``cuda`` nothing without them.

    Raises:
        RuntimeError: with ``HSM_KERNELS_JIT=1``, when no library could be loaded.
    """
    reasons: list[str] = []
    info = _try_all(os.environ, reasons)
    if not info.loaded:
        listed = " ".join(f"[{reason}]" for reason in reasons)
        message = f"hsm_kernels: no native library is loaded. {listed}"
        if _jit_mode(os.environ) == "1":
            raise RuntimeError(message)
        hint = "The slower reference runs instead. See hsm_kernels.build_info()."
        # 3: the line that imports hsm_kernels.
        warnings.warn(f"{message} {hint}", RuntimeWarning, stacklevel=3)
    return info


def _jit_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("HSM_KERNELS_JIT", "auto")
    return mode if mode in _JIT_MODES else "auto"


def _try_all(environ: Mapping[str, str], reasons: list[str]) -> BuildInfo:
    wanted = environ.get("HSM_KERNELS_JIT", "auto")
    if wanted not in _JIT_MODES:
        accepted = ", ".join(_JIT_MODES)
        reasons.append(f"HSM_KERNELS_JIT must be one of {accepted}; {wanted!r} is taken as auto")
    if environ.get("HSM_KERNELS_BUILD") == "none":
        reasons.append("HSM_KERNELS_BUILD=none is set; unset it to use the native library")
        return _info("none", None, {}, reasons)
    mode = _jit_mode(environ)
    if mode == "force":
        reasons.append("ahead of time: HSM_KERNELS_JIT=force compiles just in time")
    else:
        info = _ahead_of_time(reasons)
        if info:
            return info
    return _just_in_time(mode, environ, reasons) or _info("none", None, {}, reasons)


def _info(
    how: Literal["ahead of time", "just in time", "none"],
    library: Path | None,
    record: Mapping[str, Any],
    reasons: list[str],
) -> BuildInfo:
    return BuildInfo(
        version=description.VERSION,
        torch_version=torch.__version__,
        how=how,
        library=library,
        compiler=record.get("compiler"),
        flags=tuple(record.get("flags", ())),
        cuda_archs=tuple(record.get("cuda_archs", ())),
        cache_directory=library.parent.parent if library and how == "just in time" else None,
        reasons=(*reasons, *record.get("left_out", ())),
    )


def _description(cuda_archs: tuple[str, ...] = ()) -> description.Description:
    """The sources: inside an installed package, or beside the package in the repository."""
    repository = _PACKAGE.parent
    inside = (_PACKAGE / "csrc").is_dir() or not (repository / "pyproject.toml").is_file()
    root = (_PACKAGE if inside else repository) / "csrc"
    return description.describe(root, python_module=False, cuda_archs=cuda_archs)


def _load_into_torch(library: Path) -> None:
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]


def _ahead_of_time(reasons: list[str]) -> BuildInfo | None:
    if not _AHEAD_OF_TIME.is_file():
        reasons.append(f"ahead of time: {_AHEAD_OF_TIME} was not built")
        return None
    try:
        record = json.loads(_AHEAD_OF_TIME.with_suffix(".json").read_text())
        if record["digest"] != _description(tuple(record.get("cuda_archs", ()))).digest():
            reasons.append(f"ahead of time: {_AHEAD_OF_TIME} is stale; reinstall hsm_kernels")
            return None
        _load_into_torch(_AHEAD_OF_TIME)
    # Whatever is wrong with it, the library can be built again just in time.
    except Exception as error:
        reasons.append(f"ahead of time: {_AHEAD_OF_TIME} cannot be loaded: {error}")
        return None
    return _info("ahead of time", _AHEAD_OF_TIME, record, reasons)


def _just_in_time(mode: str, environ: Mapping[str, str], reasons: list[str]) -> BuildInfo | None:
    if mode == "0":
        reasons.append("just in time: HSM_KERNELS_JIT=0 switches it off")
        return None
    if sys.platform != "linux":
        reasons.append(f"just in time: the native library is for Linux, this is {sys.platform}")
        return None
    from ._build import cuda  # not needed where a library was built ahead

    torch_root = Path(torch.__file__).parent
    try:
        choice = cuda.choose(environ, torch_root, ahead=False)
        if choice.toolkit:
            try:
                return _compiled(mode, environ, reasons, torch_root, choice)
            # The kernels for the CPU are better than none.
            except Exception as error:
                if environ.get("HSM_KERNELS_BUILD") == "cuda":
                    raise
                choice = cuda.Choice(None, reason=str(error))
        reasons.append(f"CUDA kernels: {choice.reason}")
        return _compiled(mode, environ, reasons, torch_root, choice)
    # An import must not fail for the want of something faster.
    except Exception as error:
        reasons.append(f"just in time: {error}")
        return None


def _compiled(
    mode: str, environ: Mapping[str, str], reasons: list[str], torch_root: Path, choice: "cuda.Choice"
) -> BuildInfo:
    """The library from the cache or the compiler, loaded."""
    from ._build import jit

    request = jit.Request(
        _description(choice.archs),
        torch_root,
        torch.__version__,
        environ,
        choice.toolkit,
        rebuild=mode == "force",
        retry=mode in ("1", "force"),
        refused=reasons,
    )
    entry = jit.obtain(request)
    try:
        _load_into_torch(entry.library)
    except OSError:
        entry = jit.obtain(request, damaged=entry)
        _load_into_torch(entry.library)
    return _info("just in time", entry.library, entry.record, reasons)
