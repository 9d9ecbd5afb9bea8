"""Finds the native library in the cache, or compiles it into the cache, once for all processes."""

import atexit
import contextlib
import hashlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import cache, compilation, cuda, toolchain
from .description import Description


@dataclass(frozen=True)
class Request:
    """What is wanted, and from what it may be made."""

    description: Description
    torch_root: Path  #: the folder of the torch package
    torch_version: str
    environ: Mapping[str, str]
    toolkit: cuda.Toolkit | None = None  #: for a description with CUDA kernels
    #: Compile although a library is in the cache.
    rebuild: bool = False
    #: Compile although the compiler failed on the same sources before.
    retry: bool = False
    #: Filled with the reason of each cache directory that was passed over.
    refused: list[str] = field(default_factory=list)


def obtain(request: Request, damaged: cache.Entry | None = None) -> cache.Entry:
    """The library, from the cache or newly compiled; ``damaged`` is one that could not be loaded.

    Raises:
        toolchain.Unavailable: with the reason why there is none.
    """
    directories = _usable_directories(request)
    prefix = f"{os.uname().machine}-{request.description.digest()[:24]}-"
    try:
        compiler = toolchain.find_compiler(request.environ)
    except toolchain.Unavailable:
        # A library that was compiled when there was a compiler is as good as ever.
        kept = None if request.rebuild else _any_entry(directories, prefix)
        if kept is None or kept == damaged:
            raise
        return kept
    stamp = " ".join(tool.stamp() for tool in (compiler, request.toolkit) if tool)
    known = next(filter(None, (cache.read_compiler_version(d, stamp) for d in directories)), None)
    version = known or compilation.versions(compiler, request.toolkit)
    # Arguments in CXX count, paths do not.
    compiler_digest = hashlib.sha256(shlex.join([version, *compiler.command[1:]]).encode())
    key = prefix + compiler_digest.hexdigest()[:12]
    entry = None
    if not request.rebuild and damaged is None:
        entry = next(filter(None, (cache.read_entry(d, key) for d in directories)), None)
    if entry is None:
        entry = _build_once(request, damaged, compiler, version, key, directories)
    if known is None:
        cache.write_compiler_version(entry.library.parent.parent, stamp, version)
    return entry


def _usable_directories(request: Request) -> list[Path]:
    """The cache directories whose contents may be trusted, or that do not exist yet."""
    usable = []
    for directory in cache.candidate_directories(request.environ):
        reason = cache.refusal(directory) if os.path.exists(directory) else None
        if reason:
            request.refused.append(reason)
        else:
            usable.append(directory)
    return usable


def _any_entry(directories: list[Path], prefix: str) -> cache.Entry | None:
    entries = (cache.read_entry(d, key) for d in directories for key in cache.keys(d, prefix))
    return next(filter(None, entries), None)


def _writable_directory(request: Request, directories: list[Path]) -> Path:
    for directory in directories:
        reason = cache.prepare(directory)
        if reason is None:
            return directory
        request.refused.append(reason)
    private = tempfile.mkdtemp(prefix="hsm_kernels-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def _build_once(
    request: Request,
    damaged: cache.Entry | None,
    compiler: toolchain.Compiler,
    version: str,
    key: str,
    directories: list[Path],
) -> cache.Entry:
    """Compile, unless another process did while this one waited for the lock."""
    torch = toolchain.torch_files(request.torch_root)
    directory = _writable_directory(request, directories)
    with cache.locked(directory, key):
        cache.sweep(directory)
        entry = None if request.rebuild else cache.read_entry(directory, key)
        if entry is not None and entry != damaged:
            return entry
        _raise_remembered_failure(request, directory, key)
        record = {
            "digest": request.description.digest(),
            "compiler": f"{Path(compiler.command[0]).name} {version}",
            "cuda_archs": list(request.description.cuda_archs),
            "torch": request.torch_version,
            "built": time.time(),
        }
        try:
            return _build(request, compiler, torch, directory, key, record)
        except compilation.CompileError as error:
            log = cache.write_failure(directory, key, error.log, {**record, "error": str(error)})
            raise toolchain.Unavailable(f"the C++ compiler failed: {error} (log: {log})") from error


def _build(
    request: Request,
    compiler: toolchain.Compiler,
    torch: toolchain.TorchFiles,
    directory: Path,
    key: str,
    record: dict[str, Any],
) -> cache.Entry:
    start = time.monotonic()
    kernels = " with CUDA kernels" if request.toolkit else ""
    cache.say(f"hsm_kernels: compiling the native library{kernels}, once, into {directory} ... ")
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: cache.say(f"{time.monotonic() - start:.1f} s\n"))
        work = stack.enter_context(cache.build_folder(directory))
        result = work / "result"
        result.mkdir()
        built = compilation.build_library(
            request.description,
            compiler,
            torch,
            request.toolkit,
            work=work,
            output=cache.library_in(result),
            environ=request.environ,
        )
        seconds = round(time.monotonic() - start, 1)
        record |= {"flags": list(built.flags), "left_out": list(built.left_out), "seconds": seconds}
        entry = cache.publish(directory, key, result, record)
    cache.forget_failure(directory, key)
    return entry


def _raise_remembered_failure(request: Request, directory: Path, key: str) -> None:
    """Do not repeat a failing compilation at every import."""
    failure = None if request.retry else cache.read_failure(directory, key)
    # Another torch has other headers.
    if failure is not None and failure.get("torch") == request.torch_version:
        raise toolchain.Unavailable(
            f"the C++ compiler failed before: {failure['error']} (log: {failure['log']}); "
            "it is tried again after a day, or with HSM_KERNELS_JIT=force"
        )
