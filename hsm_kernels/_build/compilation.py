"""Runs the compilers: one process per source, several at a time, then one to link."""

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cuda, toolchain
from .description import OPTIONAL_KERNELS, Description

_ERROR_LINE = re.compile(r"\b[Ee]rror: |\bundefined reference\b|\bcannot find\b")


class CompileError(RuntimeError):
    """The compiler failed. The message is its first error line; ``log`` is all it printed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def build_library(
    description: Description,
    compiler: toolchain.Compiler,
    torch: toolchain.TorchFiles,
    toolkit: cuda.Toolkit | None = None,
    *,
    work: Path,
    output: Path,
    environ: Mapping[str, str],
) -> Description:
    """Compile and link ``description`` into the file ``output``; object files go to ``work``.

    ``toolkit`` is needed where the description has CUDA kernels. Returns what was built: kernels that the compiler does
    not know are left out.
    """
    if not description.sources:
        raise toolchain.Unavailable(f"there are no C++ sources in {description.root}")
    description = _without_unknown_kernels(description, compiler, work, environ)
    # -isystem: the warnings of torch's headers are not ours.
    includes = ["-I", str(description.root), "-isystem", str(torch.include)]
    if description.needs_python_headers:
        includes += ["-isystem", str(toolchain.python_include())]
    # cpu/lstm.cpp and binding/lstm.cpp must not share an object file.
    objects = {name: str(work / f"{name.replace('/', '-')}.o") for name in description.sources}
    compile_commands = {".cpp": [*compiler.command, *description.compile_flags, *includes]}
    search_paths = [f"-L{torch.lib}"]
    if description.cuda_archs:
        assert toolkit is not None
        compile_commands[".cu"] = [*toolkit.command(compiler), *description.cuda_compile_flags, *includes[:2]]
        search_paths.append(f"-L{toolkit.lib}")
    commands = [
        [*compile_commands[Path(source).suffix], "-c", str(description.root / source), "-o", target]
        for source, target in objects.items()
    ]
    with ThreadPoolExecutor(toolchain.job_limit(environ)) as pool:
        logs = list(pool.map(lambda command: _run(command, environ), commands))
    _raise_first_error(logs)
    link_command = [*compiler.command, *description.link_flags, *objects.values(), *search_paths]
    libraries = [f"-l{name}" for name in description.libraries]
    _raise_first_error([_run([*link_command, *libraries, "-o", str(output)], environ)])
    return description


def _without_unknown_kernels(
    description: Description, compiler: toolchain.Compiler, work: Path, environ: Mapping[str, str]
) -> Description:
    for kernels in OPTIONAL_KERNELS:
        if kernels.source not in description.sources:
            continue
        probe = work / f"probe-{kernels.name}.cpp"
        probe.write_text(kernels.probe)
        try:
            _raise_first_error([_run([*compiler.command, "-c", str(probe), "-o", f"{probe}.o"], environ)])
        except CompileError as error:
            reason = f"{kernels.name}: left out, as the C++ compiler does not know its instructions: {error}"
            description = dataclasses.replace(
                description,
                compile_flags=(*description.compile_flags, kernels.without),
                left_out=(*description.left_out, reason),
            )
    return description


def versions(compiler: toolchain.Compiler, toolkit: cuda.Toolkit | None) -> str:
    """The versions of both, without the C++ compiler's name. Starts them."""
    return f"{compiler.version()}, nvcc {toolkit.version()}" if toolkit else compiler.version()


def _run(command: list[str], environ: Mapping[str, str]) -> tuple[int, str]:
    """The exit status of ``command``, and what it printed below the command itself."""
    # The C locale: an error line is recognised by the English word.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**environ, "LC_ALL": "C"},
    )
    return done.returncode, f"$ {shlex.join(command)}\n{done.stdout}"


def _raise_first_error(logs: list[tuple[int, str]]) -> None:
    for status, log in logs:
        if status:
            lines = [line for line in log.splitlines()[1:] if line.strip()]
            errors = [line for line in lines if _ERROR_LINE.search(line)]
            first = (errors or lines or [f"the compiler ended with status {status}"])[0]
            raise CompileError(first.strip(), "\n".join(text for _, text in logs))
